"""Runs that stop and go on at another layout.

Forked processes have one run each. Under torchrun, where an import of Megatron costs more than a
run, processes have many: between two of them Megatron forgets its globals, and the process group is
made anew, of both ranks or of one.
"""

import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
from in_process import forget_megatron

from s2megatron.cluster import environment
from s2megatron.training import cpu_runtime
from s2megatron.training.checkpoint_folder import TRACKER


def run_all(plan: str) -> dict:
    """On each rank: the runs of a plan file, one after the other.

    Returns:
        By run: the error that it ended with on this rank, or "". The first one ends them all.
    """
    environment.apply()
    if not torch.cuda.is_available():
        cpu_runtime.prepare_environment()
        cpu_runtime.install()
    rank, errors = int(os.environ["RANK"]), {}
    runs = [run for run in json.loads(Path(plan).read_text()) if rank < run["ranks"]]
    for run in runs:
        if errors:
            forget_run()
        if run["stopped"]:
            go_on_from(Path(run["stopped"]), Path(run["folder"]), run["stop"], rank)
        error = errors[run["name"]] = one_run(run, rank)
        if error:
            break
        tell_end(run, rank)
    return errors


def one_run(run: dict, rank: int) -> str:
    """One run of the launcher as this rank; the error that ended it, or ""."""
    from s2megatron.training.train import train

    os.environ |= {
        "WORLD_SIZE": str(run["ranks"]),
        "LOCAL_WORLD_SIZE": str(run["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(run["port"]),
    }
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    adam = fused_adam_in_place() if run["fused_adam"] else contextlib.nullcontext()
    with adam, output_into(Path(f"{run['folder']}.log.{rank}")):
        try:
            train(run["config"], run["overrides"])
        except Exception:
            return traceback.format_exc()
    return ""


def tell_end(run: dict, rank: int) -> None:
    """FOLDER.ended appears once the losses of this run can be read; others may come after it."""
    from megatron.training import get_tensorboard_writer

    if rank == run["ranks"] - 1:  # which has the writer
        get_tensorboard_writer().flush()
        Path(f"{run['folder']}.ended").touch()


@contextlib.contextmanager
def output_into(log: Path):
    """Sends this process's stdout there. Loggers hold the stream, which is why it stays open."""
    sys.stdout.flush()
    before = os.dup(1)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


def forget_run() -> None:
    """Everything that Megatron keeps of a run in globals; the next one may have another layout."""
    from megatron.core import parallel_state, rerun_state_machine

    forget_megatron()
    parallel_state.destroy_model_parallel()
    rerun_state_machine.destroy_rerun_state_machine()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()  # models and optimizers in circles hold process groups, each with its threads


def go_on_from(run: Path, folder: Path, iteration: int, rank: int) -> None:
    """Makes `folder` what `run` would be if it had been stopped after this iteration."""
    tracker = folder / "checkpoints" / TRACKER
    if rank == 0:
        name = f"iter_{iteration:07d}"
        shutil.copytree(run / "checkpoints" / name, folder / "checkpoints" / name)
        tracker.write_text(str(iteration))
    deadline = time.monotonic() + 60
    while not tracker.exists():
        assert time.monotonic() < deadline, f"{tracker} does not come"
        time.sleep(0.01)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with its state where Apex's and Transformer Engine's have it: a step per group."""

    def __init__(self, params, lr, weight_decay, betas, eps, capturable, adam_w_mode):
        assert adam_w_mode and not capturable
        defaults = dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self._update(param, group)

    def _update(self, param, group) -> None:
        if not self.state[param]:
            self.state[param] = {
                name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")
            }
        state, (beta1, beta2) = self.state[param], group["betas"]
        state["exp_avg"].lerp_(param.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** group["step"])
        root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt()
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(mean / (root + group["eps"]), alpha=-group["lr"])


@contextlib.contextmanager
def fused_adam_in_place():
    """Megatron takes the class above as it takes Apex's where that is installed."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True),
    ):
        yield
