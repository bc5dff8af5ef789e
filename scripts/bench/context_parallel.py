"""Times the attention of one sequence that lies on several GPUs, against one GPU that holds it all.

    torchrun --nproc-per-node 4 scripts/bench/context_parallel.py --seqlens 131072,524288

For every length: forward and backward on one GPU, on all of them together, and on all of them with
the exchange left out (its buffers are there, nothing is sent), which gives the communication that
is not hidden. Times are medians in ms, of the slowest rank. Bytes are those counted at the
collective, per forward and backward pass, and stop the run where they are not the formula's.
Writes OUT/NAME.json, and prints a table. Without GPUs it runs on gloo, to be tried out.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

# Found by the line above, which lets the script run in a checkout that is not installed.
from s2_kernels import local_stride, s2_attention  # noqa: E402
from s2_kernels.exchange import block_bytes, received_blocks, sent_blocks, zigzag  # noqa: E402
from s2megatron.attention.context_parallel import ContextAttention  # noqa: E402
from s2megatron.provenance import describe  # noqa: E402

COLUMNS = {
    "tokens": "tokens",
    "one_ms": "one GPU ms",
    "together_ms": "together ms",
    "of_ideal": "of ideal",
    "silent_ms": "without exchange ms",
    "not_hidden": "not hidden",
    "received_mib": "received MiB",
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlens", default="131072,524288")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block", type=int, default=64, help="tokens of a block")
    parser.add_argument("--window", type=int, default=16, help="in blocks")
    parser.add_argument("--stride", type=int, default=16, help="in blocks")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/raw")
    parser.add_argument("--name", default="context-parallel")
    return parser.parse_args(argv)


class SilentAttention(ContextAttention):
    """The same work on each rank, with nothing sent: every swap finds its buffer filled."""

    def _swap(self, plan, rows, *, home=False):
        coming = plan.send_counts if home else plan.receive_counts
        return rows.new_zeros(sum(coming), *rows.shape[1:])


def milliseconds(run, device, repeats: int) -> float:
    """Median over the repeats, of the rank that took longest; the first two warm up."""
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    slowest = torch.tensor(statistics.median(times[2:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def both_passes(attend, q, k, v, dout):
    def run():
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    return run


def measure(options, tokens: int, device: torch.device) -> dict:
    pattern = local_stride(
        heads=options.heads,
        kv_heads=options.kv_heads,
        block_size=options.block,
        local_blocks=options.window,
        stride=options.stride,
        head_step=max(1, options.stride // options.kv_heads),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def inputs(length):
        shapes = (options.heads, options.kv_heads, options.kv_heads, options.heads)
        made = [
            torch.randn(1, length, h, options.head_size, device=device, dtype=dtype) for h in shapes
        ]
        return *(x.requires_grad_() for x in made[:3]), made[3]

    whole = inputs(tokens)
    one = milliseconds(both_passes(lambda *x: s2_attention(*x, pattern), *whole), device,
                       options.repeats)  # fmt: skip
    del whole
    part = inputs(tokens // ranks)
    attention = ContextAttention(pattern, None, dist.group.WORLD)
    together = milliseconds(both_passes(attention.attend, *part), device, options.repeats)
    passes = options.repeats + 2
    chunks = zigzag(ranks, tokens // options.block)
    size = block_bytes(
        pattern, batch=1, head_sizes=2 * options.head_size, element_bytes=dtype.itemsize
    )
    due = size * (2 * received_blocks(pattern, chunks, rank) + sent_blocks(pattern, chunks, rank))
    if attention.bytes_received != passes * due:
        raise RuntimeError(
            f"rank {rank} received {attention.bytes_received / passes} bytes a pass; due: {due}"
        )
    quiet = SilentAttention(pattern, None, dist.group.WORLD)
    silent = milliseconds(both_passes(quiet.attend, *part), device, options.repeats)
    most = torch.tensor(due, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {
        "tokens": tokens,
        "one_ms": round(one, 3),
        "together_ms": round(together, 3),
        "of_ideal": round(one / ranks / together, 4),
        "silent_ms": round(silent, 3),
        "not_hidden": round(max(0.0, together - silent) / together, 4),
        "received_mib": round(most.item() / 2**20, 3),
    }


def main(argv=None) -> None:
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rows = [measure(options, int(tokens), device) for tokens in options.seqlens.split(",")]
    if dist.get_rank() == 0:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        found = describe(ROOT) | {"ranks": dist.get_world_size(), "settings": settings}
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"{options.name}.json"
        file.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
        print(f"| {' | '.join(COLUMNS.values())} |\n|{' --- |' * len(COLUMNS)}")
        for row in rows:
            print(f"| {' | '.join(str(row[name]) for name in COLUMNS)} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
