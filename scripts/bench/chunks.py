"""Times a chunk of queries at the end of a longer sequence, Hopper against portable kernels.

    python3 scripts/bench/chunks.py --tokens 131072 --chunk 8192

Three problems of the last chunk, batch 1, bf16: *prefill*, the chunk against all tokens before it;
and what a rank of context parallelism makes of that: *near*, the chunk and the window before it
under the pattern, and *far*, the shard before these, which every query sees. One GPU.

    python3 scripts/bench/chunks.py --pages --heads 32 --kv-heads 8 --stride 16

The chunk of a prompt whose keys lie in pages (serving): by `paged_prefill`, which copies what the
chunk sees and runs the training kernel, the copy by itself, and by `paged_attention`; sparse and
dense layers.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from s2_kernels import LayerPattern, dense, local_stride

BLOCK = 64


@dataclass(frozen=True)
class Problem:
    """Queries at an offset: `chunk` of them, keys, and the pattern they are seen under."""

    name: str
    pattern: LayerPattern
    keys: int
    q_offset: int


def problems(a: argparse.Namespace) -> list[Problem]:
    """The three problems of the last chunk.

    Raises:
        ValueError: a chunk that leaves no room for the window before it, or no whole blocks.
    """
    halo = a.local - BLOCK  # the window counts the query's own block
    before = a.tokens - a.chunk - halo
    if before <= 0 or any(x % (BLOCK * a.stride) for x in (a.tokens, a.chunk)):
        raise ValueError(
            f"--chunk {a.chunk} of --tokens {a.tokens}: both must be multiples of {BLOCK} * stride "
            f"({BLOCK * a.stride}), with more than {halo} tokens before the chunk"
        )
    heads = dict(heads=a.heads, kv_heads=a.kv_heads or a.heads, block_size=BLOCK)
    pattern = local_stride(**heads, local_blocks=a.local // BLOCK, stride=a.stride)
    far = -(-before // BLOCK // a.stride) * BLOCK
    return [
        Problem("prefill", pattern, a.tokens, a.tokens - a.chunk),
        Problem("near", pattern, halo + a.chunk, halo),
        Problem("far", dense(**heads), far, far),
    ]


def measure(p: Problem, backend: str, a: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a forward and a backward pass."""
    import torch
    import triton

    from s2_kernels import s2_attention

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(tokens, heads):
        shape = (1, tokens, heads, a.d)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    g = p.pattern.kv_heads
    leaves = [draw(a.chunk, a.heads), draw(p.keys, g), draw(p.keys, g)]
    leaves = [x.requires_grad_() for x in leaves]
    dout = draw(a.chunk, a.heads)

    def forward():
        return s2_attention(*leaves, p.pattern, q_offset=p.q_offset, backend=backend)

    out = forward()

    def backward():
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    bench = triton.testing.do_bench
    return tuple(
        bench(run, warmup=25, rep=a.rep, return_mode="median") for run in (forward, backward)
    )


def page_rows(a: argparse.Namespace) -> list[str]:
    """A row for a sparse layer, and for a dense one: milliseconds of a chunk over pages."""
    import torch
    from triton.testing import do_bench

    from s2_kernels import paged_attention, paged_prefill
    from s2_kernels.prefill import copy_seen

    heads = dict(heads=a.heads, kv_heads=a.kv_heads or a.heads, block_size=BLOCK)
    sparse = local_stride(**heads, local_blocks=a.local // BLOCK, stride=a.stride)
    g, blocks, device = sparse.kv_heads, -(-a.tokens // BLOCK), a.device
    options = dict(dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    q = torch.randn(1, a.chunk, a.heads, a.d, **options)
    k_pages, v_pages = (torch.randn(g * blocks, BLOCK, a.d, **options) for _ in range(2))
    table = torch.randperm(g * blocks, device=device).int().view(1, g, blocks)
    length = torch.tensor([a.tokens], dtype=torch.int32, device=device)
    rows = []
    for name, pattern in (("sparse", sparse), ("dense", dense(**heads))):

        def copy(pattern=pattern):
            return copy_seen(k_pages, v_pages, table[0], pattern, a.chunk, a.tokens)

        def whole(pattern=pattern):
            return paged_prefill(q, k_pages, v_pages, table, pattern, lengths=(a.tokens,))

        def decode(pattern=pattern):
            return paged_attention(q, k_pages, v_pages, table, length, pattern)

        if device == "cpu":  # tried out: nothing is timed
            assert (whole() - decode()).abs().max() < 1e-4
        times = [0.0] * 3 if device == "cpu" else [
            do_bench(run, warmup=25, rep=a.rep, return_mode="median")
            for run in (whole, copy, decode)
        ]  # fmt: skip
        rows.append(f"| {name} | {a.tokens:,} | " + " | ".join(f"{x:.3f}" for x in times) + " |")
    return rows


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--stride", type=int, default=32, help="in blocks")
    parser.add_argument("--local", type=int, default=1024, help="window in tokens")
    parser.add_argument("--d", type=int, default=128, help="head size")
    parser.add_argument("--rep", type=int, default=200, help="milliseconds of each measurement")
    parser.add_argument("--pages", action="store_true", help="keys in pages: see above")
    parser.add_argument("--device", default="cuda", help="cpu only tries --pages out")
    return parser.parse_args(argv)


def main():
    a = parse()
    if a.pages:
        print("| layer | tokens | paged_prefill ms | its copy | paged_attention |")
        print("| --- | --- | --- | --- | --- |", *page_rows(a), sep="\n")
        return
    print("| problem | keys | forward ms, Hopper | portable | backward ms, Hopper | portable |")
    print("| --- | --- | --- | --- | --- | --- |")
    for p in problems(a):
        (forward, backward), (forward_2, backward_2) = (
            measure(p, backend, a) for backend in ("hopper", "triton")
        )
        times = (forward, forward_2, backward, backward_2)
        print(f"| {p.name} | {p.keys:,} | " + " | ".join(f"{x:.3f}" for x in times) + " |")


if __name__ == "__main__":
    main()
