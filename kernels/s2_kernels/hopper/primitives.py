"""What the Hopper kernels share: items of persistent programs, half-tiles, barriers, descriptors.

A *half-tile* is 64 rows, what one warpgroup's tensor cores take: of queries or of KV. Blocks have
64 tokens or a multiple, so that a half-tile lies in one block.
"""

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.configs import FUSED
from s2_kernels.hopper import all_seen
from s2_kernels.hopper.compat import async_load, async_store, thread_barrier
from s2_kernels.hopper.packed import packed_slots
from s2_kernels.launch import Packing, concurrent_programs, pad
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.schedule import count_query_tiles, query_tiles

ROWS = 64
"""Rows of a half-tile."""

OPTIONS = dict(num_warps=4, maxnreg=168, **FUSED)
"""Of every launch: 65,536 registers over 12 warps; the partitions share them out as they need."""


class Ring(NamedTuple):
    """Places in shared memory that are filled in turn, [n, ...], and a pair of barriers for each.

    Attributes:
        ready: the place was loaded.
        free: who reads it has done so.
    """

    bufs: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Tables(NamedTuple):
    """Pointers: QueryItems' items and starts, and the pattern's rules."""

    items: gl.tensor
    starts: gl.tensor
    rules: gl.tensor


@gluon.jit
def keep_order(ready, phase):
    """A second wait for what has been waited for: keeps what stands before it before it.

    ptxas moves a wait for the tensor cores up over the arithmetic that it was to overlap with, but
    not over the loop that waits for a barrier.
    """
    mbarrier.wait(ready, phase)


@gluon.jit
def count_items(tables, total, PACKED: gl.constexpr):
    """How many items this program has: those dealt to it, or every grid-th of a packed batch's."""
    if PACKED:
        return gl.maximum(total - gl.program_id(0) - 1, -1) // gl.num_programs(0) + 1
    else:
        return gl.load(tables.starts + gl.program_id(0) + 1) - gl.load(
            tables.starts + gl.program_id(0)
        )


@gluon.jit
def item_at(i_round, tables, PACKED: gl.constexpr):
    """This program's i-th item."""
    if PACKED:
        return gl.program_id(0) + i_round * gl.num_programs(0)
    else:
        return gl.load(tables.items + gl.load(tables.starts + gl.program_id(0)) + i_round)


@gluon.jit
def next_item(p_taken, n_items):
    """The next item that no program has taken, or -1. p_taken: how many were.

    A program's first item is the one of its own number.
    """
    item = gl.num_programs(0) + gl.atomic_add(p_taken, 1, sem="relaxed")
    return gl.where(item < n_items, item, -1)


class QueryItem(NamedTuple):
    """An item over queries: a tile of 128 rows of a head.

    Attributes:
        batch, head: which; batch is 0 where sequences are packed.
        position: of the tile's first row in the KV sequence, a multiple of 128: what lifetimes are
            asked with.
        row: of the tile's first row among the sequence's queries: what is loaded and stored. Below
            0 where the first query is not the tile's first row: TMA reads zeros there, and writes
            nothing.
        start: where the sequence starts in memory, its queries and its keys.
        length: how many queries the sequence has.
        terms: where its row terms start: those of a row lie at terms + row (`term_lead`).
    """

    batch: gl.tensor
    head: gl.tensor
    position: gl.tensor
    row: gl.tensor
    start: gl.tensor
    length: gl.tensor
    terms: gl.tensor


@gluon.jit
def query_item(item, tables, sizes, PACKED: gl.constexpr):
    """The `QueryItem` of this number.

    sizes: heads, slots (tiles of a head, schedule.py), s, and q_offset (`Reach`).
    """
    i_head = item // sizes.slots
    if PACKED:
        p_slot = tables.items + item % sizes.slots * 4
        row, start, length = gl.load(p_slot) * 128, gl.load(p_slot + 1), gl.load(p_slot + 2)
        terms = gl.load(p_slot + 3)
        return QueryItem(item * 0, i_head, row, row, start, length, terms)
    else:
        position, zero = (sizes.slots - 1 - item % sizes.slots) * 128, item * 0
        i_batch, i_head = i_head // sizes.heads, i_head % sizes.heads
        row, terms = position, zero
        if sizes.q_offset is not None:
            position += sizes.q_offset // 128 * 128
            row, terms = position - sizes.q_offset, sizes.q_offset % 4
        return QueryItem(i_batch, i_head, position, row, zero, sizes.s, terms)


@gluon.jit
def make_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers that COUNT arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_notes(N: gl.constexpr):
    """N int32 in shared memory, by which the producer tells the consumers what to do with a load.

    Written before the barrier that the load completes, so that who waited for it may read them.
    """
    return gl.allocate_shared_memory(gl.int32, [N, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def write_notes(notes, first, values):
    """Notes first, first + 1, ...: by all lanes of the producer, one of which completes a load."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(len(values)):
        notes.index(first + i).store(gl.full([1], values[i], gl.int32, layout))
    thread_barrier()  # before that lane does so


@gluon.jit
def read(notes, index, layout: gl.constexpr):
    """A note, [1]."""
    return notes.index(index).load(layout)


@gluon.jit
def read_scalar(notes, index):
    return gl.max(read(notes, index, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def load_rows(desc, i_batch, i_head, row, ready, buffer):
    """64 rows of a head into a buffer [64, D]; zeros where they lie outside of the tensor."""
    D: gl.constexpr = buffer.shape[1]
    async_load(desc, [i_batch, i_head, row, 0], ready, buffer.reshape([1, 1, 64, D]))


@gluon.jit
def store_some_rows(b_x, p_base, strides, i_batch, i_head, start, row, length, q_offset=None):
    """The rows of b_x [64, D] that a sequence has, where TMA cannot store them.

    Of packed sequences it would write over the next one. Queries at an offset may begin in the
    middle of a tile, at a row below 0: Hopper's stores take that for an illegal instruction, while
    its loads fill up with zeros.
    """
    layout: gl.constexpr = b_x.type.layout
    D: gl.constexpr = b_x.shape[1]
    o_row = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    p_base += i_batch.to(gl.int64) * strides[0] + i_head.to(gl.int64) * strides[2]
    p_rows = p_base + (start + o_row).to(gl.int64) * strides[1]
    there = o_row < length
    if q_offset is not None:
        there &= o_row >= 0
    mask = there[:, None] & (o_d < strides[3])[None, :]
    gl.store(p_rows[:, None] + o_d[None, :], b_x, mask=mask)


@gluon.jit
def store_rows(desc, i_batch, i_head, row, buffer):
    """64 rows of a head out of a buffer [64, D], from 0 on; rows past the tensor are left out."""
    D: gl.constexpr = buffer.shape[1]
    async_store(desc, [i_batch, i_head, row, 0], buffer.reshape([1, 1, 64, D]))


class QueryItems(NamedTuple):
    """Items of the kernels over queries: `tables` of the kernels but the pattern's, and the grid.

    Attributes:
        items, starts: schedule.query_tiles, or of a packed batch packed.packed_slots and None.
        slots: tiles of a head.
        programs: how many to launch.
    """

    items: torch.Tensor
    starts: torch.Tensor | None
    slots: int
    programs: int


def persistent_programs(device: torch.device, spare: int) -> int:
    """How many programs to launch: one a multiprocessor, but for those to be spared."""
    return max(1, concurrent_programs(device, num_warps=8) - spare)


def query_items(
    pattern: LayerPattern,
    q: torch.Tensor,
    packing: Packing | None,
    reach: "Reach",
    spare: int = 0,
) -> QueryItems:
    """The query tiles of q [b, s, h, d], or of a packed batch [T, h, d]."""
    b, s, h, *_ = extents(q)
    programs = persistent_programs(q.device, spare)
    if packing:
        slots = packed_slots(packing.cu_q, s)
        return QueryItems(slots, None, len(slots), min(programs, h * len(slots)))
    q_offset = reach.q_offset or 0
    dealt = query_tiles(pattern, s, b, programs, q.device, q_offset, reach.all_seen)
    return QueryItems(dealt.items, dealt.starts, count_query_tiles(s, q_offset), dealt.programs)


class Reach(NamedTuple):
    """Where the queries stand among the keys, as the kernels over queries take it.

    None is compiled by itself, without the arithmetic for it.

    Attributes:
        q_offset: position of the first query; None where every query stands at the position of its
            row, and there are as many keys.
        all_seen: `hopper.all_seen`. Positions do not matter then, and q_offset is None.
        near_start, near_row: of `near.Near`; None where every key lies in the row of its position.
    """

    q_offset: int | None
    all_seen: int | None
    near_start: int | None
    near_row: int | None


def reach_of(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: LayerPattern,
    q_offset: int,
    near: Near | None = None,
) -> Reach:
    """How far queries at an offset reach."""
    if near is not None:
        return Reach(q_offset, None, *near)
    seen = all_seen(pattern, k.shape[-3], q_offset)
    return Reach(offset_or_none(q, k, q_offset) if seen is None else None, seen, None, None)


def offset_or_none(q: torch.Tensor, k: torch.Tensor, q_offset: int) -> int | None:
    """The q_offset that a kernel takes: None where it is 0, and there are as many keys as queries.

    An offset of 0 counts as one where there are more keys.
    """
    return q_offset if q_offset or q.shape[-3] != k.shape[-3] else None


def term_lead(q_offset: int) -> int:
    """Row terms that stand before those of the first query, which begins at this position.

    TMA loads the terms of 64 positions from a multiple of 64 on, and wants their place in memory to
    be a multiple of 16 bytes.
    """
    return q_offset % 4


def extents(x: torch.Tensor) -> tuple[int, int, int, int, int, int, int]:
    """b, s, h, d, and the strides of batch, row and head of [b, s, h, d], or packed [T, h, d]."""
    if x.dim() == 3:
        (s, h, d), (by_row, by_head, _) = x.shape, x.stride()
        return 1, s, h, d, 0, by_row, by_head
    (b, s, h, d), (by_batch, by_row, by_head, _) = x.shape, x.stride()
    return b, s, h, d, by_batch, by_row, by_head


def strides_and_size(x: torch.Tensor) -> tuple[int, int, int, int]:
    """What `store_some_rows` takes of a tensor: strides of batch, row and head, and d."""
    b, s, h, d, by_batch, by_row, by_head = extents(x)
    return by_batch, by_row, by_head, d


class HostLayout(gl.NVMMASharedLayout):
    """A layout whose text, which Triton reads of every descriptor of every launch, is made once."""

    @classmethod
    def of(cls, layout: gl.NVMMASharedLayout) -> "HostLayout":
        made = cls(**vars(layout))
        object.__setattr__(made, "text", repr(layout))  # frozen, as layouts are
        return made

    def __repr__(self) -> str:
        return self.text


class Descriptor(TensorDescriptor):
    """A TMA descriptor over what `takes_descriptor` has taken: it is not checked a second time."""

    def __post_init__(self):
        pass


def descriptor(x: torch.Tensor, columns: int | None = None) -> Descriptor:
    """A TMA descriptor over [b, s, h, d], or packed [T, h, d], that moves [1, 1, 64, padded d].

    Or so many columns. In the order [batch, head, row, d]. A dimension of size 1 may have any
    stride in torch, and gets one that TMA takes.
    """
    b, s, h, d, by_batch, by_row, by_head = extents(x)
    unit = 16 // x.element_size()
    by_batch, by_head = by_batch if b > 1 else unit, by_head if h > 1 else unit
    strides = [by_batch, by_head, by_row if s > 1 else unit, 1]
    return Descriptor(x, [b, h, s, d], strides, *box(columns or d, x.dtype))


@functools.cache
def box(d: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """What a descriptor moves, and how that lies in shared memory.

    Swizzled, as the tensor cores read it.
    """
    shape = [1, 1, ROWS, pad(d)]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return shape, HostLayout.of(gl.NVMMASharedLayout.get_default_for(shape, dtype))


TERM_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
"""How the row terms lie in shared memory: plain, [1, 64] float32."""
TERM_BOX = [1, ROWS], HostLayout.of(TERM_LAYOUT)


def term_descriptor(x: torch.Tensor) -> Descriptor:
    """A TMA descriptor over row terms [batch, head, rows] as [batch * head, rows]: [1, 64]."""
    b, h, rows = x.shape
    return Descriptor(x, [b * h, rows], [rows, 1], *TERM_BOX)
