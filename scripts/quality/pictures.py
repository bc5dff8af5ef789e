"""Pictures of the study's report."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy


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
    """Losses watched in training, of text and of records, against tokens seen."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("text", "retrieval"), strict=True):
        for i, result in enumerate(results):
            seen, points = 0, []
            for phase in filter(None, result.get("phases", [])):
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


def draw_equal_time(results: list[dict], path: Path) -> None:
    """The watched loss of text in the last phase, against seconds of training."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for result in results:
        phase = (result.get("phases") or [{}])[-1]
        watched, clock = phase.get("validation", {}).get("text", []), phase.get("seconds", [])
        if watched and clock:
            steps, values = zip(*watched, strict=True)
            at = numpy.interp(steps, *zip(*clock, strict=True))
            kernel = f" ({phase['dense_kernel']})" if phase.get("dense_kernel") else ""
            axis.plot(at, values, marker="o", markersize=3, label=result["file"] + kernel)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("loss on held-out text (nats a token)")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
