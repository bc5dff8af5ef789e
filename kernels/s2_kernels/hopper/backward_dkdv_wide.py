"""dk and dv on Hopper at head sizes above 128, padded to 256: a warpgroup for each.

dk and dv of a column of 64 tokens take 128 registers a thread each, one more than a warpgroup has
room for. An item is one column: warpgroup 0 adds up dv, warpgroup 1 dk. The first computes the
probabilities, and hands them to the second through shared memory, in float32: each thread of the
second takes what the thread of the same number has left.

    warpgroup 0   exp, hand over P^T | dv += P^T dO, S^T = K Q^T of the next tile
    warpgroup 1   dP^T = V dO^T, take P^T | dk += dS^T Q

Q and dO half-tiles take turns in a ring of four places, P^T in one of two, so that warpgroup 0 can
be a tile ahead. K and V have one place each, which is free again with the last S^T and dP^T of an
item: the next item's arrive while this one's dk and dv leave, from registers.

Barriers, by what completes a phase of them; a warpgroup arrives once, whatever its number of warps:

    ready [PLACES]   the producer's load of Q and lse, or of dO and delta
    free [PLACES]    both warpgroups: of Q, after S^T (0), dk (1); of dO, after dv (0), dS (1)
    k_ready, v_ready the load of K, of V of an item            the notes on it with K
    k_free           warpgroup 0, after the last S^T of an item; warpgroup 1, with its notes read
    v_free           warpgroup 1, after the last dP^T of an item
    p_ready [2]      warpgroup 0, with P^T of a tile there
    p_free [2]       warpgroup 1, with it read

The diagonal tile, the last one of a column, is the only one with a mask. Rows past the end of the
queries arrive as zeros, and add nothing.

Shapes and formulas as in s2_kernels/backward.py.
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

from s2_kernels.backward_dkdv import add_pieces
from s2_kernels.hopper.compat import async_load
from s2_kernels.hopper.lists import FAR, column_rows
from s2_kernels.hopper.primitives import (
    OPTIONS,
    ROWS,
    TERM_LAYOUT,
    Ring,
    descriptor,
    extents,
    load_rows,
    make_barriers,
    make_notes,
    next_item,
    offset_or_none,
    persistent_programs,
    read_scalar,
    strides_and_size,
    term_descriptor,
    write_notes,
)
from s2_kernels.launch import (
    counter_for,
    device_table,
    on_grid,
    pad,
)
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import head_offset, key_row, load_rule
from s2_kernels.schedule import single_columns

COUNT, DIAGONAL, ITEM = map(gl.constexpr, range(3))
"""Notes of an item: half-tiles of a query head, whether the last is on the diagonal, which."""

PLACES = gl.constexpr(4)
"""Half-tiles of Q and dO at a time: with K, V and P^T, what fits 227 KiB of shared memory."""
P_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""How P^T lies in shared memory: without bank conflicts, as the tensor cores leave it."""
STORE_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
"""How results leave: as the tensor cores leave them, but four columns a thread instead of two.

Four threads store 32 bytes of a row, what memory takes at a time. One exchange between neighbours
does it; with more, Triton would go through shared memory, where there is no room.
"""


class Memory(NamedTuple):
    """What the partitions share: a ring in which Q and dO take turns, with their row terms; K, V
    and notes of an item; P^T, handed from one warpgroup to the other.
    """

    tiles: Ring
    terms: gl.shared_memory_descriptor
    k: Ring
    v: Ring
    probs: Ring
    notes: gl.shared_memory_descriptor


class Inputs(NamedTuple):
    """TMA descriptors."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dout: tma.tensor_descriptor
    lse2: tma.tensor_descriptor
    delta: tma.tensor_descriptor


class Work(NamedTuple):
    """Pointers: the items, how many are taken, the pattern's rules."""

    items: gl.tensor
    taken: gl.tensor
    rules: gl.tensor


class Sizes(NamedTuple):
    """Numbers of heads, of items; the last query's half-tile and 1; the scale.

    q_offset to near_row: `Reach`.
    """

    heads: gl.tensor
    rows: gl.tensor
    q_offset: gl.tensor
    near_start: gl.tensor
    near_row: gl.tensor
    items: gl.tensor
    scale_log2: gl.tensor


class Output(NamedTuple):
    """Where a warpgroup's sum goes, dk or dv, or its share in float32; of so many tokens."""

    base: gl.tensor
    strides: tuple
    partial: gl.tensor
    batch: gl.tensor
    t: gl.tensor
    scale: gl.tensor


@gluon.jit
def load_place(desc, terms, i_batch, i_head, row, term, at, turn, memory):
    """A half-tile of Q or dO with its row terms into its place, once that is free.

    The terms are those of head `term` of all batches, from `at` on.
    """
    place, phase = turn % PLACES, turn // PLACES & 1
    ready = memory.tiles.ready.index(place)
    mbarrier.wait(memory.tiles.free.index(place), phase ^ 1)
    mbarrier.expect(ready, desc.block_type.nbytes + terms.block_type.nbytes)
    load_rows(desc, i_batch, i_head, row, ready, memory.tiles.bufs.index(place))
    async_load(terms, [term, at], ready, memory.terms.index(place))


@gluon.jit
def load_column(desc, i_batch, i_kv, row, buf, ready):
    """K or V of an item."""
    mbarrier.expect(ready, desc.block_type.nbytes)
    load_rows(desc, i_batch, i_kv, row, ready, buf)


@gluon.jit
def producer(
    descs, memory, work, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Loads the half-tiles of queries that see a column, from the last back, and the column.

    Notes how many they are for a query head, and whether the last lies on the diagonal. Where none
    sees the column it loads one of zeros, so that every item has work.
    """
    k, v = memory.k, memory.v
    turn, i_round, item = 0, 0, gl.program_id(0)
    while item >= 0:
        p_item = work.items + item * 6
        i_kv, column, piece = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
        n_pieces, i_batch = gl.load(p_item + 3), gl.load(p_item + 5)
        rule = load_rule(work.rules, i_kv, N_BANDS)
        first = None if sizes.q_offset is None else sizes.q_offset // 64
        begin, end = column_rows(rule, column, first, sizes.rows, B, N_BANDS)
        low = begin + (end - begin) * piece // n_pieces
        high = begin + (end - begin) * (piece + 1) // n_pieces
        on_diagonal = (low == column) & (low < high)
        k_row = column * 64
        if sizes.near_start is not None:
            k_row = key_row(rule, k_row, sizes.near_start, sizes.near_row, B, N_BANDS)
        n = gl.maximum(high - low, 1)
        for i_member in range(GROUP):
            i_head = i_kv * GROUP + i_member
            term = i_batch * sizes.heads + i_head
            for i in range(n):
                row = gl.where(low < high, (high - 1 - i) * 64, FAR)
                at = row
                if sizes.q_offset is not None:
                    row -= sizes.q_offset
                    at = row + sizes.q_offset % 4
                load_place(descs.q, descs.lse2, i_batch, i_head, row, term, at, turn, memory)
                if (i_member == 0) & (i == 0):
                    mbarrier.wait(k.free.index(0), i_round & 1 ^ 1)
                    write_notes(memory.notes, 0, (n, on_diagonal.to(gl.int32), item))
                    load_column(descs.k, i_batch, i_kv, k_row, k.bufs.index(0), k.ready.index(0))
                    mbarrier.wait(v.free.index(0), i_round & 1 ^ 1)
                    load_column(descs.v, i_batch, i_kv, k_row, v.bufs.index(0), v.ready.index(0))
                load_place(
                    descs.dout, descs.delta, i_batch, i_head, row, term, at, turn + 1, memory
                )
                turn += 2
        i_round += 1
        item = next_item(work.taken, sizes.items)
    mbarrier.wait(k.free.index(0), i_round & 1 ^ 1)
    write_notes(memory.notes, ITEM, (-1,))
    mbarrier.arrive(k.ready.index(0))


@gluon.jit
def probabilities(b_s, b_lse2, scale_log2, masked, zero):
    """P^T [64, 64] of scores S^T: of a tile on the diagonal, if masked.

    zero: i >> 30 inside a loop, see add_dv: it keeps the mask's indices out of registers.
    """
    if masked:
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, b_s.type.layout))
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(0, b_s.type.layout)) + zero
        b_s = gl.where(o_n[:, None] <= o_m[None, :], b_s, float("-inf"))
    return gl.exp2(b_s * scale_log2 - b_lse2[None, :])


@gluon.jit
def hand_over(b_p, turn, probs):
    """P^T [64, 64] of a tile, in float32, for the other warpgroup."""
    place, phase = turn // 2 % 2, turn // 4 & 1
    mbarrier.wait(probs.free.index(place), phase ^ 1)
    probs.bufs.index(place).store(b_p)
    mbarrier.arrive(probs.ready.index(place))


@gluon.jit
def add_dv(turn, n, n_member, on_diagonal, scale_log2, D: gl.constexpr, memory):
    """dv [64, D] of a column from n half-tiles of queries, n_member of each query head.

    The scores of one are issued with P^T dO of the one before.
    """
    k, probs, tiles = memory.k, memory.probs, memory.tiles
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    term_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    place = turn % PLACES
    mbarrier.wait(tiles.ready.index(place), turn // PLACES & 1)
    b_s = warpgroup_mma(
        k.bufs.index(0), tiles.bufs.index(place).permute([1, 0]), zeros, use_acc=False
    )
    b_lse2 = memory.terms.index(place).reshape([64]).load(term_layout)
    mbarrier.arrive(tiles.free.index(place))  # warpgroup 1 keeps it until P^T is there
    if n == 1:
        mbarrier.arrive(k.free.index(0))
    b_dv = gl.zeros([64, D], gl.float32, layout)
    left = n_member - 1  # of this query head
    for i in range(1, n):
        b_p = probabilities(b_s, b_lse2, scale_log2, (left == 0) & on_diagonal, i >> 30)
        hand_over(b_p, turn, probs)
        left = gl.where(left == 0, n_member, left) - 1
        before, phase = (turn + 1) % PLACES, (turn + 1) // PLACES & 1
        mbarrier.wait(tiles.ready.index(before), phase)
        b_p16 = gl.convert_layout(b_p.to(tiles.bufs.dtype), p_layout)
        t_dv = warpgroup_mma(b_p16, tiles.bufs.index(before), b_dv, is_async=True)
        turn += 2
        place = turn % PLACES
        mbarrier.wait(tiles.ready.index(place), turn // PLACES & 1)
        # 0, which no compiler can tell: the addresses of K, 16 of them, would be worked out before
        # the loop, and spill.
        k_buf = k.bufs.index(i >> 30)
        t_s = warpgroup_mma(
            k_buf, tiles.bufs.index(place).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        b_lse2 = memory.terms.index(place).reshape([64]).load(term_layout)
        b_dv = warpgroup_mma_wait(1, deps=[t_dv])
        mbarrier.arrive(tiles.free.index(before))
        b_s = warpgroup_mma_wait(0, deps=[t_s])
        mbarrier.arrive(tiles.free.index(place))
        if i == n - 1:
            mbarrier.arrive(k.free.index(0))
    b_p = probabilities(b_s, b_lse2, scale_log2, (left == 0) & on_diagonal, 0)
    hand_over(b_p, turn, probs)
    b_p16 = gl.convert_layout(b_p.to(tiles.bufs.dtype), p_layout)
    turn += 1
    place = turn % PLACES
    mbarrier.wait(tiles.ready.index(place), turn // PLACES & 1)
    b_dv = warpgroup_mma(b_p16, tiles.bufs.index(place), b_dv)
    mbarrier.arrive(tiles.free.index(place))
    return b_dv


@gluon.jit
def add_dk(turn, n, D: gl.constexpr, memory):
    """dk [64, D] / scale of a column from n half-tiles of queries."""
    v, probs, tiles = memory.v, memory.probs, memory.tiles
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    term_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    b_dk = gl.zeros([64, D], gl.float32, layout)
    for i in range(n):
        q_place, do_place, phase = turn % PLACES, (turn + 1) % PLACES, (turn + 1) // PLACES & 1
        p_place, p_phase = turn // 2 % 2, turn // 4 & 1
        q_buf, do_buf = tiles.bufs.index(q_place), tiles.bufs.index(do_place)
        mbarrier.wait(tiles.ready.index(do_place), phase)
        v_buf = v.bufs.index(i >> 30)  # 0, as in add_dv
        t_dp = warpgroup_mma(v_buf, do_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        b_delta = memory.terms.index(do_place).reshape([64]).load(term_layout)
        mbarrier.wait(probs.ready.index(p_place), p_phase)
        b_p = probs.bufs.index(p_place).load(s_layout)
        mbarrier.arrive(probs.free.index(p_place))
        b_dp = warpgroup_mma_wait(0, deps=[t_dp])
        if i == n - 1:
            mbarrier.arrive(v.free.index(0))
        mbarrier.wait(tiles.ready.index(q_place), turn // PLACES & 1)
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(tiles.bufs.dtype), p_layout)
        t_dk = warpgroup_mma(b_ds, q_buf, b_dk, is_async=True)
        mbarrier.arrive(tiles.free.index(do_place))
        b_dk = warpgroup_mma_wait(0, deps=[t_dk])
        mbarrier.arrive(tiles.free.index(q_place))
        turn += 2
    return b_dk


@gluon.jit
def store_sum(p_tile, stride, first, rows, b_sum, D: gl.constexpr):
    """Stores a sum [64, D] of which the rows from first (None: 0) to rows - 1 exist."""
    b_sum = gl.convert_layout(b_sum, STORE_LAYOUT)
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, STORE_LAYOUT))
    o_d = gl.arange(0, b_sum.shape[1], layout=gl.SliceLayout(0, STORE_LAYOUT))
    mask = (o_n < rows)[:, None] & (o_d < D)[None, :]
    if first is not None:
        mask &= (o_n >= first)[:, None]
    gl.store(p_tile + o_n[:, None] * stride + o_d[None, :], b_sum, mask=mask)


@gluon.jit
def store_share(p_tile, b_sum):
    """Stores a piece's share of a sum, in float32."""
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, b_sum.type.layout))
    o_d = gl.arange(0, b_sum.shape[1], layout=gl.SliceLayout(0, b_sum.type.layout))
    gl.store(p_tile + o_n[:, None] * b_sum.shape[1] + o_d[None, :], b_sum)


@gluon.jit
def consumer(
    memory, work, sizes, out,
    WARPGROUP: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, B: gl.constexpr,
    N_BANDS: gl.constexpr,
):  # fmt: skip
    """dv (warpgroup 0) or dk (1) of every item, stored, or as a piece's share in float32."""
    k, v, tiles = memory.k, memory.v, memory.tiles
    BLOCK_D: gl.constexpr = tiles.bufs.shape[2]
    turn, i_round = 0, 0
    mbarrier.wait(k.ready.index(0), 0)
    item = read_scalar(memory.notes, ITEM)
    while item >= 0:
        p_item = work.items + item * 6
        n_member = read_scalar(memory.notes, COUNT)
        on_diagonal = read_scalar(memory.notes, DIAGONAL) > 0
        n = n_member * GROUP
        if WARPGROUP == 0:
            b_out = add_dv(turn, n, n_member, on_diagonal, sizes.scale_log2, BLOCK_D, memory)
        else:
            mbarrier.arrive(k.free.index(0))  # for the memory.notes, which were read
            mbarrier.wait(v.ready.index(0), i_round & 1)
            b_out = add_dk(turn, n, BLOCK_D, memory)
            b_out *= out.scale
        turn += 2 * n
        i_kv, column = gl.load(p_item), gl.load(p_item + 1)
        slot, i_batch = gl.load(p_item + 4), gl.load(p_item + 5)
        if slot < 0:
            row = column * 64
            if sizes.near_start is not None:
                rule = load_rule(work.rules, i_kv, N_BANDS)
                row = key_row(rule, row, sizes.near_start, sizes.near_row, B, N_BANDS)
            p_tile = out.base + head_offset(out.strides, i_batch, i_kv, row)
            b_out16 = b_out.to(tiles.bufs.dtype)
            store_sum(p_tile, out.strides[1], None, out.t - row, b_out16, D)
        else:
            at = (slot.to(gl.int64) * out.batch + i_batch) * 2 + (1 - WARPGROUP)
            store_share(out.partial + at * (64 * BLOCK_D), b_out)
        i_round += 1
        mbarrier.wait(k.ready.index(0), i_round & 1)
        item = read_scalar(memory.notes, ITEM)


@gluon.jit(
    do_not_specialize=[
        "batch", "heads", "n_rows", "q_offset", "near_start", "near_row", "n_items", "t"
    ]
)  # fmt: skip
def s2_hopper_dkdv_wide_kernel(
    d_q, d_k, d_v, d_dout, d_lse2, d_delta, p_dk, p_dv, strides_dk, strides_dv,
    p_items, p_taken, p_table, p_partial, batch, heads, n_rows, q_offset, near_start, near_row,
    n_items, t, scale, scale_log2,
    D: gl.constexpr, B: gl.constexpr, N_BANDS: gl.constexpr, GROUP: gl.constexpr,
    TERM_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit the GPU. Items: schedule.single_columns."""
    BLOCK_D: gl.constexpr = d_k.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    bufs = gl.allocate_shared_memory(dtype, [PLACES, 64, BLOCK_D], layout)
    term_bufs = gl.allocate_shared_memory(gl.float32, [PLACES, 1, 64], TERM_LAYOUT)
    k_bufs = gl.allocate_shared_memory(dtype, [1, 64, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1, 64, BLOCK_D], layout)
    p_bufs = gl.allocate_shared_memory(gl.float32, [2, 64, 64], P_LAYOUT)
    ready, free = make_barriers(PLACES, 1), make_barriers(PLACES, 2)
    k_ready, k_free = make_barriers(1, 1), make_barriers(1, 2)
    v_ready, v_free = make_barriers(1, 1), make_barriers(1, 1)
    descs = Inputs(d_q, d_k, d_v, d_dout, d_lse2, d_delta)
    p_ready, p_free = make_barriers(2, 1), make_barriers(2, 1)
    memory = Memory(
        Ring(bufs, ready, free),
        term_bufs,
        Ring(k_bufs, k_ready, k_free),
        Ring(v_bufs, v_ready, v_free),
        Ring(p_bufs, p_ready, p_free),
        make_notes(3),
    )
    work = Work(p_items, p_taken, p_table)
    sizes = Sizes(heads, n_rows, q_offset, near_start, near_row, n_items, scale_log2)
    dv_out = Output(p_dv, strides_dv, p_partial, batch, t, scale)
    dk_out = Output(p_dk, strides_dk, p_partial, batch, t, scale)
    gl.warp_specialize(
        [
            (consumer, (memory, work, sizes, dv_out, 0, GROUP, D, B, N_BANDS)),
            (consumer, (memory, work, sizes, dk_out, 1, GROUP, D, B, N_BANDS)),
            (producer, (descs, memory, work, sizes, B, N_BANDS, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


def launch_hopper_dkdv_wide(
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
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
) -> None:
    """Writes dk and dv, as s2_kernels.backward_dkdv.launch_dkdv."""
    b, s, h, d, *_ = extents(q)
    g, t = k.shape[-2], count_keys(k, near, pattern)
    slots = persistent_programs(q.device, spare)
    work = single_columns(pattern, s, b, slots, q.device, t, q_offset, near)
    partial = lse2.new_empty((work.n_slots * b, ROWS, 2 * pad(d)))
    on_grid(s2_hopper_dkdv_wide_kernel, (min(slots, len(work.items)),))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(dout),
        term_descriptor(lse2),
        term_descriptor(delta),
        dk,
        dv,
        strides_and_size(dk)[:3],
        strides_and_size(dv)[:3],
        work.items,
        counter_for(q),
        device_table(pattern, q.device),
        partial,
        b,
        h,
        -(-(q_offset + s) // ROWS),
        offset_or_none(q, k, q_offset),
        *(near or (None, None)),
        len(work.items),
        k.shape[-3],
        softmax_scale,
        softmax_scale * math.log2(math.e),
        D=d,
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        GROUP=h // g,
        TERM_LAYOUT=TERM_LAYOUT,
        **OPTIONS,
    )
    add_pieces(partial, dk, dv, work, ROWS)
