"""A prepared run, handed to Megatron's `pretrain()`."""

import gc
import json
from collections.abc import Sequence
from functools import partial

import torch
from torch.distributed.checkpoint.api import CheckpointException

from s2megatron.errors import ConfigError
from s2megatron.training import output
from s2megatron.training.checkpoint_choice import Ranks, choose_checkpoint
from s2megatron.training.checkpoint_content import checksums_at_the_end_of_a_save
from s2megatron.training.checkpoint_errors import explain
from s2megatron.training.checkpoint_folder import CheckpointPruner
from s2megatron.training.load_fixes import (
    gone_on_from,
    name_damaged_files,
    save_what_was_loaded_never_again,
)
from s2megatron.training.prepare import (
    Prepared,
    check_start,
    megatrons_refusals,
    prepare,
    summary,
)
from s2megatron.training.run_lock import RunLock
from s2megatron.training.throughput import ThroughputMeter, peak_tflops
from s2megatron.training.writer_watch import WriterWatch, end_rank

RESULT_FAILED = {
    16: "an iteration's result was not a number, or not the same again (said above). Its "
    "checkpoint is kept, and the next start repeats the iteration on other hardware, to tell which "
    "of the two it was; on the same GPU it only stops again. megatron.rerun_mode=disabled goes on "
    "without that question",
    17: "an iteration's result was wrong, and Megatron says above what it makes of it. Nothing was "
    "saved; the last checkpoint stays as it is",
}
"""What Megatron's exit statuses 16 and 17 mean (core/rerun_state_machine.py)."""


def _take_output(ready: Prepared) -> tuple[RunLock, CheckpointPruner]:
    """Locks the output folder and checks what is in it; for one rank. Raises ConfigError."""
    place = ready.output
    lock = RunLock(place.folder)
    try:
        aside = output.make_ready(place)
    except ConfigError:
        lock.release()
        raise
    for note in [lock.note, *place.notes, *aside]:
        if note:
            print(f"s2megatron: {note}", flush=True)
    args = ready.args
    pruner = CheckpointPruner(
        place.checkpoints, ready.run.output.keep, args.save_interval, args.save_retain_interval
    )
    return lock, pruner


def _summarize() -> None:
    """One line for programs, at the end of a run: peak memory per rank (0 on a CPU)."""
    if not torch.distributed.is_initialized():
        return
    peaks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(peaks, torch.cuda.max_memory_allocated() / 2**30)
    if torch.distributed.get_rank() == 0:
        peaks = [round(peak, 3) for peak in peaks]
        print(f"s2megatron summary {json.dumps({'peak_gib': peaks})}", flush=True)


def _meter(ready: Prepared) -> ThroughputMeter:
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
    from megatron.training import get_tensorboard_writer, is_last_rank

    def report(iteration: int, text: str, scalars: dict[str, float]) -> None:
        if is_last_rank():
            print(text, flush=True)
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
            if iteration == args.train_iters:
                writer.flush()  # Megatron has done so before

    args, peak = ready.args, None
    if ready.backends.cuda:
        torch.cuda.set_device(args.local_rank)  # or the question would wake GPU 0
        peak = peak_tflops(torch.cuda.get_device_name())
    return ThroughputMeter(
        ready.shape,
        ready.patterns,
        sequences=get_current_running_global_batch_size,  # step_batch_size_schedule changes it
        gpus=args.world_size,
        log_interval=args.log_interval,
        peak=peak,
        save_interval=args.save_interval if args.save else None,
        report=report,
        all_data=_over_data_parallel_ranks,
    )


def _watch_writer(lock: RunLock | None, rank: int) -> WriterWatch:
    def end(reason: str) -> None:
        if lock:
            lock.release()  # nothing of this process runs after it
        end_rank(reason)

    def tell(line: str) -> None:
        if rank == 0:  # all ranks have the same packages
            print(line, flush=True)

    return WriterWatch(end, tell=tell)


def train(config: str, overrides: Sequence[str]) -> None:
    """Trains under torchrun. Raises ConfigError before any GPU memory is taken."""
    ranks = Ranks.of_launch()
    ready = prepare(config, overrides, choose=partial(choose_checkpoint, ranks=ranks))
    notes = check_start(ready)
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    from s2megatron.training.gpt_loop import datasets_provider, make_forward_step

    with megatrons_refusals():  # asked again when the model is built
        get_megatron_optimizer_config(ready.args)
        get_megatron_ddp_config(ready.args)
    name_damaged_files()
    checksums_at_the_end_of_a_save()
    place = ready.output
    save_what_was_loaded_never_again(place.iteration if place else gone_on_from(ready.args))
    args = ready.args
    lock, pruner = None, None
    if args.rank == 0:
        print("\n".join(summary(ready, notes)), flush=True)
        if ready.output:
            lock, pruner = _take_output(ready)
    meter = _meter(ready)
    watch = _watch_writer(lock, args.rank) if args.async_save else None
    gc.freeze()  # what was imported stays: no collection needs to look at it
    gc.enable()
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, ready.model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            make_forward_step(meter, pruner.after if pruner else None),
        )
        if not (args.save or args.do_valid or args.do_test):  # the last iteration has just ended
            meter.training(args.train_iters)
    except SystemExit as stop:
        # Megatron's way out after a signal, a duration or exit_interval has a code; without one it
        # leaves because of what it has just printed, and the other ranks would wait for this one.
        if stop.code is None:
            raise RuntimeError("Megatron gave up; its reason is the last that it printed") from stop
        if stop.code:
            if args.rank == 0 and (why := RESULT_FAILED.get(stop.code)):
                print(f"s2megatron: {why}", flush=True)
            raise
    except (CheckpointException, Exception) as error:  # the former is a BaseException
        if not (told := explain(error, load=args.load, step=args.ckpt_step, save=args.save)):
            raise
        raise RuntimeError(told) from error
    finally:
        if watch:
            watch.close()
        if lock:
            lock.release()
    # Only after success: with a peer gone this can wait for ever.
    if pruner:
        pruner.close()
    _summarize()
    if torch.distributed.is_initialized():
        end_communication(args.cuda_graph_impl)


def end_communication(cuda_graph_impl: str) -> None:
    """Destroys the process groups, but where CUDA graphs may hold their collectives.

    A communicator counts the graphs that captured a collective of it, and its destruction waits for
    the last one to go (pytorch/pytorch#115388). Megatron keeps them: the last iteration would be
    saved, and the job would hang. `cluster.ending.leave` ends the process without that wait; here
    the ranks wait for each other, so that none is gone while another one still sends.

    Args:
        cuda_graph_impl: Megatron's option; "none" captures nothing.
    """
    if cuda_graph_impl == "none":
        torch.distributed.destroy_process_group()
    else:
        torch.distributed.barrier()


def _over_data_parallel_ranks(number: float) -> float:
    """Its sum over the data-parallel ranks, which call this at the same point of a step."""
    from megatron.core import mpu

    total = torch.tensor(number, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    return total.item()
