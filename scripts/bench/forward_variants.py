"""Hopper's forward pass with other ways from item to item (`forward.SEAMS`): right? faster?

    PYTHONPATH=.:kernels python3 scripts/bench/forward_variants.py --out variants.json

Needs one Hopper GPU and about 2 minutes. First every variant is compared with float64 on small odd
shapes, and with today's kernel bit by bit: all make the same products in the same order. One that
differs is named, and is not timed. Then they take turns in rounds, forwards and backwards, so that
none always has the coolest card. Prints useful TFLOP/s (only pairs the pattern keeps count), and
the median of each round's ratio to today's.
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
from s2_kernels.hopper.forward import SEAMS, launch_hopper_forward
from s2_kernels.launch import Packing

TODAY = "today"
SMALL = ((1500, 4, 4, 128), (1337, 4, 2, 128), (4160, 8, 2, 128), (1, 2, 2, 128))
"""Tokens, heads, KV heads, head size of the comparison with float64."""
MORE = ((777, 8, 2, 64), (2111, 4, 4, 96))
"""As SMALL, with --paths: they compile the kernels once more."""


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--seams", nargs="*", choices=list(SEAMS), default=list(SEAMS))
    parser.add_argument("--paths", action="store_true", help="other head sizes, packed, offsets")
    parser.add_argument("--rounds", type=int, default=4, help="each is one turn to and one fro")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of a measurement")
    parser.add_argument("--deadline", type=float, default=170, help="stop after so many seconds")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def problem(tokens, heads, kv_heads, d, window, batch=(1,)):
    """q, k, v, a pattern with stride = heads, and the scale: what the launcher takes."""
    pattern = local_stride(
        heads=heads, kv_heads=kv_heads, block_size=64, local_blocks=window // 64, stride=heads
    )
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v = (
        torch.randn(*batch, tokens, h, d, device="cuda", generator=generator, dtype=torch.bfloat16)
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v, pattern, 1 / math.sqrt(d)


def other_paths():
    """Inputs that take other paths through the kernels, by name: (arguments, options)."""
    q, k, v, pattern, scale = problem(1300, 4, 2, 128, 256, batch=())
    ends = torch.tensor([0, 37, 38, 38, 700, 1300], dtype=torch.int32, device="cuda")
    packing = Packing(ends, ends, 662, 662)
    paths = {"packed": ((q, k, v, pattern, scale), dict(packing=packing))}
    q, k, v, pattern, scale = problem(1300, 4, 2, 128, 256)
    paths["offset"] = (q[:, 333:], k, v, pattern, scale), dict(q_offset=333)
    return paths


def equal(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def check(seams, paths: bool) -> tuple[dict, set[str]]:
    """Errors of out against float64 of each shape and seam, and seams that differ from today's."""
    found, wrong = {}, set()
    for shape in (*SMALL, *(MORE if paths else ())):
        q, k, v, pattern, scale = inputs = problem(*shape, window=256)
        truth, true_lse = blocked_attention(
            q.double(), k.double(), v.double(), pattern, softmax_scale=scale
        )
        today = launch_hopper_forward(*inputs)
        row = found["x".join(map(str, shape))] = {}
        for name in seams:
            print(f"{name} at {shape}", flush=True)  # so that one that hangs is known
            out, lse = run = launch_hopper_forward(*inputs, seam=name)
            torch.cuda.synchronize()
            error = ((out.double() - truth).norm() / truth.norm()).item()
            lse_error = (lse.double() - true_lse).abs().max().item()
            row[name] = error
            if not (error < 6e-3 and lse_error < 1e-2 and equal(run, today)):
                wrong.add(name)
    for name, (inputs, options) in other_paths().items() if paths else ():
        today = launch_hopper_forward(*inputs, **options)
        for seam in seams:
            if not equal(launch_hopper_forward(*inputs, seam=seam, **options), today):
                wrong.add(seam)
                print(f"{seam}: differs from today's, {name}", flush=True)
    return found, wrong


def measure(a, tokens, seams, until) -> list[dict]:
    """A row for each seam: useful TF of each turn, and the median ratio to today's turns."""
    inputs = problem(tokens, a.heads, a.kv_heads or a.heads, 128, a.window)
    flops = 4 * inputs[3].kept_pairs(tokens) * 128
    runs = {name: partial(launch_hopper_forward, *inputs, seam=name) for name in seams}
    today = launch_hopper_forward(*inputs)
    same = {name: all(equal(run(), today) for _ in range(3)) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for turn in range(2 * a.rounds):
        if time.monotonic() < until:
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                ms = triton.testing.do_bench(runs[name], warmup=25, rep=a.rep, return_mode="median")
                times[name].append(ms)
    rows = []
    for name, ms in times.items():
        tf = [round(flops / x / 1e9, 1) for x in ms]
        ratios = [t / x for t, x in zip(times[TODAY], ms, strict=True)]
        row = dict(tokens=tokens, seam=name, tf=tf, same_bits=same[name])
        rows.append(row | dict(ratio=round(median(ratios), 4) if ratios else None))
        middle = f"{median(tf):.1f} TF, {median(ratios):.3f} times today's" if tf else "no time"
        bits = "" if same[name] else " OTHER BITS THAN TODAY'S"
        print(f"{tokens} {name}: {middle} {tf}{bits}", flush=True)
    return rows


def main():
    a = parse()
    until = time.monotonic() + a.deadline
    machine = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    machine["triton"] = triton.__version__
    print(machine, flush=True)
    seams = [TODAY, *(name for name in a.seams if name != TODAY)]
    found, wrong = check(seams, a.paths)
    for shape, row in found.items():
        print(shape, {name: f"{error:.2e}" for name, error in row.items()}, flush=True)
    print(f"wrong: {sorted(wrong) or 'none'}", flush=True)
    rows = []
    for tokens in map(int, a.tokens.split(",")):
        rows += measure(a, tokens, [x for x in seams if x == TODAY or x not in wrong], until)
    report = dict(**machine, options=vars(a) | dict(out=None), errors=found)
    if a.out:
        a.out.write_text(json.dumps(report | dict(wrong=sorted(wrong), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
