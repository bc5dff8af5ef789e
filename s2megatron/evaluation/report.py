"""The summary of an evaluation as markdown, and as pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy

MARKDOWN, PICTURE, LOSS_PICTURE = "evaluation.md", "retrieval.png", "loss.png"


def write_report(summary: dict, folder: str | Path) -> list[Path]:
    """Writes MARKDOWN and the pictures that there are numbers for; returns the files.

    Args:
        summary: of `Evaluation.summary`, or read from its file.
    """
    folder, files = Path(folder), []
    if summary["retrieval"]:
        files.append(folder / PICTURE)
        draw_retrieval(summary["retrieval"], files[-1], title=summary["about"]["model"])
    if summary["loss"]:
        files.append(folder / LOSS_PICTURE)
        draw_loss(summary["loss"], files[-1], title=summary["about"]["model"])
    files.insert(0, folder / MARKDOWN)
    files[0].write_text(markdown(summary), encoding="utf-8")
    return files


def remove_report(folder: str | Path) -> None:
    """Takes away what `write_report` wrote of an evaluation before, once its numbers are gone."""
    for name in (MARKDOWN, PICTURE, LOSS_PICTURE):
        (Path(folder) / name).unlink(missing_ok=True)


def markdown(summary: dict) -> str:
    """Every table of a summary."""
    about = summary["about"]
    parts = [
        f"# Evaluation of {about['model']}, attention {about['attention']}",
        table(["", ""], [[key, value] for key, value in about.items() if key != "model"]),
    ]
    if summary["loss"]:
        parts += [*_loss_part(summary["loss"]), f"![Loss by position]({LOSS_PICTURE})"]
    if summary["retrieval"]:
        parts += _retrieval_part(summary["retrieval"], summary["plan"])
    return "\n\n".join(parts) + "\n"


def table(head: list, rows: list[list]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _loss_part(losses: dict) -> list[str]:
    names = dict.fromkeys(  # the longest windows have all positions
        name for length in sorted(losses, key=int, reverse=True) for name in losses[length]
    )
    rows = [[name, *(_nats(found.get(name)) for found in losses.values())] for name in names]
    return [
        "## Loss, nats a token",
        "Errors are standard errors between windows. A token repeats if it completes a 5-gram that "
        "stood in its window before; the distance is to the last such place.",
        table(["tokens", *(f"at {int(n):,}" for n in losses)], rows),
    ]


def _retrieval_part(retrieval: dict, plan: dict) -> list[str]:
    lengths = [str(n) for n in plan["lengths"]]
    heads = [f"{int(n):,}" for n in lengths]
    parts = [
        "## Retrieval, share of answers right",
        "An answer is right if the argmax of every one of its tokens is. 'Left out': the same with "
        "what is asked for not in the document. Errors are standard errors between documents. "
        f"Style {plan['style']}, seed {plan['seed']}.",
        f"![Share of right answers by length and depth]({PICTURE})",
    ]
    rows = []
    for task, found in retrieval.items():
        by_length = [found["by length"][n] for n in lengths]
        rows.append([task, *(_share(cell["all"]) for cell in by_length)])
        rows.append([f"{task}, left out", *(_share(cell["left out"]) for cell in by_length)])
    parts.append(table(["task", *heads], rows))
    for task, found in retrieval.items():
        depths = [
            [f"{10 * i} to {10 * i + 10}%",
             *(_share(found["by length"][n]["by depth"][i]) for n in lengths)]
            for i in range(10)
        ]  # fmt: skip
        parts += [f"### {task}", table(["depth", *heads], depths)]
        parts.append(_one_row("distance (tokens)", found["by distance"]))
        for kind in ("by shard", "by block edge"):
            for grid, cells in found[kind].items():
                parts.append(_one_row(f"{kind.removeprefix('by ')}, {grid}", cells))
    return parts


def _one_row(name: str, cells: dict) -> str:
    return table([name, "right"], [[key, _share(cell)] for key, cell in cells.items()])


def _nats(cell: dict | None) -> str:
    if not cell or cell["value"] is None:
        return "-"
    error = "" if cell["error"] is None else f" ± {cell['error']:.4f}"
    return f"{cell['value']:.4f}{error} ({cell['count']:,})"


def _share(cell: dict) -> str:
    if cell["value"] is None:
        return "-"
    right = round(cell["value"] * cell["count"])
    error = "" if cell["error"] is None else f" ± {100 * cell['error']:.1f}"
    return f"{100 * cell['value']:.1f}%{error} ({right} of {cell['count']})"


def draw_retrieval(retrieval: dict, path: Path, *, title: str) -> None:
    """The familiar picture: a square for each task, length by depth, from red to green."""
    figure, axes = plt.subplots(
        1, len(retrieval), figsize=(3.4 * len(retrieval) + 1, 4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    image = None
    for axis, (task, found) in zip(axes[0], retrieval.items(), strict=True):
        columns = found["by length"].values()
        shares = numpy.array(
            [[_number(cell["value"]) for cell in column["by depth"]] for column in columns]
        ).T
        image = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in numpy.ndenumerate(shares):
            if not numpy.isnan(value):
                colour = "black" if 0.15 < value < 0.9 else "white"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center",
                          fontsize=7, color=colour)  # fmt: skip
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(len(found["by length"])), [_short(n) for n in found["by length"]])
        axis.set_yticks(range(10), [f"{10 * i}%" for i in range(10)])
        axis.set_xlabel("length (tokens)")
    axes[0][0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=axes, label="share of answers right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_loss(losses: dict, path: Path, *, title: str) -> None:
    """Loss by position, a line for each length."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for length, cells in losses.items():
        bins = {n: c for n, c in cells.items() if n.startswith("position ")}
        ends = [int(name.split()[-1]) for name in bins]
        values = [cell["value"] for cell in bins.values()]
        errors = [_number(cell["error"]) for cell in bins.values()]
        axis.errorbar(ends, values, errors, marker="o", markersize=4, capsize=2,
                      label=f"windows of {_short(length)}")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("position in the window, up to (tokens)")
    axis.set_ylabel("loss (nats a token)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _short(length: str) -> str:
    n = int(length)
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
