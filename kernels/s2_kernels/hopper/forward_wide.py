"""The forward kernel for Hopper at head sizes above 128, padded to 256: half-tiles of 64 tokens.

As forward.py, but the accumulator of 64 query rows takes 128 registers a thread: Q stays in shared
memory, and a step is one half-tile of KV, which is all that fits twice. The scores of a half-tile
are issued before P V of the one before, whose tensor-core time hides the softmax; those of an
item's first half-tile under the last P V of the item before.

The list begins with what only the upper rows still see (edges) and ends with the two half-tiles on
the diagonal, the second of which only the lower rows see. A warpgroup passes over the last one, or
over the first, but never over more: with the scores ahead of P V, two half-tiles passed over in a
row would wait for memory that only P V frees. Other edges are masked.

K is freed by the scores, V by P V, each warpgroup's Q by its last scores, so that the next item's Q
arrives under the last P V. out leaves in two halves of its columns: there is no room for both.

Barriers, by what completes a phase of them; a warpgroup arrives once, whatever its number of warps:

    q_ready [2]      the producer's load of Q of one warpgroup     the notes on its item with it
    q_free [2]       that warpgroup, after the last scores of an item
    k_ready [STAGES] the load of K of a half-tile                  the notes on its mask with it
    k_free [STAGES]  both warpgroups, after the scores or passing over
    v_ready [STAGES] the load of V of a half-tile
    v_free [STAGES]  both warpgroups, after P V or passing over

Shapes as in s2_kernels/forward.py.
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

from s2_kernels.hopper.compat import async_store
from s2_kernels.hopper.forward import Inputs, Sizes
from s2_kernels.hopper.lists import off_diagonal, query_list
from s2_kernels.hopper.primitives import (
    OPTIONS,
    Ring,
    Tables,
    count_items,
    descriptor,
    extents,
    item_at,
    keep_order,
    load_rows,
    make_barriers,
    make_notes,
    query_item,
    query_items,
    reach_of,
    read,
    read_scalar,
    store_some_rows,
    strides_and_size,
    write_notes,
)
from s2_kernels.hopper.softmax import LAG, first_max, rescale, row_sum, spread
from s2_kernels.launch import device_table, empty_like, on_grid
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LN2, key_row, load_rule

STAGES = 2
NOTES = gl.constexpr(4)
"""Half-tiles whose notes are kept: those of one are written over when the next but three comes."""


PASSES, COUNT, WHOLE_FROM, WHOLE_TO = map(gl.constexpr, range(4))
"""Notes of an item for a warpgroup: see `producer`."""


class Memory(NamedTuple):
    """What the partitions share: Q, K and V; notes on an item, and on the mask of a half-tile."""

    q: Ring
    k: Ring
    v: Ring
    q_notes: gl.shared_memory_descriptor
    k_notes: gl.shared_memory_descriptor


class Output(NamedTuple):
    """Where out and lse go: out by descriptor through bufs, or by pointer (None without offset)."""

    desc: tma.tensor_descriptor
    base: gl.tensor
    lse: gl.tensor
    bufs: gl.shared_memory_descriptor
    strides: tuple


@gluon.jit
def load_half_tile(desc, i_batch, i_kv, col, tile, ring, STAGES: gl.constexpr):
    """A half-tile of K or V into its stage."""
    stage = tile % STAGES
    mbarrier.expect(ring.ready.index(stage), desc.block_type.nbytes)
    load_rows(desc, i_batch, i_kv, col, ring.ready.index(stage), ring.bufs.index(stage))


@gluon.jit
def producer(
    descs, memory, tables, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads Q of every item and the half-tiles of its list, V after K of the next: as they free up.

    Notes for each warpgroup: whether it passes over a half-tile, how many it attends to, the first
    of these that needs no mask and the first after it that does.
    """
    q, k, v = memory.q, memory.k, memory.v
    done = 0
    for i_round in range(count_items(tables, sizes.heads * sizes.slots, False)):
        item = query_item(item_at(i_round, tables, False), tables, sizes, False)
        i_kv = item.head // sizes.group
        rule = load_rule(tables.rules, i_kv, N_BANDS)
        tiles = query_list(rule, item.position, B, N_BANDS)
        n_edges, unseen = tiles.n_edges, tiles.unseen
        n_before = n_edges + tiles.n_kept
        n = n_before + 2
        if sizes.all_seen is not None:  # none of them on a diagonal
            n_edges, unseen, n_before, n = n_edges * 0, unseen * 0, sizes.all_seen, sizes.all_seen
        for w in gl.static_range(2):
            passes = gl.where(n_edges > 0, 1, 0) if w == 1 else 1
            mbarrier.wait(q.free.index(w), i_round & 1 ^ 1)
            whole_from, whole_to = (n_edges - passes) * w, n_before + (1 - unseen - passes) * w
            if sizes.all_seen is not None:
                passes, whole_from, whole_to = n * 0, n * 0, n
            write_notes(memory.q_notes, w * 4, (passes, n - passes, whole_from, whole_to))
            mbarrier.expect(q.ready.index(w), descs.q.block_type.nbytes)
            q_row = item.row + w * 64
            load_rows(descs.q, item.batch, item.head, q_row, q.ready.index(w), q.bufs.index(w))
        col = 0
        for p in range(n + 1):
            col_before = col
            if p < n:
                i_half = off_diagonal(tiles, p, B, N_BANDS)
                if sizes.all_seen is not None:
                    i_half = p
                col = gl.where(p < n_before, i_half * 64, item.position + (p - n_before) * 64)
                if sizes.near_start is not None:
                    col = key_row(rule, col, sizes.near_start, sizes.near_row, B, N_BANDS)
                tile = done + p
                mbarrier.wait(k.free.index(tile % STAGES), tile // STAGES & 1 ^ 1)
                # How far beyond its own number a row sees columns, of either warpgroup.
                hidden = (p < n_edges) | ((p == n_before) & (unseen > 0))
                beyond = gl.where(p < n_before, 64, 0), gl.where(hidden, -64, (n - 1 - p) * 64)
                write_notes(memory.k_notes, tile % NOTES * 2, beyond)
                load_half_tile(descs.k, item.batch, i_kv, col, tile, k, STAGES)
            if p > 0:
                tile = done + p - 1
                mbarrier.wait(v.free.index(tile % STAGES), tile // STAGES & 1 ^ 1)
                load_half_tile(descs.v, item.batch, i_kv, col_before, tile, v, STAGES)
        done += n


@gluon.jit
def mask_half_tile(b_s, notes, tile, WARPGROUP: gl.constexpr):
    """Scores [64, 64] of a half-tile, -inf where a row does not see a column."""
    row_layout: gl.constexpr = gl.SliceLayout(1, b_s.type.layout)
    o_m = gl.arange(0, 64, layout=row_layout)
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, b_s.type.layout))
    last = o_m + read(notes, tile % NOTES * 2 + WARPGROUP, row_layout)
    return gl.where(o_n[None, :] <= last[:, None], b_s, float("-inf"))


@gluon.jit
def exponents(b_s, b_m, scale_log2):
    """What probabilities [64, 64] are powers of 2 of, what came before is to be scaled by, too.

    And the new b_m, [64, 4] as in softmax.py: it lags behind the maximum by up to LAG. A row that
    has seen nothing yet has -inf: with 0 instead, exp2 gives 0.
    """
    b_top = first_max(b_s, scale_log2)
    b_m_new = gl.where(b_top > b_m + LAG, b_top, b_m)
    b_shift = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    return b_s * scale_log2 - spread(b_shift, b_s), b_m - b_shift, b_m_new


@gluon.jit
def pass_over(tile, passes, memory, STAGES: gl.constexpr):
    """Leaves a half-tile to the other warpgroup, if passes is 1; the one after it."""
    k, v = memory.k, memory.v
    stage, phase, does = tile % STAGES, tile // STAGES & 1, passes > 0
    mbarrier.wait(k.ready.index(stage), phase, pred=does)
    mbarrier.arrive(k.free.index(stage), pred=does)
    mbarrier.wait(v.ready.index(stage), phase, pred=does)
    mbarrier.arrive(v.free.index(stage), pred=does)
    return tile + passes


@gluon.jit
def attend_tiles(
    first, n, whole_from, whole_to, b_p, b_acc, b_m, b_l, scale_log2, memory,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """An item's half-tiles 1..n-1: scores of one, then P V of the one before.

    The first one's b_p [64, 64] comes in, the last one's goes out.
    """
    q, k, v = memory.q, memory.k, memory.v
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    q_buf = q.bufs.index(WARPGROUP)
    for i in range(1, n):
        tile = first + i
        stage, phase = tile % STAGES, tile // STAGES & 1
        before, phase_before = (tile - 1) % STAGES, (tile - 1) // STAGES & 1
        zeros = gl.zeros([64, 64], gl.float32, s_layout)
        mbarrier.wait(k.ready.index(stage), phase)
        t_s = warpgroup_mma(
            q_buf, k.bufs.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v.ready.index(before), phase_before)
        t_acc = warpgroup_mma(b_p, v.bufs.index(before), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=[t_s])
        mbarrier.arrive(k.free.index(stage))
        if i == n - 1:
            mbarrier.arrive(q.free.index(WARPGROUP))
        if (i < whole_from) | (i >= whole_to):
            b_s = mask_half_tile(b_s, memory.k_notes, tile, WARPGROUP)
        b_t, b_fall, b_m = exponents(b_s, b_m, scale_log2)
        keep_order(v.ready.index(before), phase_before)
        b_acc, b_t, b_fall = warpgroup_mma_wait(0, deps=[t_acc, b_t, b_fall])
        mbarrier.arrive(v.free.index(before))
        b_rescale = gl.exp2(b_fall)
        b_acc = rescale(b_acc, b_rescale)
        b_next = gl.exp2(b_t)
        b_l = b_l * b_rescale + row_sum(b_next)
        b_p = gl.convert_layout(b_next.to(v.bufs.dtype), p_layout)
    return b_p, b_acc, b_m, b_l


@gluon.jit
def store_tile(b_acc, b_m, b_l, item, out, tables, sizes, WARPGROUP: gl.constexpr):
    """Stores lse and, one half of the columns after the other, out of 64 rows of an item."""
    layout: gl.constexpr = b_acc.type.layout
    HALF: gl.constexpr = out.bufs.shape[2]
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    item = query_item(item, tables, sizes, False)
    b_sum, b_max = gl.sum(b_l, 1), gl.max(b_m, 1)
    row = item.row + WARPGROUP * 64
    o_lse = row + gl.arange(0, 64, layout=b_sum.type.layout)
    p_lse = out.lse + (item.batch * sizes.heads + item.head).to(gl.int64) * sizes.s
    there = o_lse < sizes.s
    if sizes.q_offset is not None:
        there &= o_lse >= 0
    gl.store(p_lse + o_lse, (b_max + gl.log2(b_sum)) * LN2, mask=there)
    b_inverse = gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, layout))
    out_buf = out.bufs.index(WARPGROUP)
    b_out = (b_acc * b_inverse[:, None]).to(out.bufs.dtype)
    halves = b_out.reshape([64, 2, HALF]).permute([0, 2, 1]).split()
    if sizes.q_offset is not None and row < 0:
        store_some_rows(
            b_out, out.base, out.strides, item.batch, item.head, 0, row, sizes.s, sizes.q_offset
        )
    else:
        for i in gl.static_range(2):
            tma.store_wait(0)  # of the half before
            out_buf.store(gl.convert_layout(halves[i], half_layout))
            fence_async_shared()
            at = [item.batch, item.head, row, i * HALF]
            async_store(out.desc, at, out_buf.reshape([1, 1, 64, HALF]))


@gluon.jit
def consumer(
    memory, tables, sizes, out,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attends from 64 query rows of every item and stores out and lse."""
    q, k, v = memory.q, memory.k, memory.v
    BLOCK_D: gl.constexpr = v.bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_buf = q.bufs.index(WARPGROUP)
    at: gl.constexpr = WARPGROUP * 4
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    n_items = count_items(tables, sizes.heads * sizes.slots, False)
    mbarrier.wait(q.ready.index(WARPGROUP), 0)
    passes, n = read_scalar(memory.q_notes, at + PASSES), read_scalar(memory.q_notes, at + COUNT)
    whole_from = read_scalar(memory.q_notes, at + WHOLE_FROM)
    whole_to = read_scalar(memory.q_notes, at + WHOLE_TO)
    tile = pass_over(0, passes * WARPGROUP, memory, STAGES)
    stage, phase = tile % STAGES, tile // STAGES & 1
    mbarrier.wait(k.ready.index(stage), phase)
    b_s = warpgroup_mma(q_buf, k.bufs.index(stage).permute([1, 0]), zeros, use_acc=False)
    for i_round in range(n_items):
        item = item_at(i_round, tables, False)
        mbarrier.arrive(k.free.index(tile % STAGES))
        if (whole_from > 0) | (whole_to <= 0):
            b_s = mask_half_tile(b_s, memory.k_notes, tile, WARPGROUP)
        b_m = first_max(b_s, sizes.scale_log2)
        b_t, b_fall, b_m = exponents(b_s, b_m, sizes.scale_log2)
        b_p = gl.exp2(b_t)
        b_l = row_sum(b_p)
        mbarrier.arrive(q.free.index(WARPGROUP), pred=n == 1)
        b_p = gl.convert_layout(b_p.to(v.bufs.dtype), p_layout)
        b_acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        b_p, b_acc, b_m, b_l = attend_tiles(
            tile, n, whole_from, whole_to, b_p, b_acc, b_m, b_l, sizes.scale_log2, memory,
            WARPGROUP, STAGES,
        )  # fmt: skip
        last = (tile + n - 1) % STAGES
        mbarrier.wait(v.ready.index(last), (tile + n - 1) // STAGES & 1)
        t_acc = warpgroup_mma(b_p, v.bufs.index(last), b_acc, is_async=True)
        tile = pass_over(tile + n, passes * (1 - WARPGROUP), memory, STAGES)
        # Scores of the next item's first half-tile. After the last item, of whatever lies there.
        more = i_round + 1 < n_items
        mbarrier.wait(q.ready.index(WARPGROUP), i_round + 1 & 1, pred=more)
        passes, n = (
            read_scalar(memory.q_notes, at + PASSES),
            read_scalar(memory.q_notes, at + COUNT),
        )
        whole_from, whole_to = (
            read_scalar(memory.q_notes, at + 2),
            read_scalar(memory.q_notes, at + 3),
        )
        passes = gl.where(more, passes, 0)
        tile = pass_over(tile, passes * WARPGROUP, memory, STAGES)
        stage, phase = tile % STAGES, tile // STAGES & 1
        mbarrier.wait(k.ready.index(stage), phase, pred=more)
        t_s = warpgroup_mma(
            q_buf, k.bufs.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
        )
        b_acc = warpgroup_mma_wait(1, deps=[t_acc])
        mbarrier.arrive(v.free.index(last))
        store_tile(b_acc, b_m, b_l, item, out, tables, sizes, WARPGROUP)
        b_s = warpgroup_mma_wait(0, deps=[t_s])
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n_slots", "s", "q_offset", "all_seen", "near_start", "near_row"
    ]
)  # fmt: skip
def s2_hopper_forward_wide_kernel(
    d_q, d_k, d_v, d_out, p_out, p_lse, p_items, p_starts, p_table, strides_out,
    heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, scale_log2,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit the GPU. Items: schedule.query_tiles."""
    BLOCK_D: gl.constexpr = d_q.block_type.shape[3]
    HALF: gl.constexpr = d_out.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HALF], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, BLOCK_D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, BLOCK_D], layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2, 64, HALF], out_layout)
    q_notes, k_notes = make_notes(8), make_notes(2 * NOTES)
    q_ready, q_free = make_barriers(2, 1), make_barriers(2, 1)
    k_ready, k_free = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    v_ready, v_free = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    memory = Memory(
        Ring(q_bufs, q_ready, q_free),
        Ring(k_bufs, k_ready, k_free),
        Ring(v_bufs, v_ready, v_free),
        q_notes,
        k_notes,
    )
    tables = Tables(p_items, p_starts, p_table)
    sizes = Sizes(heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, scale_log2)
    out = Output(d_out, p_out, p_lse, out_bufs, strides_out)
    gl.warp_specialize(
        [
            (consumer, (memory, tables, sizes, out, 0, STAGES)),
            (consumer, (memory, tables, sizes, out, 1, STAGES)),
            (producer, (Inputs(d_q, d_k, d_v), memory, tables, sizes, B, N_BANDS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_hopper_forward_wide(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as s2_kernels.forward.launch_forward; `hopper.why_not` was asked before."""
    b, s, h, d, *_ = extents(q)
    out = empty_like(q, d) if into is None else into
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    reach = reach_of(q, k, pattern, q_offset, near)
    work = query_items(pattern, q, None, reach, spare)
    on_grid(s2_hopper_forward_wide_kernel, (work.programs,))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(out, columns=128),
        None if reach.q_offset is None else out,
        lse,
        work.items,
        work.starts,
        device_table(pattern, q.device),
        None if reach.q_offset is None else strides_and_size(out),
        h,
        h // k.shape[-2],
        work.slots,
        s,
        *reach,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        STAGES=STAGES,
        **OPTIONS,
    )
    return out, lse
