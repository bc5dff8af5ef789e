"""The run file's `output:` section as Megatron options: save, resume, keep, stop on a signal.

FOLDER/checkpoints/   torch_dist, saved in the background; resumed from when it holds one
FOLDER/tensorboard/   losses, tokens/s, true FLOPs
FOLDER/run.lock       who is writing here (run_lock.py)
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training.checkpoint_folder import (
    iteration_dir,
    resume_point,
    set_aside_newer,
    tracked,
    write_tracker,
)

FIRST_START_ONLY = (
    "finetune",
    "no_load_optim",
    "no_load_rng",
    "ckpt_step",
    "pretrained_checkpoint",
    "override_ckpt_iteration",
)
"""Options that say how a run begins from somebody else's weights; a resumed one leaves them out."""


LEAST_FREE = 2**20
"""Bytes: a disk with less is full, and a start on it would end at the first line it writes."""


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it does at start."""

    folder: Path
    checkpoints: Path
    options: dict
    """Megatron's, the run file's own included."""
    iteration: int | None
    """What is resumed from; None for a first start."""
    notes: list[str] = field(default_factory=list)
    """For the log: what is resumed, what was passed over."""


Choice = Callable[[Path, bool], tuple[int | None, list[str]]]
"""From the folder of checkpoints, and whether to read all of a checkpoint: the iteration, notes."""


def by_name(checkpoints: Path, verify: bool) -> tuple[int | None, list[str]]:
    """A choice that looks into no file, for a run that does not start."""
    return resume_point(checkpoints)


def resolve(output: OutputConfig, chosen: dict, choose: Choice = by_name) -> Output | None:
    """Megatron options for this output folder; None where there is none.

    Args:
        chosen: the run file's `megatron:` section; its own options win.
        choose: which checkpoint to resume from.

    Raises:
        ConfigError: options that do not go with an output folder, or no complete and undamaged
            checkpoint where there should be one.
    """
    if output.folder is None:
        for name in sorted(output.model_fields_set - {"folder"}):
            raise ConfigError(
                f"output.{name}: {getattr(output, name)!r} without output.folder, whose "
                "checkpoints it is about: name it (in place of megatron.save), or leave this out"
            )
        return None
    for name in ("save", "non_persistent_save_interval"):
        if chosen.get(name):
            raise ConfigError(
                f"megatron.{name}: {chosen[name]!r} beside output.folder, which decides where "
                "checkpoints go: leave one of them out"
            )
    if chosen.get("ckpt_format") not in (None, "torch_dist"):
        raise ConfigError(
            f"megatron.ckpt_format: {chosen['ckpt_format']!r} beside output.folder: only "
            "'torch_dist' is saved in the background and resumed at any layout; leave it out"
        )
    folder = Path(output.folder)
    checkpoints = folder / "checkpoints"
    options = {
        "save": str(checkpoints),
        "save_interval": 1000,
        "tensorboard_dir": str(folder / "tensorboard"),
        "ckpt_format": "torch_dist",
        # On SIGTERM any rank asks all ranks to save after this iteration and to leave.
        "exit_signal_handler": True,
        "async_save": True,
    } | {name: value for name, value in chosen.items() if (name, value) != ("ckpt_format", None)}
    if options["async_save"]:
        options.setdefault("use_persistent_ckpt_worker", True)  # Megatron drops async_save without
    iteration, notes = choose(checkpoints, output.verify)
    if iteration is None:
        return Output(folder, checkpoints, options, None, notes)
    notes.append(f"resuming from {iteration_dir(checkpoints, iteration)}")
    dropped = [name for name in FIRST_START_ONLY if options.get(name) not in (None, False)]
    if options.get("load"):
        dropped.append("load")
    if dropped:
        names = ", ".join(f"megatron.{name}" for name in dropped)
        notes.append(f"{names}: only for the first start, left out now")
    options = {name: value for name, value in options.items() if name not in FIRST_START_ONLY}
    # All ranks agree on it; the tracker names it only later (make_ready): the step is given.
    options |= {"load": str(checkpoints), "ckpt_step": iteration}
    return Output(folder, checkpoints, options, iteration, notes)


def make_ready(output: Output) -> list[str]:
    """Makes Megatron find the checkpoint to resume from; for one rank, under the lock.

    A tracker that does not name it is written anew, and complete checkpoints that are newer, the
    damaged ones among them, are set aside.

    Returns:
        What was set aside, for the log.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    iteration, folder = output.iteration, output.checkpoints
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"output.folder: {folder} cannot be written: {error.strerror}") from None
    if free < LEAST_FREE:
        raise ConfigError(
            f"output.folder: the disk of {folder} is full ({free} bytes are free): make room "
            "(output.keep says how many checkpoints are kept), or name another folder"
        )
    if iteration is None:
        return []
    if tracked(folder) != iteration:
        write_tracker(folder, iteration)
    return set_aside_newer(folder, iteration)
