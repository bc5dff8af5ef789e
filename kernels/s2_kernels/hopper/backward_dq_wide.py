"""dq on Hopper at head sizes above 128, padded to 256: Q and dO stay in shared memory.

The walk of backward_dq.py, a half-tile of KV at a time, for two warpgroups of 64 query rows each.
dq of 64 rows takes 128 registers a thread, and Q and dO of both warpgroups 128 KiB of the shared
memory, which leaves room for two half-tiles of K and one of V. That is enough: V is free after dP,
long before K, so that the next one arrives under dq += dS K, and K of the next tile is there.

    S = Q K^T | dP = dO V^T under the exponents | dq += dS K

dq leaves from registers.

Barriers, by what completes a phase of them; a warpgroup arrives once, whatever its number of warps:

    q_ready [2]        the producer's loads of Q and dO of one warpgroup    the notes with them
    q_free [2]         that warpgroup, after the last dP of an item
    k_ready [K_STAGES] the load of K of a half-tile
    k_free [K_STAGES]  both warpgroups, after dq or passing over
    v_ready, v_free    the load of V; both warpgroups, after dP or passing over

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

from s2_kernels.hopper.backward_dkdv_wide import store_sum
from s2_kernels.hopper.backward_dq import EDGES, KEPT, UNSEEN, Sizes
from s2_kernels.hopper.lists import listed_half, query_list
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
    strides_and_size,
    write_notes,
)
from s2_kernels.launch import device_table, on_grid
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import head_offset, key_row, load_rule

K_STAGES = gl.constexpr(2)


class Inputs(NamedTuple):
    """TMA descriptors."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    dout: tma.tensor_descriptor


class Memory(NamedTuple):
    """What the partitions share: Q and dO of both warpgroups, K and V half-tiles, notes."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k: Ring
    v: Ring
    notes: gl.shared_memory_descriptor


class Terms(NamedTuple):
    """Pointers to the row terms."""

    lse2: gl.tensor
    delta: gl.tensor


class Output(NamedTuple):
    """Where dq goes."""

    base: gl.tensor
    strides: tuple


@gluon.jit
def producer(
    descs, memory, tables, sizes, B: gl.constexpr, N_BANDS: gl.constexpr
):  # fmt: skip
    """Loads Q and dO of every item, then the K and V half-tiles of its list; notes its length.

    The list: what only the upper rows see, what all see, the two half-tiles of the diagonal.
    """
    k, v = memory.k, memory.v
    done = 0
    for i_round in range(count_items(tables, sizes.heads * sizes.slots, False)):
        item = query_item(item_at(i_round, tables, False), tables, sizes, False)
        i_batch, i_head, i_kv = item.batch, item.head, item.head // sizes.group
        rule = load_rule(tables.rules, i_kv, N_BANDS)
        tiles = query_list(rule, item.position, B, N_BANDS)
        n, notes = tiles.n_edges + tiles.n_kept + 2, (tiles.n_edges, tiles.n_kept, tiles.unseen)
        if sizes.all_seen is not None:
            n, notes = sizes.all_seen, (0, sizes.all_seen, 0)
        for w in gl.static_range(2):
            ready = memory.q_ready.index(w)
            mbarrier.wait(memory.q_free.index(w), i_round & 1 ^ 1)
            write_notes(memory.notes, w * 3, notes)
            mbarrier.expect(ready, descs.q.block_type.nbytes + descs.dout.block_type.nbytes)
            q_row = item.row + w * 64
            load_rows(descs.q, i_batch, i_head, q_row, ready, memory.q.index(w))
            load_rows(descs.dout, i_batch, i_head, q_row, ready, memory.dout.index(w))
        for p in range(n):
            column = listed_half(tiles, p, B, N_BANDS) * 64
            if sizes.all_seen is not None:
                column = p * 64
            if sizes.near_start is not None:
                column = key_row(rule, column, sizes.near_start, sizes.near_row, B, N_BANDS)
            stage, phase = done % K_STAGES, done // K_STAGES & 1
            mbarrier.wait(k.free.index(stage), phase ^ 1)
            mbarrier.expect(k.ready.index(stage), descs.k.block_type.nbytes)
            load_rows(descs.k, i_batch, i_kv, column, k.ready.index(stage), k.bufs.index(stage))
            mbarrier.wait(v.free.index(0), done & 1 ^ 1)
            mbarrier.expect(v.ready.index(0), descs.v.block_type.nbytes)
            load_rows(descs.v, i_batch, i_kv, column, v.ready.index(0), v.bufs.index(0))
            done += 1


@gluon.jit
def pass_over(low, high, memory):
    """Leaves the half-tiles low..high-1, counted over all items, to the other warpgroup."""
    k, v = memory.k, memory.v
    for done in range(low, high):
        stage, phase = done % K_STAGES, done // K_STAGES & 1
        mbarrier.wait(k.ready.index(stage), phase)
        mbarrier.arrive(k.free.index(stage))
        mbarrier.wait(v.ready.index(0), done & 1)
        mbarrier.arrive(v.free.index(0))


@gluon.jit
def load_terms(p_lse2, p_delta, item, tables, sizes, layout: gl.constexpr, WARPGROUP: gl.constexpr):
    """lse2 and delta [64] of a warpgroup's rows of an item; of a row that is not there, inf and 0.

    With them its probabilities come out as 0.
    """
    item = query_item(item, tables, sizes, False)
    o_row = item.row + WARPGROUP * 64 + gl.arange(0, 64, layout=layout)
    i_row = (item.batch * sizes.heads + item.head).to(gl.int64) * sizes.rows
    there = o_row < sizes.s
    if sizes.q_offset is not None:
        there &= o_row >= 0
        i_row += item.terms
    b_lse2 = gl.load(p_lse2 + i_row + o_row, mask=there, other=float("inf"))
    return b_lse2, gl.load(p_delta + i_row + o_row, mask=there, other=0.0)


@gluon.jit
def add_tile(
    b_dq, b_lse2, b_delta, scale_log2, done, last, memory,
    MASKED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """dq [64, D] / scale with the share of half-tile `done`; after `last`, Q and dO are free."""
    k, v = memory.k, memory.v
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dq.type.layout, 2)
    stage, phase = done % K_STAGES, done // K_STAGES & 1
    k_buf = k.bufs.index(stage)
    # 0, which no compiler can tell: addresses would be worked out before the loop, and spill.
    zero = done >> 30
    q_buf, do_buf = memory.q.index(WARPGROUP + zero), memory.dout.index(WARPGROUP + zero)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    mbarrier.wait(k.ready.index(stage), phase)
    t_s = warpgroup_mma(q_buf, k_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v.ready.index(0), done & 1)
    v_buf = v.bufs.index(zero)
    t_dp = warpgroup_mma(do_buf, v_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[t_s])
    if MASKED:
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
        b_s = gl.where(o_n[None, :] <= o_m[:, None], b_s, float("-inf"))
    b_t = b_s * scale_log2 - b_lse2[:, None]
    b_dp, b_t = warpgroup_mma_wait(0, deps=[t_dp, b_t])
    mbarrier.arrive(v.free.index(0))
    mbarrier.arrive(memory.q_free.index(WARPGROUP), pred=done == last)
    b_p = gl.exp2(b_t)
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(k.bufs.dtype), p_layout)
    b_dq = warpgroup_mma(b_ds, k_buf, b_dq)
    mbarrier.arrive(k.free.index(stage))
    return b_dq


@gluon.jit
def consumer(
    out, memory, terms, tables, sizes, D: gl.constexpr, WARPGROUP: gl.constexpr
):  # fmt: skip
    """dq of 64 query rows of every item, stored."""
    k = memory.k
    BLOCK_D: gl.constexpr = k.bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    at: gl.constexpr = WARPGROUP * 3
    done = 0
    for i_round in range(count_items(tables, sizes.heads * sizes.slots, False)):
        item = item_at(i_round, tables, False)
        b_lse2, b_delta = load_terms(
            terms.lse2, terms.delta, item, tables, sizes, row_layout, WARPGROUP
        )
        mbarrier.wait(memory.q_ready.index(WARPGROUP), i_round & 1)
        n_edges, n_kept = (
            read_scalar(memory.notes, at + EDGES),
            read_scalar(memory.notes, at + KEPT),
        )
        b_dq = gl.zeros([64, BLOCK_D], gl.float32, layout)
        begin = done + (n_edges if WARPGROUP == 1 else 0)
        diagonal = done + n_edges + n_kept + WARPGROUP
        end = diagonal - (read_scalar(memory.notes, at + UNSEEN) if WARPGROUP == 1 else 0)
        pass_over(done, begin, memory)
        last = diagonal
        if sizes.all_seen is None:
            done += n_edges + n_kept + 2
        else:
            done += n_kept
            end, last = done, done - 1
        for p in range(begin, end):
            b_dq = add_tile(
                b_dq, b_lse2, b_delta, sizes.scale_log2, p, last, memory, False,
                WARPGROUP,
            )  # fmt: skip
        if sizes.all_seen is None:
            pass_over(end, diagonal, memory)
            b_dq = add_tile(
                b_dq, b_lse2, b_delta, sizes.scale_log2, diagonal, diagonal, memory, True,
                WARPGROUP,
            )  # fmt: skip
            pass_over(diagonal + 1, done, memory)
        where = query_item(item, tables, sizes, False)
        row = where.row + WARPGROUP * 64
        p_tile = out.base + head_offset(out.strides, where.batch, where.head, row)
        b_dq16 = (b_dq * sizes.scale).to(k.bufs.dtype)
        first = None if sizes.q_offset is None else -row
        store_sum(p_tile, out.strides[1], first, sizes.s - row, b_dq16, D)


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n_slots", "s", "q_offset", "all_seen", "near_start", "near_row", "rows"
    ]
)  # fmt: skip
def s2_hopper_dq_wide_kernel(
    d_q, d_k, d_v, d_dout, p_dq, p_lse2, p_delta, p_items, p_starts, p_table, strides_dq,
    heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, rows, scale, scale_log2,
    D: gl.constexpr, B: gl.constexpr, N_BANDS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit the GPU. Items: schedule.query_tiles.

    lse2 and delta: [b, h, rows]: term_lead(q_offset), s rows and padding.
    """
    BLOCK_D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES, 64, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1, 64, BLOCK_D], layout)
    q_ready, q_free = make_barriers(2, 1), make_barriers(2, 1)
    k_ready, k_free = make_barriers(K_STAGES, 1), make_barriers(K_STAGES, 2)
    v_ready, v_free = make_barriers(1, 1), make_barriers(1, 2)
    descs = Inputs(d_q, d_k, d_v, d_dout)
    memory = Memory(
        q_bufs,
        do_bufs,
        q_ready,
        q_free,
        Ring(k_bufs, k_ready, k_free),
        Ring(v_bufs, v_ready, v_free),
        make_notes(6),
    )
    tables = Tables(p_items, p_starts, p_table)
    sizes = Sizes(
        heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, rows, scale, scale_log2
    )
    out, terms = Output(p_dq, strides_dq), Terms(p_lse2, p_delta)
    gl.warp_specialize(
        [
            (consumer, (out, memory, terms, tables, sizes, D, 0)),
            (consumer, (out, memory, terms, tables, sizes, D, 1)),
            (producer, (descs, memory, tables, sizes, B, N_BANDS)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_hopper_dq_wide(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
) -> None:
    """Writes dq, as s2_kernels.backward_dq.launch_dq."""
    b, s, h, d, *_ = extents(q)
    reach = reach_of(q, k, pattern, q_offset, near)
    work = query_items(pattern, q, None, reach, spare)
    on_grid(s2_hopper_dq_wide_kernel, (work.programs,))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(dout),
        dq,
        lse2,
        delta,
        work.items,
        work.starts,
        device_table(pattern, q.device),
        strides_and_size(dq)[:3],
        h,
        h // k.shape[-2],
        work.slots,
        s,
        *reach,
        lse2.shape[-1],
        softmax_scale,
        softmax_scale * math.log2(math.e),
        D=d,
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        **OPTIONS,
    )
