"""dq, dk and dv on Hopper in one kernel over KV, in Gluon: five matrix products instead of seven.

For measurement: nothing chooses this pass by itself (docs/kernels.md). As in backward_dkdv.py a
pair of columns of 64 tokens shares the loads of the queries, and a consumer warpgroup owns each
column with its dk and dv in registers. Here the kernel also makes dq, so that S and dP are computed
once:

- Each warpgroup leaves dS^T of its column in shared memory. Both then compute
  dq = dS_0 K_0 + dS_1 K_1 of the query half-tile, each for one half of the head's columns.
- dq is added to a sum by TMA, which adds in the L2 cache. Several programs add to a half-tile, in
  an order that varies. In float32 the last bits of dq may differ from run to run; whole numbers
  (`deterministic`) come out the same in any order.
- A half-tile that sees one column only: the other warpgroup leaves zeros for dS^T.

Two small kernels stand before and after (dq_sums.py): one makes the row terms and sets the sums to
0, the other rounds the sums to dq.

Shapes and formulas as in s2_kernels/backward.py.
"""

import dataclasses
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

from s2_kernels.backward_dkdv import add_pieces
from s2_kernels.hopper import WIDEST
from s2_kernels.hopper.backward_dkdv import Output, Work, column_item
from s2_kernels.hopper.compat import async_add, async_load
from s2_kernels.hopper.dq_sums import as_registers, begin_sums, round_sums, sum_descriptor
from s2_kernels.hopper.lists import FAR, column_rows
from s2_kernels.hopper.packed import packed_slots, term_rows
from s2_kernels.hopper.primitives import (
    OPTIONS,
    ROWS,
    TERM_LAYOUT,
    Descriptor,
    HostLayout,
    descriptor,
    extents,
    load_rows,
    make_barriers,
    make_notes,
    next_item,
    offset_or_none,
    read_scalar,
    store_rows,
    store_some_rows,
    strides_and_size,
    term_descriptor,
    term_lead,
    write_notes,
)
from s2_kernels.launch import (
    Packing,
    concurrent_programs,
    device_table,
    empty_like,
    fresh_counter,
    pad,
    takes_descriptor,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.schedule import column_pairs

STAGES = 2
LONGEST = 512
"""Half-tiles of queries above which a column is cut: pieces of about one length begin together and
stay in step, so that their programs ask the L2 cache for the same queries and sums."""
NOTES = gl.constexpr(11)
"""How many notes the producer leaves for each warpgroup of an item; what they say, in order."""
BEFORE, COUNT, WHOLE, AFTER, BATCH, KV_HEAD, SHARE, ROW, THERE, LEFT, TILE = map(
    gl.constexpr, range(11)
)


class Memory(NamedTuple):
    """What the partitions share, and the barriers of it.

    A ring of query half-tiles, q, dout and their row terms, freed together by `free` (unit: of
    whole numbers, how many make 1); K and V of
    two columns, and notes of two items in turn; dS^T of both columns, of two tiles in turn; of each
    warpgroup, dq on its way to the sum, and the place from which dv and dk leave.
    """

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    unit: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    do_ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    kv_ready: gl.shared_memory_descriptor
    kv_free: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    ds_ready: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor


class Descriptors(NamedTuple):
    """TMA descriptors of what comes in, of the sums of dq, and of dk and dv."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dout: tma.tensor_descriptor
    lse2: tma.tensor_descriptor
    delta: tma.tensor_descriptor
    unit: tma.tensor_descriptor
    dq: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor


class Sizes(NamedTuple):
    """Numbers of sequences, heads, items, queries and sums of dq of a head; q_offset; the scale."""

    batch: gl.tensor
    heads: gl.tensor
    kv_heads: gl.tensor
    items: gl.tensor
    s: gl.tensor
    tiles: gl.tensor
    q_offset: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor


@gluon.jit
def producer(
    descs, memory, work, sizes, B: gl.constexpr, N_BANDS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Loads K and V of an item's columns, then Q, dO and their row terms, from the last back.

    The half-tiles of queries that are loaded are those that see either column; of a piece, a part.
    Notes for each warpgroup how many it has no share of, adds whole, adds on the diagonal, has no
    share of, where its column lies, what is left of the sequence there, and the number of the first
    half-tile's sum of dq; the last notes say that.
    """
    done, i_round, item = 0, 0, gl.program_id(0)
    ready = memory.kv_ready.index(0)
    while item >= 0:
        at = column_item(item, work, sizes, B, N_BANDS, PACKED)
        i_batch, i_kv, start, length = at.batch, at.kv_head, at.start, at.length
        column_0, column_1 = at.column_0, at.column_1
        first_half, n_rows = None, (length + 63) // 64
        if sizes.q_offset is not None:
            first_half, n_rows = sizes.q_offset // 64, (sizes.q_offset + length + 63) // 64
        begin_0, end_0 = column_rows(at.rule, column_0, first_half, n_rows, B, N_BANDS)
        begin_1, end_1 = column_rows(at.rule, column_1, first_half, n_rows, B, N_BANDS)
        low = gl.where(column_1 < 0, begin_0, gl.minimum(begin_0, begin_1))
        n = gl.maximum(end_0, end_1) - low
        low, high = low + n * at.piece // at.n_pieces, low + n * (at.piece + 1) // at.n_pieces
        columns, ends = (column_0, column_1), (end_0, end_1)
        tile = (i_batch * sizes.heads + i_kv * GROUP) * sizes.tiles + high - 1
        if PACKED:  # of a sequence's first slot
            i_slot = item // sizes.kv_heads
            tile += (i_slot - gl.load(work.items + i_slot * 4)) * 2
        if sizes.q_offset is not None:
            tile -= first_half
        mbarrier.wait(memory.kv_free.index(0), i_round & 1 ^ 1)
        rows = ()
        for w in gl.static_range(2):
            end = gl.minimum(gl.maximum(ends[w], low), high)
            first = gl.minimum(gl.maximum(columns[w], low), end)
            on_diagonal = (first == columns[w]) & (first < end)
            n_whole = end - first - on_diagonal.to(gl.int32)
            share = gl.where(at.slot < 0, at.slot, at.slot + w * at.n_pieces)
            row = gl.where(columns[w] < 0, FAR, start + columns[w] * 64)
            n_there = gl.where(columns[w] < 0, 64, length - columns[w] * 64)
            n_left = length - (end - 1) * 64
            tiles = (high - end, end - first, n_whole, first - low)
            place = (i_batch, i_kv, share, row, n_there, n_left, tile)
            write_notes(memory.notes, (i_round % 2 * 2 + w) * NOTES, tiles + place)
            rows = rows + (row,)  # noqa: RUF005 - Triton has no (*a, b)
        mbarrier.expect(ready, 2 * (descs.k.block_type.nbytes + descs.v.block_type.nbytes))
        for w in gl.static_range(2):
            load_rows(descs.k, i_batch, i_kv, rows[w], ready, memory.k.index(w))
            load_rows(descs.v, i_batch, i_kv, rows[w], ready, memory.v.index(w))
        for i_member in range(GROUP):
            i_head = i_kv * GROUP + i_member
            term = i_batch * sizes.heads + i_head
            for i in range(high - low):
                row, term_row = start + (high - 1 - i) * 64, at.terms + (high - 1 - i) * 64
                if sizes.q_offset is not None:
                    row, term_row = row - sizes.q_offset, term_row - sizes.q_offset
                load_queries(descs, i_batch, i_head, row, term, term_row, done, memory, STAGES)
                done += 1
        i_round += 1
        item = next_item(work.taken, sizes.items)
    mbarrier.wait(memory.kv_free.index(0), i_round & 1 ^ 1)
    for w in gl.static_range(2):
        write_notes(memory.notes, (i_round % 2 * 2 + w) * NOTES, (-1,))
    mbarrier.arrive(ready)


@gluon.jit
def load_queries(
    descs, i_batch, i_head, row, term, term_row, done, memory, STAGES: gl.constexpr
):  # fmt: skip
    """Q and dO of a half-tile with their row terms, once their place is free."""
    stage, phase = done % STAGES, done // STAGES & 1
    mbarrier.wait(memory.free.index(stage), phase ^ 1)
    ready = memory.q_ready.index(stage)
    mbarrier.expect(ready, descs.q.block_type.nbytes + descs.lse2.block_type.nbytes)
    load_rows(descs.q, i_batch, i_head, row, ready, memory.q.index(stage))
    async_load(descs.lse2, [term, term_row], ready, memory.lse2.index(stage))
    ready = memory.do_ready.index(stage)
    WHOLE_NUMBERS: gl.constexpr = memory.dq.dtype == gl.int32
    nbytes: gl.constexpr = descs.dout.block_type.nbytes + descs.delta.block_type.nbytes
    mbarrier.expect(ready, nbytes + (descs.unit.block_type.nbytes if WHOLE_NUMBERS else 0))
    load_rows(descs.dout, i_batch, i_head, row, ready, memory.dout.index(stage))
    async_load(descs.delta, [term, term_row], ready, memory.delta.index(stage))
    if WHOLE_NUMBERS:
        async_load(descs.unit, [term, term_row], ready, memory.unit.index(stage))


@gluon.jit
def hand_over(b_ds, done, memory, WARPGROUP: gl.constexpr):
    """Leaves dS^T [64, 64] of a warpgroup's column and tile for both.

    A place is free again by then: the other warpgroup has left dS^T of the tile before this one,
    and before that it had the products that read this place.
    """
    place = done % 2
    memory.ds.index(place * 2 + WARPGROUP).store(b_ds)
    fence_async_shared()
    mbarrier.arrive(memory.ds_ready.index(place))


@gluon.jit
def dq_product(done, memory, WARPGROUP: gl.constexpr):
    """Issues dq / scale of a tile from both columns: [64, D / 2], this warpgroup's half."""
    HALF: gl.constexpr = memory.k.shape[2] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    place, phase = done % 2, done // 2 & 1
    t_dq = gl.zeros([64, HALF], gl.float32, layout)
    mbarrier.wait(memory.ds_ready.index(place), phase)
    for w in gl.static_range(2):
        ds_buf = memory.ds.index(place * 2 + w).permute([1, 0])
        k_buf = memory.k.index(w + (done >> 30)).slice(WARPGROUP * HALF, HALF, dim=1)
        t_dq = warpgroup_mma(ds_buf, k_buf, t_dq, use_acc=w > 0, is_async=True)
    return t_dq


@gluon.jit
def to_unit(b_dq, stage, memory):
    """dq / scale as it is added up: as it is, or in whole numbers."""
    if memory.dq.dtype == gl.int32:
        row_layout: gl.constexpr = gl.SliceLayout(1, b_dq.type.layout)
        b_unit = memory.unit.index(stage).reshape([64]).load(row_layout)
        return (b_dq * b_unit[:, None]).to(gl.int32)
    else:
        return b_dq


@gluon.jit
def add_to_sum(b_dq, desc, tile, memory, WARPGROUP: gl.constexpr):
    """Adds a warpgroup's half of a tile's dq to its sum."""
    dq_buf = memory.dq.index(WARPGROUP)
    tma.store_wait(0)  # the tile before it has left
    dq_buf.store(as_registers(b_dq))
    fence_async_shared()
    async_add(desc, [(tile * 2 + WARPGROUP) * 64, 0], dq_buf)


@gluon.jit
def pass_over(n, done, tile, desc, memory, STAGES: gl.constexpr, WARPGROUP: gl.constexpr):
    """n tiles that see the other warpgroup's column only: dq of them; of dk and dv, nothing."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    for i in range(n):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        mbarrier.wait(memory.q_ready.index(stage), phase)
        mbarrier.wait(memory.do_ready.index(stage), phase)
        hand_over(gl.zeros([64, 64], memory.ds.dtype, s_layout), done + i, memory, WARPGROUP)
        t_dq = dq_product(done + i, memory, WARPGROUP)
        b_dq = to_unit(warpgroup_mma_wait(0, deps=[t_dq]), stage, memory)
        add_to_sum(b_dq, desc, tile - i, memory, WARPGROUP)
        mbarrier.arrive(memory.free.index(stage))
    return done + n, tile - n


@gluon.jit
def add_tiles(
    n, n_whole, n_left, done, tile, b_dk, b_dv, scale_log2, desc, memory,
    STAGES: gl.constexpr, PACKED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """dk and dv [64, D] of a column with the shares of n query half-tiles added; and dq of these.

    Those from n_whole on lie on the diagonal. PACKED: tile 0 has n_left rows of the sequence.

    The warpgroups hand dS^T over in every tile and so keep in step: neither can count on the other
    for work for the tensor cores. dP runs under the exponentials, dv under dS, dk while dq leaves.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dv.type.layout, 2)
    term_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    for i in range(n):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        q_buf, do_buf = memory.q.index(stage), memory.dout.index(stage)
        # 0, which no compiler can tell: the addresses of K and V and the columns of the mask, many
        # numbers, would be worked out before the loop, and spill.
        zero = i >> 30
        k_buf, v_buf = memory.k.index(WARPGROUP + zero), memory.v.index(WARPGROUP + zero)
        zeros = gl.zeros([64, 64], gl.float32, s_layout)
        mbarrier.wait(memory.q_ready.index(stage), phase)
        t_s = warpgroup_mma(k_buf, q_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(memory.do_ready.index(stage), phase)
        t_dp = warpgroup_mma(v_buf, do_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        b_lse2 = memory.lse2.index(stage).reshape([64]).load(term_layout)
        if PACKED:
            there = gl.arange(0, 64, layout=term_layout) < n_left + 64 * i
            b_lse2 = gl.where(there, b_lse2, float("inf"))
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        if i >= n_whole:
            o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
            o_m = gl.arange(0, 64, layout=term_layout) + zero
            b_s = gl.where(o_n[:, None] <= o_m[None, :], b_s, float("-inf"))
        b_p = gl.exp2(b_s * scale_log2 - b_lse2[None, :])
        b_p16 = gl.convert_layout(b_p.to(memory.dout.dtype), p_layout)
        t_dv = warpgroup_mma(b_p16, do_buf, b_dv, is_async=True)
        b_delta = memory.delta.index(stage).reshape([64]).load(term_layout)
        if PACKED:
            b_delta = gl.where(there, b_delta, 0.0)
        b_dp = warpgroup_mma_wait(1, deps=[t_dp])
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(memory.q.dtype)
        hand_over(b_ds, done + i, memory, WARPGROUP)
        t_dq = dq_product(done + i, memory, WARPGROUP)
        t_dk = warpgroup_mma(gl.convert_layout(b_ds, p_layout), q_buf, b_dk, is_async=True)
        b_dv, b_dq = warpgroup_mma_wait(1, deps=[t_dv, t_dq])
        add_to_sum(to_unit(b_dq, stage, memory), desc, tile - i, memory, WARPGROUP)
        b_dk = warpgroup_mma_wait(0, deps=[t_dk])
        mbarrier.arrive(memory.free.index(stage))
    return b_dk, b_dv


@gluon.jit
def store_share(p_share, b_dk, b_dv):
    """A piece's dk and dv [64, D] in float32."""
    layout: gl.constexpr = b_dk.type.layout
    D: gl.constexpr = b_dk.shape[1]
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    p_tile = p_share + o_n[:, None] * D + o_d[None, :]
    gl.store(p_tile, b_dk)
    gl.store(p_tile + 64 * D, b_dv)


@gluon.jit
def store_column(desc, i_batch, i_kv, row, b_x, out_buf):
    """dk or dv [64, D] of a column, through shared memory."""
    tma.store_wait(0)
    out_buf.store(b_x.to(out_buf.dtype))
    fence_async_shared()
    store_rows(desc, i_batch, i_kv, row, out_buf)


@gluon.jit
def consumer(
    descs, stores, memory, work, sizes,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """dk and dv of one column of every item, stored, or as a piece's share; dq on the way."""
    D: gl.constexpr = memory.k.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    done, i_round, note = 0, 0, WARPGROUP * NOTES
    mbarrier.wait(memory.kv_ready.index(0), 0)
    n_before = read_scalar(memory.notes, note + BEFORE)
    while n_before >= 0:
        n = read_scalar(memory.notes, note + COUNT)
        n_whole = read_scalar(memory.notes, note + WHOLE)
        n_after = read_scalar(memory.notes, note + AFTER)
        n_left = read_scalar(memory.notes, note + LEFT)
        b_dk = gl.zeros([64, D], gl.float32, layout)
        b_dv = gl.zeros([64, D], gl.float32, layout)
        for i_member in range(GROUP):
            tile = read_scalar(memory.notes, note + TILE) + i_member * sizes.tiles
            done, tile = pass_over(n_before, done, tile, descs.dq, memory, STAGES, WARPGROUP)
            b_dk, b_dv = add_tiles(
                n, n_whole, n_left, done, tile, b_dk, b_dv, sizes.scale_log2, descs.dq, memory,
                STAGES, PACKED, WARPGROUP,
            )  # fmt: skip
            done, tile = pass_over(n_after, done + n, tile - n, descs.dq, memory, STAGES, WARPGROUP)
        mbarrier.arrive(memory.kv_free.index(0))
        b_dk *= sizes.scale
        i_batch = read_scalar(memory.notes, note + BATCH)
        i_kv = read_scalar(memory.notes, note + KV_HEAD)
        slot, row = read_scalar(memory.notes, note + SHARE), read_scalar(memory.notes, note + ROW)
        n_there = read_scalar(memory.notes, note + THERE)
        if slot >= 0:
            at = (slot.to(gl.int64) * sizes.batch + i_batch) * (64 * 2 * D)
            store_share(work.partial + at, b_dk, b_dv)
        elif PACKED and n_there < 64:  # TMA would write over the next sequence
            dk, dv = b_dk.to(memory.k.dtype), b_dv.to(memory.v.dtype)
            store_some_rows(dk, stores.dk, stores.strides_dk, i_batch, i_kv, row, 0, n_there)
            store_some_rows(dv, stores.dv, stores.strides_dv, i_batch, i_kv, row, 0, n_there)
        else:
            store_column(descs.dv, i_batch, i_kv, row, b_dv, memory.out.index(WARPGROUP))
            store_column(descs.dk, i_batch, i_kv, row, b_dk, memory.out.index(WARPGROUP))
        i_round += 1
        note = (i_round % 2 * 2 + WARPGROUP) * NOTES
        mbarrier.wait(memory.kv_ready.index(0), i_round & 1)
        n_before = read_scalar(memory.notes, note + BEFORE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batch", "heads", "kv_heads", "n_items", "s", "n_tiles", "q_offset"])
def s2_hopper_fused_kernel(
    d_q,
    d_k,
    d_v,
    d_dout,
    d_lse2,
    d_delta,
    d_unit,
    d_dq,
    d_dk,
    d_dv,
    p_dk,
    p_dv,
    p_items,
    p_taken,
    p_table,
    p_partial,
    strides_dk,
    strides_dv,
    batch,
    heads,
    kv_heads,
    n_items,
    s,
    n_tiles,
    q_offset,
    scale,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    TERM_LAYOUT: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. p_items: schedule.column_pairs, p_taken: `next_item`.

    PACKED: p_items is the table of packed.packed_slots.
    """
    D: gl.constexpr = d_k.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=16, rank=2)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], k_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [4, 64, 64], ds_layout)  # two columns, twice
    out_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    dq_bufs = gl.allocate_shared_memory(d_dq.dtype, [2, 64, D // 2], TERM_LAYOUT)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], TERM_LAYOUT)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], TERM_LAYOUT)
    unit_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], TERM_LAYOUT)
    q_ready, do_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    free, ds_ready = make_barriers(STAGES, 2), make_barriers(2, 2)
    kv_ready, kv_free = make_barriers(1, 1), make_barriers(1, 2)
    descs = Descriptors(d_q, d_k, d_v, d_dout, d_lse2, d_delta, d_unit, d_dq, d_dk, d_dv)
    notes = make_notes(4 * NOTES)
    memory = Memory(
        q_bufs, do_bufs, lse_bufs, delta_bufs, unit_bufs, q_ready, do_ready, free, k_bufs, v_bufs,
        notes, kv_ready, kv_free, ds_bufs, ds_ready, dq_bufs, out_bufs,
    )  # fmt: skip
    sizes = Sizes(batch, heads, kv_heads, n_items, s, n_tiles, q_offset, scale, scale_log2)
    work = Work(p_items, p_taken, p_table, p_partial)
    stores = Output(p_dk, p_dv, strides_dk, strides_dv)
    gl.warp_specialize(
        [
            (consumer, (descs, stores, memory, work, sizes, STAGES, GROUP, PACKED, 0)),
            (consumer, (descs, stores, memory, work, sizes, STAGES, GROUP, PACKED, 1)),
            (producer, (descs, memory, work, sizes, B, N_BANDS, STAGES, GROUP, PACKED)),
        ],
        [4, 1],
        [240, 24],
    )


def key_descriptor(k: torch.Tensor) -> Descriptor:
    """As primitives.descriptor, in a layout of which half the columns are a part by themselves."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=pad(k.shape[-1]), element_bitwidth=16, rank=4)
    return dataclasses.replace(descriptor(k), layout=HostLayout.of(layout))


def launch_hopper_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    pattern: LayerPattern,
    softmax_scale: float,
    packing: Packing | None = None,
    q_offset: int = 0,
    *,
    deterministic: bool = False,
    longest: int | None = LONGEST,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, as hopper.backward.launch_hopper_backward, of heads up to 128.

    Takes memory for dq in 4 bytes an element once more.

    Args:
        deterministic: adds dq up in whole numbers. Otherwise its last bits differ from run to run.
        longest: half-tiles of queries above which a column is cut, whatever balance needs.

    Raises:
        ValueError: the heads are larger.
    """
    if q.shape[-1] > WIDEST:
        raise ValueError(f"five products: head size {q.shape[-1]} is above {WIDEST}; take seven")
    out, dout = (x if takes_descriptor(x) else x.contiguous() for x in (out, dout))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = (empty_like(x, x.shape[-1]) for x in (q, k, v))
    b, s, h, d, *_ = extents(q)
    g, packed = k.shape[-2], packing is not None
    programs = concurrent_programs(q.device, num_warps=8)
    if packed:
        # Pairs of one more class begin anew; blocks of 256 may have a pair past the end.
        extra = pattern.n_bands // 2 if pattern.block_size == 64 else pattern.block_size // 256
        slots = items = packed_slots(packing.cu_q, s, extra)
        n_items, n_slots, n_tiles = len(items) * g, 0, len(items) * 2
        rows = term_rows(s, packing.n_seqs)
    else:
        work = column_pairs(pattern, s, b, programs, q.device, k.shape[1], q_offset, longest)
        slots, items, n_items, n_slots = None, work.items, len(work.items), work.n_slots
        n_tiles = -(-(q_offset % ROWS + s) // ROWS)
        rows = -(-(term_lead(q_offset) + s) // 4) * 4  # TMA asks for 16 bytes
    sums, lse2, delta, unit = begin_sums(
        out, lse, dout, dlse, slots, n_tiles, rows, q_offset, (k, v) if deterministic else None
    )
    partial = lse2.new_empty((n_slots * b, ROWS, 2 * pad(d)))
    s2_hopper_fused_kernel[(min(programs, n_items),)](
        descriptor(q),
        key_descriptor(k),
        descriptor(v),
        descriptor(dout),
        term_descriptor(lse2),
        term_descriptor(delta),
        term_descriptor(delta if unit is None else unit),
        sum_descriptor(sums),
        descriptor(dk),
        descriptor(dv),
        dk,
        dv,
        items,
        fresh_counter(q.device),
        device_table(pattern, q.device),
        partial,
        strides_and_size(dk),
        strides_and_size(dv),
        b,
        h,
        g,
        n_items,
        s,
        n_tiles,
        offset_or_none(q, k, q_offset),
        softmax_scale,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=STAGES,
        GROUP=h // g,
        PACKED=packed,
        TERM_LAYOUT=TERM_LAYOUT,
        **OPTIONS,
    )
    round_sums(sums, dq, slots, q_offset, softmax_scale, unit)
    if n_slots:
        add_pieces(partial, dk, dv, work, ROWS)
    return dq, dk, dv
