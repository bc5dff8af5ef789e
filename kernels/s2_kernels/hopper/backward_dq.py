"""dq on Hopper, in Gluon: the forward kernel's walk, a half-tile of KV at a time.

Persistent programs of three partitions: a producer warp loads by TMA, two consumer warpgroups own
64 query rows each of a tile of 128, with Q and dO in registers. Both walk the tile's list of KV
blocks (s2_kernels/primitives.py) in half-tiles of 64 tokens; a warpgroup passes over a half-tile
that only the other one's rows see. Only the diagonal has a mask; rows of K past its end arrive as
zeros and add nothing.

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

from s2_kernels.hopper.primitives import (
    ROWS,
    dealt_items,
    descriptor,
    half_block,
    keep_order,
    load_rows,
    make_barriers,
    store_rows,
    work_list,
)
from s2_kernels.launch import concurrent_programs, device_table, head_major, pad
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import lifetime
from s2_kernels.schedule import query_tiles


@gluon.jit
def producer(
    descs, buffers, barriers, terms, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads Q and dO of every item, then the K and V half-tiles of its list."""
    d_q, d_k, d_v, d_dout = descs
    q_bufs, do_bufs, k_bufs, v_bufs, dq_bufs = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    p_lse2, p_delta, p_items, p_starts, p_table = terms
    heads, group, n_tiles_q, s, t, q_offset, rows, scale, scale_log2 = sizes
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    done = 0
    first, n_items = dealt_items(p_starts)
    for i_round in range(n_items):
        item = gl.load(p_items + first + i_round)
        work = work_list(item, p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS)
        i_batch, i_head, row, rule, kept, n_interior, n_halves = work
        i_kv = i_head // group
        mbarrier.wait(q_free.index(0), i_round & 1 ^ 1)
        ready = q_ready.index(0)
        mbarrier.expect(ready, 2 * d_q.block_type.nbytes + 2 * d_dout.block_type.nbytes)
        for w in gl.static_range(2):
            load_rows(d_q, i_batch, i_head, row - q_offset + w * 64, ready, q_bufs.index(w))
            load_rows(d_dout, i_batch, i_head, row - q_offset + w * 64, ready, do_bufs.index(w))
        for p in range(n_halves):
            stage, phase = done % STAGES, done // STAGES & 1
            column = half_block(kept, p, B, N_SEGMENTS) * 64
            mbarrier.wait(free.index(stage), phase ^ 1)
            ready = k_ready.index(stage)
            mbarrier.expect(ready, d_k.block_type.nbytes)
            load_rows(d_k, i_batch, i_kv, column, ready, k_bufs.index(stage))
            ready = v_ready.index(stage)
            mbarrier.expect(ready, d_v.block_type.nbytes)
            load_rows(d_v, i_batch, i_kv, column, ready, v_bufs.index(stage))
            done += 1


@gluon.jit
def add_tile(
    b_q, b_dout, b_dq, b_lse2, b_delta, scale_log2, done, buffers, barriers,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dq [64, D] / scale with the share of one half-tile added."""
    q_bufs, do_bufs, k_bufs, v_bufs, dq_bufs = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dq.type.layout, 2)
    stage, phase = done % STAGES, done // STAGES & 1
    k_buf, v_buf = k_bufs.index(stage), v_bufs.index(stage)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    mbarrier.wait(k_ready.index(stage), phase)
    t_s = warpgroup_mma(b_q, k_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(stage), phase)
    t_dp = warpgroup_mma(b_dout, v_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[t_s])
    if MASKED:
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
        b_s = gl.where(o_n[None, :] <= o_m[:, None], b_s, float("-inf"))
    b_p = gl.exp2(b_s * scale_log2 - b_lse2[:, None])
    keep_order(v_ready.index(stage), phase)
    b_dp, b_p = warpgroup_mma_wait(0, deps=[t_dp, b_p])
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(k_bufs.dtype), p_layout)
    b_dq = warpgroup_mma(b_ds, k_buf, b_dq)
    mbarrier.arrive(free.index(stage))
    return b_dq


@gluon.jit
def consumer(
    d_dq, buffers, barriers, terms, sizes, WARPGROUP: gl.constexpr,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of 64 query rows of every item."""
    q_bufs, do_bufs, k_bufs, v_bufs, dq_bufs = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    p_lse2, p_delta, p_items, p_starts, p_table = terms
    heads, group, n_tiles_q, s, t, q_offset, rows, scale, scale_log2 = sizes
    D: gl.constexpr = k_bufs.shape[2]
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    first, n_items = dealt_items(p_starts)
    done = 0
    for i_round in range(n_items):
        item = gl.load(p_items + first + i_round)
        work = work_list(item, p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS)
        i_batch, i_head, row, rule, kept, n_interior, n_halves = work
        row += WARPGROUP * 64
        o_q = row - q_offset + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        at = (i_batch * heads + i_head).to(gl.int64) * rows
        b_lse2 = gl.load(p_lse2 + at + o_q, mask=o_q < s, other=float("inf"))
        b_delta = gl.load(p_delta + at + o_q, mask=o_q < s, other=0.0)
        b_dq = gl.zeros([64, D], gl.float32, layout)
        mbarrier.wait(q_ready.index(0), i_round & 1)
        b_q = q_bufs.index(WARPGROUP).load(q_layout)
        b_dout = do_bufs.index(WARPGROUP).load(q_layout)
        for part in range(2):
            high = gl.where(part == 0, gl.minimum(n_interior, 1), n_interior)
            for p in range(done + part, done + high):
                b_dq = add_tile(
                    b_q, b_dout, b_dq, b_lse2, b_delta, scale_log2, p, buffers, barriers, STAGES,
                    False,
                )  # fmt: skip
            # Not before they are used: a load from shared memory may be on its way until then.
            mbarrier.arrive(q_free.index(0), pred=(part == 0) & (n_interior > 0))
        for p in range(n_interior, n_halves):
            half = half_block(kept, p, B, N_SEGMENTS)
            block = half // (B // 64)
            sees = (half * 64 <= row) & (row // B - block < lifetime(rule, block, N_BANDS))
            if sees & (half * 64 < row):
                b_dq = add_tile(
                    b_q, b_dout, b_dq, b_lse2, b_delta, scale_log2, done + p, buffers, barriers,
                    STAGES, False,
                )  # fmt: skip
            elif sees:
                b_dq = add_tile(
                    b_q, b_dout, b_dq, b_lse2, b_delta, scale_log2, done + p, buffers, barriers,
                    STAGES, True,
                )  # fmt: skip
            else:
                stage, phase = (done + p) % STAGES, (done + p) // STAGES & 1
                mbarrier.wait(k_ready.index(stage), phase)
                mbarrier.wait(v_ready.index(stage), phase)
                mbarrier.arrive(free.index(stage))
        done += n_halves
        mbarrier.arrive(q_free.index(0), pred=n_interior == 0)
        dq_buf = dq_bufs.index(WARPGROUP)
        tma.store_wait(0)  # of the item before, long gone
        dq_buf.store((b_dq * scale).to(dq_bufs.dtype))
        fence_async_shared()
        store_rows(d_dq, i_batch, i_head, row - q_offset, dq_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "n_tiles_q", "s", "t", "q_offset", "rows"])
def s2_hopper_dq_kernel(
    d_q,
    d_k,
    d_v,
    d_dout,
    d_dq,
    p_lse2,
    p_delta,
    p_items,
    p_starts,
    p_table,
    heads,
    group,
    n_tiles_q,
    s,
    t,
    q_offset,
    rows,
    scale,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: schedule.query_tiles."""
    D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    dq_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    q_ready, q_free = make_barriers(1, 1), make_barriers(1, 2)
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    free = make_barriers(STAGES, 2)
    descs = (d_q, d_k, d_v, d_dout)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs, dq_bufs)
    barriers = (q_ready, q_free, k_ready, v_ready, free)
    terms = (p_lse2, p_delta, p_items, p_starts, p_table)
    sizes = (heads, group, n_tiles_q, s, t, q_offset, rows, scale, scale_log2)
    gl.warp_specialize(
        [
            (consumer, (d_dq, buffers, barriers, terms, sizes, 0, B, N_BANDS, STAGES)),
            (consumer, (d_dq, buffers, barriers, terms, sizes, 1, B, N_BANDS, STAGES)),
            (producer, (descs, buffers, barriers, terms, sizes, B, N_BANDS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_hopper_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int,
) -> None:
    """Writes dq, as s2_kernels.backward_dq.launch_dq."""
    q_heads, k_heads = head_major(q), head_major(k)
    b, h, s, d = q_heads.shape
    n_tiles_q = -(-s // (2 * ROWS))
    t, slots = k_heads.shape[2], concurrent_programs(q.device, num_warps=8)
    dealt = query_tiles(pattern, s, t, q_offset, b, slots, q.device)
    s2_hopper_dq_kernel[(dealt.programs,)](
        descriptor(q_heads),
        descriptor(k_heads),
        descriptor(head_major(v)),
        descriptor(head_major(dout)),
        descriptor(head_major(dq)),
        lse2,
        delta,
        dealt.items,
        dealt.starts,
        device_table(pattern, q.device),
        h,
        h // k_heads.shape[1],
        n_tiles_q,
        s,
        t,
        q_offset,
        lse2.shape[2],
        softmax_scale,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=4 if pad(d) == 128 else 8,  # what fits 227 KiB of shared memory
        num_warps=4,
        maxnreg=168,  # 65,536 registers over 12 warps; the partitions share them out as they need
    )
