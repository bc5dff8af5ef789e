"""What a run resumes from: the checkpoint's sparsity and options, against the configured ones.

An S2 model has exactly a dense model's weights, so a checkpoint would load under any sparsity and
silently train another model. The resolved patterns travel in the checkpoint's own `args` (as
`s2_sparsity`), which Megatron saves in the common state of every format.
"""

import pickle
import re
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from s2_kernels import LayerPattern
from s2_kernels.record import describe_difference, read_record
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.layer_table import first_block_dropped
from s2megatron.training.changed_options import compare, refusal
from s2megatron.training.checkpoint_folder import TRACKER, way_back
from s2megatron.training.load_fixes import settle_schedule
from s2megatron.training.resume_layout import check_layout, told_of_buckets


def latest_iteration_dir(load: str | Path, step: int | None = None) -> Path | None:
    """The checkpoint folder that Megatron would load from `load`, or None if there is none."""
    load = Path(load)
    if step is None:
        tracker = load / TRACKER
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if text == "release":
            return load / "release"
        if not text.isdigit():
            raise ConfigError(f"{tracker}: {text!r} is not an iteration; the checkpoint is damaged")
        step = int(text)
    return load / f"iter_{step:07d}"


def check_load(args) -> list[str]:
    """A checkpoint that is asked for is there: Megatron would start from random weights.

    Args:
        args: Megatron's arguments of a run that is to start.

    Returns:
        A line for the log where there may be none yet.

    Raises:
        ConfigError: nothing to load, and not for a first start in the folder that is saved to.
    """
    if args.non_persistent_ckpt_type or (args.ckpt_step is not None and args.load):
        return []  # those have folders of their own; what is at that step is looked at on its own
    if args.load and latest_iteration_dir(args.load):
        return []
    if args.pretrained_checkpoint:
        if latest_iteration_dir(args.pretrained_checkpoint):
            return []
        raise ConfigError(_no_checkpoint("pretrained_checkpoint", args.pretrained_checkpoint))
    if args.load and args.save and Path(args.load).resolve() == Path(args.save).resolve():
        return [f"{args.load} holds no checkpoint yet: this run begins with random weights"]
    if args.load:
        raise ConfigError(_no_checkpoint("load", args.load))
    for name in ("finetune", "ckpt_step"):
        if getattr(args, name):
            raise ConfigError(
                f"megatron.{name}: {getattr(args, name)} and nothing to load, so that the run "
                "would begin with random weights: name megatron.load, or leave it out"
            )
    return []


def _no_checkpoint(option: str, folder: str) -> str:
    """What is wrong with a folder that has no tracker, and which one may be meant."""
    path, meant = Path(folder), ""
    if number := re.fullmatch(r"iter_0*(\d+)", path.name):
        meant = f"; name the folder it lies in: {path.parent}, and megatron.ckpt_step={number[1]}"
    elif (path / "checkpoints" / TRACKER).is_file():
        meant = f"; do you mean {path / 'checkpoints'}?"
    elif not path.is_dir():
        meant = "; there is no such folder"
    return (
        f"megatron.{option}: {folder} holds no checkpoint (no {TRACKER} in it), so that the run "
        f"would begin with random weights{meant}"
    )


def load_common(folder: Path) -> dict:
    """A torch_dist checkpoint's common state. Raises ConfigError when it cannot be read."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException

    unreadable = (CheckpointException, CheckpointingException, OSError, EOFError, KeyError)
    try:
        return load_common_state_dict(str(folder))
    except (*unreadable, RuntimeError, pickle.UnpicklingError) as error:
        if any(folder.glob("mp_rank_*")):
            raise ConfigError(
                f"checkpoint {folder}: is in Megatron's older format 'torch', which is not read "
                "here; load it once in Megatron's own script without --spec, with "
                "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER"
            ) from None
        reason = (str(error).strip().splitlines() or [""])[-1]
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        back = f"; {way_back(folder.parent, int(number[1]))}" if number else ""
        raise ConfigError(
            f"checkpoint {folder}: cannot be read ({type(error).__name__}: {reason}): it is "
            f"incomplete, damaged, or not in torch_dist format{back}"
        ) from None


def check_resume(args, patterns: tuple[LayerPattern, ...], on_resume: str) -> None:
    """Compares the checkpoint that Megatron is about to load with what is configured.

    What differs and may differ is printed on rank 0.

    Args:
        args: Megatron's arguments. Where the checkpoint's schedule is to be used
            (use_checkpoint_opt_param_scheduler), they get its values.
        on_resume: "error" or "replace" (`sparsity.on_resume`).

    Raises:
        ConfigError: another model, optimizer, schedule or sparsity than the checkpoint's; with the
            fields, both values and the way out.
    """
    found = _checkpoint_to_load(args)
    if found is None:
        return
    folder, whole = found
    common = load_common(folder)
    if whole:
        check_layout(args, common, folder)
    saved = common.get("args")
    notes = told_of_buckets(args, common) if whole and saved is not None else []
    if saved is not None:
        comparison = compare(saved, args, optimizer=whole)
        if refused := refusal(comparison, folder, args):
            raise ConfigError(refused)
        notes += comparison.told
        notes += settle_schedule(comparison, saved, args)
    notes += _check_sparsity(folder, saved, patterns, on_resume)
    if args.rank == 0:
        for note in notes:
            print(f"s2megatron: {note}", flush=True)


def _checkpoint_to_load(args) -> tuple[Path, bool] | None:
    """The folder, and whether the optimizer's state and the schedule are loaded too."""
    folder = latest_iteration_dir(args.load, args.ckpt_step) if args.load else None
    weights_only = getattr(args, "finetune", False) or getattr(args, "no_load_optim", False)
    if folder is None and args.pretrained_checkpoint:
        folder, weights_only = latest_iteration_dir(args.pretrained_checkpoint), True
    if folder is None:
        return None
    return folder, not weights_only and folder.name != "release"


def _check_sparsity(
    folder: Path, args, patterns: tuple[LayerPattern, ...], on_resume: str
) -> list[str]:
    """A line for the log where another sparsity is gone on with. Raises ConfigError."""
    saved, dropped = getattr(args, "s2_sparsity", None), None
    if saved is None:
        dropped = first_block_dropped(patterns)
        difference = "it records no sparsity: a dense checkpoint"
        same = all(pattern.is_dense for pattern in patterns)
    else:
        with as_config_error(f"checkpoint {folder}"):
            saved_patterns = read_record(saved)
        same = saved_patterns == patterns
        difference = "" if same else describe_difference(saved_patterns, patterns)
    if same:
        return []
    message = (
        f"checkpoint {folder} was trained with another sparsity than configured:\n{difference}"
    )
    if on_resume == "error":
        raise ConfigError(
            f"{message}\nRestore the sparsity, or set sparsity.on_resume=replace to go on with "
            "the configured one"
        )
    notes = [f"{message}\ngoing on with the configured one (sparsity.on_resume)"]
    return notes if dropped is None else [*notes, f"sparsity: {dropped}"]
