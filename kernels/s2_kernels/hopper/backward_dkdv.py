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
queries arrive as zeros, and add nothing.

Shapes and formulas as in s2_kernels/backward.py.
"""

import math

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
from s2_kernels.hopper.primitives import (
    ROWS,
    TERM_LAYOUT,
    dealt_items,
    descriptor,
    load_rows,
    make_barriers,
    make_notes,
    read_scalar,
    store_rows,
    term_descriptor,
    write,
)
from s2_kernels.launch import concurrent_programs, device_table, head_major, pad
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import lifetime, load_rule
from s2_kernels.schedule import column_pairs

STAGES = 3
FAR = gl.constexpr(1 << 30)
"""A row beyond any sequence: TMA reads zeros there, and writes nothing."""


@gluon.jit
def column_rows(rule, column, n_rows, q_tile, B: gl.constexpr, N_BANDS: gl.constexpr):
    """The query half-tiles [first, end) that see a column, a KV half-tile."""
    block = column // (B // 64)
    beyond = (q_tile + n_rows - 1) // (B // 64) + 1  # keeps the product below inside int32
    end = gl.minimum(block + lifetime(rule, block, N_BANDS), beyond) * (B // 64) - q_tile
    first = gl.maximum(column - q_tile, 0)
    return first, gl.maximum(gl.minimum(end, n_rows), first)


@gluon.jit
def producer(
    descs, buffers, barriers, work, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Loads K and V of an item's columns, then Q, dO and their row terms, from the last back.

    The half-tiles of queries that are loaded are those that see either column; of a piece, a part.
    Notes for each warpgroup how many it passes over, adds whole, adds on the diagonal, passes over.
    """
    d_q, d_k, d_v, d_dout, d_lse2, d_delta, d_dk, d_dv = descs
    q_bufs, do_bufs, lse_bufs, delta_bufs, k_bufs, v_bufs, notes = buffers
    q_ready, do_ready, free, kv_ready, kv_free = barriers
    p_items, p_starts, p_table, p_partial = work
    batch, heads, n_rows, q_tile, scale, scale_log2 = sizes
    first, n_items = dealt_items(p_starts)
    done = 0
    for i_round in range(n_items):
        p_item = p_items + (first + i_round) * 7
        i_kv, column_0, column_1 = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
        piece, n_pieces, i_batch = gl.load(p_item + 3), gl.load(p_item + 4), gl.load(p_item + 6)
        rule = load_rule(p_table, i_kv, N_BANDS)
        start_0, end_0 = column_rows(rule, column_0, n_rows, q_tile, B, N_BANDS)
        start_1, end_1 = column_rows(rule, column_1, n_rows, q_tile, B, N_BANDS)
        start_1 = gl.where(column_1 < 0, start_0, start_1)
        end_1 = gl.where(column_1 < 0, start_0, end_1)
        low = gl.minimum(start_0, start_1)
        n = gl.maximum(end_0, end_1) - low
        low, high = low + n * piece // n_pieces, low + n * (piece + 1) // n_pieces
        columns, starts, ends = (column_0, column_1), (start_0, start_1), (end_0, end_1)
        for w in gl.static_range(2):
            half, turn = i_round % 2 * 2 + w, i_round // 2 & 1
            mbarrier.wait(kv_free.index(half), turn ^ 1)
            end = gl.minimum(gl.maximum(ends[w], low), high)
            start = gl.minimum(gl.maximum(starts[w], low), end)
            on_diagonal = (start == starts[w]) & (start < end) & (columns[w] >= q_tile)
            write(notes, half * 4, high - end)
            write(notes, half * 4 + 1, end - start)
            write(notes, half * 4 + 2, end - start - on_diagonal.to(gl.int32))
            write(notes, half * 4 + 3, start - low)
            ready = kv_ready.index(half)
            mbarrier.expect(ready, d_k.block_type.nbytes + d_v.block_type.nbytes)
            row = gl.where(columns[w] < 0, FAR, columns[w] * 64)
            load_rows(d_k, i_batch, i_kv, row, ready, k_bufs.index(half))
            load_rows(d_v, i_batch, i_kv, row, ready, v_bufs.index(half))
        for i_member in range(GROUP):
            i_head = i_kv * GROUP + i_member
            term = i_batch * heads + i_head
            for i in range(high - low):
                row = (high - 1 - i) * 64
                stage, phase = done % STAGES, done // STAGES & 1
                mbarrier.wait(free.index(stage), phase ^ 1)
                ready = q_ready.index(stage)
                mbarrier.expect(ready, d_q.block_type.nbytes + d_lse2.block_type.nbytes)
                load_rows(d_q, i_batch, i_head, row, ready, q_bufs.index(stage))
                tma.async_copy_global_to_shared(d_lse2, [term, row], ready, lse_bufs.index(stage))
                ready = do_ready.index(stage)
                mbarrier.expect(ready, d_dout.block_type.nbytes + d_delta.block_type.nbytes)
                load_rows(d_dout, i_batch, i_head, row, ready, do_bufs.index(stage))
                tma.async_copy_global_to_shared(
                    d_delta, [term, row], ready, delta_bufs.index(stage)
                )
                done += 1


@gluon.jit
def pass_over(n, done, barriers, STAGES: gl.constexpr):
    """Leaves n tiles to the other warpgroup."""
    q_ready, do_ready, free, kv_ready, kv_free = barriers
    for i in range(n):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        mbarrier.wait(q_ready.index(stage), phase)
        mbarrier.wait(do_ready.index(stage), phase)
        mbarrier.arrive(free.index(stage))
    return done + n


@gluon.jit
def add_tiles(
    low, high, n_whole, done, k_buf, v_buf, b_dk, b_dv, scale_log2, buffers, barriers,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv [64, D] of a column with the shares of the query half-tiles low..high-1 added.

    Those from n_whole on lie on the diagonal.
    """
    q_bufs, do_bufs, lse_bufs, delta_bufs, k_bufs, v_bufs, notes = buffers
    q_ready, do_ready, free, kv_ready, kv_free = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dv.type.layout, 2)
    term_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    for i in range(low, high):
        stage, phase = (done + i) % STAGES, (done + i) // STAGES & 1
        q_buf, do_buf = q_bufs.index(stage), do_bufs.index(stage)
        zeros = gl.zeros([64, 64], gl.float32, s_layout)
        mbarrier.wait(q_ready.index(stage), phase)
        t_s = warpgroup_mma(k_buf, q_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(do_ready.index(stage), phase)
        t_dp = warpgroup_mma(v_buf, do_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
        b_lse2 = lse_bufs.index(stage).reshape([64]).load(term_layout)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        if i >= n_whole:
            o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
            o_m = gl.arange(0, 64, layout=term_layout)
            b_s = gl.where(o_n[:, None] <= o_m[None, :], b_s, float("-inf"))
        b_p = gl.exp2(b_s * scale_log2 - b_lse2[None, :])
        b_p16 = gl.convert_layout(b_p.to(do_bufs.dtype), p_layout)
        t_dv = warpgroup_mma(b_p16, do_buf, b_dv, is_async=True)
        b_delta = delta_bufs.index(stage).reshape([64]).load(term_layout)
        b_dp = warpgroup_mma_wait(1, deps=[t_dp])
        b_ds = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(q_bufs.dtype), p_layout)
        t_dk = warpgroup_mma(b_ds, q_buf, b_dk, is_async=True)
        b_dv, b_dk = warpgroup_mma_wait(0, deps=[t_dv, t_dk])
        mbarrier.arrive(free.index(stage))
    return b_dk, b_dv


@gluon.jit
def consumer(
    descs, buffers, barriers, work, sizes, WARPGROUP: gl.constexpr,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """dk and dv of one column of every item, stored, or as a piece's share in float32."""
    d_q, d_k, d_v, d_dout, d_lse2, d_delta, d_dk, d_dv = descs
    q_bufs, do_bufs, lse_bufs, delta_bufs, k_bufs, v_bufs, notes = buffers
    q_ready, do_ready, free, kv_ready, kv_free = barriers
    p_items, p_starts, p_table, p_partial = work
    batch, heads, n_rows, q_tile, scale, scale_log2 = sizes
    D: gl.constexpr = k_bufs.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    done = 0
    first, n_items = dealt_items(p_starts)
    for i_round in range(n_items):
        p_item = p_items + (first + i_round) * 7
        i_kv, column = gl.load(p_item), gl.load(p_item + 1 + WARPGROUP)
        n_pieces, slot, i_batch = gl.load(p_item + 4), gl.load(p_item + 5), gl.load(p_item + 6)
        half, turn = i_round % 2 * 2 + WARPGROUP, i_round // 2 & 1
        k_buf, v_buf = k_bufs.index(half), v_bufs.index(half)
        mbarrier.wait(kv_ready.index(half), turn)
        n_before, n = read_scalar(notes, half * 4), read_scalar(notes, half * 4 + 1)
        n_whole, n_after = read_scalar(notes, half * 4 + 2), read_scalar(notes, half * 4 + 3)
        b_dk = gl.zeros([64, D], gl.float32, layout)
        b_dv = gl.zeros([64, D], gl.float32, layout)
        for i_member in range(GROUP):
            done = pass_over(n_before, done, barriers, STAGES)
            for part in range(2):
                b_dk, b_dv = add_tiles(
                    part, gl.where(part == 0, gl.minimum(n, 1), n), n_whole, done,
                    k_buf, v_buf, b_dk, b_dv, scale_log2, buffers, barriers, STAGES,
                )  # fmt: skip
                if part == 0:
                    # By now the item before has left the other place, which may be loaded again.
                    tma.store_wait(0)
                    mbarrier.arrive(kv_free.index(half ^ 2), pred=(i_round > 0) & (i_member == 0))
            done = pass_over(n_after, done + n, barriers, STAGES)
        b_dk *= scale
        if slot < 0:  # dk and dv leave from the place of K and V, which have been read
            v_buf.store(b_dv.to(v_bufs.dtype))
            k_buf.store(b_dk.to(k_bufs.dtype))
            fence_async_shared()
            row = gl.where(column < 0, FAR, column * 64)
            store_rows(d_dv, i_batch, i_kv, row, v_buf)
            store_rows(d_dk, i_batch, i_kv, row, k_buf)
        else:
            o_n = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
            o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
            slot += WARPGROUP * n_pieces
            at = (slot.to(gl.int64) * batch + i_batch) * (64 * 2 * D)
            p_tile = p_partial + at + o_n[:, None] * D + o_d[None, :]
            gl.store(p_tile, b_dk)
            gl.store(p_tile + 64 * D, b_dv)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batch", "heads", "n_rows", "q_tile"])
def s2_hopper_dkdv_kernel(
    d_q,
    d_k,
    d_v,
    d_dout,
    d_lse2,
    d_delta,
    d_dk,
    d_dv,
    p_items,
    p_starts,
    p_table,
    p_partial,
    batch,
    heads,
    n_rows,
    q_tile,
    scale,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    TERM_LAYOUT: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: schedule.column_pairs."""
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
    descs = (d_q, d_k, d_v, d_dout, d_lse2, d_delta, d_dk, d_dv)
    notes = make_notes(16)
    buffers = (q_bufs, do_bufs, lse_bufs, delta_bufs, k_bufs, v_bufs, notes)
    barriers = (q_ready, do_ready, free, kv_ready, kv_free)
    sizes = (batch, heads, n_rows, q_tile, scale, scale_log2)
    work = (p_items, p_starts, p_table, p_partial)
    gl.warp_specialize(
        [
            (consumer, (descs, buffers, barriers, work, sizes, 0, B, N_BANDS, STAGES, GROUP)),
            (consumer, (descs, buffers, barriers, work, sizes, 1, B, N_BANDS, STAGES, GROUP)),
            (producer, (descs, buffers, barriers, work, sizes, B, N_BANDS, STAGES, GROUP)),
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
    q_offset: int,
) -> None:
    """Writes dk and dv, as s2_kernels.backward_dkdv.launch_dkdv."""
    q_heads, k_heads = head_major(q), head_major(k)
    b, h, s, d = q_heads.shape
    g, t = k_heads.shape[1:3]
    slots = concurrent_programs(q.device, num_warps=8)
    dealt, work = column_pairs(pattern, s, t, q_offset, b, slots, q.device)
    shape = (work.n_slots * b, ROWS, 2 * pad(d))
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    s2_hopper_dkdv_kernel[(dealt.programs,)](
        descriptor(q_heads),
        descriptor(k_heads),
        descriptor(head_major(v)),
        descriptor(head_major(dout)),
        term_descriptor(lse2),
        term_descriptor(delta),
        descriptor(head_major(dk)),
        descriptor(head_major(dv)),
        dealt.items,
        dealt.starts,
        device_table(pattern, q.device),
        partial,
        b,
        h,
        -(-s // ROWS),
        q_offset // ROWS,
        softmax_scale,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=STAGES,
        GROUP=h // g,
        TERM_LAYOUT=TERM_LAYOUT,
        num_warps=4,
        maxnreg=168,  # 65,536 registers over 12 warps; the partitions share them out as they need
    )
    add_pieces(partial, dk, dv, work, ROWS)
