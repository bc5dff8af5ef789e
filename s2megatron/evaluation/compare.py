"""`s2megatron compare A B`: what B does better or worse than A, with standard errors.

Both were asked the same. So differences are taken window by window and document by document: what
makes a window hard is hard for both models, and cancels out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy

from s2megatron.errors import ConfigError
from s2megatron.evaluation.loss import WindowLosses
from s2megatron.evaluation.report import table
from s2megatron.evaluation.result import ROWS, SUMMARY, read_json
from s2megatron.evaluation.scoring import AnswerRow, RetrievalPlan, RetrievalResult
from s2megatron.evaluation.statistics import Mean

_SAME = ("data", "packed", "tokenizer", "filler")


@dataclass(frozen=True)
class Difference:
    """One line of a comparison."""

    task: str
    """A retrieval task, or "loss"."""
    length: int | None
    """Tokens of the windows or documents; None for those of all lengths together."""
    what: str
    """Which tokens of the windows, or which answers."""
    first: Mean
    second: Mean
    change: Mean
    """Second minus first; its error is that of the paired differences."""

    @property
    def errors(self) -> float | None:
        """The change in standard errors; None where there is no error to count in."""
        return self.change.value / self.change.error if self.change.error else None


def compare(first: str | Path, second: str | Path) -> str:
    """Markdown tables of the differences, second minus first. As `differences`."""
    found = differences(first, second)
    a, b = (read_json(folder, SUMMARY)["about"] for folder in (first, second))
    parts = [
        f"# {b['model']} ({b['attention']}) against {a['model']} ({a['attention']})",
        "Differences are second minus first, on the same windows and documents; errors are "
        "standard errors of the paired differences, and the last column counts them.",
    ]
    losses = [line for line in found if line.task == "loss"]
    if losses:
        head = ["length", "tokens", "first", "second", "difference", "relative", "standard errors"]
        rows = [
            [f"{line.length:,}", line.what, f"{line.first.value:.4f}", f"{line.second.value:.4f}",
             line.change, f"{100 * line.change.value / line.first.value:+.2f}%", _errors(line)]
            for line in losses
        ]  # fmt: skip
        parts += ["## Loss, nats a token", table(head, rows)]
    answers = [line for line in found if line.task != "loss"]
    if answers:
        head = ["task", "answers", "first", "second", "difference", "standard errors"]
        rows = [
            [line.task, f"{line.what} ({line.first.count})", f"{100 * line.first.value:.1f}%",
             f"{100 * line.second.value:.1f}%", line.change, _errors(line)]
            for line in answers
        ]  # fmt: skip
        parts += ["## Retrieval, share of answers right", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def differences(first: str | Path, second: str | Path) -> list[Difference]:
    """What two evaluations differ in, window by window and document by document.

    Args:
        first, second: folders that `s2megatron evaluate` wrote.

    Raises:
        ConfigError: a folder without its files, or two that were not asked the same.
    """
    a, b = (read_json(folder, SUMMARY) for folder in (first, second))
    for name in _SAME:
        if a["about"].get(name) != b["about"].get(name) and not _alike(name, a, b):
            raise ConfigError(
                f"{first} and {second} differ in {name}: {a['about'].get(name)} and "
                f"{b['about'].get(name)}; evaluate both on the same"
            )
    if a.get("plan") != b.get("plan"):
        raise ConfigError(
            f"{first} and {second} were asked different things: {a.get('plan')} and "
            f"{b.get('plan')}; evaluate both with the same options"
        )
    rows_a, rows_b = (read_json(folder, ROWS) for folder in (first, second))
    found = []
    if set(rows_a["loss"]) != set(rows_b["loss"]):
        raise ConfigError(
            f"{first} has losses at {', '.join(rows_a['loss'])} tokens, {second} at "
            f"{', '.join(rows_b['loss'])}; evaluate both with the same --lengths"
        )
    for length in rows_a["loss"]:
        found += _losses(int(length), rows_a["loss"][length], rows_b["loss"][length])
    if rows_a["answers"]:
        plan = RetrievalPlan(**_tuples(a["plan"]))
        found += _answers(plan, rows_a["answers"], rows_b["answers"])
    return found


def _alike(name: str, a: dict, b: dict) -> bool:
    """Whether tokenizers of two names are one: every model's folder has a copy of its own."""
    digests = [x["about"].get("tokenizer digest") for x in (a, b)]
    return name == "tokenizer" and digests[0] is not None and digests[0] == digests[1]


def _losses(length: int, a: dict, b: dict) -> list[Difference]:
    if a["places"] != b["places"]:
        raise ConfigError(
            f"loss at {length} tokens: the two saw different windows; evaluate both with the same "
            "--windows"
        )
    names = ("by_position", "position_counts", "by_repeat", "repeat_counts")
    of = [
        WindowLosses(length, x["places"], *(numpy.asarray(x[n], dtype=float) for n in names))
        for x in (a, b)
    ]
    change = WindowLosses(
        length,
        a["places"],
        of[1].by_position - of[0].by_position,
        of[0].position_counts,
        of[1].by_repeat - of[0].by_repeat,
        of[0].repeat_counts,
    )
    first, second = (x.table() for x in of)
    return [
        Difference("loss", length, name, first[name], second[name], value)
        for name, value in change.table().items()
        if value.value is not None
    ]


def _answers(plan: RetrievalPlan, a: list, b: list) -> list[Difference]:
    a, b = ([AnswerRow(*row) for row in rows] for rows in (a, b))
    if [row[:7] for row in a] != [row[:7] for row in b]:
        raise ConfigError("retrieval: the two were asked about different documents")
    change = [y._replace(right=y.right - x.right) for x, y in zip(a, b, strict=True)]
    of = [RetrievalResult(plan, rows) for rows in (a, b, change)]
    found = []
    for task in plan.tasks:
        for length in plan.lengths:
            cells = [x.share(task=task, length=length, needle=True) for x in of]
            found.append(Difference(task, length, f"length {length:,}", *cells))
        by_distance = [x.by_distance(task) for x in of]
        for name in by_distance[0]:
            cells = [x[name] for x in by_distance]
            found.append(Difference(task, None, f"distance {name}", *cells))
    return found


def _errors(line: Difference) -> str:
    if line.errors is not None:
        return f"{line.errors:+.1f}"
    return "one sample" if line.change.error is None else "no spread"


def _tuples(plan: dict) -> dict:
    """JSON has lists where the strict plan wants tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in plan.items()}
