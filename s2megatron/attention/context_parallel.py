"""Attention over a sequence that context-parallel ranks hold in parts.

Which blocks of K and V a rank needs of the others is known from the pattern alone
(`s2_kernels/exchange.py`). One all-to-all brings them. Each chunk of the rank then attends, in one
launch, to a buffer of what it sees: *far*, the blocks that are kept forever, and *near*, what lies
shortly before the chunk, and the chunk (`s2_kernels/near.py`). The backward pass exchanges K and V
once more, so that nothing of other ranks is held between the passes, and sends dK and dV home. They
are added in float32 in the order of the ranks, so that the same run gives the same bits.

Heads may be exchanged in *groups*: while one group computes, the next one's K and V are on their
way, and in the backward pass dK and dV of the one before as well. The output, lse and dq have the
same bits for any number of groups. Long columns of dk and dv are cut where a launch needs it for
balance, and each sum of pieces has an order of its own: there they differ by rounding.

Shapes: b batch, s tokens of this rank, h query heads, g KV heads, r = h / g, d and dv head sizes;
R rows exchanged, each one block (B tokens) of K and V of one KV head.
"""

import functools
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from s2_kernels import LayerPattern, s2_attention, s2_attention_backward
from s2_kernels.exchange import ChunkView, Placement, RankPlan, Sums, plan_rank, zigzag
from s2_kernels.moves import add_blocks, clear_blocks, copy_blocks, of_rows, of_tokens
from s2megatron.attention.overlap import SPARE, Cut, choose_groups


class ContextAttention:
    """`s2_attention` of one layer, over all tokens of its context-parallel group.

    A group of one calls the kernels on what it has, and does nothing else. Only there may the
    sequence end within a block.

    Args:
        pattern: for this tensor-parallel rank's heads.
        softmax_scale: default 1 / sqrt(d).
        group: the context-parallel process group.
        cut: how the sequence lies on its ranks; Megatron's zigzag.
        exchange_groups: how many groups of KV heads are exchanged one after the other; None: chosen
            by bytes and operations (`choose_groups`). The same on all ranks.
        spare: multiprocessors that kernels leave to NCCL while an exchange is in flight.

    Attributes:
        bytes_received: what other ranks have sent to this one so far, counted at the collective.

    Raises:
        ValueError: exchange_groups does not divide the KV heads.
    """

    def __init__(
        self,
        pattern: LayerPattern,
        softmax_scale: float | None,
        group: dist.ProcessGroup,
        cut: Cut = zigzag,
        *,
        exchange_groups: int | None = None,
        spare: int = SPARE,
    ):
        if exchange_groups is not None and (
            exchange_groups < 1 or pattern.kv_heads % exchange_groups
        ):
            raise ValueError(
                f"exchange_groups={exchange_groups}: must divide the {pattern.kv_heads} KV heads "
                "of this rank; or leave it out, and it is chosen"
            )
        self.pattern, self.scale, self.group, self.cut = pattern, softmax_scale, group, cut
        self.exchange_groups, self.spare = exchange_groups, spare
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
        out = _room(q, v.shape[-1])
        lse_type = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(len(q), q.shape[2], q.shape[1], dtype=lse_type)
        for part, received, beside in self._arriving(self._parts(q, v), k, v):
            for view in part.plan.chunks:
                tokens, heads = self._tokens(view), part.heads
                queries, into = (x[:, tokens, heads] for x in (q, out))
                own = (x[:, tokens, part.kv] for x in (k, v))
                spare = self.spare if beside else 0
                lse[:, heads, tokens] = self._attend_chunk(
                    part, view, queries, *_buffer(view, received, *own), spare, into
                )
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of a `forward` pass that gave out and lse."""
        if self.group.size() == 1:
            return s2_attention_backward(
                q, k, v, out, lse.contiguous(), dout, self.pattern, softmax_scale=self.scale
            )
        parts = self._parts(q, v)
        spare = self.spare if len(parts) > 1 else 0
        dq = _room(q, q.shape[-1])
        of_keys = _KeyGradients.room(parts, k, v)
        going_home = []
        for part, received, _ in self._arriving(parts, k, v):
            rows = _row_gradients(part.plan, received)
            for view in reversed(part.plan.chunks):
                tokens, heads = self._tokens(view), part.heads
                of_queries = (*(x[:, tokens, heads] for x in (q, out, dout)), lse[:, heads, tokens])
                own = (x[:, tokens, part.kv] for x in (k, v))
                into = dq[:, tokens, heads], *of_keys.buffer(part, view)
                self._chunk_gradients(
                    part, view, *of_queries, *_buffer(view, received, *own), spare, into
                )
                _add_to_rows(rows, view, *into[1:])
            rows = rows.to(received.dtype)
            going_home.append((part, self._swap(part.plan, rows, home=True)))
        dk, dv = of_keys.own()
        for part, returned in going_home:
            own = (x[:, :, part.kv] for x in (dk, dv))
            _add_returned(part.plan.home, returned.wait(), *own)
        return dq, dk, dv

    def _attend_chunk(self, part: "_Part", view: ChunkView, q, k, v, spare: int, into: Tensor):
        """Writes out of a chunk's queries, over the keys of its buffer; returns their lse."""
        _, lse = s2_attention(
            q,
            k,
            v,
            part.pattern,
            softmax_scale=self.scale,
            q_offset=view.chunk.start * self._block,
            return_lse=True,
            near=view.near,
            spare=spare,
            into=into,
        )
        return lse

    def _chunk_gradients(
        self, part: "_Part", view: ChunkView, q, out, dout, lse, k, v, spare: int, into: tuple
    ) -> None:
        """Writes dq of a chunk's queries, and dk and dv of its buffer."""
        s2_attention_backward(
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dout,
            part.pattern,
            softmax_scale=self.scale,
            q_offset=view.chunk.start * self._block,
            near=view.near,
            spare=spare,
            into=into,
        )

    @property
    def _block(self) -> int:
        return self.pattern.block_size

    def _arriving(self, parts: "tuple[_Part, ...]", k: Tensor, v: Tensor):
        """Per group of heads what was received, and whether another exchange is in flight then."""
        sent = None
        for part, later in zip(parts, (*parts[1:], None), strict=True):
            now = sent or self._send(part, k, v)
            sent = later and self._send(later, k, v)
            yield part, now.wait(), later is not None

    def _send(self, part: "_Part", k: Tensor, v: Tensor) -> "_Transfer":
        keys, values = k[:, :, part.kv], v[:, :, part.kv]
        return self._swap(part.plan, _pack(part.plan.send, keys, values, self._block))

    def _parts(self, q: Tensor, v: Tensor) -> "tuple[_Part, ...]":
        ranks, tokens = self.group.size(), q.shape[1]
        if tokens % self._block:
            raise ValueError(
                f"{tokens} tokens on a context-parallel rank: must be a multiple of the block of "
                f"{self._block} tokens"
            )
        blocks = tokens // self._block * ranks
        lies = (self.pattern, self.cut, ranks, blocks)
        groups = self.exchange_groups
        if groups is None:
            sizes = dict(head_sizes=q.shape[-1] + v.shape[-1], element_bytes=q.element_size())
            groups = choose_groups(*lies, **sizes, within_a_node=False)
            if groups > 1 and self._within_a_node:
                groups = choose_groups(*lies, **sizes, within_a_node=True)
        return _device_parts(*lies, self.group.rank(), groups, q.device)

    @functools.cached_property
    def _within_a_node(self) -> bool:
        """Whether all ranks run on one host. They tell each other, so that all choose alike."""
        hosts = [None] * self.group.size()
        dist.all_gather_object(hosts, socket.gethostname(), group=self.group)
        return len(set(hosts)) == 1

    def _tokens(self, view: ChunkView) -> slice:
        """The tokens of a chunk among the rank's own."""
        return slice(view.local.start * self._block, view.local.stop * self._block)

    def _swap(self, plan: RankPlan, rows: Tensor, *, home: bool = False) -> "_Transfer":
        """Rows [R, b, B, d + dv] to the ranks that need them; gradients go `home`, the same way."""
        counts = [plan.send_counts, plan.receive_counts]
        leaving, coming = counts[::-1] if home else counts
        result = rows.new_empty(sum(coming), *rows.shape[1:])
        work = dist.all_to_all_single(
            result, rows, list(coming), list(leaving), group=self.group, async_op=True
        )
        from_others = sum(coming) - coming[plan.rank]
        self.bytes_received += from_others * result[:1].numel() * result.element_size()
        return _Transfer(result, rows, work)


@dataclass(frozen=True)
class _Part:
    """Some KV heads of a layer, and their query heads, which are exchanged together."""

    kv: slice
    heads: slice
    pattern: LayerPattern
    plan: RankPlan


@dataclass(frozen=True)
class _Transfer:
    """Rows on their way; what leaves is held until they have come."""

    result: Tensor
    leaving: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


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


def _room(x: Tensor, size: int, lead: int = 0) -> Tensor:
    """Room for a tensor shaped like x [b, s, heads, d] but with size columns, after `lead` tokens;
    laid out [s, b, ..], as Megatron has it."""
    b, s, heads, _ = x.shape
    return x.new_empty(lead + s, b, heads, size).transpose(0, 1)


def _buffer(view: ChunkView, received: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V that a chunk sees, [b, t, g, d] and [b, t, g, dv].

    Args:
        received: [R, b, B, d + dv].
        k, v: the chunk's own.
    """
    if not view.before:
        return k, v
    _, b, block, size = received.shape
    own = view.before * block
    whole = received.new_empty(b, own + k.shape[1], k.shape[2], size)
    before = whole[:, :own]
    # What nobody may send: a kernel may load a block that it masks, and no NaN then.
    clear_blocks(of_tokens(before, block, *view.empty))
    to = of_tokens(before, block, view.came.slots, view.came.heads)
    copy_blocks(to, of_rows(received, view.came.rows))
    keys, values = _halves(whole, k)
    for x, part in ((k, keys), (v, values)):
        copy_blocks(of_tokens(part[:, own:], block, *view.own), of_tokens(x, block, *view.own))
    return keys, values


@dataclass(frozen=True)
class _KeyGradients:
    """dk and dv of this rank's tokens, where the kernels write them.

    A chunk's gradients are those of its buffer, whose last tokens are its own. So the buffers end
    where the chunks do, and begin in what belongs to earlier chunks, or in `lead` tokens before
    all. Later chunks come first: what their buffers leave in the place of an earlier one is read
    (`_add_to_rows`) before that one is written.

    Attributes:
        memory: dk and dv, [b, lead + s, g, d] and [b, lead + s, g, dv].
    """

    memory: tuple[Tensor, Tensor]
    lead: int
    block: int

    @classmethod
    def room(cls, parts: "tuple[_Part, ...]", k: Tensor, v: Tensor) -> "_KeyGradients":
        block = parts[0].pattern.block_size
        views = [view for part in parts for view in part.plan.chunks]
        lead = block * max(0, *(view.before - view.local.start for view in views))
        return cls(tuple(_room(x, x.shape[-1], lead) for x in (k, v)), lead, block)

    def buffer(self, part: "_Part", view: ChunkView) -> list[Tensor]:
        """dk and dv of a chunk's buffer."""
        first, last = view.local.start - view.before, view.local.stop
        tokens = slice(self.lead + first * self.block, self.lead + last * self.block)
        return [x[:, tokens, part.kv] for x in self.memory]

    def own(self) -> list[Tensor]:
        return [x[:, self.lead :] for x in self.memory]


def _row_gradients(plan: RankPlan, received: Tensor) -> Tensor:
    """0, to which the gradients of received rows are added, chunk by chunk.

    The first of them is what the kernels made, in their precision, and a sum of two is rounded
    once. With more chunks than two, as no zigzag has them, sums between are kept in float32.
    """
    dtype = received.dtype
    if len(plan.chunks) > 2:
        dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros_like(received, dtype=dtype)


def _add_to_rows(rows: Tensor, view: ChunkView, dk: Tensor, dv: Tensor) -> None:
    """Adds the gradients of a chunk's buffer to those of the rows [R, b, B, d + dv] in it."""
    block, came = rows.shape[2], view.came
    for x, part in zip((dk, dv), _halves(rows, dk), strict=True):
        add_blocks(of_rows(part, came.rows), of_tokens(x, block, came.slots, came.heads))


def _pack(send: Placement, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The blocks to send, [R, b, B, d + dv], in the order in which they travel."""
    rows = k.new_empty(len(send.rows), len(k), block, k.shape[-1] + v.shape[-1])
    for x, part in zip((k, v), _halves(rows, k), strict=True):
        copy_blocks(of_rows(part, send.rows), of_tokens(x, block, send.slots, send.heads))
    return rows


def _add_returned(home: Sums, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Adds to this rank's own dk and dv what the ranks sent home of its blocks, in their order."""
    block = returned.shape[2]
    for x, part in zip((dk, dv), _halves(returned, dk), strict=True):
        to = of_tokens(x, block, home.slots, home.heads)
        add_blocks(to, of_rows(part, home.rows), home.starts)


def _halves(rows: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """The columns of rows that belong to K, and those that belong to V."""
    size = k.shape[-1]
    return rows.split([size, rows.shape[-1] - size], dim=-1)


@functools.lru_cache(maxsize=256)
def _device_parts(
    pattern: LayerPattern,
    cut: Cut,
    ranks: int,
    blocks: int,
    rank: int,
    groups: int,
    device: torch.device,
) -> tuple[_Part, ...]:
    """The groups of heads of one rank, the indices of their plans on the device that uses them."""
    count, group = pattern.kv_heads // groups, pattern.heads // pattern.kv_heads
    parts = []
    for first in range(0, pattern.kv_heads, count):
        rules = pattern.rules[first : first + count]
        part = LayerPattern(count * group, pattern.block_size, rules)
        plan = plan_rank(part, cut(ranks, blocks), rank).to(device)
        kv, heads = slice(first, first + count), slice(first * group, (first + count) * group)
        parts.append(_Part(kv, heads, part, plan))
    return tuple(parts)
