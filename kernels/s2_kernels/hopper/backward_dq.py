"""dq and the row terms on Hopper, in Gluon: the forward kernel's walk, a half-tile of KV at a time.

Persistent programs of three partitions: a producer warp loads by TMA, two consumer warpgroups own
64 query rows each of a tile of 128, with Q and dO in registers. Both walk the half-tiles of KV that
the tile sees, from those that only the upper rows keep to the two on the diagonal, the second of
which only the lower rows see: each warpgroup passes over one end. Only the diagonal has a mask;
rows of K past its end arrive as zeros and add nothing.

The kernel over KV needs delta and lse2 of every row. They are made here, where dO has to be loaded
anyway: O of the next item comes to the place from which dq of this one will leave.

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

from s2_kernels.hopper.lists import listed_half, query_list
from s2_kernels.hopper.packed import term_rows
from s2_kernels.hopper.primitives import (
    OPTIONS,
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
    store_rows,
    store_some_rows,
    strides_and_size,
    term_lead,
    write_notes,
)
from s2_kernels.launch import Packing, device_table, on_grid, pad
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LOG2E, key_row, load_rule

EDGES, KEPT, UNSEEN = map(gl.constexpr, range(3))
"""Notes of an item: see lists.QueryList."""


class Memory(NamedTuple):
    """What the partitions share, and the barriers of it; K and V of a half-tile are freed together.

    dq: where it leaves from, and where O of the next item arrives.
    """

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    q_ready: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    kv_free: gl.shared_memory_descriptor


class Inputs(NamedTuple):
    """TMA descriptors."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    out: tma.tensor_descriptor
    dout: tma.tensor_descriptor


class Terms(NamedTuple):
    """Pointers: lse and its gradient (or None) come in, lse2 and delta go out."""

    lse: gl.tensor
    dlse: gl.tensor
    lse2: gl.tensor
    delta: gl.tensor


class Sizes(NamedTuple):
    """As in the forward kernel, and rows: row terms of a head, with padding."""

    heads: gl.tensor
    group: gl.tensor
    slots: gl.tensor
    s: gl.tensor
    q_offset: gl.tensor
    all_seen: gl.tensor
    near_start: gl.tensor
    near_row: gl.tensor
    rows: gl.tensor
    scale: gl.tensor
    scale_log2: gl.tensor


class Output(NamedTuple):
    """Where dq goes: by descriptor, or by pointer."""

    desc: tma.tensor_descriptor
    base: gl.tensor
    strides: tuple


@gluon.jit
def producer(
    descs, memory, tables, sizes,
    B: gl.constexpr, N_BANDS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Loads Q, dO and O of every item, then the K and V half-tiles of its list; notes its length.

    The list: what only the upper rows see, what all see, the two half-tiles of the diagonal.
    """
    done = 0
    for i_round in range(count_items(tables, sizes.heads * sizes.slots, PACKED)):
        item = query_item(item_at(i_round, tables, PACKED), tables, sizes, PACKED)
        i_batch, i_head, i_kv = item.batch, item.head, item.head // sizes.group
        rule = load_rule(tables.rules, i_kv, N_BANDS)
        tiles = query_list(rule, item.position, B, N_BANDS)
        mbarrier.wait(memory.q_free.index(0), i_round & 1 ^ 1)
        n, notes = tiles.n_edges + tiles.n_kept + 2, (tiles.n_edges, tiles.n_kept, tiles.unseen)
        if sizes.all_seen is not None:
            n, notes = sizes.all_seen, (0, sizes.all_seen, 0)
        write_notes(memory.notes, 0, notes)
        ready = memory.q_ready.index(0)
        mbarrier.expect(ready, 2 * descs.q.block_type.nbytes + 4 * descs.dout.block_type.nbytes)
        for w in gl.static_range(2):
            first = item.start + item.row + w * 64
            load_rows(descs.q, i_batch, i_head, first, ready, memory.q.index(w))
            load_rows(descs.dout, i_batch, i_head, first, ready, memory.dout.index(w))
            load_rows(descs.out, i_batch, i_head, first, ready, memory.dq.index(w))
        for p in range(n):
            stage, phase = done % STAGES, done // STAGES & 1
            column = item.start + listed_half(tiles, p, B, N_BANDS) * 64
            if sizes.all_seen is not None:
                column = p * 64
            if sizes.near_start is not None:
                column = key_row(rule, column, sizes.near_start, sizes.near_row, B, N_BANDS)
            mbarrier.wait(memory.kv_free.index(stage), phase ^ 1)
            ready = memory.k_ready.index(stage)
            mbarrier.expect(ready, descs.k.block_type.nbytes)
            load_rows(descs.k, i_batch, i_kv, column, ready, memory.k.index(stage))
            ready = memory.v_ready.index(stage)
            mbarrier.expect(ready, descs.v.block_type.nbytes)
            load_rows(descs.v, i_batch, i_kv, column, ready, memory.v.index(stage))
            done += 1


@gluon.jit
def pass_over(low, high, memory, STAGES: gl.constexpr):
    """Leaves the half-tiles low..high-1, counted over all items, to the other warpgroup."""
    for done in range(low, high):
        stage, phase = done % STAGES, done // STAGES & 1
        mbarrier.wait(memory.k_ready.index(stage), phase)
        mbarrier.wait(memory.v_ready.index(stage), phase)
        mbarrier.arrive(memory.kv_free.index(stage))


@gluon.jit
def row_terms(item, terms, tables, sizes, do_buf, o_buf, layout: gl.constexpr,
              PACKED: gl.constexpr, WARPGROUP: gl.constexpr):  # fmt: skip
    """lse2 and delta [64] of a warpgroup's rows of an item, which are stored, too.

    A row that sees nothing, or is not there, has lse2 inf: its probabilities come out as 0.
    """
    item = query_item(item, tables, sizes, PACKED)
    start = item.start
    D: gl.constexpr = o_buf.shape[1]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    b_out, b_dout = o_buf.load(o_layout).to(gl.float32), do_buf.load(o_layout).to(gl.float32)
    b_delta = gl.convert_layout(gl.sum(b_out * b_dout, 1), layout)
    o_row = item.row + WARPGROUP * 64 + gl.arange(0, 64, layout=layout)
    i_row = (item.batch * sizes.heads + item.head).to(gl.int64)
    there = o_row < item.length
    written = there if PACKED else o_row < sizes.rows
    if sizes.q_offset is not None:
        there &= o_row >= 0
        written = (item.terms + o_row >= 0) & (item.terms + o_row < sizes.rows)
    b_lse = gl.load(terms.lse + i_row * sizes.s + start + o_row, mask=there, other=float("-inf"))
    if terms.dlse is not None:
        p_row = terms.dlse + i_row * sizes.s + start
        b_delta -= gl.load(p_row + o_row, mask=there, other=0.0)
    sees = b_lse != float("-inf")
    b_delta = gl.where(sees, b_delta, 0.0)
    b_lse2 = gl.where(sees, b_lse * LOG2E, float("inf"))
    gl.store(terms.lse2 + i_row * sizes.rows + item.terms + o_row, b_lse2, mask=written)
    gl.store(terms.delta + i_row * sizes.rows + item.terms + o_row, b_delta, mask=written)
    return b_lse2, b_delta


@gluon.jit
def add_tile(
    b_q, b_dout, b_dq, b_lse2, b_delta, scale_log2, done, memory,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dq [64, D] / scale with the share of one half-tile added."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_dq.type.layout, 2)
    stage, phase = done % STAGES, done // STAGES & 1
    k_buf, v_buf = memory.k.index(stage), memory.v.index(stage)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    mbarrier.wait(memory.k_ready.index(stage), phase)
    t_s = warpgroup_mma(b_q, k_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(memory.v_ready.index(stage), phase)
    t_dp = warpgroup_mma(b_dout, v_buf.permute([1, 0]), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[t_s])
    if MASKED:
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, s_layout))
        b_s = gl.where(o_n[None, :] <= o_m[:, None], b_s, float("-inf"))
    b_t = b_s * scale_log2 - b_lse2[:, None]
    b_dp, b_t = warpgroup_mma_wait(0, deps=[t_dp, b_t])
    b_p = gl.exp2(b_t)
    b_ds = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(memory.k.dtype), p_layout)
    b_dq = warpgroup_mma(b_ds, k_buf, b_dq)
    mbarrier.arrive(memory.kv_free.index(stage))
    return b_dq


@gluon.jit
def consumer(
    store, memory, terms, tables, sizes,
    STAGES: gl.constexpr, PACKED: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """dq of 64 query rows of every item, and the row terms of the next one."""
    D: gl.constexpr = memory.k.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    dq_buf, do_buf = memory.dq.index(WARPGROUP), memory.dout.index(WARPGROUP)
    n_items = count_items(tables, sizes.heads * sizes.slots, PACKED)
    item = item_at(0, tables, PACKED)
    mbarrier.wait(memory.q_ready.index(0), 0)
    b_lse2, b_delta = row_terms(
        item, terms, tables, sizes, do_buf, dq_buf, row_layout, PACKED, WARPGROUP
    )
    done = 0
    for i_round in range(n_items):
        b_q = memory.q.index(WARPGROUP).load(q_layout)
        b_dout = do_buf.load(q_layout)
        n_edges, n_kept = read_scalar(memory.notes, EDGES), read_scalar(memory.notes, KEPT)
        b_dq = gl.zeros([64, D], gl.float32, layout)
        begin = done + (n_edges if WARPGROUP == 1 else 0)
        diagonal = done + n_edges + n_kept + WARPGROUP
        end = diagonal - (read_scalar(memory.notes, UNSEEN) if WARPGROUP == 1 else 0)
        pass_over(done, begin, memory, STAGES)
        if sizes.all_seen is None:
            done += n_edges + n_kept + 2
        else:
            done += n_kept
            end = done
        for part in range(2):
            high = gl.where(part == 0, gl.minimum(begin + 1, end), end)
            for p in range(begin + part, high):
                b_dq = add_tile(
                    b_q, b_dout, b_dq, b_lse2, b_delta, sizes.scale_log2, p, memory, STAGES,
                    False,
                )  # fmt: skip
            if part == 0:
                # Not before they are used: a load from shared memory may be on its way until then.
                # By now dq of the item before has left.
                tma.store_wait(0)
                mbarrier.arrive(memory.q_free.index(0), pred=begin < end)
        if sizes.all_seen is None:
            pass_over(end, diagonal, memory, STAGES)
            b_dq = add_tile(
                b_q, b_dout, b_dq, b_lse2, b_delta, sizes.scale_log2, diagonal, memory, STAGES,
                True,
            )  # fmt: skip
            mbarrier.arrive(memory.q_free.index(0), pred=begin == end)
            pass_over(diagonal + 1, done, memory, STAGES)
        where = query_item(item, tables, sizes, PACKED)
        if i_round + 1 < n_items:
            item = item_at(i_round + 1, tables, PACKED)
            mbarrier.wait(memory.q_ready.index(0), i_round + 1 & 1)
            b_lse2, b_delta = row_terms(
                item, terms, tables, sizes, do_buf, dq_buf, row_layout, PACKED, WARPGROUP
            )
        row = where.row + WARPGROUP * 64
        b_dq16 = (b_dq * sizes.scale).to(memory.dq.dtype)
        if (PACKED and row + 64 > where.length) or (sizes.q_offset is not None and row < 0):
            store_some_rows(
                b_dq16, store.base, store.strides, where.batch, where.head, where.start, row,
                where.length, sizes.q_offset,
            )  # fmt: skip
        else:
            dq_buf.store(b_dq16)
            fence_async_shared()
            store_rows(store.desc, where.batch, where.head, where.start + row, dq_buf)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n_slots", "s", "q_offset", "all_seen", "near_start", "near_row", "rows"
    ]
)  # fmt: skip
def s2_hopper_dq_kernel(
    d_q,
    d_k,
    d_v,
    d_out,
    d_dout,
    d_dq,
    p_dq,
    p_lse,
    p_dlse,
    p_lse2,
    p_delta,
    p_items,
    p_starts,
    p_table,
    strides_dq,
    heads,
    group,
    n_slots,
    s,
    q_offset,
    all_seen,
    near_start,
    near_row,
    rows,
    scale,
    scale_log2,
    B: gl.constexpr,
    N_BANDS: gl.constexpr,
    PACKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: as many programs as fit the GPU. Items: see primitives.QueryItems.

    lse2 and delta: [b, h, rows], s rows and padding, which makes their strides fit TMA.
    """
    D: gl.constexpr = d_q.block_type.shape[3]
    dtype: gl.constexpr = d_q.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)
    dq_bufs = gl.allocate_shared_memory(dtype, [2, 64, D], layout)  # and O of the next item
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 64, D], layout)
    notes = make_notes(3)
    q_ready, q_free = make_barriers(1, 1), make_barriers(1, 2)
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    free = make_barriers(STAGES, 2)
    descs = Inputs(d_q, d_k, d_v, d_out, d_dout)
    memory = Memory(
        q_bufs, do_bufs, k_bufs, v_bufs, dq_bufs, notes, q_ready, q_free, k_ready, v_ready, free
    )
    terms = Terms(p_lse, p_dlse, p_lse2, p_delta)
    tables = Tables(p_items, p_starts, p_table)
    sizes = Sizes(
        heads, group, n_slots, s, q_offset, all_seen, near_start, near_row, rows, scale, scale_log2
    )
    store = Output(d_dq, p_dq, strides_dq)
    gl.warp_specialize(
        [
            (consumer, (store, memory, terms, tables, sizes, STAGES, PACKED, 0)),
            (consumer, (store, memory, terms, tables, sizes, STAGES, PACKED, 1)),
            (producer, (descs, memory, tables, sizes, B, N_BANDS, STAGES, PACKED)),
        ],
        [4, 1],
        [232, 40],
    )


def launch_hopper_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    packing: Packing | None = None,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes dq; returns the row terms lse2 and delta, float32 [b, h, rows].

    Rows as in packed.term_rows for a packed batch, else s of them after term_lead(q_offset).
    lse, dlse: [b, h, s], or [h, T] packed, contiguous.
    """
    b, s, h, d, *_ = extents(q)
    reach = reach_of(q, k, pattern, q_offset, near)
    lead = term_lead(reach.q_offset or 0)
    rows = term_rows(s, packing.n_seqs) if packing else -(-(lead + s) // 4) * 4  # 16 bytes, for TMA
    lse2, delta = lse.new_empty((b, h, rows)), lse.new_empty((b, h, rows))
    work = query_items(pattern, q, packing, reach, spare)
    on_grid(s2_hopper_dq_kernel, (work.programs,))(
        descriptor(q),
        descriptor(k),
        descriptor(v),
        descriptor(out),
        descriptor(dout),
        descriptor(dq),
        dq,
        lse,
        dlse,
        lse2,
        delta,
        work.items,
        work.starts,
        device_table(pattern, q.device),
        strides_and_size(dq),
        h,
        h // k.shape[-2],
        work.slots,
        s,
        *reach,
        rows,
        softmax_scale,
        softmax_scale * math.log2(math.e),
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        PACKED=packing is not None,
        STAGES=4 if pad(d) == 128 else 8,  # what fits 227 KiB of shared memory
        **OPTIONS,
    )
    return lse2, delta
