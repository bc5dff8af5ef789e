"""Tables and pictures of the study from the arms' JSON files.

    python scripts/quality/report.py runs/quality/results --out runs/quality/report

OUT/report.md has a row per arm, the dense arm of the same recipe and seed as the measure: standard
errors are those of the differences, window by window. They do not know the noise between seeds.
OUT/loss-against-time.png is the frontier, OUT/curves.png how the losses fell. What an arm has not
reached yet is left empty.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from arms import ARMS, density


def read_results(folder: Path) -> list[dict]:
    """The results of a folder, by recipe, seed, and the order of the table of arms."""
    found = [json.loads(path.read_text()) | {"file": path.stem} for path in folder.glob("*.json")]
    found = [result for result in found if not result.get("only_trunk")]
    order = list(ARMS)
    return sorted(found, key=lambda r: (group(r), order.index(r["arm"])))


def group(result: dict) -> tuple[str, int]:
    """What makes arms comparable: the same recipe and seed."""
    return json.dumps(result["recipe"]["phases"]), result["recipe"]["seed"]


def losses(result: dict, length: int, far: bool = False) -> numpy.ndarray | None:
    """[windows, 2] of nats and tokens; with `far`, of repeats from 2,500 tokens back and more."""
    found = result.get("examination", {}).get(f"loss-{length}")
    rows = found and numpy.array(found["samples"]["loss"][str(length)], dtype=float)
    return None if rows is None else rows[:, 2:] if far else rows[:, :2]


def answers(result: dict, probe: str, task: str, length: int, far: bool = False):
    """[documents, 2] of right answers and answers; with `far`, to values 2,048 back and more."""
    found = result.get("examination", {}).get(probe)
    rows = found and numpy.array(found["samples"]["right"][task][str(length)], dtype=float)
    return None if rows is None else rows[:, 2:] if far else rows[:, :2]


def mean(rows: numpy.ndarray | None) -> float | None:
    """Of [samples, 2] of sums and counts; None where there is nothing to count."""
    return None if rows is None or not rows[:, 1].sum() else rows[:, 0].sum() / rows[:, 1].sum()


def difference(mine: numpy.ndarray, other: numpy.ndarray) -> tuple[float, float]:
    """Of two means over the same samples, and its standard error from the samples' differences.

    It says how sure the difference is for these two trained models; another seed is another model.
    """
    weight = mine[:, 1] / mine[:, 1].mean()
    gaps = (mine[:, 0] - other[:, 0]) / numpy.maximum(mine[:, 1], 1) * weight
    return mean(mine) - mean(other), gaps.std(ddof=1) / len(gaps) ** 0.5


def loss_table(results: list[dict]) -> list[str]:
    """Markdown: densities, losses and speed of arms that are comparable."""
    lengths = examination(results[0])["loss_lengths"]
    phases = results[0]["recipe"]["phases"]
    head = ["arm", "density at 8k", "at 32k", "tokens"]
    for name in (f"loss at {n}" for n in lengths):
        head += [name, "against dense", "on far repeats", "against dense"]
    speeds = [f"us a token at {phase['length']}" for phase in phases]
    lines = rule([*head, *speeds, "status"])
    dense = next((r for r in results if r["arm"] == "dense"), None)
    for result in results:
        cells = [result["arm"], *(f"{density(result['arm'], n):.1%}" for n in (8192, 32768)),
                 f"{sum(p['tokens'] for p in result.get('phases', [])) / 1e6:.0f}M"]  # fmt: skip
        for length in lengths:
            for far in (False, True):
                mine, other = losses(result, length, far), dense and losses(dense, length, far)
                value = mean(mine)
                cells.append("" if value is None else f"{value:.4f}")
                cells.append(against(mine, other) if result is not dense else "")
        speeds = (own_speed(result, number) for number in range(len(phases)))
        cells += ["" if speed is None else f"{speed:.2f}" for speed in speeds]
        cells.append(result["status"])
        lines.append(row(cells))
    return lines


def against(mine: numpy.ndarray | None, other: numpy.ndarray | None) -> str:
    """The difference in percent of the other, and its standard error."""
    if mean(mine) is None or mean(other) is None:
        return ""
    gap, error = difference(mine, other)
    return f"{gap / mean(other):+.2%} (se {error / mean(other):.2%})"


def retrieval_table(results: list[dict], probe: dict) -> list[str]:
    """Markdown: right answers of one probe, by task and length, and those from far away."""
    lengths = examination(results[0])["lengths"]
    columns = [(task, n, False) for task in probe["tasks"] for n in lengths]
    columns += [(task, n, True) for task in probe["tasks"] for n in lengths[-1:]]
    names = [f"{task} {n}{' far' if far else ''}" for task, n, far in columns]
    lines = rule(["arm", *names])
    for result in results:
        shares = (mean(answers(result, probe["name"], *column)) for column in columns)
        cells = ("" if share is None else f"{share:.0%}" for share in shares)
        lines.append(row([result["arm"], *cells]))
    return lines


def rule(head: list[str]) -> list[str]:
    return [row(head), "|" + " --- |" * len(head)]


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def examination(result: dict) -> dict:
    """The recipe's, or one that asks nothing."""
    none: dict = {"lengths": [], "loss_lengths": [], "probes": []}
    return result["recipe"]["examination"] or none


def own_speed(result: dict, number: int) -> float | None:
    """Microseconds a token in a phase; None where the arm had not the GPU to itself."""
    phases = result.get("phases", [])
    if len(phases) <= number or result.get("arms_per_gpu", 1) > 1:
        return None
    return phases[number].get("us_per_token")


def about(result: dict) -> list[str]:
    """What the arms of a table were made with, and on what."""
    recipe = result["recipe"]
    lines = [
        f"{result['gpu']}, commit {result['commit']}, {result['date']}, seed {recipe['seed']}; "
        + ", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        "",
    ]
    for number, phase in enumerate(recipe["phases"]):
        limit = f", stopped after {phase['seconds']:g} s" if phase["seconds"] else ""
        lines.append(
            f"- phase {number}: {phase['length']} tokens, {phase['tokens'] / 1e6:g}M planned in "
            f"steps of {phase['batch_tokens']}{limit}; rate {phase['lr']:g} to "
            f"{phase['final_lr']:g}; {phase['retrieval']:.0%} retrieval documents "
            f"(repeats {phase['repeats']:.0%}, records {phase['records']:.0%} of the others)"
        )
    return [*lines, "", f"`{result['command']}`", ""]


def plot_frontier(results: list[dict], path: Path) -> None:
    """Loss against measured time a token of the last phase."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for result in results:
        length = max(examination(result)["loss_lengths"], default=0)
        value = mean(losses(result, length))
        speed = own_speed(result, len(result["recipe"]["phases"]) - 1)
        if value and speed:
            axis.plot(speed, value, marker="o")
            axis.annotate(result["arm"], (speed, value), fontsize=8,
                          xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("training, microseconds a token (last phase)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_curves(results: list[dict], path: Path) -> None:
    """Losses watched in training, of text and of records, against tokens seen."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("text", "retrieval"), strict=True):
        for i, result in enumerate(results):
            seen, points = 0, []
            for phase in result.get("phases", []):
                watched = phase["validation"].get(name, [])
                points += [(seen + s * phase["batch_tokens"], value) for s, value in watched]
                seen += phase["tokens"]
            if points:
                tokens, values = zip(*points, strict=True)
                axis.plot([t / 1e6 for t in tokens], values, label=result["file"], color=f"C{i}")
        axis.set_title({"text": "held-out text", "retrieval": "records"}[name], fontsize=10)
        axis.set_xlabel("million tokens")
        axis.set_ylabel("loss (nats a token)")
        axis.grid(alpha=0.3)
    if axes[1].lines:
        axes[1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(argv)
    results = read_results(a.results)
    a.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Arms of the quality study", ""]
    for key in dict.fromkeys(map(group, results)):
        alike = [result for result in results if group(result) == key]
        lines += [*about(alike[0]), *loss_table(alike), ""]
        for probe in examination(alike[0])["probes"]:
            lines += [f"Right answers, {probe['name']}; far: value and answer 2,048 tokens apart "
                      "and more", "", *retrieval_table(alike, probe), ""]  # fmt: skip
    lines += ["![loss against time](loss-against-time.png)", "", "![curves](curves.png)", ""]
    plot_frontier(results, a.out / "loss-against-time.png")
    plot_curves(results, a.out / "curves.png")
    (a.out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{a.out}/report.md: {len(results)} arms")


if __name__ == "__main__":
    main()
