"""Times attention kernels side by side on one GPU and writes the report.

    python3 scripts/bench/attention.py --seqlens 8192,32768,131072 --dkernel PATH

A case is HEADS:STRIDE: causal, batch 1, a local window and every STRIDE-th block, the heads'
shards shifted. Dense providers compute all pairs. TFLOP/s are *useful* ones: 4 (forward) or 10
(backward) x d x the pairs that the provider's mask keeps. Writes NAME.json, NAME.md and NAME.png
(speed-up over FlashAttention-2) and NAME-tflops.png; --plot-from NAME.json draws them later,
without a GPU.
"""

import argparse
import importlib.util
import itertools
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

from attention_providers import PREPARE, Setting, dense_pairs, missing

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

PROVIDERS = ",".join(PREPARE)
COLUMNS = dict(  # key in the JSON: (heading, format)
    case=("heads", "{}"),
    tokens=("tokens", "{:,}"),
    provider=("provider", "{}"),
    forward_ms=("fwd ms", "{:.3f}"),
    forward_tf=("fwd TF", "{:.0f}"),
    backward_ms=("bwd ms", "{:.3f}"),
    backward_tf=("bwd TF", "{:.0f}"),
    x_forward=("fwd x FA2", "{:.2f}"),
    x_both=("fwd+bwd x FA2", "{:.2f}"),
    peak_gib=("peak GiB", "{:.2f}"),
    first_s=("first call s", "{:.1f}"),
)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="16:16,32:32,64:64", help="HEADS:STRIDE in blocks")
    parser.add_argument("--seqlens", default="8192,32768,131072")
    parser.add_argument("--providers", default=PROVIDERS)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--d", type=int, default=128, help="head size")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block")
    parser.add_argument("--local", type=int, default=1024, help="window in tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rep", type=int, default=200, help="milliseconds of each measurement")
    parser.add_argument("--rounds", type=int, default=1, help="medians of so many, to and fro")
    parser.add_argument("--dkernel", metavar="PATH", help="checkout of linxihui/dkernel")
    parser.add_argument("--deadline", type=float, default=math.inf, help="stop after these seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/raw")
    parser.add_argument("--name", help="of the files; default: attention-GPU-DATE")
    parser.add_argument("--plot-from", type=Path, metavar="JSON", help="only draw the plots")
    parser.add_argument("--peak", type=float, help="TFLOP/s of a matrix product, drawn as a line")
    a = parser.parse_args(argv)
    if a.rounds < 1:
        parser.error(f"--rounds: {a.rounds} measures nothing; give 1 or more")
    return a


def measure(p, provider, a) -> dict:
    """Milliseconds, useful TFLOP/s, peak memory of a forward and backward pass, first call."""
    import torch
    import triton

    def bench(run):
        return triton.testing.do_bench(run, warmup=25, rep=a.rep, return_mode="median")

    torch.cuda.synchronize()
    began = time.time()  # compilation, autotuning and masks count as the first call
    ready = PREPARE[provider](p, a)
    torch.autograd.grad(ready.forward(), ready.leaves, ready.dout)
    torch.cuda.synchronize()
    first_s = time.time() - began

    torch.cuda.reset_peak_memory_stats()
    out = ready.forward()
    torch.autograd.grad(out, ready.leaves, ready.dout)
    peak = torch.cuda.max_memory_allocated()
    del out

    forward_ms = bench(ready.forward)
    out = ready.forward()
    backward_ms = bench(
        lambda: torch.autograd.grad(out, ready.leaves, ready.dout, retain_graph=True)
    )
    return dict(
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        forward_tf=4 * p.d * ready.pairs / forward_ms / 1e9,
        backward_tf=10 * p.d * ready.pairs / backward_ms / 1e9,
        density=ready.pairs / dense_pairs(p),
        peak_gib=peak / 2**30,
        first_s=first_s,
    )


def to_and_fro(problems, providers, rounds: int) -> list[tuple[str, int, str]]:
    """(case, tokens, provider) in the order of measuring: no provider is always the first."""
    return [
        (*problem, provider)
        for problem in problems
        for i in range(rounds)
        for provider in providers[:: 1 - i % 2 * 2]
    ]


def in_rounds(before: dict | None, row: dict) -> dict:
    """A provider's row with one more round: medians over `rounds`, the rest as in the first.

    A round that failed stays.
    """
    if before is not None and "error" in before:
        return before
    if before is None or "error" in row:
        return row | dict(rounds=[row])
    rounds = [*before["rounds"], row]
    times = ("forward_ms", "backward_ms", "forward_tf", "backward_tf")
    medians = {key: statistics.median(x[key] for x in rounds) for key in times}
    return before | medians | dict(rounds=rounds)


def add_ratios(rows) -> None:
    """Speed over FlashAttention-2 in the same case and length, where that was measured."""
    base = {
        (r["case"], r["tokens"]): r for r in rows if r["provider"] == "fa2" and "error" not in r
    }
    for r in rows:
        fa2 = base.get((r["case"], r["tokens"]))
        if fa2 and "error" not in r:
            r["x_forward"] = fa2["forward_ms"] / r["forward_ms"]
            both = fa2["forward_ms"] + fa2["backward_ms"]
            r["x_both"] = both / (r["forward_ms"] + r["backward_ms"])


def cells(row) -> list[str]:
    shown = [form.format(row[key]) if key in row else "" for key, (_, form) in COLUMNS.items()]
    if "error" in row:
        shown[3] = row["error"][:60].replace("|", "/").replace("\n", " ")
    return shown


def describe() -> dict:
    """GPU, versions, date, commit, command."""
    from s2megatron import provenance

    packages = ["torch", "triton"]
    packages += ["flash-attn-4"] if importlib.util.find_spec("flash_attn") else []
    command = shlex.join(["python3", "scripts/bench/attention.py", *sys.argv[1:]])
    return provenance.describe(ROOT, packages) | dict(command=command)


def write(a, name, about, rows) -> None:
    from s2megatron.provenance import in_words

    a.out.mkdir(parents=True, exist_ok=True)
    report = dict(about=about, rows=rows)
    (a.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    setup = about["setup"]
    lines = [
        f"# Attention on {about['gpu']}, {about['date']}",
        "",
        f"{in_words(about['versions'])}; commit {about['commit']}.",
        f"Causal, batch 1, {setup['dtype']}, d={setup['d']}, blocks of {setup['block']} tokens, "
        f"window of {setup['local']} tokens; heads:stride"
        + (f", {setup['kv_heads']} KV heads" if setup["kv_heads"] else "")
        + ". TF counts only the pairs that a provider's mask keeps (all, for dense ones).",
        "",
        f"    {about['command']}",
        "",
        "| " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
        *("| " + " | ".join(cells(r)) + " |" for r in rows),
    ]
    (a.out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(report: Path, peak: float | None = None) -> None:
    """The report's two pictures."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is missing: draw them later with --plot-from {report}")
        return
    import matplotlib

    matplotlib.use("agg")
    data = json.loads(report.read_text(encoding="utf-8"))
    plot_speed_up(data, report.with_suffix(".png"))
    plot_tflops(data, peak, report.with_name(f"{report.stem}-tflops.png"))


def plot_speed_up(data: dict, path: Path) -> None:
    """Speed-up over FlashAttention-2, forward + backward, against sequence length."""
    import matplotlib.pyplot as plt

    rows = [r for r in data["rows"] if "x_both" in r]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    if not cases:
        print("no speed-ups to plot: no case has both FlashAttention-2 and another provider")
        return
    figure, axes = plt.subplots(
        1, len(cases), figsize=(4 * len(cases) + 1, 4), sharey=True, squeeze=False
    )
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    for axis, case in zip(axes[0], cases, strict=True):
        for i, provider in enumerate(providers):
            points = [r for r in rows if (r["case"], r["provider"]) == (case, provider)]
            xs, ys = [r["tokens"] for r in points], [r["x_both"] for r in points]
            width = 2.5 if provider.startswith("s2") else 1.2
            axis.plot(xs, ys, marker="o", color=f"C{i}", linewidth=width, label=provider)
        axis.set(xscale="log", yscale="log", title=f"{case.split(':')[0]} heads", xlabel="tokens")
        tick_tokens(axis, rows)
    tops = [2**i for i in range(-1, 8) if 2**i <= 2 * max(r["x_both"] for r in rows)]
    axes[0][0].set_yticks(tops, [f"{y:g}x" for y in tops])
    axes[0][0].set_ylabel("forward + backward, over FlashAttention-2")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(data["about"]["gpu"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def tick_tokens(axis, rows) -> None:
    ticks = sorted({r["tokens"] for r in rows})
    axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def plot_tflops(data: dict, peak: float | None, path: Path) -> None:
    """Useful TFLOP/s of the first case against sequence length, each pass by itself."""
    import matplotlib.pyplot as plt

    rows = [r for r in data["rows"] if "error" not in r and r["case"] == data["rows"][0]["case"]]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    for axis, which in zip(axes, ("forward", "backward"), strict=True):
        for i, provider in enumerate(dict.fromkeys(r["provider"] for r in rows)):
            points = [r for r in rows if r["provider"] == provider]
            xs, ys = [r["tokens"] for r in points], [r[f"{which}_tf"] for r in points]
            width = 2.5 if provider.startswith("s2") else 1.2
            axis.plot(xs, ys, marker="o", color=f"C{i}", linewidth=width, label=provider)
        if peak:
            axis.axhline(peak, color="black", linestyle="--", label="matrix product")
        axis.set(xscale="log", ylim=0, title=which, xlabel="tokens")
        tick_tokens(axis, rows)
    axes[0].set_ylabel("useful TFLOP/s")
    axes[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{data['about']['gpu']}, {rows[0]['case'].split(':')[0]} heads")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main():
    a = parse()
    if a.plot_from:
        plot(a.plot_from, a.peak)
        return
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # FlexAttention's backward runs repeatedly
    began = time.time()
    torch.ones(1024, 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")  # starts CUDA
    providers = a.providers.split(",")
    unknown = set(providers) - set(PREPARE)
    if unknown:
        sys.exit(f"--providers: unknown {', '.join(unknown)}; known are {PROVIDERS}")
    for provider in providers:
        if why := missing(provider, a):
            print(f"leaving out {provider}: {why}")
    providers = [x for x in providers if not missing(x, a)]
    about = describe()
    about["setup"] = {k: getattr(a, k) for k in ("dtype", "d", "block", "local", "kv_heads")}
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    name = a.name or f"attention-{slug}-{about['date'][:10]}"
    print(about["gpu"], about["versions"], flush=True)
    print(" | ".join(heading for heading, _ in COLUMNS.values()), flush=True)
    rows = {}
    problems = list(itertools.product(a.cases.split(","), map(int, a.seqlens.split(","))))
    turns = to_and_fro(problems, providers, a.rounds)
    for i, turn in enumerate(turns):
        if time.time() - began > a.deadline:
            print(f"deadline: {len(turns) - i} of {len(turns)} measurements left out")
            break
        case, tokens, provider = turn
        heads, stride = map(int, case.split(":"))
        p = Setting(heads, a.kv_heads or heads, stride, tokens, a.d, a.block, a.local, a.dtype)
        try:
            row = measure(p, provider, a)
        except Exception as e:  # a peer that fails is a result: it stays in the table
            row = dict(error=f"{type(e).__name__}: {str(e)[:300]}")
        row = dict(case=case, tokens=tokens, provider=provider) | row
        rows[turn] = in_rounds(rows.get(turn), row)
        add_ratios(rows.values())
        print(" | ".join(cells(rows[turn])), flush=True)
        write(a, name, about, list(rows.values()))
        torch.cuda.empty_cache()
    if rows:
        plot(a.out / f"{name}.json", a.peak)


if __name__ == "__main__":
    main()
