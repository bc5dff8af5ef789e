"""`s2megatron compare A B`: what B does better or worse than A, with standard errors.

Both were asked the same, so differences are taken window by window and document by document: what
makes a window hard is hard for both, and falls out.
"""

from pathlib import Path

import numpy

from s2megatron.errors import ConfigError
from s2megatron.evaluation.loss import WindowLosses
from s2megatron.evaluation.report import table
from s2megatron.evaluation.result import ROWS, SUMMARY, read_json
from s2megatron.evaluation.scoring import AnswerRow, RetrievalPlan, RetrievalResult
from s2megatron.evaluation.statistics import Mean

_SAME = ("data", "packed", "tokenizer", "filler")


def compare(first: str | Path, second: str | Path) -> str:
    """Markdown tables of the differences, second minus first.

    Args:
        first, second: folders that `s2megatron evaluate` wrote.

    Raises:
        ConfigError: a folder without its files, or two that were not asked the same.
    """
    folders = (first, second)
    a, b = (read_json(folder, SUMMARY) for folder in folders)
    for name in _SAME:
        if a["about"].get(name) != b["about"].get(name):
            raise ConfigError(
                f"{first} and {second} differ in {name}: {a['about'].get(name)} and "
                f"{b['about'].get(name)}; evaluate both on the same"
            )
    if a.get("plan") != b.get("plan"):
        raise ConfigError(
            f"{first} and {second} were asked different things: {a.get('plan')} and "
            f"{b.get('plan')}; evaluate both with the same options"
        )
    rows_a, rows_b = (read_json(folder, ROWS) for folder in folders)
    parts = [
        f"# {b['about']['model']} ({b['about']['attention']}) against {a['about']['model']} "
        f"({a['about']['attention']})",
        "Differences are second minus first, on the same windows and documents; errors are "
        "standard errors of the paired differences, and the last column counts them.",
    ]
    for length in rows_a["loss"]:
        if length not in rows_b["loss"]:
            raise ConfigError(f"{second}: has no loss at {length} tokens, {first} has")
        parts += _losses(int(length), rows_a["loss"][length], rows_b["loss"][length])
    if rows_a["answers"]:
        parts += _answers(RetrievalPlan(**_tuples(a["plan"])), rows_a["answers"], rows_b["answers"])
    return "\n\n".join(parts) + "\n"


def _losses(length: int, a: dict, b: dict) -> list[str]:
    if a["places"] != b["places"]:
        raise ConfigError(f"loss at {length} tokens: the two saw different windows")
    of = [
        WindowLosses(length, found["places"], *(
            numpy.asarray(found[name], dtype=float)
            for name in ("by_position", "position_counts", "by_repeat", "repeat_counts")))
        for found in (a, b)
    ]  # fmt: skip
    difference = WindowLosses(
        length,
        a["places"],
        of[1].by_position - of[0].by_position,
        of[0].position_counts,
        of[1].by_repeat - of[0].by_repeat,
        of[0].repeat_counts,
    )
    tables = [found.table() for found in (*of, difference)]
    rows = []
    for name, change in tables[2].items():
        if change.value is None:
            continue
        first, second = tables[0][name].value, tables[1][name].value
        rows.append(
            [name, f"{first:.4f}", f"{second:.4f}", change, f"{100 * change.value / first:+.2f}%",
             _errors(change)]
        )  # fmt: skip
    head = ["tokens", "first", "second", "difference", "relative", "standard errors"]
    return [f"## Loss at {length:,} tokens, nats a token", table(head, rows)]


def _answers(plan: RetrievalPlan, a: list, b: list) -> list[str]:
    a, b = ([AnswerRow(*row) for row in rows] for rows in (a, b))
    if [row[:7] for row in a] != [row[:7] for row in b]:
        raise ConfigError("retrieval: the two were asked about different documents")
    change = [y._replace(right=y.right - x.right) for x, y in zip(a, b, strict=True)]
    of = [RetrievalResult(plan, rows) for rows in (a, b, change)]
    rows = []
    for task in plan.tasks:
        for length in plan.lengths:
            cells = [r.share(task=task, length=length, needle=True) for r in of]
            rows.append(_row(task, f"length {length:,}", *cells))
        by_distance = [r.by_distance(task) for r in of]
        for name in by_distance[0]:
            rows.append(_row(task, f"distance {name}", *(found[name] for found in by_distance)))
    head = ["task", "answers", "first", "second", "difference", "standard errors"]
    return ["## Retrieval, share of answers right", table(head, rows)]


def _row(task: str, name: str, first: Mean, second: Mean, change: Mean) -> list:
    shares = (f"{100 * cell.value:.1f}%" for cell in (first, second))
    return [task, f"{name} ({first.count})", *shares, change, _errors(change)]


def _errors(change: Mean) -> str:
    """The difference in standard errors."""
    if change.error is None:
        return "one sample"
    if change.error == 0:
        return "0" if change.value == 0 else "all alike"
    return f"{change.value / change.error:+.1f}"


def _tuples(plan: dict) -> dict:
    """JSON has lists where the strict plan wants tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in plan.items()}
