"""Pictures of the study's report."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from arms import DENSE

from s2megatron.evaluation.report import draw_retrieval

MANY = 100
"""Documents a length from which on a probe has a picture of its own."""


def draw(results: list[dict], speeds: dict, values: dict, out: Path) -> dict[str, Path]:
    """Draws what there are numbers for; returns title -> file.

    Args:
        speeds, values: by a result's "file": microseconds a token of the last phase, and the loss
            at the longest length; None where there is none.
    """
    files = {"losses against tokens": out / "curves.png"}
    draw_curves(results, files["losses against tokens"])
    if any(speeds[name] and values[name] for name in speeds):
        files["loss against time a token"] = out / "loss-against-time.png"
        draw_frontier(speeds, values, files["loss against time a token"])
    timed = [r for r in results if any(p.get("train_seconds") for p in r["recipe"]["phases"])]
    if any(result.get("phases") for result in timed):
        files["loss against seconds of training"] = out / "equal-time.png"
        draw_equal_time(timed, files["loss against seconds of training"])
    for result in results:
        for probe in (result["recipe"].get("examination") or {}).get("probes", []):
            found = result.get("examination", {}).get(probe["name"], {}).get("retrieval")
            if found and (probe.get("documents") or 0) >= MANY:
                name = f"{result['file']}, {probe['name']}"
                files[name] = out / f"{result['file']}-{probe['name']}.png"
                draw_retrieval(found, files[name], title=name)
    return files


def draw_frontier(speeds: dict, values: dict, path: Path) -> None:
    """Loss against measured time a token of the last phase."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, speed in speeds.items():
        if speed and values[name]:
            axis.plot(speed, values[name], marker="o")
            axis.annotate(name, (speed, values[name]), fontsize=8,
                          xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("training, microseconds a token (last phase)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(results: list[dict], path: Path) -> None:
    """Losses watched in training, of text and of records, against tokens seen; and text's to dense.

    An arm that went on from recipe to recipe is one line.
    """
    ends = chain_ends(results)
    names = [result["arm"] for result in ends]
    names = names if len(set(names)) == len(names) else [result["file"] for result in ends]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    titles = {"text": "held-out text", "retrieval": "records"}
    for axis, kind in zip(axes, titles, strict=False):
        for i, (name, result) in enumerate(zip(names, ends, strict=True)):
            if points := watched(result, kind):
                axis.plot(*zip(*points.items(), strict=True), label=name, color=f"C{i}")
        axis.set_title(titles[kind], fontsize=10)
        axis.set_ylabel("loss (nats a token)")
    dense = next((watched(r, "text") for r in ends if r["arm"] in DENSE), {})
    for i, result in enumerate(ends):
        points = watched(result, "text")
        both = [tokens for tokens in points if tokens in dense]
        apart = [100 * (points[tokens] / dense[tokens] - 1) for tokens in both]
        axes[2].plot(both, apart, color=f"C{i}")
    axes[2].set_title("held-out text against dense", fontsize=10)
    axes[2].set_ylabel("loss above dense's (%)")
    for axis in axes:
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    if axes[1].lines:
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                      frameon=False, fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)


def chain_ends(results: list[dict]) -> list[dict]:
    """Of each arm that went on from recipe to recipe, the result that got furthest."""
    furthest: dict[tuple, dict] = {}
    for result in results:
        chain = (result["arm"], result.get("origin", result["file"]))
        before = furthest.get(chain)
        if before is None or len(result.get("phases", [])) >= len(before.get("phases", [])):
            furthest[chain] = result
    return list(furthest.values())


def watched(result: dict, kind: str) -> dict[float, float]:
    """Loss watched in training by million tokens seen."""
    seen, points = 0, {}
    for phase in filter(None, result.get("phases", [])):
        for step, value in phase["validation"].get(kind, []):
            points[(seen + step * phase["batch_tokens"]) / 1e6] = value
        seen += phase["tokens"]
    return points


def draw_equal_time(results: list[dict], path: Path) -> None:
    """The watched loss of text in the last phase, against seconds of training; a panel a length."""
    phases = [(result, result["phases"][-1]) for result in results if result.get("phases")]
    lengths = sorted({phase["length"] for _, phase in phases})
    figure, axes = plt.subplots(1, len(lengths), figsize=(1 + 4.5 * len(lengths), 4.2),
                                layout="constrained", squeeze=False)  # fmt: skip
    seeds = {result["recipe"]["seed"] for result, _ in phases}
    panels = dict(zip(lengths, axes[0], strict=True))
    for result, phase in phases:
        watched, clock = phase.get("validation", {}).get("text", []), phase.get("seconds", [])
        if watched and clock:
            steps, values = zip(*watched, strict=True)
            at = numpy.interp(steps, *zip(*clock, strict=True))
            kernel = (
                f" (dense layers: {phase['dense_kernel']})" if phase.get("dense_kernel") else ""
            )
            seed = f", seed {result['recipe']['seed']}" if len(seeds) > 1 else ""
            label = f"{result['arm']}{seed}{kernel}"
            panels[phase["length"]].plot(at, values, marker="o", markersize=3, label=label)
    for length, axis in panels.items():
        axis.set_title(f"sequences of {length:,} tokens", fontsize=10)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel("loss on held-out text (nats a token)")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
