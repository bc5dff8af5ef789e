"""Problems with keys in two parts (`near.Near`): what of a whole sequence is left in memory."""

from dataclasses import dataclass

import torch
from attention_cases import (
    Case,
    _ls,
    assert_as_good_as_eager,
    make_inputs,
    reference_results,
    run_with_grads,
)

from s2_kernels import (
    FOREVER,
    LayerPattern,
    dense,
    ranges,
    s2_attention,
    s2_attention_backward,
    sliding_window,
)
from s2_kernels.near import Near, forever_before


@dataclass(frozen=True)
class NearCase:
    """A chunk of `chunk` blocks at the end of `blocks`; near begins as late as it can, or earlier.

    Attributes:
        early: by so many blocks.
        gap: rows between far and near that belong to nobody, in blocks.
    """

    name: str
    pattern: LayerPattern
    blocks: int
    chunk: int
    d: int = 32
    b: int = 1
    early: int = 0
    gap: int = 0

    def __str__(self) -> str:
        p = self.pattern
        return f"{self.name}-{self.chunk}of{self.blocks}x{p.block_size}-H{p.heads}-D{self.d}"

    @property
    def near(self) -> Near:
        reaches = [band.reach for rule in self.pattern.rules for band in rule.bands]
        reach = max((reach for reach in reaches if reach != FOREVER), default=1)
        start = self.blocks - self.chunk - (reach - 1) - self.early
        far = max(forever_before(rule, start) for rule in self.pattern.rules)
        return Near(start, far + self.gap)

    @property
    def case(self) -> Case:
        """The same problem with all keys in memory."""
        size = self.pattern.block_size
        length, end = self.chunk * size, self.blocks * size
        return Case(self.name, self.pattern, length, end, self.d, self.b, end - length)

    @property
    def rows(self) -> torch.Tensor:
        """Of all keys, those in memory: [kv_heads, t] positions, -1 where there is none."""
        size, near = self.pattern.block_size, self.near
        blocks = near.blocks(self.pattern, self.blocks - near.start + near.row)
        tokens = blocks[..., None] * size + torch.arange(size)
        return torch.where(blocks[..., None] < 0, -1, tokens).flatten(1)

    def in_memory(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """[b, positions, g, d] -> [b, t, g, d]; `fill` where there is none."""
        rows = self.rows.to(x.device)
        index = rows.clamp(min=0).T[None, :, :, None].expand(len(x), -1, -1, x.shape[-1])
        return x.gather(1, index).masked_fill((rows < 0).T[None, :, :, None], fill)

    def at_positions(self, x: torch.Tensor) -> torch.Tensor:
        """The gradients of `in_memory`, [b, t, g, d] -> [b, positions, g, d]; others are 0."""
        rows = self.rows.to(x.device)
        index = rows.clamp(min=0).T[None, :, :, None].expand(x.shape)
        whole = x.new_zeros(len(x), self.blocks * self.pattern.block_size, *x.shape[2:])
        return whole.scatter_add_(1, index, x.masked_fill((rows < 0).T[None, :, :, None], 0))


NEAR_CASES = [
    NearCase("gqa", _ls(4, 2, 16, 2, 4, head_step=2), 17, 5),
    NearCase("early", _ls(2, 2, 16, 2, 3), 19, 4, early=2, b=2),
    NearCase("gap", _ls(2, 1, 16, 3, 4), 14, 4, gap=2),
    NearCase("per_head_strides", _ls(4, 4, 16, 2, [2, 4, 8, 3]), 22, 6),
    NearCase("dense_heads", _ls(4, 2, 16, 2, 4, dense_heads=1), 12, 3),
    NearCase("ranges", ranges(heads=4, kv_heads=2, block_size=16,
                              bands=[(2, 1), (5, 2), (None, 4)]), 25, 7),
    NearCase("window", sliding_window(heads=2, block_size=16, local_blocks=3), 12, 4),
    NearCase("dense", dense(heads=2, block_size=32), 9, 3),
    NearCase("blocks_of_64", _ls(2, 2, 64, 2, 4), 11, 3),
]  # fmt: skip

HOPPER_NEAR_CASES = [  # near and chunks may begin in the middle of a tile of 128
    NearCase("gqa", _ls(4, 2, 64, 2, 3), 10, 3, d=128),
    NearCase("gap", _ls(2, 2, 64, 1, 3), 9, 2, d=64, b=2, early=1, gap=2),
    NearCase("block128", _ls(2, 1, 128, 1, 2), 6, 2, d=96),
    NearCase("ranges", ranges(heads=2, kv_heads=1, block_size=64,
                              bands=[(2, 1), (5, 3), (None, 6)]), 17, 5, d=64),
    NearCase("dense", dense(heads=2, kv_heads=1), 7, 3, d=128),
    NearCase("window", sliding_window(heads=1, block_size=64, local_blocks=3), 8, 3, d=64),
    NearCase("dense_heads", _ls(2, 2, 64, 2, 4, dense_heads=1), 9, 3, d=64),
    NearCase("wide_gqa", _ls(4, 2, 64, 2, 3), 10, 3, d=256),
    NearCase("wide_ranges", ranges(heads=1, block_size=64, bands=[(2, 1), (5, 3), (None, 6)]),
             14, 3, d=192, gap=1),
    NearCase("wide_dense", dense(heads=1, block_size=128), 4, 2, d=256, b=2),
]  # fmt: skip


GPU_NEAR_CASES = [
    *HOPPER_NEAR_CASES,
    NearCase("long", _ls(4, 2, 64, 4, 8), 160, 40, d=128),
    NearCase("long_gap", _ls(8, 2, 64, 4, [4, 8]), 100, 31, d=128, b=2, early=3, gap=5),
    NearCase("long_dense_heads", _ls(8, 4, 64, 4, 8, dense_heads=1), 90, 24, d=64),
    NearCase("long_ranges", ranges(heads=4, kv_heads=2, block_size=128,
                                   bands=[(2, 1), (9, 2), (None, 8)]), 70, 17, d=128),
    NearCase("wide_long", _ls(4, 2, 64, 4, 8), 90, 25, d=256),
]  # fmt: skip


def check_near(case: NearCase, dtype=torch.bfloat16, device="cpu", backend="hopper") -> None:
    """Far blocks, then near, in one launch: as with all keys in memory."""
    inputs = make_inputs(case.case, dtype, device)
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    k, v = case.in_memory(k, 1e3), case.in_memory(v, 1e3)  # finite where there is no key

    def attend(*x):
        at = dict(q_offset=case.case.q_offset, near=case.near)
        return s2_attention(*x, case.pattern, return_lse=True, backend=backend, **at)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = run_with_grads(attend, (*leaves, dout, dlse))
    nowhere = (case.rows < 0).T.to(device)
    for name in ("dk", "dv"):
        assert not results[name][:, nowhere].any()
        results[name] = case.at_positions(results[name])
    assert_as_good_as_eager(results, *reference_results(case.case, inputs), case.case)


def check_into(case: NearCase, dtype, backend: str, device="cpu") -> None:
    """Results written into parts of larger tensors: the same bits, and nothing beside them."""
    q, k, v, dout, _ = (x.detach() for x in make_inputs(case.case, dtype, device))
    k, v = case.in_memory(k, 1e3), case.in_memory(v, 1e3)
    common = dict(q_offset=case.case.q_offset, near=case.near, backend=backend)
    out, lse = s2_attention(q, k, v, case.pattern, return_lse=True, **common)
    made = out, *s2_attention_backward(q, k, v, out, lse, dout, case.pattern, **common)
    wholes = [_larger(x) for x in made]
    places = [x[:, 4:-3, 1:-1] for x in wholes]
    options = dict(return_lse=True, into=places[0], **common)
    got_out, got_lse = s2_attention(q, k, v, case.pattern, **options)
    options = dict(into=tuple(places[1:]), **common)
    got = s2_attention_backward(q, k, v, got_out, got_lse, dout, case.pattern, **options)
    assert got_out is places[0] and all(x is y for x, y in zip(got, places[1:], strict=True))
    assert torch.equal(got_lse, lse)
    nowhere = (case.rows < 0).T.to(device)
    for x in (*places[2:], *made[2:]):
        x[:, nowhere] = 0  # undefined
    for whole, place, x in zip(wholes, places, made, strict=True):
        assert torch.equal(place, x)
        assert whole.isnan().sum() == whole.numel() - x.numel()


def _larger(x: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of x [b, s, heads, d], with tokens and heads around it, as [s, b, ..]."""
    b, s, heads, d = x.shape
    return x.new_full((4 + s + 3, b, 1 + heads + 1, d), torch.nan).transpose(0, 1)
