"""The planner's table of docs/scaling.md: S2 with context parallelism beside dense ring, all-gather
and Ulysses, from 128k to 4M tokens on 8 to 4,096 GPUs.

python scripts/bench/context_table.py [--gpu h200] [--table docs/scaling-context.md]
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

from s2_kernels import dense
from s2megatron.errors import ConfigError, hide_import_warnings
from s2megatron.machine import load_machine
from s2megatron.planner.layout import GATHER, RING, ULYSSES, Layout, Model
from s2megatron.planner.report import limits, read_run
from s2megatron.planner.search import search
from s2megatron.planner.step import Plan

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [2**17, 2**19, 2**20, 2**22]
GPUS = [8, 64, 512, 4096]
TOKENS = 2**24
"""Of a step."""
MODELS = (("7B", "llama_7b_128k"), ("70B", "llama_70b_128k"))
DENSE = {"dense, ring": RING, "dense, all-gather": GATHER, "dense, Ulysses": ULYSSES}
SPARSE = ("S2, 2 dense layers", "S2 in every layer")
COLUMNS = ("tokens", "GPUs", *DENSE, *SPARSE, "S2 / best dense")
LAYOUTS = ("tokens", "GPUs", "attention", "layout", "GiB", "s/step", "MFU", "limited by")


def ways(model: Model, base: Layout) -> dict[str, tuple[Model, Layout]]:
    """What is compared: attention of all layers, and how dense ones run over CP ranks."""
    shape, sparse = model.shape, next(p for p in model.patterns if not p.is_dense)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "block_size": sparse.block_size}
    full = Model(shape, (dense(**heads),) * shape.layers)
    found = {name: (full, replace(base, cp_comm=way)) for name, way in DENSE.items()}
    sparse_models = (model, Model(shape, (sparse,) * shape.layers))
    return found | {name: (m, base) for name, m in zip(SPARSE, sparse_models, strict=True)}


def best_plans(machine, model: Model, base: Layout, tokens: int, gpus: int) -> dict[str, Plan]:
    """The fastest layout that fits, by attention; what has none is left out."""
    longer = Model(replace(model.shape, seq_len=tokens), model.patterns)
    layout = replace(base, gpus=gpus, global_batch=max(1, TOKENS // tokens))
    found = {}
    for name, (one, way) in ways(longer, layout).items():
        try:
            found[name] = search(machine, one, way, 1)[0]
        except ConfigError:
            continue
    return found


def summary_row(tokens: int, gpus: int, plans: dict[str, Plan]) -> str:
    """Tokens/s/GPU of each, and how many times the best dense one S2 in every layer is."""
    rates = {name: result.tokens_per_second / gpus for name, result in plans.items()}
    cells = [f"{rates[name]:,.0f}" if name in rates else "-" for name in (*DENSE, *SPARSE)]
    best = max((rates[name] for name in DENSE if name in rates), default=0)
    times = f"{rates[SPARSE[1]] / best:.1f}" if best and SPARSE[1] in rates else "-"
    return f"| {tokens // 1024}k | {gpus:,} | {' | '.join(cells)} | {times} |"


def layout_rows(tokens: int, gpus: int, plans: dict[str, Plan], peak: float) -> list[str]:
    return [
        f"| {tokens // 1024}k | {gpus:,} | {name} | {result.layout} | "
        f"{result.memory.total / 2**30:.0f} | {result.seconds:.2f} | {result.mfu(peak):.0%} | "
        f"{limits(result)} |"
        for name, result in plans.items()
    ]


def header(columns: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]


def page(machine, gpu: str, tables: dict[str, list[tuple[str, list[str]]]]) -> str:
    """The page: per model (summary row, layout rows) of each length and number of GPUs."""
    text = [
        f"# Context parallelism, planned and not measured: {machine.gpu}",
        "",
        f"Made by `python scripts/bench/context_table.py --gpu {gpu}`. Nothing here was run: the "
        f"best layout that fits of `s2megatron plan --search`, {TOKENS // 2**20}M tokens a step. "
        "[scaling.md](scaling.md) says what the model counts and what it leaves out. Tokens/s/GPU; "
        "`-`: nothing divides and fits.",
        "",
        f"Constants: {' '.join(machine.source.split())}",
    ]
    for name, rows in tables.items():
        summary = header(COLUMNS) + [row for row, _ in rows]
        layouts = header(LAYOUTS) + [row for _, own in rows for row in own]
        text += ["", f"## {name}", "", *summary, "", f"### {name}: the layouts", "", *layouts]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "scaling-context.md")
    options = parser.parse_args(argv)
    hide_import_warnings()
    machine = load_machine(options.gpu)
    peak = max(machine.matmul_tflops.values())
    tables: dict[str, list[tuple[str, list[str]]]] = {}
    for name, config in MODELS:
        model, base = read_run(str(ROOT / "configs" / f"{config}.yaml"), [], 8, local=False)
        for tokens, gpus in itertools.product(LENGTHS, GPUS):
            plans = best_plans(machine, model, base, tokens, gpus)
            rows = summary_row(tokens, gpus, plans), layout_rows(tokens, gpus, plans, peak)
            tables.setdefault(name, []).append(rows)
            print(name, rows[0], flush=True)
    options.table.write_text(page(machine, options.gpu, tables))
    print(options.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
