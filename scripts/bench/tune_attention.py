"""Checks and times tile configurations of the Triton kernels on this GPU, one line each.

    PYTHONPATH=kernels python3 scripts/bench/tune_attention.py forward --configs 64x64w4s3tma

KERNEL is forward; dkdv or dq, the kernels of the deterministic backward pass, alone; separate, the
whole of it; fused (adds dq through TMA) or fused_ptr (through atomics).
A configuration is BLOCK_M x BLOCK_N w(arps) s(tages) tma|ptr [r(egister cap)]. Each is
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
from s2_kernels.backward import launch_backward, row_terms
from s2_kernels.backward_dkdv import launch_dkdv
from s2_kernels.backward_dq import launch_dq
from s2_kernels.blocked import blocked_attention
from s2_kernels.configs import TileConfig, fit
from s2_kernels.forward import launch_forward

SHAPES = "8192x32,32768x32,131072x32,131072x16"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=list(KERNELS))
    parser.add_argument("--configs", required=True, help="comma-separated; separate: dkdv+dq")
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


def check(a, run):
    """The error of a kernel's outputs against float64, on a small odd shape."""
    pattern, q, k, v, dout = problem(a, 1500, 4, 2)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = blocked_attention(*exact, pattern, softmax_scale=1 / math.sqrt(a.d))
    grads = torch.autograd.grad(out, exact, dout.double())
    truth = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    return errors({name: (x, truth[name]) for name, x in run(pattern, q, k, v, dout)().items()})


def errors(pairs):
    """Largest relative root mean square error, and which output has it."""
    each = {n: ((x.double() - t).norm() / t.norm()).item() for n, (x, t) in pairs.items()}
    return max((math.inf if math.isnan(e) else e, n) for n, e in each.items())


def forward(configs):
    """4 * pairs * d operations."""

    def prepare(pattern, q, k, v, dout):
        scale = 1 / math.sqrt(q.shape[-1])

        def run():
            out, lse = launch_forward(q, k, v, pattern, scale, config=configs[0])
            return dict(out=out, lse=lse)

        return run

    return prepare


def one_kernel(kind):
    """The kernel over KV tiles (8 * pairs * d operations), or that of dq (6), alone."""

    def build(configs):
        def prepare(pattern, q, k, v, dout):
            scale = 1 / math.sqrt(q.shape[-1])
            out, lse = launch_forward(q, k, v, pattern, scale)
            inputs = (q, k, v, dout, *row_terms(out, lse, dout, None))
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            gather = kind == "dq"
            rest = (pattern, scale, 0, None, fit(configs[0], pattern.block_size, gather), "ieee")

            def run():
                if kind == "dq":
                    launch_dq(*inputs, dq, *rest)
                    return dict(dq=dq)
                launch_dkdv(*inputs, dk, dv, *rest)
                return dict(dk=dk, dv=dv)

            return run

        return prepare

    return build


def backward(**options):
    """The whole backward pass: 10 * pairs * d operations. Configs: KV tiles + dq."""

    def build(configs):
        def prepare(pattern, q, k, v, dout):
            scale = 1 / math.sqrt(q.shape[-1])
            out, lse = launch_forward(q, k, v, pattern, scale)
            tiles = dict(zip(("dkdv_config", "dq_config"), configs, strict=False))

            def run():
                grads = launch_backward(
                    q, k, v, out, lse, dout, None, pattern, scale, **tiles, **options
                )
                return dict(zip(("dq", "dk", "dv"), grads, strict=True))

            return run

        return prepare

    return build


KERNELS = dict(
    forward=(4, forward),
    dkdv=(8, one_kernel("dkdv")),
    dq=(6, one_kernel("dq")),
    separate=(10, backward()),
    fused=(10, backward(deterministic=False)),
    fused_ptr=(10, backward(deterministic=False, tma_add=False)),
)


def main():
    a = parse()
    started = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    per_pair, build = KERNELS[a.kernel]
    good = []
    for text in a.configs.split(","):
        prepare = build([TileConfig.parse(x) for x in text.split("+")])
        began = time.time()
        try:
            error, name = check(a, prepare)
        except Exception as e:  # a candidate that fails is a result: go on with the next
            print(f"{a.kernel} {text} FAILED {type(e).__name__}: {str(e)[:200]}", flush=True)
            continue
        verdict = "ok" if error < 2e-2 else "WRONG"
        took = time.time() - began
        print(f"{a.kernel} {text} {verdict} error {error:.1e} ({name}) {took:.1f} s", flush=True)
        if verdict == "ok":
            good.append((text, prepare))
    for shape in a.shapes.split(","):
        tokens, heads, *rest = map(int, shape.split("x"))
        pattern, *inputs = problem(a, tokens, heads, rest[0] if rest else heads)
        flops = per_pair * pattern.kept_pairs(tokens) * a.d
        for text, prepare in good:
            if time.time() - started > a.deadline:
                print("deadline", flush=True)
                sys.exit()
            torch.cuda.reset_peak_memory_stats()
            run = prepare(pattern, *inputs)
            ms = triton.testing.do_bench(run, warmup=25, rep=a.rep, return_mode="median")
            peak = torch.cuda.max_memory_allocated() / 2**30
            line = f"{ms:.3f} ms {flops / ms / 1e9:.1f} TF peak {peak:.2f} GiB"
            print(f"{a.kernel} {shape} {text} {line}", flush=True)


if __name__ == "__main__":
    main()
