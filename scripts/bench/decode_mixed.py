"""Times decoding of mixed batches on one Hopper GPU: its own kernel against the portable one.

    python3 scripts/bench/decode_mixed.py [--out FILE.json]

Sequences of different lengths, dense heads beside sparse ones, drafts, other head sizes: what
decode_kernel.py, whose sequences are all as long, does not show. A row has microseconds of a call
in a CUDA graph that walks several pools, and the live bytes at the copy bandwidth measured in the
same run.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts/bench")]

from decode_kernel import copy_bandwidth, fill, graph_time

from s2_kernels import LayerPattern, dense, local_stride
from s2_kernels.decode import decode_config, launch_decode, tile_of
from s2megatron import provenance

DEVICE = "cuda"
GQA = dict(heads=32, kv_heads=8)
S2 = local_stride(**GQA, local_blocks=16, stride=16)
MHA = local_stride(heads=16, local_blocks=16, stride=16)
ONE_DENSE = local_stride(**GQA, local_blocks=16, stride=16, dense_heads=1)
LONG, DICE = 131072, random.Random(1)
MIXED = [DICE.randint(500, LONG) for _ in range(64)]
CASES: list[tuple[str, LayerPattern, list[int], int, int]] = [
    ("128k, 20k, 4k and 700 tokens", S2, [LONG, 20000, 4000, 700], 1, 128),
    ("16 of 500 to 128k", S2, MIXED[:16], 1, 128),
    ("64 of 500 to 128k", S2, MIXED, 1, 128),
    ("one of 128k, 15 of 1,000", S2, [LONG] + [1000] * 15, 1, 128),
    ("64 of 2k", S2, [2048] * 64, 1, 128),
    ("128k, a dense KV head of 8", ONE_DENSE, [LONG], 1, 128),
    ("4 of 128k, a dense KV head of 8", ONE_DENSE, [LONG] * 4, 1, 128),
    ("128k, dense", dense(**GQA), [LONG], 1, 128),
    ("16 of 32k, dense", dense(**GQA), [32768] * 16, 1, 128),
    ("128k, a draft of 4 tokens", S2, [LONG], 4, 128),
    ("128k, 16 heads on 16 KV heads", MHA, [LONG], 1, 128),
    ("128k, head size 64", S2, [LONG], 1, 64),
    ("8 of 128k, head size 64", S2, [LONG] * 8, 1, 64),
    ("128k, head size 256", S2, [LONG], 1, 256),
    ("8 of 128k, head size 256", S2, [LONG] * 8, 1, 256),
]
"""What it is called, the pattern, lengths, new tokens, head size."""


def time_case(pattern: LayerPattern, lengths: list[int], s: int, d: int) -> dict:
    """Microseconds by either kernel, and the live bytes."""
    first = fill(pattern, lengths, d, torch.bfloat16)
    count = max(1, min(12, int(4e8 / first[3])))  # so that no page is still in the L2 cache
    pools = [first, *(fill(pattern, lengths, d, torch.bfloat16) for _ in range(count - 1))]
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = torch.randn(len(lengths), s, pattern.heads, d, device=DEVICE).bfloat16()
    rows, _ = tile_of(s, pattern.heads // pattern.kv_heads)
    portable = decode_config(d, d, rows, pattern.block_size, q.dtype, q.device)
    us = {
        name: graph_time([
            lambda pool=pool, config=config: launch_decode(
                q, *pool[:3], lens, pattern, d**-0.5, config=config
            )
            for pool in pools
        ])
        for name, config in (("portable", portable), ("hopper", None))
    }  # fmt: skip
    return us | dict(bytes=first[3])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    copy, rows = copy_bandwidth(), []
    for name, *case in CASES:
        row = time_case(*case) | dict(case=name)
        rows.append(row | dict(floor_us=row["bytes"] / copy * 1e6))
        print("| {case} | {floor_us:.1f} | {portable:.1f} | {hopper:.1f} |".format(**rows[-1]),
              flush=True)  # fmt: skip
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, copy=copy,
                  rows=rows, **provenance.describe(ROOT, ("triton",)))  # fmt: skip
    if a.out:
        a.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
