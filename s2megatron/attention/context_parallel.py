"""Attention over a sequence that context-parallel ranks hold in parts.

Which blocks of K and V a rank needs of the others is known from the pattern alone
(`s2_kernels/exchange.py`). One all-to-all brings them. Then every chunk of the rank attends to
*near*, its own tokens and what lies shortly before, under the pattern, and to *far*, the blocks
that are kept forever, without a mask; the two results are merged by their lse. The backward pass
exchanges K and V once more, so that nothing of other ranks is held between the passes, and sends dK
and dV home. They are added in float32 in the order of the ranks, so that the same run gives the
same bits.

Shapes: b batch, s tokens of this rank, h query heads, g KV heads, r = h / g, d and dv head sizes;
R rows exchanged, each one block (B tokens) of K and V of one KV head.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from s2_kernels import LayerPattern, s2_attention, s2_attention_backward
from s2_kernels import dense as dense_pattern
from s2_kernels.exchange import Chunks, ChunkView, Placement, RankPlan, Run, plan_rank, zigzag

Cut = Callable[[int, int], Sequence[Chunks]]
"""Cuts a number of blocks among a number of ranks."""


class ContextAttention:
    """`s2_attention` of one layer, over all tokens of its context-parallel group.

    A group of one calls the kernels on what it has, and does nothing else. Only there may the
    sequence end within a block.

    Args:
        pattern: for this tensor-parallel rank's heads.
        softmax_scale: default 1 / sqrt(d).
        group: the context-parallel process group.
        cut: how the sequence lies on its ranks; Megatron's zigzag.

    Attributes:
        bytes_received: what other ranks have sent to this one so far, counted at the collective.
    """

    def __init__(
        self,
        pattern: LayerPattern,
        softmax_scale: float | None,
        group: dist.ProcessGroup,
        cut: Cut = zigzag,
    ):
        self.pattern, self.scale, self.group, self.cut = pattern, softmax_scale, group, cut
        self.bytes_received = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, s, h, d], [b, s, g, d], [b, s, g, dv] -> [b, s, h, dv]; differentiable once.

        Every rank of the group calls this at the same point, and runs the backward passes in the
        same order.

        Raises:
            ValueError: s does not divide into whole blocks on every rank.
        """
        if self.group.size() == 1:
            return s2_attention(q, k, v, self.pattern, softmax_scale=self.scale)
        return _Attend.apply(q, k, v, self)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out [b, s, h, dv] and lse [b, h, s], outside of autograd."""
        if self.group.size() == 1:
            return s2_attention(q, k, v, self.pattern, softmax_scale=self.scale, return_lse=True)
        plan = self._plan(q)
        buffers = _Buffers(plan, self._swap(plan, _pack(plan.send, k, v, self._block)), k, v)
        outs, lses = [], []
        for view in plan.chunks:
            tokens = self._tokens(view)
            chunk_q = q[:, tokens]
            near_k, near_v = buffers.near(view, tokens)
            out, lse = s2_attention(
                chunk_q,
                near_k,
                near_v,
                view.pattern,
                softmax_scale=self.scale,
                q_offset=near_k.shape[1] - chunk_q.shape[1],
                return_lse=True,
            )
            for run in view.far:
                heads = self._query_heads(run)
                far_k, far_v = buffers.far(run)
                far_out, far_lse = s2_attention(
                    chunk_q[:, :, heads],
                    far_k,
                    far_v,
                    self._dense(run),
                    softmax_scale=self.scale,
                    q_offset=far_k.shape[1],
                    return_lse=True,
                )
                _merge(out[:, :, heads], lse[:, heads], far_out, far_lse)
            outs.append(out)
            lses.append(lse)
        return _join(outs, dim=1), _join(lses, dim=2)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of a `forward` pass that gave out and lse.

        Near and far are each a part of one softmax: with its out and lse they give their parts of
        the gradients, which are added.
        """
        if self.group.size() == 1:
            return self._part((q, out, dout), lse, k, v, self.pattern, 0)
        plan = self._plan(q)
        buffers = _Buffers(plan, self._swap(plan, _pack(plan.send, k, v, self._block)), k, v)
        dqs, own = [], []
        for view in plan.chunks:
            tokens = self._tokens(view)
            chunk = [x[:, tokens] for x in (q, out, dout)]
            chunk_lse = lse[:, :, tokens]
            near_k, near_v = buffers.near(view, tokens)
            dq, dk, dv = self._part(
                chunk, chunk_lse, near_k, near_v, view.pattern, near_k.shape[1] - chunk[0].shape[1]
            )
            own.append(buffers.take_near(view, dk, dv))
            if view.far:
                dq = dq.to(buffers.sum_dtype)
            for run in view.far:
                heads = self._query_heads(run)
                far_k, far_v = buffers.far(run)
                far_dq, dk, dv = self._part(
                    [x[:, :, heads] for x in chunk], chunk_lse[:, heads], far_k, far_v,
                    self._dense(run), far_k.shape[1],
                )  # fmt: skip
                dq[:, :, heads] += far_dq
                buffers.take_far(run, dk, dv)
            dqs.append(dq.to(q.dtype))
        returned = self._swap(plan, buffers.gradients(), home=True)
        dk, dv = (_join(parts, dim=1) for parts in zip(*own, strict=True))
        return _join(dqs, dim=1), *_add_returned(plan, returned, dk, dv, self._block)

    @property
    def _block(self) -> int:
        return self.pattern.block_size

    def _part(self, chunk, lse, k, v, pattern, q_offset) -> tuple[Tensor, Tensor, Tensor]:
        q, out, dout = chunk
        return s2_attention_backward(
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dout,
            pattern,
            softmax_scale=self.scale,
            q_offset=q_offset,
        )

    def _plan(self, q: Tensor) -> RankPlan:
        ranks, tokens = self.group.size(), q.shape[1]
        if tokens % self._block:
            raise ValueError(
                f"{tokens} tokens on a context-parallel rank: must be a multiple of the block of "
                f"{self._block} tokens"
            )
        blocks = tokens // self._block * ranks
        return _device_plan(self.pattern, self.cut, ranks, self.group.rank(), blocks, q.device)

    def _tokens(self, view: ChunkView) -> slice:
        """The tokens of a chunk among the rank's own."""
        return slice(view.local.start * self._block, view.local.stop * self._block)

    def _query_heads(self, run: Run) -> slice:
        group = self.pattern.heads // self.pattern.kv_heads
        return slice(run.heads.start * group, run.heads.stop * group)

    def _dense(self, run: Run) -> LayerPattern:
        group = self.pattern.heads // self.pattern.kv_heads
        return _dense(group, len(run.heads), self._block)

    def _swap(self, plan: RankPlan, rows: Tensor, *, home: bool = False) -> Tensor:
        """Rows [R, b, B, d + dv] to the ranks that need them; gradients go `home`, the same way."""
        counts = [plan.send_counts, plan.receive_counts]
        leaving, coming = counts[::-1] if home else counts
        result = rows.new_empty(sum(coming), *rows.shape[1:])
        dist.all_to_all_single(result, rows, list(coming), list(leaving), group=self.group)
        from_others = sum(coming) - coming[plan.rank]
        self.bytes_received += from_others * result[:1].numel() * result.element_size()
        return result


class _Attend(torch.autograd.Function):
    """Keeps this rank's own q, k, v, out and lse alone."""

    @staticmethod
    def forward(ctx, q, k, v, attention: ContextAttention):
        out, lse = attention.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention = attention
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *ctx.attention.backward(*ctx.saved_tensors, dout), None


class _Buffers:
    """K and V of what one rank's chunks see, and the float32 gradients of what was received.

    Args:
        received: [R, b, B, d + dv].
        k, v: this rank's own.
    """

    def __init__(self, plan: RankPlan, received: Tensor, k: Tensor, v: Tensor):
        self.plan, self.received, self.k, self.v = plan, received, k, v
        self.sum_dtype = torch.promote_types(k.dtype, torch.float32)
        self._far = self._blocks(plan.far_blocks)
        self._place(self._far, plan.far)
        self._far_gradients: Tensor | None = None
        self._gradients: Tensor | None = None

    def _blocks(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for blocks, [b, count, B, g, d + dv]; what nobody sent stays 0.

        A kernel may load a block that it then masks, and must not find a NaN there.
        """
        _, b, block, size = self.received.shape
        return self.received.new_zeros(b, count, block, self.k.shape[2], size, dtype=dtype)

    def _place(self, blocks: Tensor, placement: Placement) -> None:
        if blocks.shape[1]:
            blocks[:, placement.slots, :, placement.heads] = self.received[placement.rows]

    def near(self, view: ChunkView, tokens: slice) -> tuple[Tensor, Tensor]:
        """K and V of the chunk and of its halo, [b, t, g, d] and [b, t, g, dv]."""
        own = self.k[:, tokens], self.v[:, tokens]
        count = view.chunk.start - view.near.start
        if not count:
            return own
        halo = self._blocks(count)
        self._place(halo, view.halo)
        parts = halo.flatten(1, 2).split([self.k.shape[-1], self.v.shape[-1]], dim=-1)
        return tuple(torch.cat(pair, dim=1) for pair in zip(parts, own, strict=True))

    def far(self, run: Run) -> tuple[Tensor, Tensor]:
        """K and V of the far blocks that some KV heads see, [b, t, heads, d] and with dv."""
        seen = self._far[:, : run.blocks, :, run.heads.start : run.heads.stop].flatten(1, 2)
        return seen.split([self.k.shape[-1], self.v.shape[-1]], dim=-1)

    def take_near(self, view: ChunkView, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradients of the halo to those of what was received; returns the chunk's own."""
        count = view.chunk.start - view.near.start
        block = self.received.shape[2]
        if count:
            halo = torch.cat([x[:, : count * block] for x in (dk, dv)], dim=-1)
            self._collect(halo.unflatten(1, (count, block)), view.halo)
        return dk[:, count * block :], dv[:, count * block :]

    def take_far(self, run: Run, dk: Tensor, dv: Tensor) -> None:
        if self._far_gradients is None:
            self._far_gradients = self._blocks(self.plan.far_blocks, self.sum_dtype)
        seen = self._far_gradients[:, : run.blocks, :, run.heads.start : run.heads.stop]
        seen += torch.cat([dk, dv], dim=-1).unflatten(1, seen.shape[1:3])

    def gradients(self) -> Tensor:
        """Those of the received rows, [R, b, B, d + dv] in the dtype they are sent in."""
        if self._far_gradients is not None:
            self._collect(self._far_gradients, self.plan.far)
        if self._gradients is None:
            return torch.zeros_like(self.received)
        return self._gradients.to(self.received.dtype)

    def _collect(self, blocks: Tensor, placement: Placement) -> None:
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.received, dtype=self.sum_dtype)
        self._gradients[placement.rows] += blocks[:, placement.slots, :, placement.heads]


def _pack(send: Placement, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The blocks to send, [R, b, B, d + dv], in the order in which they travel."""
    if not len(send.rows):  # of one rank, whose sequence may end within a block
        return k.new_empty(0, len(k), block, k.shape[-1] + v.shape[-1])
    rows = [x.unflatten(1, (-1, block))[:, send.slots, :, send.heads] for x in (k, v)]
    return torch.cat(rows, dim=-1)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Makes out [b, s, h, dv] and lse [b, h, s] those of the softmax over both parts' keys."""
    total = torch.logaddexp(lse, other_lse)
    weights = [(part - total).exp().transpose(1, 2)[..., None] for part in (lse, other_lse)]
    out.copy_(out * weights[0] + other_out * weights[1])
    lse.copy_(total)


def _add_returned(
    plan: RankPlan, returned: Tensor, dk: Tensor, dv: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """This rank's own dk and dv, and what the ranks sent home of its blocks, in their order.

    Within one rank's rows no block of a head comes twice, so each is a plain addition.
    """
    if not len(returned):
        return dk, dv
    parts = returned.split([dk.shape[-1], dv.shape[-1]], dim=-1)
    sums = []
    for own, rows in zip((dk, dv), parts, strict=True):
        total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        blocks = total.unflatten(1, (-1, block))
        for part, slots, heads in zip(
            *(x.split(plan.send_counts) for x in (rows, plan.send.slots, plan.send.heads)),
            strict=True,
        ):
            blocks[:, slots, :, heads] += part
        sums.append(total.to(own.dtype))
    return sums[0], sums[1]


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@functools.lru_cache(maxsize=256)
def _dense(group: int, kv_heads: int, block: int) -> LayerPattern:
    return dense_pattern(heads=group * kv_heads, kv_heads=kv_heads, block_size=block)


@functools.lru_cache(maxsize=256)
def _device_plan(
    pattern: LayerPattern, cut: Cut, ranks: int, rank: int, blocks: int, device: torch.device
) -> RankPlan:
    """The plan of one rank, its indices on the device where they are used."""
    return plan_rank(pattern, cut(ranks, blocks), rank).to(device)
