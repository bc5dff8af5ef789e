"""From a run file to Megatron's `pretrain()`: parse, check, build, hand over."""

import contextlib
import errno
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.api import CheckpointException

from s2_kernels import LayerPattern
from s2megatron import data_options, output
from s2megatron.backends import Backends, default_options, find_backends
from s2megatron.checkpoint.folder import Keeper
from s2megatron.config import RunConfig, load_config
from s2megatron.errors import ConfigError
from s2megatron.layer_table import layer_table
from s2megatron.planning import ModelShape
from s2megatron.run_lock import RunLock


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check that needs no process group and no GPU memory."""

    run: RunConfig
    backends: Backends
    args: object
    """Megatron's arguments, validated."""
    model_config: object
    """Megatron's GPTModelConfig, with our layer spec and model check."""
    patterns: tuple[LayerPattern, ...]
    shape: ModelShape
    output: output.Output | None
    """Its folder, where the run file names one."""


def prepare(config: str, overrides: Sequence[str], *, writers: bool = True) -> Prepared:
    """Everything up to the start of the process group.

    Args:
        writers: let Megatron open its TensorBoard and wandb writers.

    Raises:
        ConfigError: what is wrong, where, and the way out.
    """
    run = load_config(config, overrides)
    backends = find_backends()
    if not backends.cuda:
        from s2megatron import cpu_runtime

        cpu_runtime.install()
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    from s2megatron.checkpoint.record import check_resume, record
    from s2megatron.layer_spec import build_layer_spec
    from s2megatron.megatron_fixes import keep_rope_scaling_factor, skip_missing_makefile
    from s2megatron.megatron_options import to_argv
    from s2megatron.model_checks import add_model_check, check_model_options, check_run_options

    skip_missing_makefile()
    options = default_options(backends, run.megatron)
    options = data_options.resolve(run.data, options)
    place = output.resolve(run.output, options)
    options = place.options if place else options
    if not writers:
        options |= {"tensorboard_dir": None, "wandb_project": None}
    # Megatron's parser reads the command line: from here on it is the run file's.
    argv, parsed = to_argv(options)
    check_run_options(parsed)
    sys.argv = [sys.argv[0], *argv]
    try:
        args = parse_and_validate_args()
    except (AssertionError, TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"Megatron refuses these options: {str(error) or where.line}\n"
            f"({where.filename}:{where.lineno})"
        ) from error
    model_config = gpt_config_from_args(args)
    transformer = model_config.transformer
    patterns = run.sparsity.resolve(
        num_layers=transformer.num_layers,
        heads=transformer.num_attention_heads,
        kv_heads=transformer.num_query_groups,
    )
    check_model_options(transformer, patterns, on_gpu=backends.cuda)
    check_resume(args, patterns, run.sparsity.on_resume)
    args.s2_sparsity = record(patterns)

    def layer_spec(config, vp_stage: int | None = None):
        keep = run.sparsity.keep_attention_output
        return build_layer_spec(config, patterns, vp_stage, keep_attention_output=keep)

    model_config.transformer_layer_spec = layer_spec
    keep_rope_scaling_factor(model_config, args)
    add_model_check(model_config, patterns, seq_len=args.seq_length)
    shape = ModelShape.from_megatron(transformer, args)
    return Prepared(run, backends, args, model_config, patterns, shape, place)


def prepare_without_launch(config: str, overrides: Sequence[str]) -> Prepared:
    """`prepare` outside torchrun, for the fewest ranks that the run file's layout needs.

    Where WORLD_SIZE is set, that many. It is not left behind: what comes next in this process may
    be another run.
    """
    if "WORLD_SIZE" in os.environ:
        return prepare(config, overrides, writers=False)
    os.environ["WORLD_SIZE"] = str(ranks_named_by(load_config(config, overrides)))
    try:
        return prepare(config, overrides, writers=False)
    finally:
        del os.environ["WORLD_SIZE"]


def dry_run(config: str, overrides: Sequence[str]) -> str:
    """The layer table, parameter count and true FLOPs per step of a run, without starting it."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron's 900 lines of arguments
        ready = prepare_without_launch(config, overrides)
    return "\n".join(_summary(ready, [layer_table(ready.patterns, ready.args.seq_length)]))


def ranks_named_by(run: RunConfig) -> int:
    """The fewest ranks that the run file's layout needs."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = 1
    for name in sizes:
        size = run.megatron.get(name) or 1
        ranks *= size if isinstance(size, int) and size > 0 else 1
    return ranks


def _summary(ready: Prepared, lines: list[str]) -> list[str]:
    args, shape = ready.args, ready.shape
    sparse = shape.flops_per_sequence(ready.patterns) * args.global_batch_size
    attention = shape.attention_flops(ready.patterns) * args.global_batch_size
    dense = shape.dense_attention_flops() * args.global_batch_size
    stages = args.virtual_pipeline_model_parallel_size
    experts = args.expert_model_parallel_size
    layout = (
        f"TP {args.tensor_model_parallel_size}"
        f"{' + SP' if args.sequence_parallel else ''}, PP {args.pipeline_model_parallel_size}"
        f"{f' x {stages} virtual stages' if stages else ''}, DP {args.data_parallel_size}"
        f"{f', EP {experts}' if experts > 1 else ''}"
    )
    packed = args.dataloader_inter_document_masking
    assumed = "; if every sequence were one document: the log counts documents" if packed else ""
    return [
        *ready.backends.lines(args),
        f"{'layout':<16} {layout}: {args.world_size} rank(s)",
        f"{'parameters':<16} {shape.parameters():,}",
        f"{'batch':<16} {args.global_batch_size} sequences of {args.seq_length} tokens",
        f"{'FLOPs per step':<16} {sparse:.4e} true model FLOPs, {attention / sparse:.1%} of them "
        f"attention; with dense attention {sparse - attention + dense:.4e}{assumed}",
        *lines,
    ]


def _take_output(ready: Prepared) -> tuple[RunLock, Keeper]:
    """Locks the output folder and checks what is in it; for one rank. Raises ConfigError."""
    place = ready.output
    lock = RunLock(place.folder)
    place.checkpoints.mkdir(exist_ok=True)
    output.check_undamaged(place)
    for note in [lock.note, *place.notes]:
        if note:
            print(f"s2megatron: {note}", flush=True)
    keeper = Keeper(place.checkpoints, ready.run.output.keep, ready.args.save_interval)
    return lock, keeper


def _summarize() -> None:
    """One line for programs, at the end of a run: peak memory per rank (0 on a CPU)."""
    if not torch.distributed.is_initialized():
        return
    peaks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(peaks, torch.cuda.max_memory_allocated() / 2**30)
    if torch.distributed.get_rank() == 0:
        peaks = [round(peak, 3) for peak in peaks]
        print(f"s2megatron summary {json.dumps({'peak_gib': peaks})}", flush=True)


def train(config: str, overrides: Sequence[str]) -> None:
    """Trains under torchrun. Raises ConfigError before any GPU memory is taken."""
    ready = prepare(config, overrides)
    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, is_last_rank, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from s2megatron.gpt_loop import datasets_provider, make_forward_step
    from s2megatron.throughput import ThroughputMeter, peak_tflops

    args = ready.args
    lock, keeper = None, None
    if args.rank == 0:
        print("\n".join(_summary(ready, [])), flush=True)
        if ready.output:
            lock, keeper = _take_output(ready)

    def report(iteration: int, text: str, scalars: dict[str, float]) -> None:
        if is_last_rank():
            print(text, flush=True)
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)

    peak = None
    if ready.backends.cuda:
        torch.cuda.set_device(args.local_rank)  # or the question would wake GPU 0
        peak = peak_tflops(torch.cuda.get_device_name())
    meter = ThroughputMeter(
        ready.shape,
        ready.patterns,
        sequences=args.global_batch_size,
        gpus=args.world_size,
        log_interval=args.log_interval,
        peak=peak,
        save_interval=args.save_interval if args.save else None,
        report=report,
        all_data=_over_data_parallel_ranks,
    )
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, ready.model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            make_forward_step(meter, keeper.after if keeper else None),
        )
    except SystemExit as stop:  # Megatron's way out after a signal, a duration, exit_interval
        if stop.code:
            raise
    except CheckpointException as error:  # a BaseException, which error reports pass over
        raise RuntimeError(output.save_failed(args.save, error)) from error
    except OSError as error:  # a full disk may meet TensorBoard's writer first
        if error.errno != errno.ENOSPC or not args.save:
            raise
        raise RuntimeError(output.save_failed(args.save, error)) from error
    finally:
        if lock:
            lock.release()
    # Only after success: with a peer gone this can wait for ever.
    if keeper:
        keeper.close()
    _summarize()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _over_data_parallel_ranks(number: float) -> float:
    """Its sum over the data-parallel ranks, which call this at the same point of a step."""
    from megatron.core import mpu

    total = torch.tensor(number, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    return total.item()
