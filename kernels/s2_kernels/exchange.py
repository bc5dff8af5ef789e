"""Which KV blocks cross between context-parallel ranks: pure arithmetic on lifetimes.

A sequence of n blocks is cut into *chunks*, and every rank holds the tokens of some of them. A
query block attends only to blocks that are alive in it, so what a rank needs of what lies before a
chunk is known from the pattern alone. With i0 the first block of a chunk,

    block k of KV head h is needed  <=>  k < i0 and i0 - k < lifetime(h, k),

since whatever a later block of the chunk attends to, the first one does too, or it lies in the
chunk. Shard, window, ranges and dense heads are all this rule.

What a chunk sees is two pieces:

- *near*: the blocks from `near_start` to the chunk's end. They are at their positions, so that the
  pattern applies as it is (`shifted`), and blocks that nobody asks for may be missing;
- *far*: the blocks before `near_start` that are kept forever, per KV head in ascending order. Every
  query of the chunk attends to all of them, so they need no mask and no positions.

Blocks count from the start of the sequence unless a name says *local*: then from a rank's first.
Nothing here knows process groups. `s2megatron/attention/context_parallel.py` sends what is planned.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2_kernels.cache import count_selected, kept_ranges
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


def shifted(pattern: LayerPattern, blocks: int) -> LayerPattern:
    """The pattern of a sequence whose first `blocks` blocks are cut off."""
    rules = tuple(
        HeadRule(rule.bands, (rule.shift + blocks) % rule.bands[-1].stride)
        for rule in pattern.rules
    )
    return LayerPattern(pattern.heads, pattern.block_size, rules)


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


def forever_before(rule: HeadRule, block: int) -> int:
    """How many blocks before `block` the head keeps forever."""
    widest = rule.bands[-1]
    if widest.reach != FOREVER:
        return 0
    return count_selected(0, block - 1, widest.stride, rule.shift)


@dataclass(frozen=True)
class Run:
    """Neighbouring KV heads with equally many far blocks.

    Attributes:
        heads: the KV heads.
        blocks: how many far blocks each has.
    """

    heads: range
    blocks: int


@dataclass(frozen=True)
class Placement:
    """Rows of what was received, and where they go: int64 [rows] each.

    Attributes:
        rows: indices into the received blocks.
        slots: the block of the buffer that each becomes.
        heads: its KV head.
    """

    rows: Tensor
    slots: Tensor
    heads: Tensor

    def to(self, device: torch.device) -> "Placement":
        return Placement(*(x.to(device) for x in (self.rows, self.slots, self.heads)))


@dataclass(frozen=True)
class ChunkView:
    """What one chunk of a rank sees.

    Attributes:
        chunk: its blocks.
        local: its blocks, counted from the rank's first.
        near: the blocks of near; the chunk is their end, what lies before it is the *halo*.
        pattern: for near alone.
        halo: where received blocks go in the halo.
        far: per run of KV heads, how long a prefix of the far buffer it sees.
    """

    chunk: range
    local: range
    near: range
    pattern: LayerPattern
    halo: Placement
    far: tuple[Run, ...]


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
        far: where received blocks go in the far buffer, which all chunks of the rank read.
        far_blocks: its length.
        chunks: what each chunk sees.
    """

    rank: int
    send: Placement
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    far: Placement
    far_blocks: int
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
            far=self.far.to(device),
            chunks=tuple(replace(view, halo=view.halo.to(device)) for view in self.chunks),
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
    send_heads, send_slots = torch.cat(sends).unbind(1)
    asked = needed(pattern, chunks[rank], n_blocks)
    receives = [asked[:, held].nonzero() for held in positions]
    heads = torch.cat([pairs[:, 0] for pairs in receives])
    blocks = torch.cat([held[pairs[:, 1]] for held, pairs in zip(positions, receives, strict=True)])
    lives = torch.stack([rule.lifetimes(n_blocks) for rule in pattern.rules])[heads, blocks]

    views, local = [], 0
    for chunk in chunks[rank]:
        start = near_start(pattern, chunk)
        in_halo = (blocks >= start) & (blocks < chunk.start) & (chunk.start - blocks < lives)
        views.append(
            ChunkView(
                chunk=chunk,
                local=range(local, local + len(chunk)),
                near=range(start, chunk.stop),
                pattern=shifted(pattern, start),
                halo=_placement(in_halo, blocks - start, heads),
                far=_far_runs(pattern, start),
            )
        )
        local += len(chunk)

    far_end = views[-1].near.start
    strides, shifts = torch.tensor([(r.bands[-1].stride, r.shift) for r in pattern.rules]).T
    progress = (blocks - (-shifts % strides)[heads]) // strides[heads]
    in_far = (blocks < far_end) & (lives == FOREVER)
    return RankPlan(
        rank=rank,
        send=Placement(torch.arange(len(send_heads)), send_slots, send_heads),
        send_counts=tuple(len(pairs) for pairs in sends),
        receive_counts=tuple(len(pairs) for pairs in receives),
        far=_placement(in_far, progress, heads),
        far_blocks=max(forever_before(rule, far_end) for rule in pattern.rules),
        chunks=tuple(views),
    )


def _placement(chosen: Tensor, slots: Tensor, heads: Tensor) -> Placement:
    return Placement(chosen.nonzero().flatten(), slots[chosen], heads[chosen])


def _far_runs(pattern: LayerPattern, start: int) -> tuple[Run, ...]:
    """The KV heads that have far blocks before `start`, in runs of equal counts."""
    runs: list[Run] = []
    for head, rule in enumerate(pattern.rules):
        count = forever_before(rule, start)
        if runs and runs[-1].blocks == count:
            runs[-1] = Run(range(runs[-1].heads.start, head + 1), count)
        else:
            runs.append(Run(range(head, head + 1), count))
    return tuple(run for run in runs if run.blocks)


def _check_chunks(chunks: Sequence[Chunks]) -> None:
    ends = [0]
    for chunk in sorted((chunk for held in chunks for chunk in held), key=lambda c: c.start):
        if chunk.start != ends[-1] or chunk.stop <= chunk.start:
            raise ValueError(f"chunks {chunks}: must cover every block once, and none be empty")
        ends.append(chunk.stop)
    for held in chunks:
        if tuple(held) != merged(held):
            raise ValueError(f"chunks {held} of a rank: must ascend and not touch; take merged()")
