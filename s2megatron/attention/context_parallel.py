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
from s2_kernels.exchange import ChunkView, Placement, RankPlan, plan_rank, zigzag
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
                keys = _buffer(view, received, k[:, tokens, part.kv], v[:, tokens, part.kv])
                spare = self.spare if beside else 0
                seen = self._attend_chunk(part, view, q[:, tokens, heads], *keys, spare)
                out[:, tokens, heads], lse[:, heads, tokens] = seen
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
        dq, dk, dv = (_room(x, x.shape[-1]) for x in (q, k, v))
        going_home = []
        for part, received, _ in self._arriving(parts, k, v):
            gradients = _Gradients(received)
            for view in part.plan.chunks:
                tokens, heads = self._tokens(view), part.heads
                keys = _buffer(view, received, k[:, tokens, part.kv], v[:, tokens, part.kv])
                queries = [x[:, tokens, heads] for x in (q, out, dout)]
                chunk_lse = lse[:, heads, tokens].contiguous()
                dq[:, tokens, heads], *of_keys = self._chunk_gradients(
                    part, view, *queries, chunk_lse, *keys, spare
                )
                own = gradients.take(view, *of_keys)
                dk[:, tokens, part.kv], dv[:, tokens, part.kv] = own
            going_home.append((part, self._swap(part.plan, gradients.rows(), home=True)))
        for part, returned in going_home:
            own = (x[:, :, part.kv] for x in (dk, dv))
            _add_returned(part.plan, returned.wait(), *own, self._block)
        return dq, dk, dv

    def _attend_chunk(self, part: "_Part", view: ChunkView, q, k, v, spare: int):
        """out and lse of a chunk's queries, over the keys of its buffer."""
        return s2_attention(
            q,
            k,
            v,
            part.pattern,
            softmax_scale=self.scale,
            q_offset=view.chunk.start * self._block,
            return_lse=True,
            near=view.near,
            spare=spare,
        )

    def _chunk_gradients(self, part: "_Part", view: ChunkView, q, out, dout, lse, k, v, spare: int):
        """dq of a chunk's queries, and dk and dv of its buffer."""
        return s2_attention_backward(
            q,
            k,
            v,
            out,
            lse,
            dout,
            part.pattern,
            softmax_scale=self.scale,
            q_offset=view.chunk.start * self._block,
            near=view.near,
            spare=spare,
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


def _room(x: Tensor, size: int) -> Tensor:
    """Room for a tensor shaped like x [b, s, heads, d] but with size columns; laid out [s, b, ..],
    as Megatron has it."""
    b, s, heads, _ = x.shape
    return x.new_empty(s, b, heads, size).transpose(0, 1)


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
    before = whole[:, :own].unflatten(1, (view.before, block))
    _clear(before)
    before[:, view.came.slots, :, view.came.heads] = received[view.came.rows]
    keys, values = whole.split([k.shape[-1], v.shape[-1]], dim=-1)
    keys[:, own:], values[:, own:] = k, v
    return keys, values


def _clear(blocks: Tensor) -> None:
    """Sets to 0 what nobody may send: a kernel may load a block that it masks, and no NaN then."""
    blocks.zero_()


class _Gradients:
    """Float32 gradients of received rows, added up over the chunks of a rank.

    Args:
        received: [R, b, B, d + dv].
    """

    def __init__(self, received: Tensor):
        self.received = received
        self.sum: Tensor | None = None

    def take(self, view: ChunkView, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a chunk's gradients of what it received; returns those of its own tokens."""
        block = self.received.shape[2]
        own = view.before * block
        if len(view.came.rows):
            if self.sum is None:
                dtype = torch.promote_types(dk.dtype, torch.float32)
                self.sum = torch.zeros_like(self.received, dtype=dtype)
            parts = (x[:, :own].unflatten(1, (view.before, block)) for x in (dk, dv))
            at = (slice(None), view.came.slots, slice(None), view.came.heads)
            self.sum[view.came.rows] += torch.cat([x[at] for x in parts], dim=-1)
        return dk[:, own:], dv[:, own:]

    def rows(self) -> Tensor:
        """[R, b, B, d + dv] in the dtype they are sent in."""
        if self.sum is None:
            return torch.zeros_like(self.received)
        return self.sum.to(self.received.dtype)


def _pack(send: Placement, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The blocks to send, [R, b, B, d + dv], in the order in which they travel."""
    rows = [x.unflatten(1, (-1, block))[:, send.slots, :, send.heads] for x in (k, v)]
    return torch.cat(rows, dim=-1)


def _add_returned(plan: RankPlan, returned: Tensor, dk: Tensor, dv: Tensor, block: int) -> None:
    """Adds to this rank's own dk and dv what the ranks sent home of its blocks, in their order.

    Within one rank's rows no block of a head comes twice, so each is a plain addition.
    """
    if not len(returned):
        return
    parts = returned.split([dk.shape[-1], dv.shape[-1]], dim=-1)
    for own, rows in zip((dk, dv), parts, strict=True):
        total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        blocks = total.unflatten(1, (-1, block))
        for part, slots, heads in zip(
            *(x.split(plan.send_counts) for x in (rows, plan.send.slots, plan.send.heads)),
            strict=True,
        ):
            blocks[:, slots, :, heads] += part
        own.copy_(total)


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
