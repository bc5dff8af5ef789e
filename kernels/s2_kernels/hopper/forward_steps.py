"""Steps of the forward kernel's consumers (forward.py): notes, masks, tiles, and storing out."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2_kernels.hopper.primitives import (
    Ring,
    read_scalar,
    store_rows,
    store_some_rows,
    write_notes,
)
from s2_kernels.hopper.softmax import exponents, pack, rescale, row_sum, unpack
from s2_kernels.primitives import LN2

PLACE, KEPT, EDGES, DIAGONAL, HIDDEN = map(gl.constexpr, (0, 5, 6, 7, 8))
"""Notes of an item: five of its `Place`, n_kept, n_edges, and for `mask_first`: hidden is for
warpgroup 0, the next note for 1."""


class Memory(NamedTuple):
    """What the partitions share: Q of both warpgroups, rings of K and V tiles, notes on an item."""

    q: Ring
    k: Ring
    v: Ring
    notes: gl.shared_memory_descriptor


class Place(NamedTuple):
    """Where an item lies in memory: of its `QueryItem` what who stores it must know."""

    batch: gl.tensor
    head: gl.tensor
    row: gl.tensor
    start: gl.tensor
    length: gl.tensor


class Output(NamedTuple):
    """Where out and lse go: by descriptor through bufs, or by pointer."""

    desc: tma.tensor_descriptor
    base: gl.tensor
    lse: gl.tensor
    bufs: gl.shared_memory_descriptor
    strides: tuple
    heads: gl.tensor


class Finished(NamedTuple):
    """Rows of out [64, D] that `store_staged` has still to store, and where they go."""

    rows: gl.tensor
    where: Place
    out: Output


@gluon.jit
def turn(tile, ring):
    """Where a tile, counted over all items, lies in a ring, and its barriers' phase."""
    STAGES: gl.constexpr = ring.bufs.shape[0]
    return tile % STAGES, tile // STAGES & 1


@gluon.jit
def pass_over(low, high, ring):
    """Leaves the tiles low..high-1 to the other warpgroup."""
    for tile in range(low, high):
        stage, phase = turn(tile, ring)
        mbarrier.wait(ring.ready.index(stage), phase)
        mbarrier.arrive(ring.free.index(stage))


@gluon.jit
def write_item(notes, item, tiles, diagonal):
    """Notes of an item, for `read_item`. diagonal: see `mask_first`."""
    write_notes(notes, PLACE, Place(item.batch, item.head, item.row, item.start, item.length))
    hidden_0 = gl.where(tiles.n_edges > 0, 0, 1)
    write_notes(notes, KEPT, (tiles.n_kept, tiles.n_edges, diagonal, hidden_0, tiles.unseen))


@gluon.jit
def read_item(notes, WARPGROUP: gl.constexpr):
    """Where an item lies; half-tiles that all rows see, and others; how its first tile is masked.

    That is by (diagonal, hidden): see `mask_first`.
    """
    where = Place(
        read_scalar(notes, 0),
        read_scalar(notes, 1),
        read_scalar(notes, 2),
        read_scalar(notes, 3),
        read_scalar(notes, 4),
    )
    masked = read_scalar(notes, DIAGONAL), read_scalar(notes, HIDDEN + WARPGROUP)
    return where, read_scalar(notes, KEPT), read_scalar(notes, EDGES), masked


@gluon.jit
def mask_first(b_s, masked):
    """Scores [64, 128] of an item's first tile: its second half lies on the diagonal.

    There, row m sees the columns up to m + diagonal: 0, or 64 where it is no diagonal. It is read
    from a note: of a constant, the compiler would keep the whole mask in registers from item to
    item. The first half may be hidden from all rows.
    """
    diagonal, hidden = masked
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_0, b_1 = gl.split(gl.reshape(b_s, [64, 2, 64]).permute([0, 2, 1]))
    b_0 = gl.where(hidden > 0, float("-inf"), b_0)
    b_1 = gl.convert_layout(b_1, layout)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout)) + diagonal
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    b_1 = gl.where(o_n[None, :] <= o_m[:, None], b_1, float("-inf"))
    b_1 = gl.convert_layout(b_1, b_0.type.layout)
    joined = gl.join(b_0, b_1).permute([0, 2, 1]).reshape([64, 128])
    return gl.convert_layout(joined, b_s.type.layout)


@gluon.jit
def attend_tiles(
    low, high, last, b_q, b_p, b_acc, b_m, b_l, scale_log2, memory, N: gl.constexpr,
    finished=None, WARPGROUP: gl.constexpr = 0,
):  # fmt: skip
    """Tiles low..high-1, counted over all items: scores of one, then P V of the one before.

    That is tile `last`, whose b_p [64, 128] comes in; the tile that comes out as such has its own.
    N: columns of these tiles, 128 or 64; the other columns' probabilities are zeros. finished: of
    the item before, stored by this `WARPGROUP` while the first of these tiles has its scores made.
    """
    k, v = memory.k, memory.v
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    for tile in range(low, high):
        stage, phase = turn(tile, k)
        before, phase_before = turn(last, v)
        zeros = gl.zeros([64, N], gl.float32, s_layout)
        k_buf = k.bufs.index(stage).slice(0, N, 0)
        b_p16 = unpack(b_p, v.bufs.dtype, p_layout)
        mbarrier.wait(k.ready.index(stage), phase)
        t_s = warpgroup_mma(b_q, k_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        if finished is not None:
            store_staged(finished, WARPGROUP)
        mbarrier.wait(v.ready.index(before), phase_before)
        t_acc = warpgroup_mma(
            b_p16, v.bufs.index(before), b_acc, use_acc=finished is None, is_async=True
        )
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        mbarrier.arrive(k.free.index(stage))
        b_t, b_m, b_rise = exponents(b_s, b_m, scale_log2)
        b_acc, b_t = warpgroup_mma_wait(0, deps=[t_acc, b_t])
        mbarrier.arrive(v.free.index(before))
        b_rescale = gl.exp2(-b_rise)
        b_acc = rescale(b_acc, b_rescale)
        b_next = gl.exp2(b_t)
        b_l = b_l * b_rescale + gl.convert_layout(row_sum(b_next), b_l.type.layout)
        b_next = pack(b_next, v.bufs.dtype)
        if N == 64:
            b_next = gl.join(b_next, gl.zeros_like(b_next)).permute([0, 2, 1]).reshape([64, 64])
        b_p = gl.convert_layout(b_next, b_p.type.layout)
        last = tile
    return last, b_p, b_acc, b_m, b_l


@gluon.jit
def attend_item(
    low, n_kept, n_edges, last, b_q, b_p, b_acc, b_m, b_l, sizes, memory, WARPGROUP: gl.constexpr
):  # fmt: skip
    """The tiles of an item from `low` on, and where the next item begins. As `attend_tiles`.

    n_kept: how many half-tiles that all rows see are left.
    """
    middle = low + n_kept // 2
    # The odd half-tile that both warpgroups see, then the other edges, which one of them sees.
    tile = middle + n_kept % 2 + gl.maximum(n_edges - 1, 0)
    high = tile if WARPGROUP == 0 else middle + n_kept % 2
    last, b_p, b_acc, b_m, b_l = attend_tiles(
        low, middle, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 128
    )
    last, b_p, b_acc, b_m, b_l = attend_tiles(
        middle, high, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 64
    )
    pass_over(high, tile, memory.k)
    pass_over(high, tile, memory.v)
    return tile, last, b_p, b_acc, b_m, b_l


@gluon.jit
def store_lse(b_m, b_l, where, sizes, out, o_layout: gl.constexpr, WARPGROUP: gl.constexpr):
    """Stores lse of a warpgroup's 64 rows; what their sums of P V are multiplied with, [64]."""
    row = where.row + WARPGROUP * 64
    b_sum, b_max = gl.sum(b_l, 1), gl.max(b_m, 1)
    o_lse = row + gl.arange(0, 64, layout=b_sum.type.layout)
    p_lse = out.lse + (where.batch * out.heads + where.head).to(gl.int64) * sizes.s + where.start
    there = o_lse < where.length
    if sizes.q_offset is not None:
        there &= o_lse >= 0
    gl.store(p_lse + o_lse, (b_max + gl.log2(b_sum)) * LN2, mask=there)
    return gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, o_layout))


@gluon.jit
def store_staged(finished, WARPGROUP: gl.constexpr):
    """Stores rows through shared memory and TMA. They are waited for before the next such rows."""
    where, out = finished.where, finished.out
    out_buf = out.bufs.index(WARPGROUP)
    tma.store_wait(0)  # of the item before, long gone
    out_buf.store(finished.rows)
    fence_async_shared()
    store_rows(out.desc, where.batch, where.head, where.start + where.row + WARPGROUP * 64, out_buf)


@gluon.jit
def store_out(finished, sizes, PACKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """Stores rows as `store_staged`, or by pointer."""
    where, out = finished.where, finished.out
    row = where.row + WARPGROUP * 64
    # TMA would write over the next sequence, and takes no row below 0.
    if (PACKED and row + 64 > where.length) or (sizes.q_offset is not None and row < 0):
        store_some_rows(
            finished.rows, out.base, out.strides, where.batch, where.head, where.start, row,
            where.length, sizes.q_offset,
        )  # fmt: skip
    else:
        store_staged(finished, WARPGROUP)


@gluon.jit
def first_scores(memory, zeros, q_layout: gl.constexpr, WARPGROUP: gl.constexpr):
    """Of the first item: Q, what `read_item` says, and the scores of the first tile.

    Q's place may be freed now, and not before it is used: it may be on its way until then.
    """
    q, k = memory.q, memory.k
    mbarrier.wait(q.ready.index(0), 0)
    b_q = q.bufs.index(WARPGROUP).load(q_layout)
    where, n_kept, n_edges, masked = read_item(memory.notes, WARPGROUP)
    pass_over(0, WARPGROUP, k)
    mbarrier.wait(k.ready.index(WARPGROUP), 0)
    b_s = warpgroup_mma(b_q, k.bufs.index(WARPGROUP).permute([1, 0]), zeros, use_acc=False)
    return b_q, where, n_kept, n_edges, masked, b_s
