"""The planner's curves of docs/scaling.md: best layout from 8 to 16,384 GPUs, dense and S2.

Without context parallelism, which scripts/bench/context_table.py is about.

python scripts/bench/scaling_curves.py [--gpu h200] [--out docs/images] [--table TABLE.md]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

from s2_kernels import dense
from s2megatron.errors import ConfigError, hide_import_warnings
from s2megatron.machine import load_machine
from s2megatron.planner.layout import Model
from s2megatron.planner.report import limits, read_run
from s2megatron.planner.search import search

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
GPUS = [2**n for n in range(3, 15)]
TOKENS = 2**24
"""Of a step: held (strong scaling), or grown to WEAK sequences per 8 GPUs (weak scaling)."""
WEAK = 4
TABLED = (8, 64, 512, 1024, 4096, 16384)
COLUMNS = ("GPUs", "attention", "layout", "GiB", "tokens/step", "s/step", "tokens/s/GPU", "MFU",
           "limited by")  # fmt: skip
KINDS = ("dense", "S2, 2 dense layers", "S2 in every layer")


def kinds(model: Model) -> dict[str, Model]:
    """The run file's hybrid beside its two ends."""
    shape, sparse = model.shape, next(p for p in model.patterns if not p.is_dense)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "block_size": sparse.block_size}
    ends = ((dense(**heads),) * shape.layers, model.patterns, (sparse,) * shape.layers)
    return {name: Model(shape, patterns) for name, patterns in zip(KINDS, ends, strict=True)}


def best_plan(machine, model: Model, base, gpus: int, batch: int):
    """The fastest layout that fits; None where none does."""
    try:
        layout = replace(base, gpus=gpus, global_batch=batch)
        return search(machine, model, layout, 1, most_cp=1)[0]
    except ConfigError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "scaling-plan.md")
    options = parser.parse_args(argv)
    hide_import_warnings()
    machine = load_machine(options.gpu)
    command = f"python scripts/bench/scaling_curves.py --gpu {options.gpu}"
    text = [
        f"# Planned, not measured: {machine.gpu}",
        "",
        f"Made by `{command}`. Nothing here was run: these are `s2megatron plan --search`'s best "
        f"layouts with the constants of {options.gpu}.yaml. A step has {TOKENS / 2**20:.0f}M "
        f"tokens, and in a second row, where that is more, {WEAK} sequences per 8 GPUs. Without "
        "context parallelism a sequence stays within one TP group; TP leaves the node only where "
        "nothing else fits.",
        "",
        f"Constants: {' '.join(machine.source.split())}",
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, (name, config) in enumerate((("7B", "llama_7b_128k"), ("70B", "llama_70b_128k"))):
        model, base = read_run(str(ROOT / "configs" / f"{config}.yaml"), [], 8, local=False)
        for column, length in enumerate((2**17, 2**20)):
            long = Model(replace(model.shape, seq_len=length), model.patterns)
            title = f"{name}, {length // 1024}k tokens"
            rows = curve(machine, long, base, axes[row][column], title)
            text += ["", f"## {title}", "", *rows]
    figure.suptitle(
        f"Planned tokens/s/GPU on {machine.gpu}, best layout that fits (no context parallelism); "
        f"solid: 16M tokens a step, dashed: {WEAK} sequences per 8 GPUs",
        fontsize=10,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "scaling-plan.png"
    figure.savefig(picture, dpi=130)
    options.table.write_text("\n".join(text) + "\n")
    print(f"{picture}, {options.table}")
    return 0


def curve(machine, model: Model, base, axis, title: str) -> list[str]:
    """One panel; returns its table's lines."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join(['---'] * len(COLUMNS))} |",
    ]
    peak = max(machine.matmul_tflops.values())
    for colour, (kind, one) in zip(("#444444", "#f0a63a", "#2f6db5"), kinds(model).items(),
                                   strict=True):  # fmt: skip
        held: list[tuple[int, float]] = []
        grown: list[tuple[int, float]] = []
        for gpus in GPUS:
            few = max(1, TOKENS // one.shape.seq_len)
            for batch, points in ((few, held), (max(few, WEAK * gpus // 8), grown)):
                if points is grown and batch == few:
                    continue
                result = best_plan(machine, one, base, gpus, batch)
                if result is not None:
                    points.append((gpus, result.tokens_per_second / gpus))
                if gpus in TABLED:
                    lines.append(_row(gpus, kind, result, peak))
        for points, style in ((held, "o-"), (grown, "x--")):
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4,
                          label=kind if points is held else None)  # fmt: skip
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(GPUS[::2], [f"{n:,}" for n in GPUS[::2]])
    axis.set_xlabel("GPUs")
    axis.set_ylabel("tokens/s/GPU")
    axis.grid(alpha=0.3, which="both")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    return lines


def _row(gpus: int, kind: str, result, peak: float) -> str:
    if result is None:
        return f"| {gpus:,} | {kind} | nothing fits | | | | | | |"
    return (
        f"| {gpus:,} | {kind} | {result.layout} | {result.memory.total / 2**30:.0f} | "
        f"{result.tokens / 2**20:.0f}M | {result.seconds:.2f} | "
        f"{result.tokens_per_second / gpus:,.0f} | {result.mfu(peak):.0%} | {limits(result)} |"
    )


if __name__ == "__main__":
    sys.exit(main())
