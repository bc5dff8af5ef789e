"""Decoding for Hopper, in Gluon: pages by TMA, products with the keys as rows.

The units, lists, shares and parts of s2_kernels/decode.py. A few queries would leave most of a
warpgroup's tensor cores empty. So here K is the left operand: a tile's scores are [64 keys, M
queries], and out is [dv, M]. Work goes on in rounds of STAGES tiles: the scores of all of them, one
maximum, which all warps must agree on, then their products with V. The next round's K is asked for
in the middle of a round and its V at its end. Two programs a multiprocessor wait in turn.

With WRITTEN the launch before this one is the one that writes the new tokens' keys and values, and
it changes nothing else. So a program that starts while that one runs (programmatic dependent
launch) asks for older pages at once, and waits before it asks for the newest.

Shapes as in s2_kernels/decode.py; M rows of a unit, padded; a tile has 64 rows of one page.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from s2_kernels.configs import FUSED
from s2_kernels.decode_lists import (
    count_tiles,
    has_begin,
    listed_block,
    listed_tiles,
    live_segments,
    own_tiles,
    parts_of,
    positions_of,
    share_of,
)
from s2_kernels.hopper.compat import async_load, thread_barrier
from s2_kernels.hopper.primitives import ROWS, Descriptor, HostLayout, make_barriers
from s2_kernels.launch import (
    arrivals_for,
    concurrent_programs,
    device_table,
    on_grid,
    pad,
    takes_pdl,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LN2, LOG2E, lifetime, load_rule

STAGES = 3
"""Tiles of K, and of V, that are on their way or being computed from."""
START = 4
"""What the begin of a unit costs, in tiles."""
MERGED, MERGED_WIDE = 32, 8
"""Parts that are added up at a time, up to a head size of 128 and above: what does not spill."""


class Ring(NamedTuple):
    """Places for tiles of K, or of V, and the barriers that their loads complete.

    A tuple of buffers [1, 64, d], not one buffer: else the compiler, which does not know that
    places differ, has all warps wait between one load and the next.
    """

    bufs: tuple
    ready: tuple


class Unit(NamedTuple):
    """A KV head of a sequence: its rule, its list of live blocks and its row of the page table.

    length: of the sequence; last: its last position; new: the first tile that the launch before may
    write to.
    """

    rule: tuple
    segments: tuple
    length: gl.tensor
    last: gl.tensor
    new: gl.tensor
    p_pages: gl.tensor
    stride: gl.tensor


class Output(NamedTuple):
    """Where out and lse of a unit go: pointers to its sequence, strides, first head, rows."""

    p_out: gl.tensor
    p_lse: gl.tensor
    stride_token: gl.tensor
    stride_head: gl.tensor
    stride_lse: gl.tensor
    head: gl.tensor
    n_rows: gl.tensor


@gluon.jit
def zero():
    """0, which the compiler does not know: what it counts from stays in the loop.

    Else the descriptors of all products of a round would be kept in registers, more than there are.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def block_of(unit, tile, B: gl.constexpr, N_BANDS: gl.constexpr):
    return listed_block(unit.segments, tile // (B // 64), N_BANDS)


@gluon.jit
def first_position(unit, tile, B: gl.constexpr, N_BANDS: gl.constexpr):
    """Of a tile's keys."""
    return block_of(unit, tile, B, N_BANDS) * B + tile % (B // 64) * 64


@gluon.jit
def pages_of(unit, tile, high, N: gl.constexpr, B: gl.constexpr, N_BANDS: gl.constexpr):
    """The pages of N tiles from `tile` on; of the last one before `high` where there is none."""
    pages = ()
    for i in gl.static_range(N):
        block = block_of(unit, gl.minimum(tile + i, high - 1), B, N_BANDS)
        pages += (gl.load(unit.p_pages + block * unit.stride),)
    return pages


@gluon.jit
def expect(desc, ring, tile, high):
    """Has a round's barriers wait for the tiles from `tile` on; for those past `high`, nothing."""
    for i in gl.static_range(len(ring.ready)):
        mbarrier.expect(ring.ready[i], desc.block_type.nbytes, pred=tile + i < high)
    for i in gl.static_range(1, len(ring.ready)):
        mbarrier.arrive(ring.ready[i], pred=tile + i >= high)


@gluon.jit
def ask(desc, ring, pages, tile, low, high, B: gl.constexpr):
    """Has the round's tiles from `tile` on brought that are among low..high-1."""
    for i in gl.static_range(len(pages)):
        row = (tile + i) % (B // 64) * 64
        there = (tile + i >= low) & (tile + i < high)
        buf = ring.bufs[i].index(0).reshape(ring.bufs[i].shape)
        async_load(desc, [pages[i], row, 0], ring.ready[i], buf, there)


@gluon.jit
def begin_unit(descs, k, v, unit, low, high, B: gl.constexpr, N_BANDS: gl.constexpr,
               WRITTEN: gl.constexpr):  # fmt: skip
    """Asks for the first round of tiles low..high-1, the new tokens' last."""
    pages = pages_of(unit, low, high, len(k.bufs), B, N_BANDS)
    expect(descs[0], k, low, high)
    expect(descs[1], v, low, high)
    thread_barrier()
    old = gl.minimum(high, unit.new) if WRITTEN else high
    ask(descs[0], k, pages, low, low, old, B)
    ask(descs[1], v, pages, low, low, old, B)
    if WRITTEN and gl.minimum(low + len(k.bufs), high) > old:
        tl.extra.cuda.gdc_wait()
        ask(descs[0], k, pages, low, old, high, B)
        ask(descs[1], v, pages, low, old, high, B)


@gluon.constexpr_function
def by_rows(width: int):
    """A layout of tiles [n, width] whose rows are contiguous in memory."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def clear_rows(buf, n_rows):
    """Zeros in place of the rows from n_rows on: there may be NaN, and NaN * 0 is NaN, too."""
    layout: gl.constexpr = by_rows(buf.shape[1])
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    b_x = buf.load(layout)
    buf.store(gl.where((o_row < n_rows)[:, None], b_x, gl.zeros_like(b_x)))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def load_queries(p_q, strides, i_seq, i_kv, s, q_buf, D: gl.constexpr, GROUP: gl.constexpr):
    """The unit's s * GROUP rows of Q, then zeros, into q_buf [M, BLOCK_D]."""
    layout: gl.constexpr = by_rows(q_buf.shape[1])
    o_m = gl.arange(0, q_buf.shape[0], layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, q_buf.shape[1], layout=gl.SliceLayout(0, layout))
    p_rows = p_q + i_seq * strides[0] + (o_m // GROUP).to(gl.int64) * strides[1]
    p_rows += (i_kv * GROUP + o_m % GROUP) * strides[2]
    mask = (o_m < s * GROUP)[:, None] & (o_d < D)[None, :]
    q_buf.store(gl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def scores(
    q_buf, k_buf, unit, tile, s, scale_log2, B: gl.constexpr, N_BANDS: gl.constexpr,
    GROUP: gl.constexpr, ONE_TOKEN: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Scaled scores [64, M] of a tile's keys, -inf where a query does not see a key."""
    M: gl.constexpr = q_buf.shape[0]
    zeros = gl.zeros([64, M], gl.float32, layout)
    b_s = warpgroup_mma(k_buf, q_buf.permute([1, 0]), zeros, use_acc=False) * scale_log2
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_col = first_position(unit, tile, B, N_BANDS) + o_n
    sees = (o_col <= unit.last)[:, None]
    if not ONE_TOKEN:  # one token attends to all that is listed; of several, each to its own
        block = block_of(unit, tile, B, N_BANDS)
        o_row = unit.length - s + gl.arange(0, M, layout=gl.SliceLayout(0, layout)) // GROUP
        life = lifetime(unit.rule, block, N_BANDS)
        sees = sees & (o_col[:, None] <= o_row[None, :]) & (o_row // B - block < life)[None, :]
    return gl.where(sees, b_s, float("-inf"))


@gluon.jit
def attend(
    q_buf, p_bufs, descs, k, v, unit, low, high, s, scale_log2, phase, B: gl.constexpr,
    N_BANDS: gl.constexpr, GROUP: gl.constexpr, ONE_TOKEN: gl.constexpr, WRITTEN: gl.constexpr,
):  # fmt: skip
    """out [M, BLOCK_DV], normalised, and lse [M] over tiles low..high-1; the next round's phase."""
    N: gl.constexpr = len(k.bufs)
    M: gl.constexpr = q_buf.shape[0]
    BLOCK_DV: gl.constexpr = v.bufs[0].shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    nothing = gl.full([64, M], float("-inf"), gl.float32, layout)
    b_acc = gl.zeros([BLOCK_DV, M], gl.float32, layout)
    b_m = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
    b_l = gl.zeros([64, M], gl.float32, layout)  # each thread its own part of the sum
    # Rows of the last tile that the sequence has; 64 or more where it is not the unit's last one.
    n_left = unit.last + 1 - first_position(unit, high - 1, B, N_BANDS)
    for tile in range(low, high, N):
        after, first = tile + N, zero()
        pages = pages_of(unit, after, high, N, B, N_BANDS)
        all_scores, b_top = (), nothing
        for i in gl.static_range(N):
            b_s = nothing
            if tile + i < high:
                mbarrier.wait(k.ready[i], phase)
                b_s = scores(
                    q_buf, k.bufs[i].index(first), unit, tile + i, s, scale_log2, B, N_BANDS,
                    GROUP, ONE_TOKEN, layout,
                )  # fmt: skip
            all_scores += (b_s,)
            b_top = gl.maximum(b_top, b_s)
        b_new = gl.maximum(b_m, gl.max(b_top, 0))
        b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = gl.exp2(b_m - b_shift)
        b_l = b_l * b_scale[None, :]
        b_acc = b_acc * b_scale[None, :]
        b_m = b_new
        for i in gl.static_range(N):
            b_p = gl.exp2(all_scores[i] - b_shift[None, :])
            b_l += b_p
            p_bufs[i].store(b_p.to(p_bufs[i].dtype).permute([1, 0]))
        if after < high:
            expect(descs[0], k, after, high)
        fence_async_shared()
        thread_barrier()  # all have written P and read K
        if WRITTEN and (after < high) & (after + N > unit.new):
            tl.extra.cuda.gdc_wait()
        ask(descs[0], k, pages, after, low, high, B)
        for i in gl.static_range(N):
            if tile + i < high:
                mbarrier.wait(v.ready[i], phase)
                v_buf = v.bufs[i].index(first)
                if (tile + i == high - 1) & (n_left < 64):
                    clear_rows(v_buf, n_left)
                b_acc = warpgroup_mma(v_buf.permute([1, 0]), p_bufs[i].permute([1, 0]), b_acc)
        if after < high:
            expect(descs[1], v, after, high)
        thread_barrier()  # all have read V
        ask(descs[1], v, pages, after, low, high, B)
        phase ^= 1
    b_sum = gl.sum(b_l, 0)
    some = b_sum > 0
    b_sum = gl.where(some, b_sum, 1.0)
    b_lse = gl.where(some, (b_m + gl.log2(b_sum)) * LN2, float("-inf"))
    b_out = (b_acc * (1.0 / b_sum)[None, :]).permute([1, 0])
    return b_out, gl.convert_layout(b_lse, gl.SliceLayout(1, b_out.type.layout)), phase


@gluon.jit
def store_out(b_out, b_lse, row, to, DV: gl.constexpr, GROUP: gl.constexpr):
    """Stores out [n, BLOCK_DV] and lse [n] of the rows of a unit from `row` on."""
    layout: gl.constexpr = b_out.type.layout
    o_m = row + gl.arange(0, b_out.shape[0], layout=gl.SliceLayout(1, layout))
    o_dv = gl.arange(0, b_out.shape[1], layout=gl.SliceLayout(0, layout))
    o_token, o_head = o_m // GROUP, to.head + o_m % GROUP
    there = o_m < to.n_rows
    p_rows = to.p_out + o_token.to(gl.int64) * to.stride_token + o_head * to.stride_head
    mask = there[:, None] & (o_dv < DV)[None, :]
    gl.store(p_rows[:, None] + o_dv[None, :], b_out, mask=mask)
    p_lse = to.p_lse + o_head * to.stride_lse + o_token
    gl.store(p_lse, gl.convert_layout(b_lse, gl.SliceLayout(1, layout)), mask=there)


@gluon.jit
def store_part(b_out, b_lse, p_part, p_part_lse, n_rows, DV: gl.constexpr):
    """Stores a part of a unit of n_rows rows."""
    layout: gl.constexpr = b_out.type.layout
    o_m = gl.arange(0, b_out.shape[0], layout=gl.SliceLayout(1, layout))
    o_dv = gl.arange(0, b_out.shape[1], layout=gl.SliceLayout(0, layout))
    mask = (o_m < n_rows)[:, None] & (o_dv < DV)[None, :]
    gl.store(p_part + (o_m * DV)[:, None] + o_dv[None, :], b_out, mask=mask)
    gl.store(p_part_lse + o_m, b_lse, mask=o_m < n_rows)


@gluon.jit
def merge(
    p_part, p_part_lse, n_parts, row, n_rows, DV: gl.constexpr, BLOCK_DV: gl.constexpr,
    RM: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """out [4, BLOCK_DV] and lse [4] of a unit's rows from `row` on: its parts added up, in order.

    PARTS at a time; a thread has some columns of all of them. `.cg`: they were written on other
    multiprocessors, so what an L1 cache may hold of that memory is old.
    """
    layout: gl.constexpr = gl.BlockedLayout(
        [PARTS, 1, BLOCK_DV // 32], [1, 1, 32], [1, 4, 1], [2, 1, 0]
    )
    by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    flat: gl.constexpr = gl.SliceLayout(0, layout)
    o_p = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    o_m = row + gl.arange(0, 4, layout=by_row)
    o_dv = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    b_acc = gl.zeros([4, BLOCK_DV], gl.float32, flat)
    b_max = gl.full([4], float("-inf"), gl.float32, by_row)
    b_sum = gl.zeros([4], gl.float32, by_row)
    for i in range(0, n_parts, PARTS):
        there = (i + o_p < n_parts)[:, None] & (o_m < n_rows)[None, :]
        o_part = (i + o_p)[:, None] * RM + o_m[None, :]
        b_lse = gl.load(p_part_lse + o_part, mask=there, other=float("-inf"), cache_modifier=".cg")
        mask = there[:, :, None] & (o_dv < DV)[None, None, :]
        p_parts = p_part + (o_part * DV)[:, :, None] + o_dv[None, None, :]
        b_part = gl.load(p_parts, mask=mask, other=0.0, cache_modifier=".cg")
        b_new = gl.maximum(b_max, gl.max(b_lse, 0))
        b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = gl.exp2((b_lse - b_shift[None, :]) * LOG2E)
        b_scale = gl.exp2((b_max - b_shift) * LOG2E)
        b_sum = b_sum * b_scale + gl.sum(b_weight, 0)
        b_scale = gl.convert_layout(b_scale, gl.SliceLayout(1, flat))
        b_acc = b_acc * b_scale[:, None] + gl.sum(b_part * b_weight[:, :, None], 0)
        b_max = b_new
    some = b_sum > 0
    b_sum = gl.where(some, b_sum, 1.0)
    b_lse = gl.where(some, b_max + gl.log2(b_sum) * LN2, float("-inf"))
    return b_acc / gl.convert_layout(b_sum, gl.SliceLayout(1, flat))[:, None], b_lse


@gluon.jit(
    do_not_specialize=[
        "stride_table_b", "stride_table_h", "stride_table_k", "s", "n_units", "stride_lse"
    ],
    do_not_specialize_on_alignment=["p_pages", "p_lengths"],  # those of some of a step's sequences
)  # fmt: skip
def s2_hopper_decode_kernel(
    d_k,
    d_v,
    p_q,
    p_pages,
    p_lengths,
    p_table,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_arrived,
    strides_q,
    stride_table_b,
    stride_table_h,
    stride_table_k,
    strides_out,
    stride_lse,
    s,
    n_units,
    scale_log2,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    GROUP: gl.constexpr,
    RM: gl.constexpr,
    M: gl.constexpr,
    B: gl.constexpr,
    U: gl.constexpr,
    N_BANDS: gl.constexpr,
    ONE_TOKEN: gl.constexpr,
    EVEN: gl.constexpr,
    STAGES: gl.constexpr,
    START: gl.constexpr,
    PARTS: gl.constexpr,
    WRITTEN: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid: (programs,), each with its share of all units' tiles (`share_of`).

    EVEN, where all units' lists are known to be about as long: (pieces, units). Every piece of a
    unit has as many tiles but the last ones, which have what is left; nobody counts other units.

    A program's part of unit u is row block i_program + u of p_part [programs + units, RM, dv].
    p_arrived [units]: how many parts of a unit are written, 0 at first and at last. The program
    that writes the last one adds all of them up.
    """
    BLOCK_D: gl.constexpr = d_k.block_type.shape[2]
    BLOCK_DV: gl.constexpr = d_v.block_type.shape[2]
    dtype: gl.constexpr = d_k.dtype
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, BLOCK_D], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, 64], dtype)
    q_buf = gl.allocate_shared_memory(dtype, [M, BLOCK_D], q_layout)
    p_bufs, k_bufs, v_bufs, k_ready, v_ready = (), (), (), (), ()
    for _ in gl.static_range(STAGES):
        p_bufs += (gl.allocate_shared_memory(dtype, [M, 64], p_layout),)
        k_bufs += (gl.allocate_shared_memory(dtype, [1, 64, BLOCK_D], k_layout),)
        v_bufs += (gl.allocate_shared_memory(dtype, [1, 64, BLOCK_DV], v_layout),)
        k_ready += (make_barriers(1, 1).index(0),)
        v_ready += (make_barriers(1, 1).index(0),)
    k, v = Ring(k_bufs, k_ready), Ring(v_bufs, v_ready)
    if EVEN:  # what no kernel writes can be read before the one before has ended
        rule = load_rule(p_table, gl.program_id(1) % KV_HEADS, N_BANDS)
    if PDL:
        if not WRITTEN:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if ONE_TOKEN:
        s = 1
    i_program, n_programs = gl.program_id(0), gl.num_programs(0)
    if EVEN:
        piece, split = i_program, n_programs
        i_unit = gl.program_id(1)
        end_unit, i_program = i_unit + 1, i_unit * split + piece
    else:
        # Up to 256 of them in each warp, so that no warp waits for others.
        o_unit = gl.arange(0, U, layout=gl.BlockedLayout([min(U // 32, 8)], [32], [4], [0]))
        n_listed = count_tiles(
            p_lengths, p_table, o_unit, s, KV_HEADS, 1, n_units, RM // GROUP, 64, B, N_BANDS
        )
        split, total, i_unit, end_unit, start, low, high = share_of(
            i_program, n_listed, o_unit, n_units, START
        )
    phase = 0
    for u in range(i_unit, end_unit):
        i_kv, i_seq = u % KV_HEADS, (u // KV_HEADS).to(gl.int64)
        length = gl.load(p_lengths + i_seq)
        if not EVEN:
            rule = load_rule(p_table, i_kv, N_BANDS)
        first, last = positions_of(0, length, s, RM // GROUP)
        segments = live_segments(rule, first, last, B, N_BANDS)
        n_tiles = listed_tiles(segments, last, 64, B, N_BANDS)
        # From the token before them on: it may end a block that is another sequence's, too, whose
        # new token that is.
        new = n_tiles - (last // 64 - gl.maximum(first - 1, 0) // 64 + 1)
        p_row_pages = p_pages + i_seq * stride_table_b + i_kv * stride_table_h
        unit = Unit(rule, segments, length, last, new, p_row_pages, stride_table_k)
        to = Output(
            p_out + i_seq * strides_out[0], p_lse + i_seq * (KV_HEADS * GROUP) * stride_lse,
            strides_out[1], strides_out[2], stride_lse, i_kv * GROUP, s * GROUP,
        )  # fmt: skip
        if EVEN:
            longest = gl.maximum((n_tiles + split - 1) // split, 1)
            own_low = piece * longest
            own_high = gl.minimum(own_low + longest, n_tiles)
            begins = piece == 0
        else:
            own_low, own_high = own_tiles(n_tiles, split, start, low, high, START)
            begins = has_begin(split, start, low, high)
        if own_low < own_high:
            descs = (d_k, d_v)
            begin_unit(descs, k, v, unit, own_low, own_high, B, N_BANDS, WRITTEN)
            load_queries(p_q, strides_q, i_seq, i_kv, s, q_buf, D, GROUP)
            b_out, b_lse, phase = attend(
                q_buf, p_bufs, descs, k, v, unit, own_low, own_high, s, scale_log2, phase, B,
                N_BANDS, GROUP, ONE_TOKEN, WRITTEN,
            )  # fmt: skip
            if WRITTEN:  # the memory that is written from here on may have been the last kernel's
                tl.extra.cuda.gdc_wait()
            if own_high - own_low == n_tiles:  # the whole unit: there is nothing to merge
                store_out(b_out, b_lse, 0, to, DV, GROUP)
            else:
                i_part = (i_program + u).to(gl.int64) * RM
                store_part(b_out, b_lse, p_part + i_part * DV, p_part_lse + i_part, s * GROUP, DV)
                if EVEN:
                    i_first = u * split
                    i_stop = i_first + (n_tiles + longest - 1) // longest
                else:
                    i_first, i_stop = parts_of(
                        u, split, total, start, n_tiles, n_units, n_programs, START
                    )
                # All threads have written before one of them counts the part (release); who counts
                # the last one sees what was written before all counts (acquire).
                thread_barrier()
                arrived = gl.atomic_add(p_arrived + u, 1, sem="acq_rel")
                if arrived == i_stop - i_first - 1:
                    gl.store(p_arrived + u, 0)  # for the next launch
                    i_part = (i_first + u).to(gl.int64) * RM
                    for row in range(0, s * GROUP, 4):
                        b_o, b_l = merge(
                            p_part + i_part * DV, p_part_lse + i_part, i_stop - i_first, row,
                            s * GROUP, DV, BLOCK_DV, RM, PARTS,
                        )  # fmt: skip
                        store_out(b_o, b_l, row, to, DV, GROUP)
        elif (n_tiles == 0) & begins:  # padding
            if WRITTEN:
                tl.extra.cuda.gdc_wait()
            layout: gl.constexpr = by_rows(BLOCK_DV)
            b_out = gl.zeros([M, BLOCK_DV], gl.float32, layout)
            b_lse = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
            store_out(b_out, b_lse, 0, to, DV, GROUP)
        if not EVEN:
            start += n_tiles + START


def page_descriptor(pages: torch.Tensor) -> Descriptor:
    """A TMA descriptor over pages [pages, B, d] that moves [1, 64, padded d]."""
    (count, size, d), (by_page, by_row, _) = pages.shape, pages.stride()
    unit = 16 // pages.element_size()
    shape = [1, ROWS, pad(d)]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[pages.dtype]
    layout = HostLayout.of(gl.NVMMASharedLayout.get_default_for(shape, dtype))
    strides = [by_page if count > 1 else unit, by_row, 1]
    return Descriptor(pages, [count, size, d], strides, shape, layout)


def launch_hopper_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    programs: int | None = None,
    after_write: bool = False,
) -> None:
    """Fills out [b, s, h, dv] and lse [b, h, s]; `hopper.takes_decode` was asked before.

    Args:
        programs: how many share the work (default: as many as run at a time).
        after_write: as in `paged_attention`.
    """
    (b, s, h, d), dv = q.shape, v_pages.shape[-1]
    # A program takes up to half of a multiprocessor's shared memory, or all of it.
    programs = programs or concurrent_programs(q.device, 4 if pad(d) + pad(dv) <= 256 else 8)
    kv_heads, group = pattern.kv_heads, h // pattern.kv_heads
    units, rows = b * kv_heads, triton.next_power_of_2(s) * group
    even = b == 1 and programs >= units and len({rule.bands for rule in pattern.rules}) == 1
    grid = (programs // units, units) if even else (programs,)
    part = lse.new_empty((math.prod(grid) + units, rows, dv))
    part_lse = lse.new_empty((math.prod(grid) + units, rows))
    pdl = takes_pdl(s2_hopper_decode_kernel, q.device)
    parts = triton.next_power_of_2(max(programs // units, 4))  # of a unit, about
    on_grid(s2_hopper_decode_kernel, grid)(
        page_descriptor(k_pages),
        page_descriptor(v_pages),
        q,
        page_table,
        lengths,
        device_table(pattern, q.device),
        out,
        lse,
        part,
        part_lse,
        arrivals_for(q, units),
        q.stride()[:3],
        *page_table.stride(),
        out.stride()[:3],
        lse.stride(1),
        s,
        units,
        softmax_scale * math.log2(math.e),
        KV_HEADS=kv_heads,
        D=d,
        DV=dv,
        GROUP=group,
        RM=rows,
        M=max(8, triton.next_power_of_2(rows)),
        B=pattern.block_size,
        U=32 if units <= 32 else max(128, triton.next_power_of_2(units)),
        N_BANDS=pattern.n_bands,
        ONE_TOKEN=s == 1,
        EVEN=even,
        STAGES=STAGES,
        START=START,
        PARTS=min(MERGED if pad(dv) <= 128 else MERGED_WIDE, parts),
        WRITTEN=after_write and pdl,
        PDL=pdl,
        num_warps=4,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
    )
