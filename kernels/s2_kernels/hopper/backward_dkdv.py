"""dk and dv on Hopper, in Gluon: a pair of KV half-tiles shares the loads of the queries.

Persistent programs of three partitions: a producer warp loads by TMA, two consumer warpgroups own
one KV half-tile each, that is, a column of 64 tokens, with its dk and dv in registers. The two
columns of an item have neighbouring ranges of queries (two blocks of the shard, or two of the
window), so that both warpgroups read the same tiles of Q and dO; a warpgroup passes over the few
tiles that only the other one's column is seen by.

Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T are register operands. Per tile a
warpgroup issues S^T, dP^T, dv += P^T dO and dk += dS^T Q, and has a product in flight while it
computes: dP^T under the exponentials, dv under dS, and the other warpgroup's at any time.

The diagonal tile, the last one of a column, is the only one with a mask. Rows past the end of the
queries arrive as zeros and add nothing; in a packed batch the next sequence's rows arrive, and
their terms are replaced by those of rows that see nothing.

Programs take the next pair of columns when they are done with one, long ones first: those of a
dense batch from a list made on the host (schedule.py); how long packed sequences are, the host does
not know, and the pairs are worked out from the sequence's length.

Shapes and formulas as in s2_kernels/backward.py.
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

from s2_kernels.backward_dkdv import add_pieces
from s2_kernels.hopper.compat import async_load
from s2_kernels.hopper.lists import FAR, column_rows, pair_of_sequence
from s2_kernels.hopper.packed import packed_slots
from s2_kernels.hopper.primitives import (
    OPTIONS,
    ROWS,
    TERM_LAYOUT,
    descriptor,
    extents,
    load_rows,
    make_barriers,
    make_notes,
    next_item,
    offset_or_none,
    persistent_programs,
    read_scalar,
    store_rows,
    store_some_rows,
    strides_and_size,
    term_descriptor,
    write_notes,
)
from s2_kernels.launch import (
    Packing,
    counter_for,
    device_table,
    on_grid,
    pad,
)
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import key_row, load_rule
from s2_kernels.schedule import column_pairs

STAGES = 3
NOTES = gl.constexpr(10)
"""How many notes the producer leaves for each warpgroup of an item; what they say, in order."""
BEFORE, COUNT, WHOLE, AFTER, BATCH, KV_HEAD, SHARE, ROW, THERE, LEFT = map(gl.constexpr, range(10))


class Memory(NamedTuple):
    """What the partitions share, and the barriers of it.

    A ring of query half-tiles, q, dout and their row terms, freed together by `free`; K, V and
    notes of two columns, of this item and the next, in four places.
    """

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse2: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    do_ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    kv_ready: gl.shared_memory_descriptor
    kv_free: gl.shared_memory_descriptor


class Descriptors(NamedTuple):
    """TMA descriptors of what comes in and of dk and dv."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dout: tma.tensor_descriptor
    lse2: tma.tensor_descriptor
    delta: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor


class Work(NamedTuple):
    """Pointers: the items, how many are taken, the pattern's rules, and where pieces go."""

    items: gl.tensor
    taken: gl.tensor
    rules: gl.tensor
    partial: gl.tensor


class Sizes(NamedTuple):
    """Numbers of sequences, heads, items and queries; q_offset, near (`Reach`); the scale."""

    batch: gl.tensor
    heads: gl.tensor
    items: gl.tensor
    s: gl.tensor
    q_offset: gl.tensor
    near_start: gl.tensor
    near_row: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor
    kv_heads: gl.tensor


class Output(NamedTuple):
    """Where dk and dv go, by pointer."""

    dk: gl.tensor
    dv: gl.tensor
    strides_dk: tuple
    strides_dv: tuple


class ColumnItem(NamedTuple):
    """An item over columns: two of a KV head, or a piece of both.

    Attributes:
        rule, kv_head: the head's rule, and which it is.
        column_0, column_1: KV half-tiles; the second may be -1.
        piece, n_pieces: which of so many pieces; slot: where its share goes, -1 without one.
        batch, start, length, terms: of the sequence: which (0 where packed), where it starts in
            memory, how many queries it has, where their row terms start.
    """

    rule: tuple
    kv_head: gl.tensor
    column_0: gl.tensor
    column_1: gl.tensor
    piece: gl.tensor
    n_pieces: gl.tensor
    slot: gl.tensor
    batch: gl.tensor
    start: gl.tensor
    length: gl.tensor
    terms: gl.tensor


@gluon.jit
def column_item(item, work, sizes, B: gl.constexpr, N_BANDS: gl.constexpr, PACKED: gl.constexpr):
    """The `ColumnItem` of this number."""
    zero = item * 0
    if PACKED:
        i_kv, p_slot = item % sizes.kv_heads, work.items + item // sizes.kv_heads * 4
        u, start, length = gl.load(p_slot), gl.load(p_slot + 1), gl.load(p_slot + 2)
        rule = load_rule(work.rules, i_kv, N_BANDS)
        column_0, column_1 = pair_of_sequence(rule, u, length, B, N_BANDS)
        terms = gl.load(p_slot + 3)
        return ColumnItem(
            rule, i_kv, column_0, column_1, zero, zero + 1, zero - 1, zero, start, length, terms
        )
    else:
        p_item = work.items + item * 7
        i_kv, column_0, column_1 = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
        piece, n_pieces, slot = gl.load(p_item + 3), gl.load(p_item + 4), gl.load(p_item + 5)
        rule = load_rule(work.rules, i_kv, N_BANDS)
        i_batch, length, terms = gl.load(p_item + 6), zero + sizes.s, zero
        if sizes.q_offset is not None:
            terms = sizes.q_offset % 4
        return ColumnItem(
            rule, i_kv, column_0, column_1, piece, n_pieces, slot, i_batch, zero, length, terms
        )


@gluon.jit
def producer(
    descs, memory, work, sizes, B: gl.constexpr, N_BANDS: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Loads K and V of an item's columns, then Q, dO and their row terms, from the last back.

    The half-tiles of queries that are loaded are those that see either column; of a piece, a part.
    Notes for each warpgroup how many it passes over, adds whole, adds on the diagonal, passes over,
    where its column lies, and what is left of the sequence there; the last notes say that.
    """
    done, i_round, item = 0, 0, gl.program_id(0)
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
        for w in gl.static_range(2):
            half, turn = i_round % 2 * 2 + w, i_round // 2 & 1
            mbarrier.wait(memory.kv_free.index(half), turn ^ 1)
            end = gl.minimum(gl.maximum(ends[w], low), high)
            first = gl.minimum(gl.maximum(columns[w], low), end)
            on_diagonal = (first == columns[w]) & (first < end)
            n_whole = end - first - on_diagonal.to(gl.int32)
            share = gl.where(at.slot < 0, at.slot, at.slot + w * at.n_pieces)
            row = start + columns[w] * 64
            if sizes.near_start is not None:
                row = key_row(at.rule, row, sizes.near_start, sizes.near_row, B, N_BANDS)
            row = gl.where(columns[w] < 0, FAR, row)
            n_there = gl.where(columns[w] < 0, 64, length - columns[w] * 64)
            n_left = length - (end - 1) * 64
            tiles = (high - end, end - first, n_whole, first - low)
            place = (i_batch, i_kv, share, row, n_there, n_left)
            write_notes(memory.notes, half * NOTES, tiles + place)
            ready = memory.kv_ready.index(half)
            mbarrier.expect(ready, descs.k.block_type.nbytes + descs.v.block_type.nbytes)
            load_rows(descs.k, i_batch, i_kv, row, ready, memory.k.index(half))
            load_rows(descs.v, i_batch, i_kv, row, ready, memory.v.index(half))
        for i_member in range(GROUP):
            i_head = i_kv * GROUP + i_member
            term = i_batch * sizes.heads + i_head
            for i in range(high - low):
                row, term_row = start + (high - 1 - i) * 64, at.terms + (high - 1 - i) * 64
                if sizes.q_offset is not None:
                    row, term_row = row - sizes.q_offset, term_row - sizes.q_offset
                stage, phase = done % STAGES, done // STAGES & 1
                mbarrier.wait(memory.free.index(stage), phase ^ 1)
                ready = memory.q_ready.index(stage)
                mbarrier.expect(ready, descs.q.block_type.nbytes + descs.lse2.block_type.nbytes)
                load_rows(descs.q, i_batch, i_head, row, ready, memory.q.index(stage))
                async_load(descs.lse2, [term, term_row], ready, memory.lse2.index(stage))
                ready = memory.do_ready.index(stage)
                mbarrier.expect(ready, descs.dout.block_type.nbytes + descs.delta.block_type.nbytes)
                load_rows(descs.dout, i_batch, i_head, row, ready, memory.dout.index(stage))
                async_load(descs.delta, [term, term_row], ready, memory.delta.index(stage))
                done += 1
        i_round += 1
        item = next_item(work.taken, sizes.items)
    for w in gl.static_range(2):
        half, turn = i_round % 2 * 2 + w, i_round // 2 & 1
        mbarrier.wait(memory.kv_free.index(half), turn ^ 1)
        write_notes(memory.notes, half * NOTES, (-1,))
        mbarrier.arrive(memory.kv_ready.index(half))


@gluon.jit
def pass_over(n, done, memory, STAGES: gl.constexpr):
    """Leaves n tiles to the other warpgroup."""
    for i in range(n):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        mbarrier.wait(memory.q_ready.index(stage), phase)
        mbarrier.wait(memory.do_ready.index(stage), phase)
        mbarrier.arrive(memory.free.index(stage))
    return done + n


@gluon.jit
def add_tiles(
    low, high, n_whole, n_left, done, k_buf, v_buf, b_dk, b_dv, scale_log2, memory,
    STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk and dv [64, D] of a column with the shares of the query half-tiles low..high-1 added.

    Those from n_whole on lie on the diagonal. PACKED: tile 0 has n_left rows of the sequence.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dv.type.layout, 2)
    term_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    for i in range(low, high):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        q_buf, do_buf = memory.q.index(stage), memory.dout.index(stage)
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
            o_m = gl.arange(0, 64, layout=term_layout)
            b_s = gl.where(o_n[:, None] <= o_m[None, :], b_s, float("-inf"))
        b_t = b_s * scale_log2 - b_lse2[None, :]
        b_dp, b_t = warpgroup_mma_wait(0, deps=[t_dp, b_t])
        b_p = gl.exp2(b_t)
        b_p16 = gl.convert_layout(b_p.to(memory.dout.dtype), p_layout)
        t_dv = warpgroup_mma(b_p16, do_buf, b_dv, is_async=True)
        b_delta = memory.delta.index(stage).reshape([64]).load(term_layout)
        if PACKED:
            b_delta = gl.where(there, b_delta, 0.0)
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(memory.q.dtype), p_layout)
        t_dk = warpgroup_mma(b_ds, q_buf, b_dk, is_async=True)
        b_dv, b_dk = warpgroup_mma_wait(0, deps=[t_dv, t_dk])
        mbarrier.arrive(memory.free.index(stage))
    return b_dk, b_dv


@gluon.jit
def consumer(
    descs, stores, memory, work, sizes,
    STAGES: gl.constexpr, GROUP: gl.constexpr, PACKED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """dk and dv of one column of every item, stored, or as a piece's share in float32."""
    D: gl.constexpr = memory.k.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    done, i_round = 0, 0
    half, turn = WARPGROUP, 0
    mbarrier.wait(memory.kv_ready.index(half), turn)
    n_before = read_scalar(memory.notes, half * NOTES + BEFORE)
    while n_before >= 0:
        note = half * NOTES
        k_buf, v_buf = memory.k.index(half), memory.v.index(half)
        n, n_whole = (
            read_scalar(memory.notes, note + COUNT),
            read_scalar(memory.notes, note + WHOLE),
        )
        n_after = read_scalar(memory.notes, note + AFTER)
        n_left = read_scalar(memory.notes, note + LEFT)
        b_dk = gl.zeros([64, D], gl.float32, layout)
        b_dv = gl.zeros([64, D], gl.float32, layout)
        for i_member in range(GROUP):
            done = pass_over(n_before, done, memory, STAGES)
            for part in range(2):
                b_dk, b_dv = add_tiles(
                    part, gl.where(part == 0, gl.minimum(n, 1), n), n_whole, n_left, done,
                    k_buf, v_buf, b_dk, b_dv, sizes.scale_log2, memory, STAGES, PACKED,
                )  # fmt: skip
                if part == 0:
                    # By now the item before has left the other place, which may be loaded again.
                    tma.store_wait(0)
                    mbarrier.arrive(
                        memory.kv_free.index(half ^ 2), pred=(i_round > 0) & (i_member == 0)
                    )
            done = pass_over(n_after, done + n, memory, STAGES)
        b_dk *= sizes.scale
        i_batch = read_scalar(memory.notes, note + BATCH)
        i_kv = read_scalar(memory.notes, note + KV_HEAD)
        slot, row = read_scalar(memory.notes, note + SHARE), read_scalar(memory.notes, note + ROW)
        n_there = read_scalar(memory.notes, note + THERE)
        if slot >= 0:
            o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
            at = (slot.to(gl.int64) * sizes.batch + i_batch) * (64 * 2 * D)
            p_tile = work.partial + at + o_n[:, None] * D + o_d[None, :]
            gl.store(p_tile, b_dk)
            gl.store(p_tile + 64 * D, b_dv)
        elif PACKED and n_there < 64:  # TMA would write over the next sequence
            store_some_rows(
                b_dk.to(memory.k.dtype),
                stores.dk,
                stores.strides_dk,
                i_batch,
                i_kv,
                row,
                0,
                n_there,
            )
            store_some_rows(
                b_dv.to(memory.v.dtype),
                stores.dv,
                stores.strides_dv,
                i_batch,
                i_kv,
                row,
                0,
                n_there,
            )
        else:  # dk and dv leave from the place of K and V, which have been read
            v_buf.store(b_dv.to(memory.v.dtype))
            k_buf.store(b_dk.to(memory.k.dtype))
            fence_async_shared()
            store_rows(descs.dv, i_batch, i_kv, row, v_buf)
            store_rows(descs.dk, i_batch, i_kv, row, k_buf)
        i_round += 1
        half, turn = i_round % 2 * 2 + WARPGROUP, i_round // 2 & 1
        mbarrier.wait(memory.kv_ready.index(half), turn)
        n_before = read_scalar(memory.notes, half * NOTES + BEFORE)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "batch", "heads", "n_items", "s", "q_offset", "near_start", "near_row", "kv_heads"
    ]
)  # fmt: skip
def s2_hopper_dkdv_kernel(
    d_q,
    d_k,
    d_v,
    d_dout,
    d_lse2,
    d_delta,
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
    q_offset,
    near_start,
    near_row,
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
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [4, 64, D], layout)  # two columns, twice
    v_bufs = gl.allocate_shared_memory(dtype, [4, 64, D], layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], TERM_LAYOUT)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], TERM_LAYOUT)
    q_ready, do_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    free = make_barriers(STAGES, 2)
    kv_ready, kv_free = make_barriers(4, 1), make_barriers(4, 1)
    descs = Descriptors(d_q, d_k, d_v, d_dout, d_lse2, d_delta, d_dk, d_dv)
    notes = make_notes(4 * NOTES)
    memory = Memory(
        q_bufs, do_bufs, lse_bufs, delta_bufs, q_ready, do_ready, free,
        k_bufs, v_bufs, notes, kv_ready, kv_free,
    )  # fmt: skip
    sizes = Sizes(
        batch, heads, n_items, s, q_offset, near_start, near_row, scale, scale_log2, kv_heads
    )
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


def launch_hopper_dkdv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    packing: Packing | None = None,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
) -> None:
    """Writes dk and dv, as s2_kernels.backward_dkdv.launch_dkdv."""
    b, s, h, d, *_ = extents(q)
    g = k.shape[-2]
    programs = persistent_programs(q.device, spare)
    if packing:
        # Pairs of one more class begin anew; blocks of 256 may have a pair past the end.
        extra = pattern.n_bands // 2 if pattern.block_size == 64 else pattern.block_size // 256
        items = packed_slots(packing.cu_q, s, extra)
        n_items, n_slots = len(items) * g, 0
    else:
        t = count_keys(k, near, pattern)
        work = column_pairs(pattern, s, b, programs, q.device, t, q_offset, near=near)
        items, n_items, n_slots = work.items, len(work.items), work.n_slots
    partial = lse2.new_empty((n_slots * b, ROWS, 2 * pad(d)))
    on_grid(s2_hopper_dkdv_kernel, (min(programs, n_items),))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(dout),
        term_descriptor(lse2),
        term_descriptor(delta),
        descriptor(dk),
        descriptor(dv),
        dk,
        dv,
        items,
        counter_for(q),
        device_table(pattern, q.device),
        partial,
        strides_and_size(dk),
        strides_and_size(dv),
        b,
        h,
        g,
        n_items,
        s,
        offset_or_none(q, k, q_offset),
        *(near or (None, None)),
        softmax_scale,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=STAGES,
        GROUP=h // g,
        PACKED=packing is not None,
        TERM_LAYOUT=TERM_LAYOUT,
        **OPTIONS,
    )
    if n_slots:
        add_pieces(partial, dk, dv, work, ROWS)
