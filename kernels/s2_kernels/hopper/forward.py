"""The forward kernel for Hopper, in Gluon: loads, tensor cores and softmax at the same time.

Persistent programs of three partitions: a producer warp loads by TMA, two consumer warpgroups own
64 query rows each of a tile of 128. A KV tile has 128 rows: two half-tiles of 64 that lie anywhere,
the next two entries of the query tile's list of KV blocks (primitives.py), so that the shard, the
ranges and the window go through one pipeline. The scores of a tile are issued before the previous
tile's P V, whose tensor-core time hides this tile's softmax.

An item is a query tile of a head; a program takes every grid-th, and each partition works out the
next item's list while the others are busy. Barriers come in pairs, ready (loaded) and free (read).

Shapes as in s2_kernels/forward.py.
"""

import functools
import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.launch import (
    concurrent_programs,
    device_table,
    empty_like,
    head_major,
    pad,
    tma_strides,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    LN2,
    block_at,
    count_blocks,
    kept_segments,
    lifetime,
    load_rule,
)

ROWS = 64
"""Rows of a half-tile of KV, and of a consumer's queries."""
FAR = gl.constexpr(1 << 30)
"""A row beyond any sequence: TMA reads zeros there."""


@gluon.jit
def count_items(n_items):
    """How many items this program works on: every grid-th, the direction alternating."""
    grid = gl.num_programs(0)
    rounds = n_items // grid
    return rounds + (item_at(rounds) < n_items).to(gl.int32)


@gluon.jit
def item_at(i_round):
    """The item of a round. Items go from heavy to light: to and fro, every program gets as much."""
    grid, i_program = gl.num_programs(0), gl.program_id(0)
    return i_round * grid + gl.where(i_round % 2 == 0, i_program, grid - 1 - i_program)


@gluon.jit
def work_list(
    item, p_table, heads, group, n_tiles_q, s, t, q_offset, B: gl.constexpr, N_BANDS: gl.constexpr
):
    """An item: batch, head, first row of its query tile, its list of KV blocks, and its tiles.

    Returns (i_batch, i_head, row, rule, kept, halves, n_interior, n_tiles): halves counts the
    half-tiles of the list, n_interior the tiles that need no mask.
    """
    M: gl.constexpr = 128
    i_tile = n_tiles_q - 1 - item % n_tiles_q
    i_head = item // n_tiles_q % heads  # in range for items past the last one too
    i_batch = item // n_tiles_q // heads
    row = q_offset + i_tile * M
    last_row = gl.minimum(row + M, q_offset + s) - 1
    k_last = gl.maximum(t - 1, 0) // B
    rule = load_rule(p_table, i_head // group, N_BANDS)
    kept = kept_segments(rule, row // B, last_row // B, k_last, True, N_BANDS)
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    halves = count_blocks(kept, N_SEGMENTS) * (B // 64)
    n_interior = count_blocks(kept, N_BANDS) * (B // 64) // 2
    n_tiles = gl.maximum((halves + 1) // 2, 1)
    return i_batch, i_head, row, rule, kept, halves, n_interior, n_tiles


@gluon.jit
def half_row(kept, halves, position, B: gl.constexpr, N_SEGMENTS: gl.constexpr):
    """First KV row of a half-tile of the list, or FAR past its end."""
    block = block_at(kept, position // (B // 64), N_SEGMENTS)
    return gl.where(position < halves, block * B + position % (B // 64) * 64, FAR)


@gluon.jit
def load_half_tiles(desc, i_batch, i_kv, row_0, row_1, ready, buffer):
    """Two half-tiles of 64 rows into one buffer [128, D]."""
    D: gl.constexpr = buffer.shape[1]
    halves = buffer.reshape([1, 2, 64, D])
    mbarrier.expect(ready, 2 * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [i_batch, i_kv, row_0, 0], ready, halves.slice(0, 1, 1))
    tma.async_copy_global_to_shared(desc, [i_batch, i_kv, row_1, 0], ready, halves.slice(1, 1, 1))


@gluon.jit
def load_kv(
    p, done, descs, buffers, barriers, i_batch, i_kv, kept, halves,
    B: gl.constexpr, N_SEGMENTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads K and V of tile p of a list, once their buffers are free."""
    d_q, d_k, d_v, d_out = descs
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    row_0 = half_row(kept, halves, 2 * p, B, N_SEGMENTS)
    row_1 = half_row(kept, halves, 2 * p + 1, B, N_SEGMENTS)
    stage, phase = (done + p) % STAGES, (done + p) // STAGES & 1
    mbarrier.wait(k_free.index(stage), phase ^ 1)
    load_half_tiles(d_k, i_batch, i_kv, row_0, row_1, k_ready.index(stage), k_bufs.index(stage))
    mbarrier.wait(v_free.index(stage), phase ^ 1)
    load_half_tiles(d_v, i_batch, i_kv, row_0, row_1, v_ready.index(stage), v_bufs.index(stage))


@gluon.jit
def producer(
    descs, buffers, barriers, p_table, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads Q of every item and the K and V tiles of its list."""
    d_q, d_k, d_v, d_out = descs
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    batch, heads, group, n_tiles_q, s, t, q_offset, scale_log2 = sizes
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    n_items = batch * heads * n_tiles_q
    done = 0
    work = work_list(item_at(0), p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS)
    for i_round in range(count_items(n_items)):
        i_batch, i_head, row, rule, kept, halves, n_interior, n_tiles = work
        i_kv = i_head // group
        slot, turn = i_round % 2, i_round // 2 & 1
        mbarrier.wait(q_free.index(slot), turn ^ 1)
        mbarrier.expect(q_ready.index(slot), 2 * d_q.block_type.nbytes)
        for i in gl.static_range(2):
            tma.async_copy_global_to_shared(
                d_q, [i_batch, i_head, row - q_offset + i * 64, 0], q_ready.index(slot),
                q_bufs.index(2 * slot + i).reshape(d_q.block_type.shape),
            )  # fmt: skip
        for p in range(n_tiles - 1):
            load_kv(
                p, done, descs, buffers, barriers, i_batch, i_kv, kept, halves,
                B, N_SEGMENTS, STAGES,
            )  # fmt: skip
        # While the consumers are at it, the next list.
        work = work_list(
            item_at(i_round + 1), p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS
        )
        load_kv(
            n_tiles - 1, done, descs, buffers, barriers, i_batch, i_kv, kept, halves,
            B, N_SEGMENTS, STAGES,
        )  # fmt: skip
        done += n_tiles


@gluon.jit
def mask_tile(
    b_s, rule, kept, halves, p, o_row, t,
    B: gl.constexpr, N_BANDS: gl.constexpr, N_SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Scores [64, 128] of a tile, -inf where row o_row [64] does not see a column."""
    col_layout: gl.constexpr = gl.SliceLayout(0, b_s.type.layout)
    o_n = gl.arange(0, 128, layout=col_layout)
    row_0 = half_row(kept, halves, 2 * p, B, N_SEGMENTS)
    row_1 = half_row(kept, halves, 2 * p + 1, B, N_SEGMENTS)
    last_0 = last_column(rule, row_0, o_row, t, B, N_BANDS)
    last_1 = last_column(rule, row_1, o_row, t, B, N_BANDS)
    last = gl.where((o_n < 64)[None, :], last_0[:, None], last_1[:, None] + 64)
    return gl.where(o_n[None, :] <= last, b_s, float("-inf"))


@gluon.jit
def last_column(rule, row, o_row, t, B: gl.constexpr, N_BANDS: gl.constexpr):
    """The last column [64] of the half-tile from `row` on that o_row sees, at most 63; or -1."""
    life = lifetime(rule, row // B, N_BANDS)
    last = gl.minimum(gl.minimum(o_row, t - 1) - row, 63)
    return gl.where(o_row // B - row // B < life, last, -1)


@gluon.jit
def softmax_step(b_s, b_m, b_l, scale_log2, MASKED: gl.constexpr):
    """Probabilities [64, 128] in base 2, the factor for what came before, new maximum and sum."""
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
    b_shift = b_m_new
    if MASKED:  # a row that has seen nothing yet has maximum -inf: with 0, exp2 gives 0
        b_shift = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_rescale = gl.exp2(b_m - b_shift)
    b_p = gl.exp2(b_s * scale_log2 - b_shift[:, None])
    return b_p, b_rescale, b_m_new, b_l * b_rescale + gl.sum(b_p, 1)


@gluon.jit
def attend_tiles(
    low, high, done, q_buf, k_bufs, v_bufs, k_ready, k_free, v_ready, v_free,
    b_p, b_acc, b_m, b_l, o_row, rule, kept, halves, t, scale_log2,
    B: gl.constexpr, N_BANDS: gl.constexpr, N_SEGMENTS: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles low..high-1: scores of tile p, then P V of tile p - 1, whose b_p [64, 128] comes in."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    for p in range(low, high):
        stage, phase = (done + p) % STAGES, (done + p) // STAGES & 1
        before, phase_before = (done + p - 1) % STAGES, (done + p - 1) // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        zeros = gl.zeros([64, 128], gl.float32, s_layout)
        t_s = warpgroup_mma(
            q_buf, k_bufs.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), phase_before)
        t_acc = warpgroup_mma(b_p, v_bufs.index(before), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        mbarrier.arrive(k_free.index(stage))
        if MASKED:
            b_s = mask_tile(b_s, rule, kept, halves, p, o_row, t, B, N_BANDS, N_SEGMENTS)
        b_next, b_rescale, b_m, b_l = softmax_step(b_s, b_m, b_l, scale_log2, MASKED)
        b_acc = warpgroup_mma_wait(0, deps=[t_acc])
        mbarrier.arrive(v_free.index(before))
        b_rescale = gl.convert_layout(b_rescale, gl.SliceLayout(1, b_acc.type.layout))
        b_acc = b_acc * b_rescale[:, None]
        b_p = gl.convert_layout(b_next.to(v_bufs.dtype), p_layout)
    return b_p, b_acc, b_m, b_l


@gluon.jit
def consumer(
    descs, buffers, barriers, p_table, sizes, p_lse,
    WARPGROUP: gl.constexpr, B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attends from 64 query rows of every item and stores out and lse."""
    d_q, d_k, d_v, d_out = descs
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    batch, heads, group, n_tiles_q, s, t, q_offset, scale_log2 = sizes
    D: gl.constexpr = v_bufs.shape[2]
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    n_items = batch * heads * n_tiles_q
    done = 0
    work = work_list(item_at(0), p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS)
    for i_round in range(count_items(n_items)):
        i_batch, i_head, row, rule, kept, halves, n_interior, n_tiles = work
        row += WARPGROUP * 64
        o_row = row + gl.arange(0, 64, layout=row_layout)
        slot, turn = i_round % 2, i_round // 2 & 1
        q_buf = q_bufs.index(2 * slot + WARPGROUP)
        mbarrier.wait(q_ready.index(slot), turn)

        stage, phase = done % STAGES, done // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase)
        b_s = warpgroup_mma(
            q_buf, k_bufs.index(stage).permute([1, 0]), gl.zeros([64, 128], gl.float32, s_layout),
            use_acc=False,
        )  # fmt: skip
        mbarrier.arrive(k_free.index(stage))
        tma.store_wait(0)  # of the item before, whose out has left by now
        mbarrier.arrive(q_free.index(1 - slot), pred=i_round > 0)
        if n_interior == 0:
            b_s = mask_tile(b_s, rule, kept, halves, 0, o_row, t, B, N_BANDS, N_SEGMENTS)
        b_m = gl.full([64], float("-inf"), gl.float32, row_layout)
        b_l = gl.zeros([64], gl.float32, row_layout)
        b_p, b_rescale, b_m, b_l = softmax_step(b_s, b_m, b_l, scale_log2, True)
        b_p = gl.convert_layout(b_p.to(v_bufs.dtype), p_layout)
        b_acc = gl.zeros([64, D], gl.float32, o_layout)
        b_p, b_acc, b_m, b_l = attend_tiles(
            1, n_interior, done, q_buf, k_bufs, v_bufs, k_ready, k_free, v_ready, v_free,
            b_p, b_acc, b_m, b_l, o_row, rule, kept, halves, t, scale_log2,
            B, N_BANDS, N_SEGMENTS, STAGES, False,
        )  # fmt: skip
        b_p, b_acc, b_m, b_l = attend_tiles(
            gl.maximum(n_interior, 1), n_tiles, done, q_buf, k_bufs, v_bufs,
            k_ready, k_free, v_ready, v_free,
            b_p, b_acc, b_m, b_l, o_row, rule, kept, halves, t, scale_log2,
            B, N_BANDS, N_SEGMENTS, STAGES, True,
        )  # fmt: skip
        done += n_tiles
        stage, phase = (done - 1) % STAGES, (done - 1) // STAGES & 1
        mbarrier.wait(v_ready.index(stage), phase)
        t_acc = warpgroup_mma(b_p, v_bufs.index(stage), b_acc, is_async=True)
        work = work_list(
            item_at(i_round + 1), p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS
        )
        b_acc = warpgroup_mma_wait(0, deps=[t_acc])
        mbarrier.arrive(v_free.index(stage))

        sees = b_l > 0
        b_sum = gl.where(sees, b_l, 1.0)
        b_lse = gl.where(sees, b_m * LN2 + gl.log(b_sum), float("-inf"))
        b_sum = gl.convert_layout(b_sum, gl.SliceLayout(1, o_layout))
        o_q = o_row - q_offset
        p_row = p_lse + (i_batch * heads + i_head).to(gl.int64) * s
        gl.store(p_row + o_q, b_lse, mask=o_q < s)
        b_out = (b_acc / b_sum[:, None]).to(q_bufs.dtype)
        q_buf.store(b_out)  # Q has been read: out leaves from its place
        fence_async_shared()
        tma.async_copy_shared_to_global(
            d_out, [i_batch, i_head, row - q_offset, 0], q_buf.reshape([1, 1, 64, D])
        )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["batch", "heads", "group", "n_tiles_q", "s", "t", "q_offset"])
def s2_hopper_forward_kernel(
    d_q,
    d_k,
    d_v,
    d_out,
    p_lse,
    p_table,
    batch,
    heads,
    group,
    n_tiles_q,
    s,
    t,
    q_offset,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: heads x query tiles, the last tiles first."""
    D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [4, 64, D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 128, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 128, D], layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    descs = (d_q, d_k, d_v, d_out)
    buffers = (q_bufs, k_bufs, v_bufs)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    sizes = (batch, heads, group, n_tiles_q, s, t, q_offset, scale_log2)
    gl.warp_specialize(
        [
            (consumer, (descs, buffers, barriers, p_table, sizes, p_lse, 0, B, N_BANDS, STAGES)),
            (consumer, (descs, buffers, barriers, p_table, sizes, p_lse, 1, B, N_BANDS, STAGES)),
            (producer, (descs, buffers, barriers, p_table, sizes, B, N_BANDS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    """A TMA descriptor over [batch, head, row, d] that moves [1, 1, 64, padded d]."""
    box = [1, 1, ROWS, pad(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), tma_strides(x), box, box_layout(box[-1], x.dtype))


@functools.cache
def box_layout(columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box of 64 rows lies in shared memory: swizzled, as the tensor cores read it."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, columns], dtype)


def launch_hopper_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as s2_kernels.forward.launch_forward; `hopper.why_not` was asked before."""
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    b, h, s, d = q_heads.shape
    out = empty_like(q, d)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    n_tiles_q = triton.cdiv(s, 2 * ROWS)
    programs = min(concurrent_programs(q.device, num_warps=8), b * h * n_tiles_q)
    s2_hopper_forward_kernel[(programs,)](
        descriptor(q_heads),
        descriptor(k_heads),
        descriptor(v_heads),
        descriptor(head_major(out)),
        lse,
        device_table(pattern, q.device),
        b,
        h,
        h // k_heads.shape[1],
        n_tiles_q,
        s,
        k_heads.shape[2],
        q_offset,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=2 if pad(d) == 128 else 4,  # what fits 227 KiB of shared memory
        num_warps=4,
        maxnreg=168,  # 65,536 registers over 12 warps; the partitions share them out as they need
    )
    return out, lse
