"""Ranks that hold a sequence in parts, against one that holds it all, in float64.

`main` is what each rank runs. It finds the name of a result file in sys.argv, where rank 0 writes
what every case gave (JSON). Groups of 1, 2 and 3 ranks are subgroups of the 4 that are started.
"""

import datetime
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from s2_kernels import LayerPattern, dense, local_stride, ranges, s2_attention, sliding_window
from s2_kernels.exchange import block_bytes, merged, received_blocks, sent_blocks, zigzag
from s2_kernels.moves import Blocks
from s2megatron.attention import context_parallel
from s2megatron.attention.context_parallel import ContextAttention

B, D, DV = 16, 8, 4


def contiguous(ranks: int, n_blocks: int):
    size = n_blocks // ranks
    return tuple((range(rank * size, (rank + 1) * size),) for rank in range(ranks))


def uneven(ranks: int, n_blocks: int):
    """Chunks of all sizes, dealt out in turn; every rank has as many blocks."""
    owners = [(k * k + k // 3) % ranks for k in range(n_blocks)]
    for k, rank in enumerate(owners):  # even out
        fewest = min(range(ranks), key=owners.count)
        if owners.count(rank) > n_blocks // ranks:
            owners[k] = fewest
    return tuple(
        merged([range(k, k + 1) for k, owner in enumerate(owners) if owner == rank])
        for rank in range(ranks)
    )


@dataclass(frozen=True)
class ContextCase:
    pattern: LayerPattern
    ranks: int
    blocks: int
    tp: int = 1
    cut: object = zigzag
    groups: int | None = None


def _ls(heads, kv_heads, local, stride, **more):
    return local_stride(heads=heads, kv_heads=kv_heads, block_size=B, local_blocks=local,
                        stride=stride, **more)  # fmt: skip


CASES = {
    "mha": ContextCase(_ls(4, 4, 3, 4), 2, 16),
    "gqa": ContextCase(_ls(6, 2, 4, 8, head_step=2), 4, 32),
    "v_not_dividing_a_chunk": ContextCase(_ls(4, 4, 3, 8, head_step=3), 4, 40),
    "window_over_chunks": ContextCase(_ls(4, 2, 7, 4), 4, 16),
    "stride_over_sequence": ContextCase(_ls(2, 2, 2, 64), 4, 16),
    "ranges": ContextCase(
        ranges(heads=4, kv_heads=2, block_size=B, bands=[(3, 1), (12, 2), (None, 8)]), 2, 32
    ),
    "short_ranges": ContextCase(
        ranges(heads=2, block_size=B, bands=[(2, 1), (9, 3)]), 3, 24
    ),
    "mixed_strides": ContextCase(_ls(4, 4, 2, [2, 4, 8, 3]), 3, 24),
    "dense_heads": ContextCase(_ls(8, 4, 2, [2, 4, 8, 8], dense_heads=1), 3, 24),
    "sliding_window": ContextCase(
        sliding_window(heads=4, kv_heads=2, block_size=B, local_blocks=5), 4, 24
    ),
    "dense": ContextCase(dense(heads=4, kv_heads=2, block_size=B), 4, 16),
    "tp_over_kv_heads": ContextCase(_ls(8, 2, 3, 4), 2, 16, tp=4),
    "tp": ContextCase(_ls(8, 4, 3, 4), 2, 16, tp=2),
    "one_rank": ContextCase(_ls(4, 2, 3, 4), 1, 7),
    "contiguous": ContextCase(_ls(4, 2, 3, 4), 3, 24, cut=contiguous),
    "uneven_chunks": ContextCase(_ls(4, 2, 3, 4), 3, 24, cut=uneven),
    "head_groups": ContextCase(_ls(8, 4, 3, 4), 4, 32, groups=4),
    "groups_of_mixed_strides": ContextCase(
        _ls(8, 4, 2, [2, 4, 8, 3], dense_heads=1), 3, 24, groups=2
    ),
    "groups_of_uneven_chunks": ContextCase(_ls(4, 2, 3, 4), 3, 24, cut=uneven, groups=2),
}  # fmt: skip


def poison(value: float):
    """Makes `value` stand in buffers where nobody sent anything. (Sums start at 0 all the same.)"""

    def fill(to: Blocks) -> None:
        to.x[to.index] = value

    return mock.patch.object(context_parallel, "clear_blocks", fill)


def _inputs(case: ContextCase):
    g = torch.Generator().manual_seed(0)
    tokens, p = case.blocks * B, case.pattern
    shapes = (p.heads, D), (p.kv_heads, D), (p.kv_heads, DV), (p.heads, DV)
    return [torch.randn(2, tokens, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def run_case(case: ContextCase, group) -> dict[str, float]:
    """Largest differences from one rank's out, dq, dk, dv on this rank; bytes counted and due."""
    q, k, v, dout = _inputs(case)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = s2_attention(*whole, case.pattern, backend="reference")
    expected = out, *torch.autograd.grad(out, whole, dout)

    chunks = case.cut(case.ranks, case.blocks)
    mine = torch.cat([torch.arange(c.start * B, c.stop * B) for c in chunks[group.rank()]])
    got = [torch.zeros_like(x)[:, mine] for x in (dout, q, k, v)]
    counted = due = 0
    for tp in range(case.tp):  # one after the other: they do not meet
        part = case.pattern.shard(tp, case.tp)
        heads = range(tp * part.heads, (tp + 1) * part.heads)
        first = tp * case.pattern.kv_heads // case.tp
        kv_heads = range(first, first + part.kv_heads)
        local = [x[:, mine][:, :, list(h)].requires_grad_()
                 for x, h in ((q, heads), (k, kv_heads), (v, kv_heads))]  # fmt: skip
        attention = ContextAttention(part, None, group, case.cut, exchange_groups=case.groups)
        with poison(float("nan")):
            result = attention.attend(*local)
            forward = attention.bytes_received
            grads = torch.autograd.grad(result, local, dout[:, mine][:, :, list(heads)])
        for total, x, h in zip(got, (result, *grads), (heads, heads, kv_heads, kv_heads),
                               strict=True):  # fmt: skip
            total[:, :, list(h)] += x
        size = block_bytes(part, batch=2, head_sizes=D + DV, element_bytes=8)
        received = received_blocks(part, chunks, group.rank()) * size
        assert forward == received, (forward, received)
        counted += attention.bytes_received
        due += 2 * received + sent_blocks(part, chunks, group.rank()) * size
    report = {
        name: (x - y[:, mine]).detach().abs().max().item()
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True)
    }
    assert not any(x != x for x in report.values()), f"NaN: a rank read what nobody sent: {report}"
    return report | {"bytes": counted, "due": due}


def same_bits(group) -> bool:
    """bfloat16 gradients of passes over the same inputs, in 1, 1, 2, 4 and 4 groups of heads."""
    case = CASES["dense_heads"]
    q, k, v, dout = (x.bfloat16() for x in _inputs(case))
    mine = slice(group.rank() * 8 * B, (group.rank() + 1) * 8 * B)
    passes = []
    for groups in (1, 1, 2, 4, 4):
        local = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
        attention = ContextAttention(case.pattern, None, group, contiguous, exchange_groups=groups)
        out = attention.attend(*local)
        passes.append((out, *torch.autograd.grad(out, local, dout[:, mine])))
    return all(
        torch.equal(x, y) for other in passes[1:] for x, y in zip(passes[0], other, strict=True)
    )


GPU_CASES = {
    "gqa": local_stride(heads=8, kv_heads=4, block_size=64, local_blocks=4, stride=8),
    "dense_heads": local_stride(
        heads=8, kv_heads=4, block_size=64, local_blocks=3, stride=[2, 4, 8, 8], dense_heads=1
    ),
    "ranges": ranges(heads=4, kv_heads=2, block_size=64, bands=[(3, 1), (9, 2), (None, 8)]),
    "dense": dense(heads=4, kv_heads=2),
}


def run_on_gpu(pattern: LayerPattern, group, tokens: int = 8192) -> dict[str, float]:
    """Errors in bfloat16 against one rank in float32, over those of one rank in bfloat16.

    Raises RuntimeError where a pass that is not the first one makes the host wait for the GPU.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    g = torch.Generator().manual_seed(0)
    heads = (pattern.heads, pattern.kv_heads, pattern.kv_heads, pattern.heads)
    inputs = [torch.randn(1, tokens, h, 128, generator=g).bfloat16().to(device) for h in heads]
    chunks = zigzag(group.size(), tokens // 64)[group.rank()]
    mine = torch.cat([torch.arange(c.start * 64, c.stop * 64) for c in chunks]).to(device)

    def both_passes(attend, *x):
        leaves = [t.clone().requires_grad_() for t in x[:3]]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, x[3])

    def alone(*x):
        return s2_attention(*x, pattern)

    exact = both_passes(alone, *(x.float() for x in inputs))
    plain = both_passes(alone, *inputs)
    attention = ContextAttention(pattern, None, group)
    local = [x[:, mine] for x in inputs]
    with poison(1e4):  # not NaN: a tile may be loaded whole, and what nobody sees masked
        got = both_passes(attention.attend, *local)
    both_passes(attention.attend, *local)  # compiles what clears a buffer
    torch.cuda.set_sync_debug_mode("error")
    both_passes(attention.attend, *local)
    torch.cuda.set_sync_debug_mode("default")
    ratios = {}
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        errors = [(t.detach().float() - z[:, mine].detach()).norm() for t in (x, y[:, mine])]
        ratios[name] = (errors[0] / errors[1]).item()
    return ratios


def main_on_gpu() -> None:
    """Under torchrun: every rank prints its name, case and ratios."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for name, pattern in GPU_CASES.items():
        ratios = run_on_gpu(pattern, dist.group.WORLD)
        line = json.dumps({"rank": dist.get_rank(), "case": name, "ratios": ratios})
        sys.stdout.write(line + "\n")  # once: print writes twice under PYTHONUNBUFFERED
        sys.stdout.flush()
    dist.destroy_process_group()


def bench() -> int:
    """scripts/bench/context_parallel.py, whose options are in sys.argv."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/bench"))
    import context_parallel as script

    script.main()
    return 0


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    world = dist.get_world_size()
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(1, world + 1)}
    results = {}
    for name, case in CASES.items():
        if case.ranks <= world:
            mine = None
            if dist.get_rank() < case.ranks:
                mine = run_case(case, groups[case.ranks])
            results[name] = [None] * world
            dist.all_gather_object(results[name], mine)
    if world >= 3 and dist.get_rank() < 3:
        results["same_bits"] = same_bits(groups[3])
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    main_on_gpu() if sys.argv[1:] == ["--gpu"] else os._exit(main())
