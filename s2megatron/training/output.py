"""The run file's `output:` section as Megatron options: save, resume, keep, stop on a signal.

FOLDER/checkpoints/   torch_dist, saved in the background; resumed from when it holds one
FOLDER/tensorboard/   losses, tokens/s, true FLOPs
FOLDER/run.lock       who is writing here (run_lock.py)
"""

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training.checkpoint_folder import damage, iteration_dir, iterations, resume_point

FIRST_START_ONLY = (
    "finetune",
    "no_load_optim",
    "no_load_rng",
    "ckpt_step",
    "pretrained_checkpoint",
    "override_ckpt_iteration",
)
"""Options that say how a run begins from somebody else's weights; a resumed one leaves them out."""


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it does at start."""

    folder: Path
    checkpoints: Path
    options: dict
    """Megatron's, the run file's own included."""
    notes: list[str] = field(default_factory=list)
    """For the log: what is resumed, what was passed over."""


def resolve(output: OutputConfig, chosen: dict) -> Output | None:
    """Megatron options for this output folder; None where there is none.

    Args:
        chosen: the run file's `megatron:` section; its own options win.

    Raises:
        ConfigError: options that do not go with an output folder, or no complete checkpoint where
            there should be one.
    """
    if output.folder is None:
        return None
    for name in ("save", "non_persistent_save_interval"):
        if chosen.get(name):
            raise ConfigError(
                f"megatron.{name}: {chosen[name]!r} beside output.folder, which decides where "
                "checkpoints go: leave one of them out"
            )
    if chosen.get("ckpt_format", "torch_dist") != "torch_dist":
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
    } | chosen
    if options["async_save"]:
        # Megatron 0.19 drops async_save without the worker, whose default comes from a package.
        options.setdefault("use_persistent_ckpt_worker", True)
        nvrx = importlib.util.find_spec("nvidia_resiliency_ext") is not None
        options.setdefault("async_strategy", "nvrx" if nvrx else "mcore")
    iteration, notes = resume_point(checkpoints)
    if iteration is None:
        return Output(folder, checkpoints, options, notes)
    passed_over = bool(notes)
    notes.append(f"resuming from {iteration_dir(checkpoints, iteration)}")
    dropped = [name for name in FIRST_START_ONLY if options.get(name) not in (None, False)]
    if options.get("load"):
        dropped.append("load")
    if dropped:
        names = ", ".join(f"megatron.{name}" for name in dropped)
        notes.append(f"{names}: only for the first start, left out now")
    options = {name: value for name, value in options.items() if name not in FIRST_START_ONLY}
    options["load"] = str(checkpoints)
    if passed_over:  # the tracker names another
        options["ckpt_step"] = iteration
    return Output(folder, checkpoints, options, notes)


def check_undamaged(output: Output) -> None:
    """Reads the sizes of all files of the checkpoint to resume from; for one rank.

    Raises:
        ConfigError: one is too short; names the checkpoint before it.
    """
    iteration = output.options.get("ckpt_step") or resume_point(output.checkpoints)[0]
    if iteration is None:
        return
    found = damage(iteration_dir(output.checkpoints, iteration))
    if not found:
        return
    sound = [
        number
        for number in iterations(output.checkpoints)
        if number < iteration and not damage(iteration_dir(output.checkpoints, number))
    ]
    way_out = (
        f"to go back to the one before it: echo {sound[-1]} > "
        f"{output.checkpoints}/latest_checkpointed_iteration.txt"
        if sound
        else "no earlier one is complete"
    )
    raise ConfigError(
        f"output.folder: {iteration_dir(output.checkpoints, iteration)} is damaged: {found}; "
        f"{way_out}"
    )


def save_failed(folder: str, error: BaseException) -> str:
    """What to tell a user whose checkpoint could not be written.

    Megatron's background writer passes on an error's type and not its text: the free space tells a
    full disk from other troubles.
    """
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    free = shutil.disk_usage(folder).free
    full = "the disk is full" if free < 2**20 else f"{free / 2**30:.1f} GiB are free there"
    return (
        f"a checkpoint or log could not be written to {folder} ({full}): {last}. The last complete "
        "checkpoint stays as it is; make room (output.keep says how many are kept) and start again"
    )
