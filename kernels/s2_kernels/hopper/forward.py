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
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2_kernels.hopper.compat import async_load
from s2_kernels.hopper.forward_steps import (
    Finished,
    Memory,
    Output,
    Place,
    attend_item,
    attend_tiles,
    first_scores,
    mask_first,
    pass_over,
    read_item,
    store_lse,
    store_out,
    store_staged,
    turn,
    write_item,
)
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
    strides_and_size,
)
from s2_kernels.hopper.softmax import (
    first_exponents,
    first_softmax,
    pack,
    row_sum,
    unpack,
)
from s2_kernels.launch import Packing, device_table, empty_like, on_grid, pad
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import block_at, key_row, load_rule

EARLY, IN_STEP, SECOND, ROOMY = map(gl.constexpr, (1, 2, 4, 8))
SEAMS = dict(today=0, early=1, in_step=2, roomy=2 + 8, second=2 + 4, second_roomy=2 + 4 + 8)
"""How a consumer goes from item to item, by the flags above:

`consumer`; EARLY: K of the next item's first tile is free before out is stored.
IN_STEP: `consumer_in_step`. SECOND: the second tile's scores are made while out is stored. ROOMY:
out goes through Q's place, so that K has a third."""


class Inputs(NamedTuple):
    """TMA descriptors."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor


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
def consumer(
    memory, tables, sizes, out, PACKED: gl.constexpr, WARPGROUP: gl.constexpr, SEAM: gl.constexpr
):  # fmt: skip
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
    b_q, where, n_kept, n_edges, masked, b_s = first_scores(memory, zeros, q_layout, WARPGROUP)
    mbarrier.arrive(q.free.index(0))
    if SEAM & EARLY:
        mbarrier.arrive(k.free.index(WARPGROUP))
    tile = 0
    for i_round in range(n_items):
        if not SEAM & EARLY:
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
        if SEAM & EARLY:  # lse under the products; K is free before out is on its way
            b_factor = store_lse(b_m, b_l, where, sizes, out, o_layout, WARPGROUP)
            b_acc = warpgroup_mma_wait(1, deps=[t_acc])
            mbarrier.arrive(v.free.index(stage))
            b_out = (b_acc * b_factor[:, None]).to(out.bufs.dtype)
            b_s, b_out = warpgroup_mma_wait(0, deps=[t_s, b_out])
            mbarrier.arrive(k.free.index(k_stage), pred=more)
            mbarrier.arrive(q.free.index(0), pred=more)
            store_out(Finished(b_out, where, out), sizes, PACKED, WARPGROUP)
        else:
            b_acc = warpgroup_mma_wait(1, deps=[t_acc])
            mbarrier.arrive(v.free.index(stage))
            b_factor = store_lse(b_m, b_l, where, sizes, out, o_layout, WARPGROUP)
            b_out = (b_acc * b_factor[:, None]).to(out.bufs.dtype)
            store_out(Finished(b_out, where, out), sizes, PACKED, WARPGROUP)
            b_s = warpgroup_mma_wait(0, deps=[t_s])
            mbarrier.arrive(q.free.index(0), pred=more)
        where = where_next
    tma.store_wait(0)


@gluon.jit
def consumer_in_step(
    memory, tables, sizes, out, PACKED: gl.constexpr, WARPGROUP: gl.constexpr, SEAM: gl.constexpr
):  # fmt: skip
    """As `consumer`, but from item to item it goes as from tile to tile (SEAMS).

    The last P V of an item hides the search for the maximum in the next item's first tile, whose K
    is free as soon as it is read. Out is stored after that tile's softmax: by itself (IN_STEP), or
    while the scores of the second tile are made.
    """
    q, k, v = memory.q, memory.k, memory.v
    BLOCK_D: gl.constexpr = v.bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zeros = gl.zeros([64, 128], gl.float32, s_layout)
    n_items = count_items(tables, sizes.heads * sizes.slots, PACKED)
    b_q, where, n_kept, n_edges, masked, b_s = first_scores(memory, zeros, q_layout, WARPGROUP)
    mbarrier.arrive(k.free.index(WARPGROUP))
    b_t, b_m = first_exponents(mask_first(b_s, masked), sizes.scale_log2)
    b_acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
    b_factor = gl.zeros([64], gl.float32, gl.SliceLayout(1, o_layout))
    # Before the first item there is nothing to store, and behind the last row nothing is.
    where = Place(where.batch, where.head, where.length, where.start, where.length)
    tile = 0
    for i_round in range(n_items):
        more = i_round + 1 < n_items
        b_p = gl.exp2(b_t)
        b_l = row_sum(b_p)
        b_p = pack(b_p, v.bufs.dtype)
        finished = Finished((b_acc * b_factor[:, None]).to(out.bufs.dtype), where, out)
        b_acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        low, last, other = tile + 2, tile + WARPGROUP, tile + 1 - WARPGROUP
        pass_over(tile + 1, tile + 2 - WARPGROUP, k)
        pass_over(other, other + 1, v)
        b_q = q.bufs.index(WARPGROUP).load(q_layout)
        where, n_kept, n_edges, _ = read_item(memory.notes, WARPGROUP)
        second = gl.where(n_kept > 1, 1, 0)
        if SEAM & SECOND and not PACKED and sizes.q_offset is None:
            if second == 0:
                store_staged(finished, WARPGROUP)
            last, b_p, b_acc, b_m, b_l = attend_tiles(
                low, low + second, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 128,
                finished, WARPGROUP,
            )  # fmt: skip
        else:
            store_out(finished, sizes, PACKED, WARPGROUP)
            last, b_p, b_acc, b_m, b_l = attend_tiles(
                low, low + second, last, b_q, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory, 128
            )
        if SEAM & ROOMY:  # out went through Q's place
            tma.store_wait(0)
        # Q and the notes may be on their way to registers until they were used, or a tile later.
        mbarrier.arrive(q.free.index(0), pred=more & (second == 1))
        low, n_kept = low + second, n_kept - 2 * second
        tile, last, b_p, b_acc, b_m, b_l = attend_item(
            low, n_kept, n_edges, last, b_q, b_p, b_acc, b_m, b_l, sizes, memory, WARPGROUP
        )
        mbarrier.arrive(q.free.index(0), pred=more & (second == 0))
        # The next item's first tile. After the last item, whatever lies there.
        mbarrier.wait(q.ready.index(0), i_round + 1 & 1, pred=more)
        if WARPGROUP == 1:
            k_stage, phase = turn(tile, k)
            mbarrier.wait(k.ready.index(k_stage), phase, pred=more)
            mbarrier.arrive(k.free.index(k_stage), pred=more)
        k_stage, phase = turn(tile + WARPGROUP, k)
        b_p16 = unpack(b_p, v.bufs.dtype, p_layout)
        mbarrier.wait(k.ready.index(k_stage), phase, pred=more)
        q_buf, k_buf = q.bufs.index(WARPGROUP), k.bufs.index(k_stage).permute([1, 0])
        t_s = warpgroup_mma(q_buf, k_buf, zeros, use_acc=False, is_async=True)
        stage, phase = turn(last, v)
        mbarrier.wait(v.ready.index(stage), phase)
        t_acc = warpgroup_mma(b_p16, v.bufs.index(stage), b_acc, is_async=True)
        b_factor = store_lse(b_m, b_l, where, sizes, out, o_layout, WARPGROUP)
        _, _, _, masked = read_item(memory.notes, WARPGROUP)
        # Waits that are over, as in `keep_order`: ptxas would free K after lse and the search for
        # the maximum, and wait for P V before that.
        mbarrier.wait(q.ready.index(0), i_round + 1 & 1, pred=more)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        mbarrier.arrive(k.free.index(k_stage), pred=more)
        mbarrier.wait(q.ready.index(0), i_round + 1 & 1, pred=more)
        b_t, b_m = first_exponents(mask_first(b_s, masked), sizes.scale_log2)
        mbarrier.wait(q.ready.index(0), i_round + 1 & 1, pred=more)
        b_acc, b_t = warpgroup_mma_wait(0, deps=[t_acc, b_t])
        mbarrier.arrive(v.free.index(stage))
    finished = Finished((b_acc * b_factor[:, None]).to(out.bufs.dtype), where, out)
    store_out(finished, sizes, PACKED, WARPGROUP)
    tma.store_wait(0)


@gluon.jit
def any_consumer(
    memory, tables, sizes, out, PACKED: gl.constexpr, WARPGROUP: gl.constexpr, SEAM: gl.constexpr
):  # fmt: skip
    """The consumer of this seam."""
    if SEAM & IN_STEP:
        consumer_in_step(memory, tables, sizes, out, PACKED, WARPGROUP, SEAM)
    else:
        consumer(memory, tables, sizes, out, PACKED, WARPGROUP, SEAM)


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
    SEAM: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: see primitives.QueryItems."""
    BLOCK_D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], q_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES, 128, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [V_STAGES, 128, BLOCK_D], layout)
    if SEAM & ROOMY:
        out_bufs = q_bufs
    else:
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
            (any_consumer, (memory, tables, sizes, out, PACKED, 0, SEAM)),
            (any_consumer, (memory, tables, sizes, out, PACKED, 1, SEAM)),
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
    seam: str = "today",
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as s2_kernels.forward.launch_forward; `hopper.why_not` was asked before.

    seam: of SEAMS. Only scripts/bench/forward_variants.py asks for another than today's.
    """
    b, s, h, d, *_ = extents(q)
    out = empty_like(q, d)
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
        # What fits 227 KiB of shared memory.
        K_STAGES=(3 if SEAMS[seam] & ROOMY.value else 2) if pad(d) == 128 else 6,
        V_STAGES=3 if pad(d) == 128 else 6,
        SEAM=SEAMS[seam],
        **OPTIONS,
    )
    return out, lse if packing is None else lse[0]
