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

from s2_kernels.hopper.primitives import (
    ROWS,
    dealt_items,
    descriptor,
    half_block,
    keep_order,
    load_rows,
    make_barriers,
    make_notes,
    query_item,
    read,
    read_scalar,
    store_rows,
    work_list,
    write,
)
from s2_kernels.launch import (
    concurrent_programs,
    device_table,
    empty_like,
    head_major,
    pad,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LN2, lifetime
from s2_kernels.schedule import query_tiles

FAR = gl.constexpr(1 << 30)
"""A row beyond any sequence: TMA reads zeros there."""


@gluon.jit
def half_row(kept, halves, position, B: gl.constexpr, N_SEGMENTS: gl.constexpr):
    """First KV row of a half-tile of the list, or FAR past its end."""
    return gl.where(position < halves, half_block(kept, position, B, N_SEGMENTS) * 64, FAR)


@gluon.jit
def note_mask(notes, at, rule, row, col, t, B: gl.constexpr, N_BANDS: gl.constexpr):
    """What the consumers' masks take from a half-tile: two diagonals, the last column that exists.

    Row m of a warpgroup's 64 sees column n of the half-tile if n <= m + diagonal.
    """
    life = lifetime(rule, col // B, N_BANDS)
    for w in gl.static_range(2):
        ahead = row + w * 64 - col
        sees = (ahead >= 0) & ((row + w * 64) // B - col // B < life)
        write(notes, at + w, gl.where(sees, gl.minimum(ahead, 64), -64))
    write(notes, at + 2, gl.minimum(t - 1 - col, 63))


@gluon.jit
def load_half_tiles(desc, i_batch, i_kv, row_0, row_1, ready, buffer):
    """Two half-tiles of 64 rows into one buffer [128, D]."""
    D: gl.constexpr = buffer.shape[1]
    halves = buffer.reshape([1, 2, 64, D])
    mbarrier.expect(ready, 2 * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [i_batch, i_kv, row_0, 0], ready, halves.slice(0, 1, 1))
    tma.async_copy_global_to_shared(desc, [i_batch, i_kv, row_1, 0], ready, halves.slice(1, 1, 1))


@gluon.jit
def producer(
    descs, buffers, barriers, tables, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads Q of every item and the K and V tiles of its list, with notes on both.

    K of a tile is freed together with V of the tile before.
    """
    d_q, d_k, d_v = descs
    q_bufs, k_bufs, v_bufs, q_notes, k_notes = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    p_items, p_starts, p_table = tables
    heads, group, n_tiles_q, s, t, q_offset, scale_log2 = sizes
    N_SEGMENTS: gl.constexpr = 2 * N_BANDS + 1
    first, n_items = dealt_items(p_starts)
    tile = 0
    for i_round in range(n_items):
        item = gl.load(p_items + first + i_round)
        work = work_list(item, p_table, heads, group, n_tiles_q, s, t, q_offset, B, N_BANDS)
        i_batch, i_head, row, rule, kept, n_interior, halves = work
        i_kv = i_head // group
        n_interior = n_interior // 2
        n_tiles = gl.maximum((halves + 1) // 2, 1)
        mbarrier.wait(q_free.index(0), i_round & 1 ^ 1)
        write(q_notes, 0, n_interior)
        write(q_notes, 1, n_tiles)
        mbarrier.expect(q_ready.index(0), 2 * d_q.block_type.nbytes)
        for w in gl.static_range(2):
            q_row = row - q_offset + w * 64
            load_rows(d_q, i_batch, i_head, q_row, q_ready.index(0), q_bufs.index(w))
        for p in range(n_tiles):
            col_0 = half_row(kept, halves, 2 * p, B, N_SEGMENTS)
            col_1 = half_row(kept, halves, 2 * p + 1, B, N_SEGMENTS)
            stage, phase = tile % STAGES, tile // STAGES & 1
            mbarrier.wait(free.index(stage), phase ^ 1)
            if p >= n_interior:
                note_mask(k_notes, stage * 6, rule, row, col_0, t, B, N_BANDS)
                note_mask(k_notes, stage * 6 + 3, rule, row, col_1, t, B, N_BANDS)
            ready = k_ready.index(stage)
            load_half_tiles(d_k, i_batch, i_kv, col_0, col_1, ready, k_bufs.index(stage))
            after, phase = (tile + 1) % STAGES, (tile + 1) // STAGES & 1
            mbarrier.wait(free.index(after), phase ^ 1, pred=tile >= STAGES)
            ready = v_ready.index(stage)
            load_half_tiles(d_v, i_batch, i_kv, col_0, col_1, ready, v_bufs.index(stage))
            tile += 1


@gluon.jit
def mask_tile(b_s, notes, stage, WARPGROUP: gl.constexpr):
    """Scores [64, 128] of a tile, -inf where a row does not see a column."""
    row_layout: gl.constexpr = gl.SliceLayout(1, b_s.type.layout)
    o_m = gl.arange(0, 64, layout=row_layout)
    o_n = gl.arange(0, 128, layout=gl.SliceLayout(0, b_s.type.layout))
    at = stage * 6
    last_0 = gl.minimum(
        o_m + read(notes, at + WARPGROUP, row_layout), read(notes, at + 2, row_layout)
    )
    last_1 = gl.minimum(
        o_m + read(notes, at + 3 + WARPGROUP, row_layout), read(notes, at + 5, row_layout)
    )
    last = gl.where((o_n < 64)[None, :], last_0[:, None], last_1[:, None] + 64)
    return gl.where(o_n[None, :] <= last, b_s, float("-inf"))


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
    low, high, b_q, b_p, b_acc, b_m, b_l, scale_log2, buffers, barriers,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles low..high-1, counted over all items: scores of one, then P V of the one before.

    That one's b_p [64, 128] comes in.
    """
    q_bufs, k_bufs, v_bufs, q_notes, k_notes = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    for tile in range(low, high):
        stage, phase = tile % STAGES, tile // STAGES & 1
        before, phase_before = (tile - 1) % STAGES, (tile - 1) // STAGES & 1
        zeros = gl.zeros([64, 128], gl.float32, s_layout)
        mbarrier.wait(k_ready.index(stage), phase)
        t_s = warpgroup_mma(
            b_q, k_bufs.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), phase_before)
        t_acc = warpgroup_mma(b_p, v_bufs.index(before), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        if MASKED:
            b_s = mask_tile(b_s, k_notes, stage, WARPGROUP)
        b_next, b_rescale, b_m, b_l = softmax_step(b_s, b_m, b_l, scale_log2, MASKED)
        keep_order(v_ready.index(before), phase_before)
        b_acc, b_next = warpgroup_mma_wait(0, deps=[t_acc, b_next])
        mbarrier.arrive(free.index(stage))
        b_rescale = gl.convert_layout(b_rescale, gl.SliceLayout(1, b_acc.type.layout))
        b_acc = b_acc * b_rescale[:, None]
        b_p = gl.convert_layout(b_next.to(v_bufs.dtype), p_layout)
    return b_p, b_acc, b_m, b_l


@gluon.jit
def store_tile(b_acc, b_m, b_l, item, out, sizes, WARPGROUP: gl.constexpr):
    """Stores out and lse of a warpgroup's 64 rows of an item; the next item waits for out."""
    d_out, p_lse, out_bufs = out
    heads, group, n_tiles_q, s, t, q_offset, scale_log2 = sizes
    layout: gl.constexpr = b_acc.type.layout
    i_batch, i_head, i_tile = query_item(item, heads, n_tiles_q)
    sees = b_l > 0
    b_sum = gl.where(sees, b_l, 1.0)
    b_lse = gl.where(sees, b_m * LN2 + gl.log(b_sum), float("-inf"))
    b_inverse = gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, layout))
    row = i_tile * 128 + WARPGROUP * 64
    o_lse = row + gl.arange(0, 64, layout=b_m.type.layout)
    gl.store(p_lse + (i_batch * heads + i_head).to(gl.int64) * s + o_lse, b_lse, mask=o_lse < s)
    out_buf = out_bufs.index(WARPGROUP)
    tma.store_wait(0)  # of the item before, long gone
    out_buf.store((b_acc * b_inverse[:, None]).to(out_bufs.dtype))
    fence_async_shared()
    store_rows(d_out, i_batch, i_head, row, out_buf)


@gluon.jit
def consumer(
    buffers, barriers, tables, sizes, out,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attends from 64 query rows of every item and stores out and lse.

    The scores of an item's first tile are issued before the last P V of the item before is done.
    """
    q_bufs, k_bufs, v_bufs, q_notes, k_notes = buffers
    q_ready, q_free, k_ready, v_ready, free = barriers
    p_items, p_starts, p_table = tables
    heads, group, n_tiles_q, s, t, q_offset, scale_log2 = sizes
    BLOCK_D: gl.constexpr = v_bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    zeros = gl.zeros([64, 128], gl.float32, s_layout)
    first, n_items = dealt_items(p_starts)
    p_items += first
    mbarrier.wait(q_ready.index(0), 0)
    b_q = q_bufs.index(WARPGROUP).load(q_layout)
    n_interior = read_scalar(q_notes, 0)
    n_tiles = read_scalar(q_notes, 1)
    mbarrier.wait(k_ready.index(0), 0)
    b_s = warpgroup_mma(b_q, k_bufs.index(0).permute([1, 0]), zeros, use_acc=False)
    mbarrier.arrive(q_free.index(0))  # not before Q is used: it may be on its way until then
    tile = 0
    for i_round in range(n_items):
        item = gl.load(p_items + i_round)
        if n_interior == 0:
            b_s = mask_tile(b_s, k_notes, tile % STAGES, WARPGROUP)
        b_m = gl.full([64], float("-inf"), gl.float32, row_layout)
        b_l = gl.zeros([64], gl.float32, row_layout)
        b_p, b_rescale, b_m, b_l = softmax_step(b_s, b_m, b_l, scale_log2, True)
        b_p = gl.convert_layout(b_p.to(v_bufs.dtype), p_layout)
        mbarrier.arrive(free.index(tile % STAGES))
        b_acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        b_p, b_acc, b_m, b_l = attend_tiles(
            tile + 1, tile + n_interior, b_q, b_p, b_acc, b_m, b_l, scale_log2, buffers, barriers,
            WARPGROUP, STAGES, False,
        )  # fmt: skip
        b_p, b_acc, b_m, b_l = attend_tiles(
            tile + gl.maximum(n_interior, 1), tile + n_tiles, b_q, b_p, b_acc, b_m, b_l, scale_log2,
            buffers, barriers, WARPGROUP, STAGES, True,
        )  # fmt: skip
        tile += n_tiles
        stage, phase = (tile - 1) % STAGES, (tile - 1) // STAGES & 1
        mbarrier.wait(v_ready.index(stage), phase)
        t_acc = warpgroup_mma(b_p, v_bufs.index(stage), b_acc, is_async=True)
        # Scores of the next item's first tile. After the last item, of whatever lies there.
        more = i_round + 1 < n_items
        mbarrier.wait(q_ready.index(0), i_round + 1 & 1, pred=more)
        b_q = q_bufs.index(WARPGROUP).load(q_layout)
        n_interior = read_scalar(q_notes, 0)
        n_tiles = read_scalar(q_notes, 1)
        stage, phase = tile % STAGES, tile // STAGES & 1
        mbarrier.wait(k_ready.index(stage), phase, pred=more)
        t_s = warpgroup_mma(
            b_q, k_bufs.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        b_acc = warpgroup_mma_wait(1, deps=[t_acc])
        store_tile(b_acc, b_m, b_l, item, out, sizes, WARPGROUP)
        b_s = warpgroup_mma_wait(0, deps=[t_s])
        mbarrier.arrive(q_free.index(0), pred=more)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "n_tiles_q", "s", "t", "q_offset"])
def s2_hopper_forward_kernel(
    d_q,
    d_k,
    d_v,
    d_out,
    p_lse,
    p_items,
    p_starts,
    p_table,
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
    """Grid: as many programs as fit the GPU. Items: schedule.query_tiles."""
    BLOCK_D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], q_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 128, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 128, BLOCK_D], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], q_layout)
    q_notes, k_notes = make_notes(2), make_notes(6 * STAGES)
    q_ready, q_free = make_barriers(1, 1), make_barriers(1, 2)
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    free = make_barriers(STAGES, 2)
    buffers = (q_bufs, k_bufs, v_bufs, q_notes, k_notes)
    barriers = (q_ready, q_free, k_ready, v_ready, free)
    tables = (p_items, p_starts, p_table)
    sizes = (heads, group, n_tiles_q, s, t, q_offset, scale_log2)
    out = (d_out, p_lse, out_bufs)
    gl.warp_specialize(
        [
            (consumer, (buffers, barriers, tables, sizes, out, 0, STAGES)),
            (consumer, (buffers, barriers, tables, sizes, out, 1, STAGES)),
            (producer, ((d_q, d_k, d_v), buffers, barriers, tables, sizes, B, N_BANDS, STAGES)),
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
    q_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as s2_kernels.forward.launch_forward; `hopper.why_not` was asked before."""
    q_heads, k_heads = head_major(q), head_major(k)
    b, h, s, d = q_heads.shape
    out = empty_like(q, d)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    t, slots = k_heads.shape[2], concurrent_programs(q.device, num_warps=8)
    dealt = query_tiles(pattern, s, t, q_offset, b, slots, q.device)
    s2_hopper_forward_kernel[(dealt.programs,)](
        descriptor(q_heads),
        descriptor(k_heads),
        descriptor(head_major(v)),
        descriptor(head_major(out)),
        lse,
        dealt.items,
        dealt.starts,
        device_table(pattern, q.device),
        h,
        h // k_heads.shape[1],
        triton.cdiv(s, 2 * ROWS),
        s,
        t,
        q_offset,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=2 if pad(d) == 128 else 6,  # what fits 227 KiB of shared memory
        num_warps=4,
        maxnreg=168,  # 65,536 registers over 12 warps; the partitions share them out as they need
    )
    return out, lse
