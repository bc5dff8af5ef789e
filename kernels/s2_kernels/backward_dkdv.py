"""The backward kernel over KV tiles: dk and dv, and in the fused variant dq as well.

A KV block is seen by one contiguous range of query rows, its lifetime. Scores are computed
transposed, [N, M], so that P^T and dS^T are register operands of their matmuls, and all query heads
of a group add to the same dk and dv. schedule.py says which program works on what.

Shapes and formulas as in backward.py.
"""

import math

import torch
import triton
import triton.language as tl

from s2_kernels.configs import FUSED, TileConfig
from s2_kernels.launch import (
    Packing,
    concurrent_programs,
    descriptor,
    device_table,
    head_major,
    on_grid,
    pad,
    row_descriptor,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    add_rows,
    head_offset,
    key_row,
    lifetime,
    load_rows,
    load_rule,
    sequence,
    store_rows,
)
from s2_kernels.schedule import ColumnWork, column_work, round_up
from s2_kernels.tiles import Matrix, add_to_dkdv, load, matrix_of


@triton.jit(
    do_not_specialize=[
        "s", "t", "q_offset", "near_start", "near_row", "stride_lse_b", "stride_lse_h", "n_seqs",
        "first_head",
    ]
)  # fmt: skip
def s2_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    d_q,
    d_dout,
    p_dout,
    p_dk,
    p_dv,
    p_dq,
    d_dq,
    p_partial,
    p_lse2,
    p_delta,
    d_lse2,
    d_delta,
    p_table,
    p_items,
    p_cu_q,
    p_cu_k,
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
    strides_dk,
    strides_dv,
    strides_dq,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    q_offset,
    near_start,
    near_row,
    n_seqs,
    first_head,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    N_BANDS: tl.constexpr,
    TMA: tl.constexpr,
    TMA_ADD: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one KV tile, or the float32 share that one piece of its column has in them.

    Grid: (items * sequences,). Given p_dq [b, heads, s, D] float32, whose first head is query head
    first_head, it also adds scale * dS K there (fused).
    """
    i_seq = tl.program_id(0) % n_seqs
    p_item = p_items + tl.program_id(0) // n_seqs * 5
    i_kv, i_tile = tl.load(p_item), tl.load(p_item + 1)
    piece, n_pieces, slot = tl.load(p_item + 2), tl.load(p_item + 3), tl.load(p_item + 4)
    start_q, s = sequence(p_cu_q, i_seq, s, PACKED)
    start_k, t = sequence(p_cu_k, i_seq, t, PACKED)
    i_batch = i_seq * 0 if PACKED else i_seq
    first_col = i_tile * N
    if first_col >= t:
        return
    o_col = first_col + tl.arange(0, N)  # positions of keys
    m_col = o_col < t

    # The positions that see this block: from its first column, for its lifetime.
    rule = load_rule(p_table, i_kv, N_BANDS)
    o_k = o_col  # rows of keys in memory
    if near_start is not None:
        o_k = key_row(rule, first_col, near_start, near_row, B, N_BANDS) + tl.arange(0, N)
    i_block = first_col // B
    beyond = (q_offset + s - 1) // B + 1  # keeps the product below inside int32
    first_row = tl.maximum(first_col, q_offset)
    first_row -= (first_row - q_offset) % 4  # TMA wants the row terms on a boundary of 16 bytes
    end_row = tl.minimum(i_block + lifetime(rule, i_block, N_BANDS), beyond) * B
    end_row = tl.minimum(end_row, q_offset + s)
    n_rows = tl.maximum(end_row - first_row, 0)
    # The tiles of rows: first those that reach above the diagonal, last perhaps a partial one.
    n_tiles = tl.cdiv(n_rows, M)
    n_diagonal = tl.cdiv(tl.maximum(first_col + N - 1 - first_row, 0), M)
    n_whole = n_rows // M
    low = n_tiles * GROUP * piece // n_pieces
    high = n_tiles * GROUP * (piece + 1) // n_pieces

    p_k += head_offset(strides_k, i_batch, i_kv, start_k)
    p_v += head_offset(strides_v, i_batch, i_kv, start_k)
    b_k = load_rows(p_k, o_k, strides_k[1], m_col, D, BLOCK_D)  # [N, D]
    b_v = load_rows(p_v, o_k, strides_v[1], m_col, DV, BLOCK_DV)  # [N, DV]
    b_dk = tl.zeros([N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([N, BLOCK_DV], tl.float32)

    # All heads of the group, each from its last row back: programs that run at the same time start
    # at the same rows, and find them in the cache.
    for p in tl.range(low, high):
        i_head, i_rows = i_kv, n_tiles - 1 - p
        if GROUP > 1:
            i_head, i_rows = i_kv * GROUP + p // n_tiles, n_tiles - 1 - p % n_tiles
        row = first_row - q_offset + i_rows * M
        o_q = row + tl.arange(0, M)  # rows in memory, and the positions of their queries
        o_row = o_q + q_offset
        m_row = o_row < end_row
        start = head_offset((stride_lse_b, 1, stride_lse_h), i_batch, i_head, start_q)
        q = matrix_of(p_q, d_q, strides_q, i_batch, i_head, start_q)
        dout = matrix_of(p_dout, d_dout, strides_dout, i_batch, i_head, start_q)
        lse2 = Matrix(p_lse2 + start, d_lse2, 1, i_batch, i_head)
        delta = Matrix(p_delta + start, d_delta, 1, i_batch, i_head)
        at = start_q + row
        b_q = load(q, o_q, m_row, at, D, BLOCK_D, M, TMA)  # [M, D]
        b_dout = load(dout, o_q, m_row, at, DV, BLOCK_DV, M, TMA)  # [M, DV]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
        if (i_rows < n_diagonal) | (i_rows >= n_whole):
            m_s = (o_col[:, None] <= o_row[None, :]) & m_row[None, :]
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_dk, b_dv, b_ds = add_to_dkdv(
            b_s, b_q, b_dout, b_v, b_dk, b_dv, lse2, delta, o_q, m_row, at, scale_log2,
            M, TMA, PRECISION,
        )  # fmt: skip
        if p_dq is not None:
            b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION) * scale  # [M, D]
            if TMA_ADD:
                # Rows past the range get 0 added, rows past the tensor are left out.
                d_dq.atomic_add(
                    [i_batch, i_head - first_head, at, 0], b_dq.reshape(1, 1, M, BLOCK_D)
                )
            else:
                p_dqh = p_dq + head_offset(strides_dq, i_batch, i_head - first_head, start_q)
                add_rows(p_dqh, o_q, strides_dq[1], m_row, b_dq, D, BLOCK_D)

    if slot < 0:
        p_dk += head_offset(strides_dk, i_batch, i_kv, start_k)
        p_dv += head_offset(strides_dv, i_batch, i_kv, start_k)
        store_rows(p_dk, o_k, strides_dk[1], m_col, b_dk * scale, D, BLOCK_D)
        store_rows(p_dv, o_k, strides_dv[1], m_col, b_dv, DV, BLOCK_DV)
    else:
        SIZE: tl.constexpr = N * (BLOCK_D + BLOCK_DV)
        p_slot = p_partial + (slot.to(tl.int64) * n_seqs + i_seq) * SIZE
        o_n, m_n = tl.arange(0, N), tl.arange(0, N) >= 0
        store_rows(p_slot, o_n, BLOCK_D, m_n, b_dk * scale, BLOCK_D, BLOCK_D)
        store_rows(p_slot + N * BLOCK_D, o_n, BLOCK_DV, m_n, b_dv, BLOCK_DV, BLOCK_DV)


@triton.jit(do_not_specialize=["t", "n_seqs"])
def s2_add_pieces_kernel(
    p_partial,
    p_dk,
    p_dv,
    p_cut,
    p_cu_k,
    strides_dk,
    strides_dv,
    t,
    n_seqs,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dk and dv of one cut column: its pieces, added in order. Grid: (cut columns * sequences,).

    t: rows of a sequence in memory, where columns are counted here.
    """
    i_seq = tl.program_id(0) % n_seqs
    p_item = p_cut + tl.program_id(0) // n_seqs * 4
    i_kv, i_tile = tl.load(p_item), tl.load(p_item + 1)
    slot, n_pieces = tl.load(p_item + 2), tl.load(p_item + 3)
    start_k, t = sequence(p_cu_k, i_seq, t, PACKED)
    i_batch = i_seq * 0 if PACKED else i_seq
    o_n = tl.arange(0, N)
    o_col = i_tile * N + o_n
    SIZE: tl.constexpr = N * (BLOCK_D + BLOCK_DV)
    b_dk = tl.zeros([N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([N, BLOCK_DV], tl.float32)
    if i_tile * N >= t:
        return
    for p in tl.range(0, n_pieces):
        p_slot = p_partial + ((slot + p).to(tl.int64) * n_seqs + i_seq) * SIZE
        b_dk += load_rows(p_slot, o_n, BLOCK_D, o_n >= 0, BLOCK_D, BLOCK_D)
        p_slot += N * BLOCK_D
        b_dv += load_rows(p_slot, o_n, BLOCK_DV, o_n >= 0, BLOCK_DV, BLOCK_DV)
    p_dk += head_offset(strides_dk, i_batch, i_kv, start_k)
    p_dv += head_offset(strides_dv, i_batch, i_kv, start_k)
    store_rows(p_dk, o_col, strides_dk[1], o_col < t, b_dk, D, BLOCK_D)
    store_rows(p_dv, o_col, strides_dv[1], o_col < t, b_dv, DV, BLOCK_DV)


def launch_dkdv(
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
    packing: Packing | None,
    near: Near | None,
    config: TileConfig,
    precision: str,
    *,
    kv_heads: range | None = None,
    dq_sum: torch.Tensor | None = None,
    tma_add: bool = False,
    slots: int | None = None,
) -> None:
    """Writes dk and dv of some KV heads (default: all), and adds to dq_sum where given.

    Args:
        dq_sum: float32 [b, query heads of kv_heads, s, d], zero; tma_add: add through TMA.
        slots: programs that run at a time, for the balance; default: as many as fit this device.
    """
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    dout_heads, dk_heads, dv_heads = head_major(dout), head_major(dk), head_major(dv)
    b, h, s, d = q_heads.shape
    g, t = k_heads.shape[1], count_keys(k, near, pattern)
    d_v = v.shape[-1]
    kv_heads = kv_heads or range(g)
    n_seqs, longest = b, (s, t)
    if packing:
        n_seqs, longest = packing.n_seqs, (round_up(packing.max_q), round_up(packing.max_k))
    work = column_work(
        pattern,
        kv_heads,
        *longest,
        q_offset,
        config.block_m,
        config.block_n,
        round_up(n_seqs) if packing else n_seqs,
        slots or concurrent_programs(q.device, config.num_warps),
        q.device,
        near,
    )
    sizes = dict(D=d, DV=d_v, BLOCK_D=pad(d), BLOCK_DV=pad(d_v), N=config.block_n)
    shape = (work.n_slots * n_seqs, config.block_n, pad(d) + pad(d_v))
    partial = lse2.new_empty(shape)
    # TMA cannot stop at the end of a packed sequence; what follows it may be NaN, and NaN * 0 too.
    tma = config.tma and not packing and takes_descriptor(q_heads) and takes_descriptor(dout_heads)
    tma_add = tma_add and dq_sum is not None and takes_descriptor(dq_sum)
    on_grid(s2_dkdv_kernel, (len(work.items) * n_seqs,))(
        q,
        k,
        v,
        descriptor(q_heads, config.block_m, pad(d)) if tma else None,
        descriptor(dout_heads, config.block_m, pad(d_v)) if tma else None,
        dout,
        dk,
        dv,
        dq_sum,
        descriptor(dq_sum, config.block_m, pad(d)) if tma_add else None,
        partial,
        lse2,
        delta,
        row_descriptor(lse2, config.block_m) if tma else None,
        row_descriptor(delta, config.block_m) if tma else None,
        device_table(pattern, q.device),
        work.items,
        packing.cu_q if packing else None,
        packing.cu_k if packing else None,
        rows_and_heads(q_heads),
        rows_and_heads(k_heads),
        rows_and_heads(v_heads),
        rows_and_heads(dout_heads),
        rows_and_heads(dk_heads),
        rows_and_heads(dv_heads),
        None if dq_sum is None else rows_and_heads(dq_sum),
        *lse2.stride()[:2],
        s,
        t,
        q_offset,
        *(near or (None, None)),
        n_seqs,
        kv_heads.start * (h // g),
        softmax_scale,
        softmax_scale * math.log2(math.e),
        GROUP=h // g,
        **sizes,
        M=config.block_m,
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        TMA=tma,
        TMA_ADD=tma_add,
        PACKED=packing is not None,
        PRECISION=precision,
        **config.options(),
    )
    add_pieces(partial, dk, dv, work, config.block_n, packing)


def add_pieces(
    partial: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    work: ColumnWork,
    tile: int,
    packing: Packing | None = None,
) -> None:
    """Adds up what the pieces of cut columns left in `partial`, [slots * sequences, tile, dk + dv].

    Writes the rows of dk and dv that belong to cut columns of `tile` tokens.
    """
    if not work.n_slots:
        return
    dk_heads, dv_heads = head_major(dk), head_major(dv)
    n_seqs = packing.n_seqs if packing else dk_heads.shape[0]
    on_grid(s2_add_pieces_kernel, (len(work.cut) * n_seqs,))(
        partial,
        dk,
        dv,
        work.cut,
        packing.cu_k if packing else None,
        rows_and_heads(dk_heads),
        rows_and_heads(dv_heads),
        dk_heads.shape[2],
        n_seqs,
        D=dk.shape[-1],
        DV=dv.shape[-1],
        BLOCK_D=pad(dk.shape[-1]),
        BLOCK_DV=pad(dv.shape[-1]),
        N=tile,
        PACKED=packing is not None,
        **FUSED,
    )
