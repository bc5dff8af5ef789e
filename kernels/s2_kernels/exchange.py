"""Which KV blocks cross between context-parallel ranks: pure arithmetic on lifetimes.

A sequence of n blocks is cut into *chunks*, and every rank holds the tokens of some of them. A
query block attends only to blocks that are alive in it, so what a rank needs of what lies before a
chunk is known from the pattern alone. With i0 the first block of a chunk,

    block k of KV head h is needed  <=>  k < i0 and i0 - k < lifetime(h, k),

since whatever a later block of the chunk attends to, the first one does too, or it lies in the
chunk. Shard, window, ranges and dense heads are all this rule.

What a chunk sees is two pieces:

- *near*: the blocks from `near_start` to the chunk's end, one after the other. Blocks that nobody
  asks for may be missing;
- *far*: the blocks before `near_start` that are kept forever, per KV head in ascending order.

Both lie in one buffer, far first. The kernels get it with a `near.Near`: what lies where.

Blocks count from the start of the sequence unless a name says *local*: then from a rank's first.
Nothing here knows process groups. `s2megatron/attention/context_parallel.py` sends what is planned.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from s2_kernels.cache import count_selected, kept_ranges
from s2_kernels.near import Near, forever_before
from s2_kernels.pattern import FOREVER, HeadRule, LayerPattern

Chunks = tuple[range, ...]
"""The blocks that one rank holds: ascending ranges of step 1, no two of which touch."""


def zigzag(ranks: int, n_blocks: int) -> tuple[Chunks, ...]:
    """Megatron's layout: of 2 * ranks equal chunks, rank r holds chunks r and 2 * ranks - 1 - r.

    The last rank's two chunks touch and are one; so a single rank has one chunk, the sequence.

    Raises:
        ValueError: the blocks do not divide into 2 * ranks chunks (one rank takes any number).
    """
    if ranks > 1 and n_blocks % (2 * ranks):
        raise ValueError(
            f"{n_blocks} blocks do not divide into {2 * ranks} chunks, two for each of {ranks} "
            "context-parallel ranks"
        )
    if ranks == 1:
        return ((range(n_blocks),),)
    size = n_blocks // (2 * ranks)
    halves = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
    return tuple(merged([range(i * size, (i + 1) * size) for i in indices]) for indices in halves)


def merged(chunks: Sequence[range]) -> Chunks:
    """The chunks in ascending order, those that touch made into one."""
    result: list[range] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start):
        if result and result[-1].stop == chunk.start:
            result[-1] = range(result[-1].start, chunk.stop)
        else:
            result.append(chunk)
    return tuple(result)


# --- how much crosses: O(bands) per chunk and KV head ----------------------------------------


@functools.lru_cache(maxsize=4096)
def needed_count(rule: HeadRule, first: int, low: int, high: int) -> int:
    """How many of the blocks low..high-1 a chunk that begins at block `first` needs; O(bands)."""
    return sum(
        count_selected(max(start, low), min(stop, high - 1, first - 1), stride, rule.shift)
        for start, stop, stride in kept_ranges(rule, first)
    )


def crossing_blocks(pattern: LayerPattern, source: Chunks, destination: Chunks) -> int:
    """How many blocks, over all KV heads, go from one rank to another; once each.

    What a chunk needs of the blocks before the rank's previous chunk, that one needs as well. So
    each block is counted for the first of the destination's chunks that comes after it. From a
    rank to itself: what its later chunks need of its earlier ones.
    """
    total = 0
    rules = Counter(pattern.rules)
    done = 0
    for chunk in destination:
        for held in source:
            low, high = max(held.start, done), min(held.stop, chunk.start)
            if low < high:
                total += sum(
                    times * needed_count(rule, chunk.start, low, high)
                    for rule, times in rules.items()
                )
        done = chunk.start
    return total


def received_blocks(pattern: LayerPattern, chunks: Sequence[Chunks], rank: int) -> int:
    """Blocks of K and V, over all KV heads, that a rank receives from others in a forward pass.

    Args:
        chunks: per rank, what it holds (`zigzag`).

    With stride V, window L (both in blocks), chunks of C blocks in zigzag and g KV heads whose
    shifts are spread evenly over the stride, V dividing C, this is, for rank r of c,

        g * ((2c - 2 - r) * C / V + ([r > 0] + [r < c - 1]) * (L - 1) * (1 - 1 / V))
    """
    others = [held for source, held in enumerate(chunks) if source != rank]
    return sum(crossing_blocks(pattern, held, chunks[rank]) for held in others)


def sent_blocks(pattern: LayerPattern, chunks: Sequence[Chunks], rank: int) -> int:
    """Blocks that a rank sends to others in a forward pass, one for each rank that needs it.

    For each of them the backward pass brings a block of dK and dV back.
    """
    others = [held for target, held in enumerate(chunks) if target != rank]
    return sum(crossing_blocks(pattern, chunks[rank], held) for held in others)


def block_bytes(pattern: LayerPattern, *, batch: int, head_sizes: int, element_bytes: int) -> int:
    """Bytes of one block of K and V for one KV head.

    Args:
        head_sizes: of K and of V, added up (2 * d where they are alike).
    """
    return pattern.block_size * batch * head_sizes * element_bytes


# --- what crosses, and where it goes ---------------------------------------------------------


def needed(pattern: LayerPattern, chunks: Chunks, n_blocks: int) -> Tensor:
    """Bool [kv_heads, n_blocks]: what a rank needs of the blocks before each of its chunks.

    What a later chunk needs of the rank's own earlier ones is included.
    """
    lives = torch.stack([rule.lifetimes(n_blocks) for rule in pattern.rules])
    blocks = torch.arange(n_blocks)
    asked = torch.zeros_like(lives, dtype=torch.bool)
    for chunk in chunks:
        asked |= (blocks < chunk.start) & (chunk.start - blocks < lives)
    return asked


def near_start(pattern: LayerPattern, chunk: range) -> int:
    """The block at which near begins: as late as finite bands allow, at a multiple of the stride.

    The multiple is that of the widest stride. All heads of this stride then keep equally many
    blocks forever before near.
    """
    bands = [band for rule in pattern.rules for band in rule.bands]
    reach = max((band.reach for band in bands if band.reach != FOREVER), default=1)
    strides = [band.stride for band in bands if band.reach == FOREVER]
    start = max(0, chunk.start - (reach - 1))
    return start - start % max(strides, default=1)


@dataclass(frozen=True)
class Placement:
    """Rows of what was received, and where they go: int64 [rows] each.

    Attributes:
        rows: indices into the received blocks.
        slots: the block, of the buffer or the rank's own, that each becomes or is.
        heads: its KV head.
    """

    rows: Tensor
    slots: Tensor
    heads: Tensor

    def to(self, device: torch.device) -> "Placement":
        return Placement(*(x.to(device) for x in (self.rows, self.slots, self.heads)))


class Places(NamedTuple):
    """Blocks of single heads: int64 [blocks] each."""

    slots: Tensor
    heads: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Places":
        """Those that a mask [slots, heads] names."""
        return cls(*(x.contiguous() for x in mask.nonzero().unbind(1)))

    def to(self, device: torch.device) -> "Places":
        return Places(*(x.to(device) for x in self))


@dataclass(frozen=True)
class Sums:
    """Rows of gradients that come home, by the block of the rank's own that they are added to.

    Attributes:
        slots, heads: local block and KV head, int64 [blocks]; each pair once.
        rows: indices into the rows that were sent, and come back in their order, int64 [rows]:
            those of a block one after the other, by rank.
        starts: where in `rows` each block's begin, and their number, int64 [blocks + 1].
    """

    slots: Tensor
    heads: Tensor
    rows: Tensor
    starts: Tensor

    @classmethod
    def of(cls, send: Placement) -> "Sums":
        if not len(send.rows):
            return cls(send.slots, send.heads, send.rows, send.rows.new_zeros(1))
        pairs = torch.stack([send.heads, send.slots], dim=1)
        pairs, block, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        heads, slots = (x.contiguous() for x in pairs.unbind(1))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(slots, heads, block.argsort(stable=True), starts)

    def to(self, device: torch.device) -> "Sums":
        return Sums(*(x.to(device) for x in (self.slots, self.heads, self.rows, self.starts)))


@dataclass(frozen=True)
class ChunkView:
    """What one chunk of a rank sees: a buffer of blocks, of which the last are the chunk's own.

    Attributes:
        chunk: its blocks.
        local: its blocks, counted from the rank's first.
        before: how many blocks of the buffer stand before its own: far, then the *halo*.
        near: where far ends; None where every block lies in the row of its position.
        came: where received blocks go in the buffer.
        empty: the blocks of the buffer, before its own, that nobody sends.
        own: all of its own blocks, slots being counted from the chunk's first.
    """

    chunk: range
    local: range
    before: int
    near: Near | None
    came: Placement
    empty: Places
    own: Places

    def to(self, device: torch.device) -> "ChunkView":
        lists = {name: getattr(self, name).to(device) for name in ("came", "empty", "own")}
        return replace(self, **lists)


@dataclass(frozen=True)
class RankPlan:
    """One rank's part in the exchange of one layer.

    A *row* is one block of one KV head. Rows travel ordered by rank, KV head and block. A rank
    "sends" to itself what its later chunks need of its earlier ones, so that all that comes before
    a chunk is found in one place.

    Attributes:
        rank: this rank.
        send: the rows to send, as local blocks (`slots`) and KV heads; `rows` counts them.
        send_counts, receive_counts: rows per rank.
        home: what is added to what when gradients of the sent rows come back.
        chunks: what each chunk sees.
    """

    rank: int
    send: Placement
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    home: Sums
    chunks: tuple[ChunkView, ...]

    @property
    def received_blocks(self) -> int:
        """How many blocks other ranks send to this one."""
        return sum(self.receive_counts) - self.receive_counts[self.rank]

    @property
    def sent_blocks(self) -> int:
        """How many blocks this rank sends to others."""
        return sum(self.send_counts) - self.send_counts[self.rank]

    def to(self, device: torch.device) -> "RankPlan":
        """The plan with its indices on a device."""
        return replace(
            self,
            send=self.send.to(device),
            home=self.home.to(device),
            chunks=tuple(view.to(device) for view in self.chunks),
        )


def plan_rank(pattern: LayerPattern, chunks: Sequence[Chunks], rank: int) -> RankPlan:
    """What a rank sends and receives, and what each of its chunks sees.

    Args:
        pattern: for the heads at hand (`LayerPattern.shard` under tensor parallelism).
        chunks: per rank, what it holds; together all blocks, each once.
    """
    _check_chunks(chunks)
    n_blocks = sum(len(chunk) for held in chunks for chunk in held)
    positions = [torch.cat([torch.arange(c.start, c.stop) for c in held]) for held in chunks]
    own = positions[rank]
    sends = [needed(pattern, held, n_blocks)[:, own].nonzero() for held in chunks]
    send_heads, send_slots = (x.contiguous() for x in torch.cat(sends).unbind(1))
    send = Placement(torch.arange(len(send_heads)), send_slots, send_heads)
    asked = needed(pattern, chunks[rank], n_blocks)
    receives = [asked[:, held].nonzero() for held in positions]
    heads = torch.cat([pairs[:, 0] for pairs in receives])
    blocks = torch.cat([held[pairs[:, 1]] for held, pairs in zip(positions, receives, strict=True)])

    views, local = [], 0
    for chunk in chunks[rank]:
        view = _view(pattern, chunk, range(local, local + len(chunk)), heads, blocks)
        views.append(view)
        local += len(chunk)
    return RankPlan(
        rank=rank,
        send=send,
        send_counts=tuple(len(pairs) for pairs in sends),
        receive_counts=tuple(len(pairs) for pairs in receives),
        home=Sums.of(send),
        chunks=tuple(views),
    )


def _view(
    pattern: LayerPattern, chunk: range, local: range, heads: Tensor, blocks: Tensor
) -> ChunkView:
    """What a chunk sees of its own and of received rows, block `blocks` of KV head `heads` each."""
    near = Near(start := near_start(pattern, chunk), _far_blocks(pattern, start))
    slots, seen = torch.empty_like(blocks), torch.zeros_like(blocks, dtype=torch.bool)
    for head, rule in enumerate(pattern.rules):
        of = (heads == head).nonzero().flatten()
        lives = rule.lifetimes(chunk.stop)[blocks[of].clamp(max=chunk.start)]
        seen[of] = (blocks[of] < chunk.start) & (chunk.start - blocks[of] < lives)
        slots[of] = torch.from_numpy(near.rows(rule, blocks[of].numpy()))
    came = Placement(seen.nonzero().flatten(), slots[seen], heads[seen])
    before = near.row + chunk.start - near.start
    empty = torch.ones(before, pattern.kv_heads, dtype=torch.bool)
    empty[came.slots, came.heads] = False
    in_place = near.start == 0 or pattern.is_dense
    return ChunkView(
        chunk=chunk,
        local=local,
        before=before,
        near=None if in_place else near,
        came=came,
        empty=Places.of(empty),
        own=Places.of(torch.ones(len(chunk), pattern.kv_heads)),
    )


def _far_blocks(pattern: LayerPattern, start: int) -> int:
    """The most blocks before `start` that a head keeps forever."""
    return max(forever_before(rule, start) for rule in pattern.rules)


def _check_chunks(chunks: Sequence[Chunks]) -> None:
    ends = [0]
    for chunk in sorted((chunk for held in chunks for chunk in held), key=lambda c: c.start):
        if chunk.start != ends[-1] or chunk.stop <= chunk.start:
            raise ValueError(f"chunks {chunks}: must cover every block once, and none be empty")
        ends.append(chunk.stop)
    for held in chunks:
        if tuple(held) != merged(held):
            raise ValueError(f"chunks {held} of a rank: must ascend and not touch; take merged()")
