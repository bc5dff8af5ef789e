"""What context parallelism copies and holds: the planner's figures beside the operations that run.

Each rank of `ContextAttention` runs on the CPU, with kernels that only allocate, in a group whose
other ranks are not there. PyTorch's operations are counted, and
blocks that are moved, which on GPUs a kernel of ours does.
"""

import pytest
import torch
import torch.distributed as dist
from planner_cases import make_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from s2_kernels import dense, local_stride
from s2_kernels.moves import Blocks
from s2_kernels.pattern import ranges, sliding_window
from s2megatron.attention import context_parallel
from s2megatron.planner import context
from s2megatron.planner.layout import Layout, Model

HEADS = {"heads": 8, "kv_heads": 4, "block_size": 16}
PATTERNS = {
    "stride": local_stride(**HEADS, local_blocks=4, stride=8, head_step=2),
    "window over chunks": local_stride(**HEADS, local_blocks=20, stride=4),
    "ranges": ranges(**HEADS, bands=[(3, 1), (12, 2), (None, 8)]),
    "window alone": sliding_window(**HEADS, local_blocks=9),
    "mixed": local_stride(**HEADS, local_blocks=4, stride=[2, 4, 8, 8], dense_heads=1),
    "dense": dense(**HEADS),
}
RANKS, BLOCKS, HEAD = 4, 64, 32


class Counted(TorchDispatchMode):
    """Bytes that operations read and write, and the most that is held of what they allocate.

    Of tensors of four dimensions or more: lse and indices are left out.
    """

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.moved, self.held, self.peak = rank, 0, {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        self.moved += self._bytes(op, args, result)
        for x in filter(_size, _tensors(result)):
            storage = x.untyped_storage()
            if not any(y.untyped_storage()._cdata == storage._cdata for y in _tensors(args)):
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: x for key, x in self.held.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result

    def _bytes(self, op, args, result) -> int:
        name = op.name().split("::")[1].split(".")[0]
        given = [_size(x) for x in _tensors(args)]
        made = [_size(x) for x in _tensors(result)]
        if op.is_view or "empty" in name or not sum(given + made):
            return 0
        if name == "alltoall_base_":  # what a rank sends to itself
            counts, rows = args[4], args[1]
            return 2 * counts[self.rank] * _size(rows[:1])
        if name in ("zero_", "zeros_like", "zeros", "new_zeros"):
            return made[0]
        if name == "index_put_":  # blocks set to a number
            return len(args[1][1]) * _size(args[0][:, :1, :, :1])
        if name == "copy_":
            return sum(given)
        raise AssertionError(f"{op} is not counted yet")


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for part in tree for x in _tensors(part)] if isinstance(tree, list | tuple) else []


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size() if x.dim() >= 4 else 0


def _attend(q, k, v, pattern, *, into, **options):
    return into, q.new_empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32)


def _gradients(q, k, v, out, lse, dout, pattern, *, into, **options):
    return into


def _copy(to, source):
    _looking().moved += 2 * _size_of(to)


def _add(to, source, starts=None):
    _looking().moved += 2 * _size_of(to) + _size_of(source)


def _looking() -> Counted:
    return _get_current_dispatch_mode()


def _size_of(blocks: Blocks) -> int:
    return len(blocks.slots) * _size(blocks.x[:, :1, :, :1])


@pytest.fixture
def counted(request, monkeypatch):
    """The planner's model of a layer of such a pattern; what each rank's two passes do."""
    monkeypatch.setattr(context_parallel, "copy_blocks", _copy)
    monkeypatch.setattr(context_parallel, "add_blocks", _add)
    monkeypatch.setattr(context_parallel, "s2_attention", _attend)
    monkeypatch.setattr(context_parallel, "s2_attention_backward", _gradients)
    pattern, found = PATTERNS[request.param], []
    sizes = {"layers": 1, "heads": 8, "kv_heads": 4, "head_dim": HEAD}
    model = Model(make_model(seq_len=BLOCKS * 16, **sizes).shape, (pattern,))
    for rank in range(RANKS):
        dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
        heads = (pattern.heads, pattern.kv_heads, pattern.kv_heads)
        tokens = BLOCKS * 16 // RANKS
        q, k, v = (torch.zeros(1, tokens, h, HEAD, dtype=torch.bfloat16) for h in heads)
        try:
            attention = context_parallel.ContextAttention(
                pattern, None, dist.group.WORLD, exchange_groups=1
            )
            with Counted(rank) as forward:
                out, lse = attention.forward(q, k, v)
            with Counted(rank) as backward:
                attention.backward(q, k, v, out, lse, out)
        finally:
            dist.destroy_process_group()
        found.append((forward.moved, backward.moved, backward.peak + out.nbytes))
    return model, found


@pytest.mark.parametrize("counted", PATTERNS, indirect=True)
def test_copies_and_buffers_are_those_of_the_operations(counted):
    """No rank does more than the planner says; the one that does most does not much less.

    The planner adds up the most of each kind, which no single rank has.
    """
    model, found = counted
    layout = Layout(gpus=RANKS, cp=RANKS, fused=False)
    said = (*context.copied_bytes(model, layout, 0), context.buffer_bytes(model, layout, 0))
    for most, planned in zip(map(max, *found), said, strict=True):
        print(most, planned, planned / most)
        print(most, planned, planned / most)
        assert most <= planned <= 1.12 * most
