"""Corrections of how Megatron loads a checkpoint: changed rates, names of files, no second save.

Seen with megatron-core 0.19.2 and torch 2.11.
"""

import dataclasses
import functools
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.futures import Future

from s2megatron.training.changed_options import NOT_IN_SCHEDULER, Change, Comparison
from s2megatron.training.checkpoint_folder import tracked

_BATCH = ("megatron.global_batch_size", "megatron.step_batch_size_schedule")
"""Part of the schedule, which counts samples, and never the checkpoint's: ranks have it already."""


def settle_schedule(comparison: Comparison, saved: Namespace, now: Namespace) -> list[str]:
    """Makes Megatron go on with the schedule that was chosen, the new one or the checkpoint's.

    Megatron finds a parameter group of the checkpoint by its learning rates among others, so that
    with another `lr` it finds none, whatever its override options say.

    Args:
        saved, now: Megatron's arguments, the checkpoint's and the run's; the latter are changed
            where the checkpoint's schedule is to be used.

    Returns:
        A line for each option that differs, for the log.
    """
    if not comparison.schedule:
        return []
    if now.override_opt_param_scheduler:
        _rewrite_rates(saved, now)
        return [f"{change}: the new one from here on" for change in comparison.schedule]
    rates = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
    for name in (*rates, *NOT_IN_SCHEDULER):
        if hasattr(saved, name):
            setattr(now, name, getattr(saved, name))
    return [_kept(change) for change in comparison.schedule]


def _kept(change: Change) -> str:
    batch = ", with the new batch" if change.name in _BATCH else ""
    return f"{change}: the checkpoint's schedule goes on{batch}"


def _rewrite_rates(saved: Namespace, now: Namespace) -> None:
    """Puts the new rates into the parameter groups of what Megatron loads."""
    from megatron.training import checkpointing

    load = checkpointing._load_base_checkpoint
    load = getattr(load, "__wrapped__", load)  # an earlier run of this process had other rates

    @functools.wraps(load)
    def with_new_rates(*args, **kwargs):
        state, *rest = load(*args, **kwargs)
        _replace_rates(state, saved, now)
        return (state, *rest)

    checkpointing._load_base_checkpoint = with_new_rates


def _replace_rates(state: Any, saved: Namespace, now: Namespace) -> None:
    """In every `param_groups` under `state["optimizer"]`, however deep: Megatron chains them."""
    before, after = _group_rates(saved), _group_rates(now)
    todo = [state.get("optimizer")] if isinstance(state, dict) else []
    while todo:
        node = todo.pop()
        if not isinstance(node, dict):
            continue
        for group in node.get("param_groups", ()):
            _replace_in_group(group, before, after)
        todo += [child for key, child in node.items() if key != "param_groups"]


def _group_rates(args: Namespace) -> list[dict[str, float]]:
    """What parameter groups hold of the options, by their own names: most, then embeddings."""
    rates = [{"max_lr": args.lr, "min_lr": args.min_lr}]
    if (own := getattr(args, "decoupled_lr", None)) is not None:
        least = args.decoupled_min_lr
        rates.append({"max_lr": own, "min_lr": args.min_lr if least is None else least})
    return rates


def _replace_in_group(group: dict, before: list[dict], after: list[dict]) -> None:
    """A group with both rates of one kind gets both; one with a rate of its own keeps that."""
    for old, new in zip(before, after, strict=False):
        if all(group.get(key) == value for key, value in old.items()):
            group.update(new)
            return
    for key in before[0]:
        for old, new in zip(before, after, strict=False):
            if group.get(key) == old[key]:
                group[key] = new[key]
                break


def gone_on_from(args: Namespace) -> int | None:
    """The iteration in its own folder that a run goes on from; None for a run that begins.

    Args:
        args: Megatron's arguments of a run without output.folder.
    """
    if not args.load or not args.save or args.finetune or args.non_persistent_ckpt_type:
        return None
    if Path(args.load).resolve() != Path(args.save).resolve():
        return None
    return tracked(Path(args.load)) if args.ckpt_step is None else args.ckpt_step


def save_what_was_loaded_never_again(iteration: int | None) -> None:
    """Started again, a run that had trained to its end would write the checkpoint over itself.

    Cut off in the middle of that, it would have lost what it had.

    Args:
        iteration: what this run resumes from; None for a first start.
    """
    from megatron.training import training

    save = training.save_checkpoint_and_time
    save = getattr(save, "__wrapped__", save)  # an earlier run of this process had another

    @functools.wraps(save)
    def unless_loaded(now: int, *args, **kwargs):
        if now != iteration:
            save(now, *args, **kwargs)

    training.save_checkpoint_and_time = unless_loaded


class DamagedFile(RuntimeError):
    """A file of a checkpoint whose content cannot be read. The message names it."""


def name_damaged_files() -> None:
    """Lets the reader of torch's distributed checkpoints say which file it could not read.

    torch reads all of a rank's files in one call, and its errors speak of bytes and not of files.
    """
    if getattr(FileSystemReader.read_data, "_names_files", False):
        return
    read_data = FileSystemReader.read_data

    @functools.wraps(read_data)
    def one_file_after_another(self, plan, planner):
        files: dict[str, list] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        done = Future()
        done.set_result(None)
        for name, items in files.items():
            try:
                done = read_data(self, dataclasses.replace(plan, items=items), planner)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reason = reason.partition(". ")[0]  # torch goes on for a paragraph
                raise DamagedFile(f"{self.path}/{name} cannot be read: {reason}") from error
        return done

    one_file_after_another._names_files = True
    FileSystemReader.read_data = one_file_after_another
