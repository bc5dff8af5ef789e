"""Kernels that walk lists of blocks: forward, dk and dv, and dq, for `block_sparse_attention`.

What a program begins with and what a tile adds is written once, for these and for forward.py,
backward_dkdv.py and backward_dq.py: in tiles.py. This file says where the next tile comes from. A
tile is a block or a part of one.

Shapes: b batch, s query tokens, t KV tokens, h query heads, g KV heads, d and dv head sizes, B
block size, M query rows and N KV rows of a tile. Lists as in `BlockTables`.
    q [b, s, h, d]   k [b, t, g, d]   v [b, t, g, dv]   out [b, s, h, dv]   lse [b, h, s] float32
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from s2_kernels.backward import row_terms
from s2_kernels.configs import TileConfig, backward_config, forward_config
from s2_kernels.launch import (
    capability,
    descriptor,
    empty_like,
    head_major,
    pad,
    row_descriptor,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.primitives import (
    KeyTile,
    finish_softmax,
    head_offset,
    load_rows,
    mask_scores,
    start_softmax,
    store_rows,
)
from s2_kernels.tiles import (
    Matrix,
    add_to_dkdv,
    add_to_dq,
    add_values,
    load,
    matrix_of,
    query_operands,
    score,
)


@triton.jit
def tile_list(p_ends, i_list, i_block, n_blocks, PER_BLOCK: tl.constexpr):
    """Where a list starts, and its number of tiles, PER_BLOCK to a block."""
    p_ends += i_list * n_blocks + i_block
    start = tl.load(p_ends)
    return start, (tl.load(p_ends + 1) - start) * PER_BLOCK


@triton.jit
def listed_tile(p_blocks, start, p, ROWS: tl.constexpr, B: tl.constexpr):
    """The p-th tile of a list: its block, its first row, and its rows [ROWS]."""
    i_block = tl.load(p_blocks + start + p // (B // ROWS))
    first = i_block * B + p % (B // ROWS) * ROWS
    return i_block, first, first + tl.arange(0, ROWS)


class SparseQueries(NamedTuple):
    """What a program over query rows works on: heads, rows [M], which exist, their block.

    start_q, start_k: where a sequence begins in memory, for `query_operands`: at row 0.
    """

    batch: tl.tensor
    head: tl.tensor
    kv_head: tl.tensor
    start_q: tl.tensor
    start_k: tl.tensor
    rows: tl.tensor
    there: tl.tensor
    block: tl.tensor


@triton.jit
def sparse_queries(s, heads, group, M: tl.constexpr, B: tl.constexpr):
    """Of a grid (query tiles, heads * batch), the last tiles first."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_batch = tl.program_id(1) // heads
    i_head = tl.program_id(1) % heads
    o_row, zero = i_tile * M + tl.arange(0, M), i_batch * 0
    program = SparseQueries(
        i_batch, i_head, i_head // group, zero, zero, o_row, o_row < s, i_tile * M // B
    )
    return program


@triton.jit
def score_listed_tile(
    at, p_blocks, start, p, t, b_q, k, v,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [N, D], values [N, DV] and masked scores [M, N] of the p-th tile of a list of blocks."""
    i_k, column, o_col = listed_tile(p_blocks, start, p, N, B)
    keys = KeyTile(o_col, i_k, o_col < t, o_col, column)  # position and row are the same
    b_k, b_v, b_s = score(b_q, k, v, keys, D, DV, BLOCK_D, BLOCK_DV, N, TMA, PRECISION)
    if (i_k == at.block) | (column + N > t):
        b_s = mask_scores(b_s, 0, at.rows, o_col, i_k, t, False, N, B, 0)
    return b_k, b_v, b_s


@triton.jit(do_not_specialize=["s", "t", "nq", "stride_lse_b", "stride_lse_h", "heads", "group"])
def s2_sparse_forward_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_out,
    p_lse,
    p_ends,
    p_blocks,
    strides_q,
    strides_k,
    strides_v,
    strides_out,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    nq,
    heads,
    group,
    mask_group,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of one query tile of one head. Grid: (query tiles, heads * batch)."""
    at = sparse_queries(s, heads, group, M, B)
    q, k, v = query_operands(at, p_q, p_k, p_v, d_k, d_v, strides_q, strides_k, strides_v)
    b_q = load_rows(q.base, at.rows, q.stride, at.there, D, BLOCK_D)  # [M, D]
    b_acc, b_m, b_l = start_softmax(M, BLOCK_DV)

    start, n_tiles = tile_list(p_ends, at.head // mask_group, at.block, nq, B // N)
    for p in tl.range(0, n_tiles):
        b_k, b_v, b_s = score_listed_tile(
            at, p_blocks, start, p, t, b_q, k, v, D, DV, BLOCK_D, BLOCK_DV, N, B, TMA, PRECISION
        )
        b_acc, b_m, b_l = add_values(b_s, b_v, b_acc, b_m, b_l, scale_log2, True, PRECISION)

    b_out, b_lse = finish_softmax(b_acc, b_m, b_l)
    p_out += head_offset(strides_out, at.batch, at.head, at.start_q)
    store_rows(p_out, at.rows, strides_out[1], at.there, b_out, DV, BLOCK_DV)
    p_lse += head_offset((stride_lse_b, 1, stride_lse_h), at.batch, at.head, at.start_q)
    tl.store(p_lse + at.rows, b_lse, mask=at.there)


@triton.jit(do_not_specialize=["s", "t", "nq", "stride_lse_b", "stride_lse_h", "heads", "group"])
def s2_sparse_dq_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_dout,
    p_dq,
    p_lse2,
    p_delta,
    p_ends,
    p_blocks,
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
    strides_dq,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    nq,
    heads,
    group,
    mask_group,
    scale,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one query tile of one head; grid and loop of the forward kernel."""
    at = sparse_queries(s, heads, group, M, B)
    q, k, v = query_operands(at, p_q, p_k, p_v, d_k, d_v, strides_q, strides_k, strides_v)
    dout = matrix_of(p_dout, None, strides_dout, at.batch, at.head, at.start_q)
    o_terms = head_offset((stride_lse_b, 1, stride_lse_h), at.batch, at.head, at.start_q) + at.rows
    b_q = load_rows(q.base, at.rows, q.stride, at.there, D, BLOCK_D)  # [M, D]
    b_dout = load_rows(dout.base, at.rows, dout.stride, at.there, DV, BLOCK_DV)  # [M, DV]
    b_lse2 = tl.load(p_lse2 + o_terms, mask=at.there, other=float("inf"))  # [M]
    b_delta = tl.load(p_delta + o_terms, mask=at.there, other=0.0)
    b_dq = tl.zeros([M, BLOCK_D], tl.float32)

    start, n_tiles = tile_list(p_ends, at.head // mask_group, at.block, nq, B // N)
    for p in tl.range(0, n_tiles):
        b_k, b_v, b_s = score_listed_tile(
            at, p_blocks, start, p, t, b_q, k, v, D, DV, BLOCK_D, BLOCK_DV, N, B, TMA, PRECISION
        )
        b_dq = add_to_dq(b_s, b_k, b_v, b_dout, b_lse2, b_delta, b_dq, scale_log2, PRECISION)

    p_dq += head_offset(strides_dq, at.batch, at.head, at.start_q)
    store_rows(p_dq, at.rows, strides_dq[1], at.there, b_dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["s", "t", "nk", "stride_lse_b", "stride_lse_h", "kv_heads", "group"])
def s2_sparse_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    d_q,
    d_dout,
    p_dout,
    p_dk,
    p_dv,
    p_lse2,
    p_delta,
    d_lse2,
    d_delta,
    p_ends,
    p_blocks,
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
    strides_dk,
    strides_dv,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    nk,
    kv_heads,
    group,
    mask_group,
    scale,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one KV tile, over its group's heads. Grid: (KV tiles, KV heads * batch)."""
    i_tile = tl.program_id(0)
    i_batch = tl.program_id(1) // kv_heads
    i_kv = tl.program_id(1) % kv_heads
    o_col = i_tile * N + tl.arange(0, N)
    m_col = o_col < t
    i_block = i_tile * N // B

    zero = i_batch * 0
    p_k += head_offset(strides_k, i_batch, i_kv, zero)
    p_v += head_offset(strides_v, i_batch, i_kv, zero)
    b_k = load_rows(p_k, o_col, strides_k[1], m_col, D, BLOCK_D)  # [N, D]
    b_v = load_rows(p_v, o_col, strides_v[1], m_col, DV, BLOCK_DV)  # [N, DV]
    b_dk = tl.zeros([N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([N, BLOCK_DV], tl.float32)

    for j in tl.range(0, group):
        i_head = i_kv * group + j
        o_terms = head_offset((stride_lse_b, 1, stride_lse_h), i_batch, i_head, zero)
        q = matrix_of(p_q, d_q, strides_q, i_batch, i_head, zero)
        dout = matrix_of(p_dout, d_dout, strides_dout, i_batch, i_head, zero)
        lse2 = Matrix(p_lse2 + o_terms, d_lse2, 1, i_batch, i_head)
        delta = Matrix(p_delta + o_terms, d_delta, 1, i_batch, i_head)
        start, n_tiles = tile_list(p_ends, i_head // mask_group, i_block, nk, B // M)
        for p in tl.range(0, n_tiles):
            i_q, row, o_row = listed_tile(p_blocks, start, p, M, B)
            m_row = o_row < s
            b_q = load(q, o_row, m_row, row, D, BLOCK_D, M, TMA)  # [M, D]
            b_dout = load(dout, o_row, m_row, row, DV, BLOCK_DV, M, TMA)  # [M, DV]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
            if (i_q == i_block) | (row + M > s):
                m_s = (o_col[:, None] <= o_row[None, :]) & m_row[None, :]
                b_s = tl.where(m_s, b_s, float("-inf"))
            b_dk, b_dv, b_ds = add_to_dkdv(
                b_s, b_q, b_dout, b_v, b_dk, b_dv, lse2, delta, o_row, m_row, row, scale_log2,
                M, TMA, PRECISION,
            )  # fmt: skip

    p_dk += head_offset(strides_dk, i_batch, i_kv, zero)
    p_dv += head_offset(strides_dv, i_batch, i_kv, zero)
    store_rows(p_dk, o_col, strides_dk[1], m_col, b_dk * scale, D, BLOCK_D)
    store_rows(p_dv, o_col, strides_dv[1], m_col, b_dv, DV, BLOCK_DV)


def _within_block(config: TileConfig, block_size: int) -> TileConfig:
    """Tiles of at most a block, so that one list entry says all there is about a tile."""
    m, n = min(config.block_m, block_size), min(config.block_n, block_size)
    return replace(config, block_m=m, block_n=n)


def _constants(q, v, block_size: int, config: TileConfig) -> dict:
    """What the three kernels take at compile time, but for TMA."""
    d, dv = q.shape[-1], v.shape[-1]
    return dict(
        D=d,
        DV=dv,
        BLOCK_D=pad(d),
        BLOCK_DV=pad(dv),
        M=config.block_m,
        N=config.block_n,
        B=block_size,
        PRECISION="ieee",
        **config.options(),
    )


def launch_forward(q, k, v, tables, block_size, softmax_scale):
    """out (like q, with dv columns) and lse [b, h, s] float32; inputs checked by the caller."""
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    b, h, s, d = q_heads.shape
    dv = v.shape[-1]
    config = forward_config(max(d, dv), q.dtype, capability(q.device))
    config = _within_block(config, block_size)
    tma = config.tma and takes_descriptor(k_heads) and takes_descriptor(v_heads)
    out = empty_like(q, dv)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    s2_sparse_forward_kernel[(triton.cdiv(s, config.block_m), h * b)](
        q,
        k,
        v,
        descriptor(k_heads, config.block_n, pad(d)) if tma else None,
        descriptor(v_heads, config.block_n, pad(dv)) if tma else None,
        out,
        lse,
        tables.row_ends,
        tables.row_blocks,
        *(rows_and_heads(x) for x in (q_heads, k_heads, v_heads, head_major(out))),
        *lse.stride()[:2],
        s,
        k_heads.shape[2],
        tables.nq,
        h,
        h // k_heads.shape[1],
        h // tables.mask_heads,
        softmax_scale * math.log2(math.e),
        TMA=tma,
        **_constants(q, v, block_size, config),
    )
    return out, lse


def launch_backward(q, k, v, out, lse, dout, dlse, tables, block_size, softmax_scale):
    """dq, dk and dv, laid out like q, k and v."""
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    lse2, delta = row_terms(out, lse, dout, dlse)
    dq, dk, dv = (empty_like(x, x.shape[-1]) for x in (q, k, v))
    common = (tables, block_size, softmax_scale)
    _launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, *common)
    _launch_dq(q, k, v, dout, lse2, delta, dq, *common)
    return dq, dk, dv


def _launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, tables, block_size, softmax_scale):
    q_heads, k_heads, v_heads, dout_heads = (head_major(x) for x in (q, k, v, dout))
    d, d_v = q.shape[-1], v.shape[-1]
    b, g, t, _ = k_heads.shape
    h = q_heads.shape[1]
    config = backward_config("separate", max(d, d_v), q.dtype, capability(q.device))
    config = _within_block(config, block_size)
    m = config.block_m
    tma = config.tma and takes_descriptor(q_heads) and takes_descriptor(dout_heads)
    s2_sparse_dkdv_kernel[(triton.cdiv(t, config.block_n), g * b)](
        q,
        k,
        v,
        descriptor(q_heads, m, pad(d)) if tma else None,
        descriptor(dout_heads, m, pad(d_v)) if tma else None,
        dout,
        dk,
        dv,
        lse2,
        delta,
        row_descriptor(lse2, m) if tma else None,
        row_descriptor(delta, m) if tma else None,
        tables.column_ends,
        tables.column_blocks,
        *(rows_and_heads(x) for x in (q_heads, k_heads, v_heads, dout_heads)),
        rows_and_heads(head_major(dk)),
        rows_and_heads(head_major(dv)),
        *lse2.stride()[:2],
        q_heads.shape[2],
        t,
        tables.nk,
        g,
        h // g,
        h // tables.mask_heads,
        softmax_scale,
        softmax_scale * math.log2(math.e),
        TMA=tma,
        **_constants(q, v, block_size, config),
    )


def _launch_dq(q, k, v, dout, lse2, delta, dq, tables, block_size, softmax_scale):
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    d, d_v = q.shape[-1], v.shape[-1]
    b, h, s, _ = q_heads.shape
    config = backward_config("dq", max(d, d_v), q.dtype, capability(q.device))
    config = _within_block(config, block_size)
    tma = config.tma and takes_descriptor(k_heads) and takes_descriptor(v_heads)
    s2_sparse_dq_kernel[(triton.cdiv(s, config.block_m), h * b)](
        q,
        k,
        v,
        descriptor(k_heads, config.block_n, pad(d)) if tma else None,
        descriptor(v_heads, config.block_n, pad(d_v)) if tma else None,
        dout,
        dq,
        lse2,
        delta,
        tables.row_ends,
        tables.row_blocks,
        *(rows_and_heads(x) for x in (q_heads, k_heads, v_heads)),
        rows_and_heads(head_major(dout)),
        rows_and_heads(head_major(dq)),
        *lse2.stride()[:2],
        s,
        k_heads.shape[2],
        tables.nq,
        h,
        h // k_heads.shape[1],
        h // tables.mask_heads,
        softmax_scale,
        softmax_scale * math.log2(math.e),
        TMA=tma,
        **_constants(q, v, block_size, config),
    )
