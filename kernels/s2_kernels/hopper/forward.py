"""The forward kernel for Hopper, in Gluon: loads, tensor cores and softmax at the same time.

Persistent programs of three partitions: a producer warp loads by TMA, two consumer warpgroups own
64 query rows each of a tile of 128. A KV tile has 128 rows: two half-tiles of 64 that lie anywhere,
the next two entries of the query tile's list of KV blocks (lists.py), so that the shard, the
ranges and the window go through one pipeline. The scores of a tile are issued before the previous
tile's P V, whose tensor-core time hides the search for the maximum. The exponentials come after it:
the other warpgroup has the tensor cores then, and the two take turns by themselves.

An item is a query tile of a head. Its first two KV tiles lie on the diagonal, one for each
warpgroup: its rows' own half-tile, and the one before it that they see. Then come pairs of
half-tiles that all rows see, without a mask; then, one by one, the last of these if they are odd in
number, and what else only the upper rows still see. What it does not see, a warpgroup passes over.

Barriers come in pairs, ready (loaded) and free (read); a warpgroup arrives once.

Shapes as in s2_kernels/forward.py.
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2_kernels.hopper.compat import async_load
from s2_kernels.hopper.lists import FAR, QueryList, listed_position, query_list
from s2_kernels.hopper.primitives import (
    OPTIONS,
    Ring,
    Tables,
    count_items,
    descriptor,
    extents,
    item_at,
    load_rows,
    make_barriers,
    make_notes,
    query_item,
    query_items,
    reach_of,
    read_scalar,
    store_rows,
    store_some_rows,
    strides_and_size,
    write_notes,
)
from s2_kernels.hopper.softmax import exponents, first_softmax, pack, rescale, row_sum, unpack
from s2_kernels.launch import Packing, device_table, empty_like, on_grid, pad
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LN2, block_at, key_row, load_rule

PLACE, KEPT, EDGES, DIAGONAL, HIDDEN = map(gl.constexpr, (0, 5, 6, 7, 8))
"""Notes of an item: five of its `Place`, n_kept, n_edges, and for `mask_first`: hidden is for
warpgroup 0, the next note for 1."""


class Inputs(NamedTuple):
    """TMA descriptors."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor


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


class Sizes(NamedTuple):
    """Numbers of heads, of query heads per KV head, of tiles of a head, of queries; the scale.

    q_offset to near_row: `Reach`.
    """

    heads: gl.tensor
    group: gl.tensor
    slots: gl.tensor
    s: gl.tensor
    q_offset: gl.tensor
    all_seen: gl.tensor
    near_start: gl.tensor
    near_row: gl.tensor
    scale_log2: gl.tensor


class Output(NamedTuple):
    """Where out and lse go: by descriptor through bufs, or by pointer."""

    desc: tma.tensor_descriptor
    base: gl.tensor
    lse: gl.tensor
    bufs: gl.shared_memory_descriptor
    strides: tuple
    heads: gl.tensor


@gluon.jit
def turn(tile, ring):
    """Where a tile, counted over all items, lies in a ring, and its barriers' phase."""
    STAGES: gl.constexpr = ring.bufs.shape[0]
    return tile % STAGES, tile // STAGES & 1


@gluon.jit
def load_half_tiles(desc, i_batch, i_kv, rows, tile, ring):
    """Two half-tiles of 64 rows as one tile of a ring, once its place is free."""
    stage, phase = turn(tile, ring)
    mbarrier.wait(ring.free.index(stage), phase ^ 1)
    ready = ring.ready.index(stage)
    halves = ring.bufs.index(stage).reshape([1, 2, 64, ring.bufs.shape[2]])
    mbarrier.expect(ready, 2 * desc.block_type.nbytes)
    async_load(desc, [i_batch, i_kv, rows[0], 0], ready, halves.slice(0, 1, 1))
    async_load(desc, [i_batch, i_kv, rows[1], 0], ready, halves.slice(1, 1, 1))


@gluon.jit
def full_list(n):
    """The list of an item whose rows see all of n half-tiles, in place of a `QueryList`.

    The first and the last of them are in both warpgroups' first tile.
    """
    n_first, n_kept = gl.where(n > 1, 1, 0), gl.maximum(n - 2, 0)
    tiles = QueryList(n * 0, (1, 1, n_kept), (0, 1, n_first), n_kept, n_first, 1 - n_first)
    return tiles


@gluon.jit
def producer(
    descs, memory, tables, sizes, B: gl.constexpr, N_BANDS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Loads Q of every item and the K and V tiles of its list; notes how long the list is."""
    q, k, v = memory.q, memory.k, memory.v
    BLOCK: gl.constexpr = B if sizes.all_seen is None else 64  # of the list's segments
    n_items = count_items(tables, sizes.heads * sizes.slots, PACKED)
    tile = 0
    for i_round in range(n_items):
        item = query_item(item_at(i_round, tables, PACKED), tables, sizes, PACKED)
        rule = load_rule(tables.rules, item.head // sizes.group, N_BANDS)
        if sizes.all_seen is None:
            tiles = query_list(rule, item.position, B, N_BANDS)
        else:
            tiles = full_list(sizes.all_seen)
        mbarrier.wait(q.free.index(0), i_round & 1 ^ 1)
        write_item(memory.notes, item, tiles, 0 if sizes.all_seen is None else 64)
        mbarrier.expect(q.ready.index(0), 2 * descs.q.block_type.nbytes)
        for w in gl.static_range(2):
            q_row = item.start + item.row + w * 64
            load_rows(descs.q, item.batch, item.head, q_row, q.ready.index(0), q.bufs.index(w))
        i_kv = item.head // sizes.group
        edge = gl.where(tiles.n_edges > 0, block_at(tiles.edges, 0, N_BANDS) * 64, FAR)
        n_paired = 2 + tiles.n_kept // 2
        for p in range(n_paired + tiles.n_kept % 2 + gl.maximum(tiles.n_edges - 1, 0)):
            if p < 2:
                if sizes.all_seen is None:
                    at_0, at_1 = gl.where(p == 0, edge, item.position), item.position + p * 64
                else:
                    at_0, at_1 = edge, (sizes.all_seen - 1) * 64
            else:  # pairs, then what is left, one by one
                half = gl.minimum(2 * p, n_paired + p) - 4
                at_0 = listed_position(tiles, half, BLOCK, N_BANDS)
                at_1 = listed_position(tiles, half + 1, BLOCK, N_BANDS)
                at_1 = gl.where(p < n_paired, at_1, FAR)
            if sizes.near_start is not None:
                at_0 = key_row(rule, at_0, sizes.near_start, sizes.near_row, B, N_BANDS)
                at_1 = key_row(rule, at_1, sizes.near_start, sizes.near_row, B, N_BANDS)
            rows = (item.start + at_0, item.start + at_1)
            load_half_tiles(descs.k, item.batch, i_kv, rows, tile, k)
            load_half_tiles(descs.v, item.batch, i_kv, rows, tile, v)
            tile += 1


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
    low, high, last, b_q, b_p, b_acc, b_m, b_l, scale_log2, memory, N: gl.constexpr
):  # fmt: skip
    """Tiles low..high-1, counted over all items: scores of one, then P V of the one before.

    That is tile `last`, whose b_p [64, 128] comes in; the tile that comes out as such has its own.
    N: columns of these tiles, 128 or 64; the other columns' probabilities are zeros.
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
        mbarrier.wait(v.ready.index(before), phase_before)
        t_acc = warpgroup_mma(b_p16, v.bufs.index(before), b_acc, is_async=True)
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
def store_tile(b_acc, b_m, b_l, where, sizes, out, PACKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """Stores out and lse of a warpgroup's 64 rows of an item; the next item waits for out."""
    row = where.row + WARPGROUP * 64
    b_sum, b_max = gl.sum(b_l, 1), gl.max(b_m, 1)
    o_lse = row + gl.arange(0, 64, layout=b_sum.type.layout)
    p_lse = out.lse + (where.batch * out.heads + where.head).to(gl.int64) * sizes.s + where.start
    there = o_lse < where.length
    if sizes.q_offset is not None:
        there &= o_lse >= 0
    gl.store(p_lse + o_lse, (b_max + gl.log2(b_sum)) * LN2, mask=there)
    b_factor = gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, b_acc.type.layout))
    b_out = (b_acc * b_factor[:, None]).to(out.bufs.dtype)
    if (PACKED and row + 64 > where.length) or (sizes.q_offset is not None and row < 0):
        store_some_rows(
            b_out, out.base, out.strides, where.batch, where.head, where.start, row, where.length,
            sizes.q_offset,
        )  # fmt: skip
    else:
        out_buf = out.bufs.index(WARPGROUP)
        tma.store_wait(0)  # of the item before, long gone
        out_buf.store(b_out)
        fence_async_shared()
        store_rows(out.desc, where.batch, where.head, where.start + row, out_buf)


@gluon.jit
def consumer(memory, tables, sizes, out, PACKED: gl.constexpr, WARPGROUP: gl.constexpr):
    """Attends from 64 query rows of every item and stores out and lse.

    The scores of an item's first tile are issued before the last P V of the item before is done.
    """
    q, k, v = memory.q, memory.k, memory.v
    BLOCK_D: gl.constexpr = v.bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zeros = gl.zeros([64, 128], gl.float32, s_layout)
    n_items = count_items(tables, sizes.heads * sizes.slots, PACKED)
    mbarrier.wait(q.ready.index(0), 0)
    b_q = q.bufs.index(WARPGROUP).load(q_layout)
    where, n_kept, n_edges, masked = read_item(memory.notes, WARPGROUP)
    pass_over(0, WARPGROUP, k)
    mbarrier.wait(k.ready.index(WARPGROUP), 0)
    b_s = warpgroup_mma(b_q, k.bufs.index(WARPGROUP).permute([1, 0]), zeros, use_acc=False)
    mbarrier.arrive(q.free.index(0))  # not before Q is used: it may be on its way until then
    tile = 0
    for i_round in range(n_items):
        mbarrier.arrive(k.free.index((tile + WARPGROUP) % k.bufs.shape[0]))
        pass_over(tile + 1, tile + 2 - WARPGROUP, k)
        b_s = mask_first(b_s, masked)
        b_p, b_m, b_l = first_softmax(b_s, sizes.scale_log2)
        b_p = pack(b_p, v.bufs.dtype)
        b_acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        last, other = tile + WARPGROUP, tile + 1 - WARPGROUP
        pass_over(other, other + 1, v)
        low, middle = tile + 2, tile + 2 + n_kept // 2
        # The odd half-tile that both warpgroups see, then the other edges, which one of them sees.
        tile = middle + n_kept % 2 + gl.maximum(n_edges - 1, 0)
        high = tile if WARPGROUP == 0 else middle + n_kept % 2
        last, b_p, b_acc, b_m, b_l = attend_tiles(
            low, middle, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 128
        )
        last, b_p, b_acc, b_m, b_l = attend_tiles(
            middle, high, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 64
        )
        pass_over(high, tile, k)
        pass_over(high, tile, v)
        stage, phase = turn(last, v)
        mbarrier.wait(v.ready.index(stage), phase)
        b_p16 = unpack(b_p, v.bufs.dtype, p_layout)
        t_acc = warpgroup_mma(b_p16, v.bufs.index(stage), b_acc, is_async=True)
        # Scores of the next item's first tile. After the last item, of whatever lies there.
        more = i_round + 1 < n_items
        mbarrier.wait(q.ready.index(0), i_round + 1 & 1, pred=more)
        b_q = q.bufs.index(WARPGROUP).load(q_layout)
        where_next, n_kept, n_edges, masked = read_item(memory.notes, WARPGROUP)
        if WARPGROUP == 1:
            k_stage, phase = turn(tile, k)
            mbarrier.wait(k.ready.index(k_stage), phase, pred=more)
            mbarrier.arrive(k.free.index(k_stage), pred=more)
        k_stage, phase = turn(tile + WARPGROUP, k)
        mbarrier.wait(k.ready.index(k_stage), phase, pred=more)
        t_s = warpgroup_mma(
            b_q, k.bufs.index(k_stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        b_acc = warpgroup_mma_wait(1, deps=[t_acc])
        mbarrier.arrive(v.free.index(stage))
        store_tile(b_acc, b_m, b_l, where, sizes, out, PACKED, WARPGROUP)
        where = where_next
        b_s = warpgroup_mma_wait(0, deps=[t_s])
        mbarrier.arrive(q.free.index(0), pred=more)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n_slots", "s", "q_offset", "all_seen", "near_start", "near_row"
    ]
)  # fmt: skip
def s2_hopper_forward_kernel(
    d_q,
    d_k,
    d_v,
    d_out,
    p_out,
    p_lse,
    p_items,
    p_starts,
    p_table,
    strides_out,
    heads,
    group,
    n_slots,
    s,
    q_offset,
    all_seen,
    near_start,
    near_row,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    PACKED: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: see primitives.QueryItems."""
    BLOCK_D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], q_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES, 128, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [V_STAGES, 128, BLOCK_D], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], q_layout)
    q_notes = make_notes(10)
    q_ready, q_free = make_barriers(1, 1), make_barriers(1, 2)
    k_ready, k_free = make_barriers(K_STAGES, 1), make_barriers(K_STAGES, 2)
    v_ready, v_free = make_barriers(V_STAGES, 1), make_barriers(V_STAGES, 2)
    memory = Memory(
        Ring(q_bufs, q_ready, q_free),
        Ring(k_bufs, k_ready, k_free),
        Ring(v_bufs, v_ready, v_free),
        q_notes,
    )
    tables = Tables(p_items, p_starts, p_table)
    sizes = Sizes(heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, scale_log2)
    out = Output(d_out, p_out, p_lse, out_bufs, strides_out, heads)
    gl.warp_specialize(
        [
            (consumer, (memory, tables, sizes, out, PACKED, 0)),
            (consumer, (memory, tables, sizes, out, PACKED, 1)),
            (producer, (Inputs(d_q, d_k, d_v), memory, tables, sizes, B, N_BANDS, PACKED)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    packing: Packing | None = None,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as s2_kernels.forward.launch_forward; `hopper.why_not` was asked before."""
    b, s, h, d, *_ = extents(q)
    out = empty_like(q, d) if into is None else into
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    reach = reach_of(q, k, pattern, q_offset, near)
    work = query_items(pattern, q, packing, reach, spare)
    on_grid(s2_hopper_forward_kernel, (work.programs,))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(out),
        out,
        lse,
        work.items,
        work.starts,
        device_table(pattern, q.device),
        strides_and_size(out),
        h,
        h // k.shape[-2],
        work.slots,
        s,
        *reach,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        PACKED=packing is not None,
        K_STAGES=2 if pad(d) == 128 else 6,  # what fits 227 KiB of shared memory
        V_STAGES=3 if pad(d) == 128 else 6,
        **OPTIONS,
    )
    return out, lse if packing is None else lse[0]
