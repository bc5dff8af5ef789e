"""Checks and times tile configurations of the Triton kernels on this GPU, one line each.

    PYTHONPATH=kernels python3 scripts/tune_attention.py forward --configs 64x64w4s3tma

A configuration is BLOCK_M x BLOCK_N [x STEP] w(arps) s(tages) tma|ptr [r(egister cap)]. Each is
first compared with the PyTorch backend on a small shape; a wrong one is reported and not timed.
Prints useful TFLOP/s: only the pairs the pattern keeps count. For development: what it finds goes
into s2_kernels/configs.py by hand.
"""

import argparse
import math
import sys
import time

import torch
import triton

from s2_kernels import local_stride
from s2_kernels.blocked import blocked_attention
from s2_kernels.configs import TileConfig
from s2_kernels.forward import launch_forward

SHAPES = "8192x32,32768x32,131072x32,131072x16"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=["forward"])
    parser.add_argument("--configs", required=True, help="comma-separated")
    parser.add_argument("--shapes", default=SHAPES, help="TOKENSxHEADS[xKV_HEADS], stride = heads")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--local", type=int, default=1024, help="window in tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layout", choices=["bshd", "bhsd", "sbhd"], default="bhsd")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of measurement")
    parser.add_argument("--deadline", type=float, default=420, help="stop after so many seconds")
    return parser.parse_args(argv)


def problem(a, tokens, heads, kv_heads, seed=0):
    """Pattern and q, k, v, dout [1, tokens, heads, d] in the layout asked for."""
    pattern = local_stride(
        heads=heads,
        kv_heads=kv_heads,
        block_size=a.block,
        local_blocks=max(1, a.local // a.block),
        stride=heads,
    )
    generator = torch.Generator("cuda").manual_seed(seed)
    order = dict(bshd=(0, 1, 2, 3), bhsd=(0, 2, 1, 3), sbhd=(1, 0, 2, 3))[a.layout]

    def draw(h):
        shape = (1, tokens, h, a.d)
        x = torch.randn([shape[i] for i in order], device="cuda", generator=generator)
        return x.to(getattr(torch, a.dtype)).permute([order.index(i) for i in range(4)])

    return pattern, draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def errors(got, truth):
    """Largest relative root mean square error over pairs of tensors."""
    return max(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True))


def check(a, run):
    """The error of run(pattern, q, k, v, dout) against float64, on a small odd shape."""
    pattern, q, k, v, dout = problem(a, 1500, 4, 2)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = blocked_attention(*exact, pattern, softmax_scale=1 / math.sqrt(a.d))
    grads = torch.autograd.grad(out, exact, dout.double())
    return errors(*run(pattern, q, k, v, dout, (out, lse, *grads)))


def forward(config):
    def run(pattern, q, k, v, dout, truth=None):
        got = launch_forward(q, k, v, pattern, 1 / math.sqrt(q.shape[-1]), config=config)
        return got, truth and truth[:2]

    return run


def main():
    a = parse()
    started = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    good = []
    for text in a.configs.split(","):
        config = TileConfig.parse(text)
        run = dict(forward=forward)[a.kernel](config)
        began = time.time()
        try:
            error = check(a, run)
        except Exception as e:
            print(f"{a.kernel} {config} FAILED {type(e).__name__}: {str(e)[:200]}", flush=True)
            continue
        verdict = "ok" if error < 2e-2 else "WRONG"
        print(f"{a.kernel} {config} {verdict} error {error:.1e} {time.time() - began:.1f} s")
        if verdict == "ok":
            good.append((config, run))
    for shape in a.shapes.split(","):
        tokens, heads, *rest = map(int, shape.split("x"))
        kv_heads = rest[0] if rest else heads
        pattern, *inputs = problem(a, tokens, heads, kv_heads)
        flops = 4 * pattern.kept_pairs(tokens) * a.d
        for config, run in good:
            if time.time() - started > a.deadline:
                print("deadline", flush=True)
                sys.exit()
            ms = triton.testing.do_bench(
                lambda run=run, p=pattern, x=inputs: run(p, *x),
                warmup=25,
                rep=a.rep,
                return_mode="median",
            )
            print(f"{a.kernel} {shape} {config} {ms:.3f} ms {flops / ms / 1e9:.1f} TF", flush=True)


if __name__ == "__main__":
    main()
