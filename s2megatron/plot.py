"""Pictures: the mask of chosen layers and heads, and a loss curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from s2_kernels import LayerPattern
from s2_kernels.record import describe

_COLOURS = ("#f4f4f1", "#2f6db5", "#f0a63a", "#444444")
_LABELS = ("not attended to", "shard (kept)", "local window", "diagonal (token-causal)")


def mask_image(pattern: LayerPattern, kv_head: int, n_blocks: int) -> torch.Tensor:
    """[n, n] of 0 nothing, 1 shard, 2 window, 3 diagonal, for one KV head."""
    rule = pattern.rules[kv_head]
    age = torch.arange(n_blocks)[:, None] - torch.arange(n_blocks)
    kept = (age >= 0) & (age < rule.lifetimes(n_blocks))
    image = kept.int()
    if not rule.is_dense:
        image[kept & (age < rule.bands[0].reach)] = 2
    image.fill_diagonal_(3)
    return image


def plot_masks(
    patterns: Mapping[int, LayerPattern], path: str | Path, *, heads: Sequence[int], n_blocks: int
) -> None:
    """Draws one row per layer and one square per KV head, then all heads' union, to a PNG.

    Args:
        patterns: layer number -> pattern.
        heads: KV heads to draw, as many of them as a layer has.
        n_blocks: side of each square, in blocks.
    """
    columns = len(heads) + 1
    figure, axes = plt.subplots(
        len(patterns),
        columns,
        figsize=(2.3 * columns, 2.5 * len(patterns) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    colours = ListedColormap(_COLOURS)
    for row, (number, pattern) in zip(axes, patterns.items(), strict=True):
        images = [mask_image(pattern, h, n_blocks) for h in range(pattern.kv_heads)]
        shown = [h for h in heads if h < pattern.kv_heads]
        squares = [(f"layer {number}, KV head {h}", images[h]) for h in shown]
        union = torch.stack(images).amax(0)
        squares.append((f"layer {number}, all {pattern.kv_heads} together", union))
        for axis in row[len(squares) :]:
            axis.axis("off")
        for axis, (title, image) in zip(row, squares, strict=False):
            axis.imshow(image, cmap=colours, vmin=0, vmax=3, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"query block (of {n_blocks})", fontsize=7)
        row[0].set_xlabel("KV block\n" + describe(pattern).split(", shifts")[0], fontsize=6)
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", label=label)
        for colour, label in zip(_COLOURS, _LABELS, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_scalars(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard events of a run: tag -> (step, value), in step order, a step's last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: sorted({e.step: e.value for e in events.Scalars(tag)}.items())
        for tag in events.Tags()["scalars"]
    }


def plot_loss(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    *,
    levels: Mapping[str, float],
    title: str,
) -> None:
    """Loss against iteration, with horizontal reference levels (nats per token), to a PNG."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 25 else None
        axis.plot(steps, values, label=name, marker=marker, markersize=4)
    for name, level in levels.items():
        axis.axhline(level, linestyle="--", color="#888888", linewidth=1)
        axis.annotate(name, (0.99, level), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=8)  # fmt: skip
    axis.set_xlabel("iteration")
    axis.set_ylabel("loss (nats per token)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
