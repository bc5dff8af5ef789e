"""Hopper's backward pass with five matrix products beside today's with seven: right? faster?

    PYTHONPATH=.:kernels python3 scripts/bench/backward_products.py --out products.json

Needs one Hopper GPU and about 6 minutes. First every version is compared with float64 on small odd
shapes; one whose error is over 1.25 times today's is named, and is not timed. Then the versions
take turns in rounds, forwards and backwards, so that none always has the coolest card. Prints
useful TFLOP/s (only pairs the pattern keeps count) and, of each version, how long its kernels take.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton

from s2_kernels import local_stride
from s2_kernels.blocked import blocked_attention
from s2_kernels.hopper.backward import launch_hopper_backward
from s2_kernels.hopper.backward_fused import launch_hopper_fused
from s2_kernels.hopper.forward import launch_hopper_forward

TODAY = "seven"
VERSIONS = {
    TODAY: launch_hopper_backward,
    "five": launch_hopper_fused,
    "five, pieces of 128": partial(launch_hopper_fused, longest=128),
    "five, not cut": partial(launch_hopper_fused, longest=None),
    "five, whole numbers": partial(launch_hopper_fused, deterministic=True),
}
"""Of each name, a launcher of the whole backward pass; the last gives the same bits every time."""
SMALL = ((1500, 4, 4, 128), (1337, 4, 2, 128), (777, 8, 2, 64), (2111, 4, 4, 96), (1, 2, 2, 128))
"""Tokens, heads, KV heads, head size of the comparison with float64."""


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--versions", nargs="*", choices=list(VERSIONS), default=list(VERSIONS))
    parser.add_argument("--rounds", type=int, default=2, help="each is one turn to and one fro")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of a measurement")
    parser.add_argument("--deadline", type=float, default=480, help="stop after so many seconds")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def problem(tokens, heads, kv_heads, d, window, dtype=torch.bfloat16):
    """What a launcher of the backward pass takes, of random inputs; stride = heads."""
    pattern = local_stride(
        heads=heads, kv_heads=kv_heads, block_size=64, local_blocks=window // 64, stride=heads
    )
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v, dout = (
        torch.randn(1, tokens, h, d, device="cuda", generator=generator, dtype=dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    scale = 1 / math.sqrt(d)
    out, lse = launch_hopper_forward(q, k, v, pattern, scale)
    return q, k, v, out, lse, dout, None, pattern, scale


def errors(versions) -> dict[str, dict[str, float]]:
    """The largest relative root mean square error of dq, dk and dv, of each shape and version."""
    found = {}
    for shape in SMALL:
        inputs = problem(*shape, window=256)
        q, k, v, _, _, dout, _, pattern, scale = inputs
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out, _ = blocked_attention(*exact, pattern, softmax_scale=scale)
        truth = torch.autograd.grad(out, exact, dout.double())
        row = found["x".join(map(str, shape))] = {}
        for name in versions:
            grads = VERSIONS[name](*inputs)
            pairs = zip(grads, truth, strict=True)
            each = [((x.double() - t).norm() / t.norm().clamp(1e-2)).item() for x, t in pairs]
            row[name] = math.inf if any(map(math.isnan, each)) else max(each)
    return found


def wrong(found, versions) -> set[str]:
    """Versions whose error is over 1.25 times today's somewhere."""
    return {
        name
        for row in found.values()
        for name in versions
        if not row[name] <= 1.25 * row[TODAY] + 1e-3  # one token: gradients of 0 but for rounding
    }


def kernels(run) -> dict[str, float]:
    """Milliseconds of each kernel of one call, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {
        event.key[:60]: round(event.device_time_total / 3e3, 4)
        for event in profile.key_averages()
        if event.device_time_total > 0
    }


def measure(a, tokens, versions, until) -> list[dict]:
    """A row for each version: milliseconds and useful TF of each turn, and its kernels."""
    inputs = problem(tokens, a.heads, a.kv_heads or a.heads, a.d, a.window)
    flops = 10 * inputs[7].kept_pairs(tokens) * a.d
    runs = {name: partial(VERSIONS[name], *inputs) for name in versions}
    parts = {name: kernels(run) for name, run in runs.items()}  # compiles as well
    times = {name: [] for name in versions}
    for turn in range(2 * a.rounds):
        for name in list(versions)[:: -1 if turn % 2 else 1]:
            if time.monotonic() < until:
                ms = triton.testing.do_bench(runs[name], warmup=25, rep=a.rep, return_mode="median")
                times[name].append(ms)
    rows = []
    for name, ms in times.items():
        tf = [round(flops / x / 1e9, 1) for x in ms]
        rows.append(dict(tokens=tokens, version=name, tf=tf, kernels_ms=parts[name]))
        middle = f"{median(tf):.1f} TF" if tf else "no time left"
        print(f"{tokens} {name}: {middle} {tf} {parts[name]}", flush=True)
    return rows


def same_bits(name, inputs) -> bool:
    """Whether three calls give the same dq, dk and dv, bit for bit."""
    first, *others = (VERSIONS[name](*inputs) for _ in range(3))
    return all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def main():
    a = parse()
    until = time.monotonic() + a.deadline
    machine = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    machine["triton"] = triton.__version__
    print(machine, flush=True)
    found = errors({TODAY, *a.versions})
    left_out = wrong(found, a.versions)
    for shape, row in found.items():
        print(shape, {name: f"{error:.2e}" for name, error in row.items()}, flush=True)
    inputs = problem(4096, 4, 4, a.d, 256)
    bits = {name: same_bits(name, inputs) for name in a.versions if name not in left_out}
    print(f"wrong: {sorted(left_out) or 'none'}; same bits: {bits}", flush=True)
    rows = []
    for tokens in map(int, a.tokens.split(",")):
        rows += measure(a, tokens, [x for x in a.versions if x not in left_out], until)
    report = dict(**machine, options=vars(a) | dict(out=None), errors=found, same_bits=bits)
    report |= dict(wrong=sorted(left_out), rows=rows)
    if a.out:
        a.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
