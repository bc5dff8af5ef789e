"""A folder of torch_dist checkpoints: which are complete, which to resume from, which to delete.

Megatron writes `iter_*/` first, its `.metadata` when all ranks' files are there, and last the
tracker `latest_checkpointed_iteration.txt`. A folder that the tracker does not name or that has no
`.metadata` is half-written and is never picked up.
"""

import pickle
import re
import shutil
import threading
from pathlib import Path

from s2megatron.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
_GOING = ".deleting-"


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
    """'' where every file is as long as `.metadata` says, else what is not. Reads all sizes."""
    if missing := missing_parts(checkpoint):
        return missing
    try:
        with (checkpoint / ".metadata").open("rb") as stream:
            stored = pickle.load(stream).storage_data.values()
    except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
        return f".metadata cannot be read ({error})"
    sizes: dict[str, int] = {}
    for part in stored:
        end = part.offset + part.length
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), end)
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return ""


def tracked(folder: Path) -> int | None:
    """The iteration that Megatron's tracker names; None where there is none or it is damaged."""
    try:
        text = (folder / TRACKER).read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def resume_point(folder: Path) -> tuple[int | None, list[str]]:
    """The iteration to resume from, and what was passed over.

    That is the tracker's, or, where that one is damaged, the newest complete one before it.

    Returns:
        (iteration, notes); iteration is None where nothing was ever completed.

    Raises:
        ConfigError: a tracker exists, and no checkpoint beside it is complete.
    """
    notes: list[str] = []
    tracker = folder / TRACKER
    newest = tracked(folder)
    if newest is None and tracker.exists():
        notes.append(f"{tracker} is damaged ({tracker.read_text()!r})")
    elif newest is None:
        return None, notes
    for number in reversed(iterations(folder)):
        if newest is not None and number > newest:
            continue  # begun and never finished
        missing = missing_parts(iteration_dir(folder, number))
        if not missing:
            return number, notes
        notes.append(f"{iteration_dir(folder, number)} is incomplete: {missing}")
    raise ConfigError(
        f"output.folder: {folder} has a checkpoint tracker and no complete checkpoint: "
        f"{'; '.join(notes) or 'no iter_* folder'}; restore one, or name another output.folder"
    )


class Keeper:
    """Deletes all but the newest `keep` complete checkpoints; used on one rank.

    A checkpoint counts once the tracker names it, so an asynchronous save in progress never pushes
    out the last good one. Deletion renames first, in one step, and runs in the background.
    """

    def __init__(self, folder: Path, keep: int, save_interval: int | None):
        self.folder, self.keep, self.save_interval = folder, keep, save_interval
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
        for number in done[: -self.keep]:
            old = iteration_dir(self.folder, number)
            going = self.folder / f"{_GOING}{old.name}"
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
