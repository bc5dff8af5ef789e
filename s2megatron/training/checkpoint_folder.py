"""A folder of torch_dist checkpoints: which are complete, which to resume from, which to delete.

Megatron writes `iter_*/` first, its `.metadata` when all ranks' files are there, and last the
tracker `latest_checkpointed_iteration.txt`. A folder that has no `.metadata` is half-written and is
never picked up.
"""

import contextlib
import re
import shutil
import threading
from pathlib import Path

from s2megatron.errors import ConfigError
from s2megatron.training.checkpoint_content import damaged_metadata, stored_parts

TRACKER = "latest_checkpointed_iteration.txt"
_GOING = ".deleting-"
_ASIDE = "aside-"


def iteration_dir(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def iterations(folder: Path) -> list[int]:
    """Numbers of all `iter_*` folders, complete or not, in order."""
    found = [re.fullmatch(r"iter_(\d{7,})", path.name) for path in folder.glob("iter_*")]
    return sorted(int(match[1]) for match in found if match)


def missing_parts(checkpoint: Path) -> str:
    """'' for a torch_dist checkpoint whose save was finished, else what is missing from it."""
    for name in (".metadata", "metadata.json"):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    return ""


def damage(checkpoint: Path) -> str:
    """'' where every file is as long as `.metadata` says, else what is not. Reads all sizes.

    Of the content only `.metadata` and `metadata.json` are compared with their checksums;
    checkpoint_content.py reads the rest.
    """
    if missing := missing_parts(checkpoint) or damaged_metadata(checkpoint):
        return missing
    try:
        parts = stored_parts(checkpoint)
    except ValueError as error:
        return str(error)
    sizes: dict[str, int] = {}
    for part in parts:
        sizes[part.file] = max(sizes.get(part.file, 0), part.offset + part.length)
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return ""


def tracked(folder: Path) -> int | None:
    """The iteration that Megatron's tracker names; None where there is none or it is damaged."""
    text = _tracker_text(folder) or ""
    return int(text) if text.isascii() and text.isdigit() else None


def _tracker_text(folder: Path) -> str | None:
    """What the tracker holds, whatever its bytes; None where there is none."""
    try:
        return (folder / TRACKER).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):  # the latter is told when it is made
        return None


def write_tracker(folder: Path, iteration: int) -> None:
    """Beside, then renamed: a reader sees the old text or the new one, never half of it."""
    beside = folder / f".{TRACKER}.new"
    beside.write_text(str(iteration))
    beside.rename(folder / TRACKER)


def resume_point(folder: Path) -> tuple[int | None, list[str]]:
    """The iteration to resume from, and why it is not the tracker's.

    That is the one which the tracker names. Where the tracker is missing, is damaged, or names a
    checkpoint that is not complete, it is the newest complete checkpoint.

    Returns:
        (iteration, notes); iteration is None where nothing was ever completed.

    Raises:
        ConfigError: a tracker exists, and no checkpoint beside it is complete.
    """
    missing = {n: missing_parts(iteration_dir(folder, n)) for n in iterations(folder)}
    complete = [number for number, lacks in missing.items() if not lacks]
    text, named = _tracker_text(folder), tracked(folder)
    if named in complete:
        return named, []
    if text is None and not complete:
        return None, []
    tracker = folder / TRACKER
    if text is None:
        notes = [f"{tracker} is missing"]
    elif named is None:
        notes = [f"{tracker} is damaged ({text[:80]!r})"]
    else:
        lacks = missing.get(named, "it is not there")
        notes = [f"{tracker} names {iteration_dir(folder, named)}, which is not complete: {lacks}"]
    newest = complete[-1] if complete else -1
    notes += [
        f"{iteration_dir(folder, number)} is incomplete: {lacks}"
        for number, lacks in missing.items()
        if number > newest
    ]
    if complete:
        return newest, [*notes, "the newest complete checkpoint is taken"]
    way_out = "restore one, name another output.folder, or remove the tracker to start from nothing"
    if text == "release":
        way_out = (
            "this is a converted model, not a run's own checkpoint: start from it with "
            f"megatron.load={folder} megatron.finetune=true and an output.folder of its own"
        )
    raise ConfigError(
        f"output.folder: {folder} has a checkpoint tracker and no complete checkpoint: "
        f"{'; '.join(notes)}; {way_out}"
    )


def set_aside_newer(folder: Path, iteration: int) -> list[str]:
    """Renames complete checkpoints newer than `iteration`, which training would write over.

    They are there when the tracker was set back by hand, or when a run was cut off between its last
    file and the tracker. A folder without `.metadata` is half a save, and stays to be written over:
    a new save into a complete folder would look complete from its first byte on.

    Returns:
        A line for each, for the log.
    """
    notes = []
    for number in iterations(folder):
        checkpoint = iteration_dir(folder, number)
        if number <= iteration or missing_parts(checkpoint):
            continue
        aside = folder / f"{_ASIDE}{checkpoint.name}"
        again = 1
        while aside.exists():
            again += 1
            aside = folder / f"{_ASIDE}{checkpoint.name}-{again}"
        checkpoint.rename(aside)
        notes.append(f"{checkpoint} is newer than where this run resumes: kept as {aside}")
    return notes


def way_back(folder: Path, iteration: int) -> str:
    """How to resume from the checkpoint before `iteration`, where one is whole; for a message."""
    sound = [
        number
        for number in iterations(folder)
        if number < iteration and not damage(iteration_dir(folder, number))
    ]
    if not sound:
        return "no earlier one is complete"
    return f"to go back to the one before it: echo {sound[-1]} > {folder}/{TRACKER}"


class CheckpointPruner:
    """Deletes all but the newest `keep` complete checkpoints; used on one rank.

    A checkpoint counts once the tracker names it, so an asynchronous save in progress never pushes
    out the last good one. Half-written folders do not count; those older than the oldest one kept
    go as well. Deletion renames first, in one step, and runs in the background.

    Args:
        retain_interval: Megatron's save_retain_interval, whose multiples stay beside the newest.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        save_interval: int | None,
        retain_interval: int | None = None,
    ):
        self.folder, self.keep, self.save_interval = folder, keep, save_interval
        self.retain_interval = retain_interval
        self._seen: int | None = None
        self._deleting: list[threading.Thread] = []
        for leftover in folder.glob(f"{_GOING}*"):
            self._delete(leftover)

    def after(self, iteration: int) -> None:
        """Call at every iteration: looks at the tracker while a save is awaited."""
        last_save = iteration - iteration % self.save_interval if self.save_interval else 0
        if last_save and self._seen != last_save:
            self.prune()

    def prune(self) -> None:
        newest = tracked(self.folder)
        if newest is None or newest == self._seen:
            return
        self._seen = newest
        done = [number for number in iterations(self.folder) if number <= newest]
        complete = [n for n in done if not missing_parts(iteration_dir(self.folder, n))]
        if not complete:
            return
        oldest_kept = complete[-self.keep :][0]
        for number in done:
            if number >= oldest_kept:
                break
            if self.retain_interval and number % self.retain_interval == 0 and number in complete:
                continue
            old = iteration_dir(self.folder, number)
            going = self.folder / f"{_GOING}{old.name}"
            with contextlib.suppress(FileNotFoundError):  # Megatron deletes between the retained
                old.rename(going)
                self._delete(going)

    def close(self) -> None:
        """Prunes once more, and waits for the deletions."""
        self.prune()
        for thread in self._deleting:
            thread.join()

    def _delete(self, path: Path) -> None:
        thread = threading.Thread(target=shutil.rmtree, args=(path,), daemon=True)
        thread.start()
        self._deleting = [t for t in self._deleting if t.is_alive()] + [thread]
