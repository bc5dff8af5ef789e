"""Times the attention of one sequence that lies on several GPUs, against one GPU that holds it all.

    torchrun --nproc-per-node 4 scripts/bench/context_parallel.py --seqlens 131072,524288

For every length: forward and backward on one GPU, and, in rows, the ways to share them out:

    two launches     near and far of a chunk apart, merged by lse, as before near.Near
    one launch       both at once, all heads in one group
    n groups         the next group's exchange in flight beside the kernels
    n groups, 0      the same with no multiprocessor left to NCCL
    chosen           as many groups as the plugin takes by itself

Each on all GPUs together, and with the exchange left out (its buffers are there, nothing is sent),
which gives the communication that is not hidden. Times are medians in ms, of the slowest rank, of
calls that follow each other at once (`IN_A_ROW`); up to 2026-11-28 each began on an idle GPU.
Bytes are those counted at the collective, per forward and backward pass, and stop the run where
they are not the formula's. Writes OUT/NAME.json, and prints a table. Without GPUs
it runs on gloo, to be tried out.
"""

import argparse
import functools
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
from s2_kernels import dense, local_stride
from s2_kernels.exchange import block_bytes, received_blocks, sent_blocks, zigzag
from s2megatron.attention import context_parallel
from s2megatron.attention.context_parallel import ContextAttention
from s2megatron.provenance import describe

COLUMNS = {
    "tokens": "tokens",
    "way": "way",
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
    parser.add_argument("--backend", choices=["auto", "hopper", "triton"], default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/raw")
    parser.add_argument("--name", default="context-parallel")
    return parser.parse_args(argv)


class Silent:
    """The same work on each rank, with nothing sent: every swap finds its buffer filled.

    With noise, made once: products of zeros draw so little power that the card's clock rises.
    """

    def _swap(self, plan, rows, *, home=False):
        coming = plan.send_counts if home else plan.receive_counts
        return Arrived(_noise((sum(coming), *rows.shape[1:]), rows.dtype, rows.device))


@functools.lru_cache(maxsize=8)
def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


class Arrived:
    """A transfer that takes no time."""

    def __init__(self, rows):
        self.rows = rows

    def wait(self):
        return self.rows


class TwoLaunches(ContextAttention):
    """Near under the pattern, far without a mask, merged by lse: for patterns of one stride.

    Near begins at a multiple of the stride, so that the pattern is the same from there on.
    """

    def _cut(self, view, k, v):
        """Far's and near's keys, their offsets, and far's pattern."""
        far = view.near.row * self._block
        at = (view.chunk.start - view.near.start) * self._block
        return (k[:, :far], v[:, :far]), (k[:, far:], v[:, far:]), far, at

    def _far_pattern(self, part):
        p = part.pattern
        return dense(heads=p.heads, kv_heads=p.kv_heads, block_size=p.block_size)

    def _attend_chunk(self, part, view, q, k, v, spare, into):
        if view.near is None or not view.near.row:
            return super()._attend_chunk(part, view, q, k, v, spare, into)
        far, near, far_at, near_at = self._cut(view, k, v)
        run = functools.partial(
            context_parallel.s2_attention, softmax_scale=self.scale, return_lse=True, spare=spare
        )
        out, lse = run(q, *near, part.pattern, q_offset=near_at)
        far_out, far_lse = run(q, *far, self._far_pattern(part), q_offset=far_at)
        total = torch.logaddexp(lse, far_lse)
        near_weight, far_weight = (
            (x - total).exp().transpose(1, 2)[..., None] for x in (lse, far_lse)
        )
        into.copy_(out * near_weight + far_out * far_weight)
        return total

    def _chunk_gradients(self, part, view, q, out, dout, lse, k, v, spare, into):
        if view.near is None or not view.near.row:
            super()._chunk_gradients(part, view, q, out, dout, lse, k, v, spare, into)
            return
        far, near, far_at, near_at = self._cut(view, k, v)
        run = functools.partial(
            context_parallel.s2_attention_backward, softmax_scale=self.scale, spare=spare
        )
        lse = lse.contiguous()
        dq, *of_near = run(q, *near, out, lse, dout, part.pattern, q_offset=near_at)
        far_dq, *of_far = run(q, *far, out, lse, dout, self._far_pattern(part), q_offset=far_at)
        into[0].copy_(dq.float() + far_dq)
        for x, pair in zip(into[1:], zip(of_far, of_near, strict=True), strict=True):
            torch.cat(pair, dim=1, out=x)


def ways(kv_heads: int) -> dict[str, tuple[type, dict]]:
    """Class and options of every row."""
    rows = {
        "two launches": (TwoLaunches, dict(exchange_groups=1)),
        "one launch": (ContextAttention, dict(exchange_groups=1)),
    }
    for n in (2, 4):
        if kv_heads % n == 0:
            rows[f"{n} groups"] = (ContextAttention, dict(exchange_groups=n))
            rows[f"{n} groups, 0"] = (ContextAttention, dict(exchange_groups=n, spare=0))
    return rows | {"chosen": (ContextAttention, {})}


IN_A_ROW = 4
"""Calls that are timed together: in a training step the GPU is busy when attention is called, and
does not wait for the host to launch what comes first."""


def milliseconds(run, device, repeats: int) -> float:
    """Of one of `IN_A_ROW` calls; median over the repeats, of the rank that took longest.

    The first two repeats warm up.
    """
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(IN_A_ROW):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began) / IN_A_ROW)
    slowest = torch.tensor(statistics.median(times[2:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def both_passes(attend, q, k, v, dout):
    def run():
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    return run


def pattern_of(options):
    return local_stride(
        heads=options.heads,
        kv_heads=options.kv_heads,
        block_size=options.block,
        local_blocks=options.window,
        stride=options.stride,
        head_step=max(1, options.stride // options.kv_heads),
    )


def due_bytes(pattern, options, tokens: int, element_bytes: int) -> int:
    """What this rank receives in a forward and a backward pass."""
    rank, chunks = dist.get_rank(), zigzag(dist.get_world_size(), tokens // options.block)
    size = block_bytes(
        pattern, batch=1, head_sizes=2 * options.head_size, element_bytes=element_bytes
    )
    return size * (2 * received_blocks(pattern, chunks, rank) + sent_blocks(pattern, chunks, rank))


def measure(options, tokens: int, device: torch.device):
    """Yields the rows of a length."""
    pattern = pattern_of(options)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ranks = dist.get_world_size()

    def inputs(length):
        shapes = (options.heads, options.kv_heads, options.kv_heads, options.heads)
        made = [
            torch.randn(1, length, h, options.head_size, device=device, dtype=dtype) for h in shapes
        ]
        return *(x.requires_grad_() for x in made[:3]), made[3]

    whole = inputs(tokens)
    alone = functools.partial(context_parallel.s2_attention, pattern=pattern)
    one = milliseconds(both_passes(alone, *whole), device, options.repeats)
    del whole
    part = inputs(tokens // ranks)
    due = due_bytes(pattern, options, tokens, dtype.itemsize)
    most = torch.tensor(due, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for way, (attention_class, settings) in ways(options.kv_heads).items():
        attention = attention_class(pattern, None, dist.group.WORLD, **settings)
        together = milliseconds(both_passes(attention.attend, *part), device, options.repeats)
        received = attention.bytes_received / (options.repeats + 2) / IN_A_ROW
        if received != due:
            raise RuntimeError(
                f"rank {dist.get_rank()} received {received} bytes a pass, {way}; due: {due}"
            )
        silent_class = type("SilentAttention", (Silent, attention_class), {})
        quiet = silent_class(pattern, None, dist.group.WORLD, **settings)
        silent = milliseconds(both_passes(quiet.attend, *part), device, options.repeats)
        if way == "chosen":
            way = f"chosen: {len(attention._parts(part[0], part[2]))}"
        yield {
            "tokens": tokens,
            "way": way,
            "one_ms": round(one, 3),
            "together_ms": round(together, 3),
            "of_ideal": round(one / ranks / together, 4),
            "silent_ms": round(silent, 3),
            "not_hidden": round(max(0.0, together - silent) / together, 4),
            "received_mib": round(most.item() / 2**20, 3),
        }


def take_backend(backend: str) -> None:
    """Attention as the plugin calls it, by a backend; on a CPU, as ever."""
    if backend != "auto":
        for name in ("s2_attention", "s2_attention_backward"):
            run = functools.partial(getattr(context_parallel, name), backend=backend)
            setattr(context_parallel, name, run)


def main(argv=None) -> None:
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    take_backend(options.backend)
    rows = [
        row
        for tokens in options.seqlens.split(",")
        for row in measure(options, int(tokens), device)
    ]
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
