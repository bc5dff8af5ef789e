"""What an evaluation found, as plain data: a summary to read and rows to compare by."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from s2megatron.errors import ConfigError
from s2megatron.evaluation.loss import WindowLosses
from s2megatron.evaluation.scoring import RetrievalResult
from s2megatron.evaluation.shards import Grid
from s2megatron.evaluation.statistics import Mean

SUMMARY, ROWS = "evaluation.json", "rows.json"
VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """Losses by length, and retrieval."""

    about: dict
    """Model, data, machine and versions: what a reader wants to know of the numbers."""
    losses: list[WindowLosses] = field(default_factory=list)
    retrieval: RetrievalResult | None = None
    grids: list[Grid] = field(default_factory=list)
    """Block grids that answers are counted by."""

    def summary(self) -> dict:
        """Every table, as dicts of `Mean.as_dict`."""
        found: dict = {"version": VERSION, "about": self.about, "loss": {}, "retrieval": {}}
        for losses in self.losses:
            found["loss"][str(losses.length)] = _plain(losses.table())
        if self.retrieval is not None:
            found["plan"] = self.retrieval.plan.model_dump()
            for task in self.retrieval.plan.tasks:
                found["retrieval"][task] = self._task(task)
        return found

    def _task(self, task: str) -> dict:
        result = self.retrieval
        lengths = {
            str(length): {
                "all": result.share(task=task, length=length, needle=True).as_dict(),
                "left out": result.share(task=task, length=length, needle=False).as_dict(),
                "by depth": [m.as_dict() for m in result.by_depth(task, length)],
            }
            for length in result.plan.lengths
        }
        return {
            "by length": lengths,
            "by distance": _plain(result.by_distance(task)),
            "by shard": {
                str(g): _plain(result.by_shard(task, g)) for g in self.grids if g.period > 1
            },
            "by block edge": {str(g): _plain(result.by_edge(task, g)) for g in self.grids},
        }

    def rows(self) -> dict:
        """What `summary` was counted from: a row for every window and every answer."""
        found: dict = {"version": VERSION, "loss": {}, "answers": []}
        for losses in self.losses:
            found["loss"][str(losses.length)] = {
                "places": losses.places,
                "by_position": losses.by_position.round(3).tolist(),
                "position_counts": losses.position_counts.tolist(),
                "by_repeat": losses.by_repeat.round(3).tolist(),
                "repeat_counts": losses.repeat_counts.tolist(),
            }
        if self.retrieval is not None:
            found["answers"] = [
                [*row[:-1], round(row.nats, 4)] for row in self.retrieval.rows
            ]  # AnswerRow's fields
        return found

    def write(self, folder: str | Path) -> None:
        """Writes SUMMARY and ROWS into a folder, which is made; each appears when whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content, indent in ((SUMMARY, self.summary(), 1), (ROWS, self.rows(), None)):
            write_json(folder / name, content, indent)


def read_json(folder: str | Path, name: str) -> dict:
    """SUMMARY or ROWS of a folder. Raises ConfigError."""
    file = Path(folder) / name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"{file}: there is no such file; name a folder that `s2megatron evaluate` wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: is not JSON ({error}); evaluate again") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ConfigError(f"{file}: version {version!r}, this one reads {VERSION}")
    return found


def _plain(table: dict[str | int, Mean]) -> dict:
    return {str(name): mean.as_dict() for name, mean in table.items()}


def writable(out: Path) -> Path:
    """The file, in a folder that is there now. Raises ConfigError where it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be written; name a file")
    return out


def write_json(out: Path, data: dict, indent: int | None = 1) -> None:
    """Written beside and renamed: a reader never sees half of it."""
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    part.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")
    part.replace(out)
