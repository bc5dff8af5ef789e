"""How long a call of attention keeps the host, and what that does to the time of a call at 8k.

    python3 scripts/bench/host_time.py --name host-time-h100

One table: microseconds of the host for a forward pass and for a backward pass through autograd,
medians and 90th percentiles, of torch's SDPA and of the S2 kernels, and their ratios to SDPA. Then
rounds at the same length: milliseconds of the device alone (the host has run ahead, so that nothing
waits for it) and of calls one after the other as a benchmark has them. A round in which the second
is far above the first went at the host's pace. Writes NAME.json and NAME.md with --name.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from s2_kernels import local_stride, s2_attention
from s2megatron.provenance import describe, in_words, machine

AHEAD = 20_000_000
"""Cycles that the device is kept busy, while the host goes on: about 10 ms."""


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--local", type=int, default=1024, help="window in tokens")
    parser.add_argument("--calls", type=int, default=200, help="of which medians are taken")
    parser.add_argument("--rounds", type=int, default=12, help="of device and wall time; 0: none")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/raw")
    parser.add_argument("--name", help="of the files; default: only printed")
    return parser.parse_args(argv)


def draw(a, layout: str):
    """q, k, v and dout in the layout [b, h, s, d] or [b, s, h, d]."""
    shape = (1, a.heads, a.tokens, a.d) if layout == "bhsd" else (1, a.tokens, a.heads, a.d)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    torch.manual_seed(0)
    leaves = [torch.randn(shape, device=a.device, dtype=dtype).requires_grad_() for _ in "qkv"]
    return leaves, torch.randn_like(leaves[0])


def providers(a) -> dict:
    """Of each provider: its inputs, dout, a forward pass, and a context to call it in."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    pattern = local_stride(
        heads=a.heads, local_blocks=max(1, a.local // 64), stride=a.heads, block_size=64
    )

    def s2(backend):
        return lambda q, k, v: s2_attention(q, k, v, pattern, backend=backend)

    found = {"sdpa": (*draw(a, "bhsd"), sdpa, contextlib.nullcontext)}
    if a.device == "cpu":
        return found | {"s2 blocked": (*draw(a, "bshd"), s2("blocked"), contextlib.nullcontext)}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        chosen = getattr(SDPBackend, name)
        of = (*draw(a, "bhsd"), sdpa, lambda chosen=chosen: sdpa_kernel([chosen]))
        found[f"sdpa {name.partition('_')[0].lower()}"] = of
    for name, backend in (("s2", "auto"), ("s2 portable", "triton")):
        found[name] = (*draw(a, "bshd"), s2(backend), contextlib.nullcontext)
    return found


def synchronize(a) -> None:
    if a.device == "cuda":
        torch.cuda.synchronize()


def host_microseconds(a, leaves, dout, forward) -> dict[str, list[float]]:
    """Of each call, how long the host was at it, with an idle device at its start."""
    times = dict(forward=[], backward=[])
    for _ in range(a.calls + 10):
        synchronize(a)
        began = time.perf_counter()
        out = forward(*leaves)
        times["forward"].append((time.perf_counter() - began) * 1e6)
        synchronize(a)
        began = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        times["backward"].append((time.perf_counter() - began) * 1e6)
    return {name: found[10:] for name, found in times.items()}


def device_milliseconds(run, calls: int = 10) -> float:
    """Of one call, while the host is ahead of the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def wall_milliseconds(run, calls: int = 50) -> float:
    """Of one call among many, started one after the other on an idle device."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3 / calls


def rounds(a, leaves, dout, forward) -> dict[str, list[tuple[float, float]]]:
    """(device, wall) milliseconds of each round, forward and backward."""
    out = forward(*leaves)
    runs = dict(
        forward=lambda: forward(*leaves),
        backward=lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    )
    return {
        name: [(device_milliseconds(run), wall_milliseconds(run)) for _ in range(a.rounds)]
        for name, run in runs.items()
    }


def measure(a) -> dict:
    result = describe(ROOT) | dict(gpu=machine(a.device), rows={}, rounds={})
    for name, (leaves, dout, forward, context) in providers(a).items():
        with context():
            times = host_microseconds(a, leaves, dout, forward)
            row = {}
            for which, found in times.items():
                row[which] = statistics.median(found)
                row[f"{which}_p90"] = sorted(found)[len(found) * 9 // 10]
            result["rows"][name] = row
            if a.device == "cuda" and a.rounds:
                result["rounds"][name] = rounds(a, leaves, dout, forward)
    return result


def page(result: dict, a) -> str:
    """The tables in Markdown."""
    sdpa = result["rows"]["sdpa"]
    lines = [
        f"Host time of a call, {a.tokens:,} tokens, {a.heads} heads of {a.d}: microseconds, "
        f"medians of {a.calls} calls (90th percentile). {result['gpu']}; "
        f"{in_words(result['versions'])}; {result['date']}, commit {result['commit']}.",
        "",
        "| provider | forward us | x SDPA | backward us | x SDPA |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        cells = [name]
        for which in ("forward", "backward"):
            cells.append(f"{row[which]:.0f} ({row[f'{which}_p90']:.0f})")
            cells.append(f"{row[which] / sdpa[which]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    if result["rounds"]:
        lines += ["", "Milliseconds of a call, device alone / calls one after the other, by round:"]
        lines += ["", "| provider | pass | rounds |", "| --- | --- | --- |"]
    for name, passes in result["rounds"].items():
        for which, found in passes.items():
            told = ", ".join(f"{device:.3f} / {wall:.3f}" for device, wall in found)
            lines.append(f"| {name} | {which} | {told} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    a = parse(argv)
    result = measure(a)
    text = page(result, a)
    print(text)
    if a.name:
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / f"{a.name}.json").write_text(json.dumps(result, indent=1))
        command = f"    python3 scripts/bench/host_time.py {shlex.join(argv or sys.argv[1:])}\n\n"
        (a.out / f"{a.name}.md").write_text(command + text)


if __name__ == "__main__":
    main()
