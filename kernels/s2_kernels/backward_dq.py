"""The backward kernel over query tiles: dq = scale * dS K, by the loops of the forward kernel.

Shapes and formulas as in backward.py.
"""

import math

import torch
import triton
import triton.language as tl

from s2_kernels.configs import TileConfig
from s2_kernels.launch import (
    Packing,
    descriptor,
    device_table,
    head_major,
    pad,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    count_interior_tiles,
    count_tiles,
    head_offset,
    kept_segments,
    load_rows,
    load_rule,
    load_tile,
    mask_scores,
    query_tile,
    sequence,
    store_rows,
    tile_columns,
)


@triton.jit(do_not_specialize=["s", "t", "q_offset", "stride_lse_b", "stride_lse_h", "group"])
def s2_dq_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_dout,
    p_dq,
    p_lse2,
    p_delta,
    p_table,
    p_cu_q,
    p_cu_k,
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
    strides_dq,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    q_offset,
    group,
    scale,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    N_BANDS: tl.constexpr,
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one query tile of one head; grid and loops of the forward kernel."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_seq = tl.program_id(1), tl.program_id(2)
    i_kv = i_head // group
    start_q, s = sequence(p_cu_q, i_seq, s, PACKED)
    start_k, t = sequence(p_cu_k, i_seq, t, PACKED)
    i_batch = i_seq * 0 if PACKED else i_seq

    o_row, m_row, first_row, last_row = query_tile(i_tile, q_offset, s, M, B)
    if first_row > last_row:
        return
    o_q = o_row - q_offset
    i_first, i_last, k_last = first_row // B, last_row // B, tl.maximum(t - 1, 0) // B

    p_q += head_offset(strides_q, i_batch, i_head, start_q)
    p_k += head_offset(strides_k, i_batch, i_kv, start_k)
    p_v += head_offset(strides_v, i_batch, i_kv, start_k)
    p_dout += head_offset(strides_dout, i_batch, i_head, start_q)
    start = head_offset((stride_lse_b, 1, stride_lse_h), i_batch, i_head, start_q)
    b_q = load_rows(p_q, o_q, strides_q[1], m_row, D, BLOCK_D)  # [M, D]
    b_dout = load_rows(p_dout, o_q, strides_dout[1], m_row, DV, BLOCK_DV)  # [M, DV]
    b_lse2 = tl.load(p_lse2 + start + o_q, mask=m_row, other=float("inf"))  # [M]
    b_delta = tl.load(p_delta + start + o_q, mask=m_row, other=0.0)
    b_dq = tl.zeros([M, BLOCK_D], tl.float32)

    rule = load_rule(p_table, i_kv, N_BANDS)
    SPANS: tl.constexpr = M > B
    N_SEGMENTS: tl.constexpr = 2 * N_BANDS + 1 if SPANS else N_BANDS + 1
    kept = kept_segments(rule, i_first, i_last, k_last, SPANS, N_BANDS)
    n_tiles = count_tiles(kept, last_row, t, N, B, N_SEGMENTS)
    n_interior = count_interior_tiles(kept, N, B, N_BANDS)
    for p in tl.range(0, n_tiles):
        o_col, i_block, column = tile_columns(kept, p, N, B, N_SEGMENTS)
        m_col, row = o_col < t, start_k + column
        b_k = load_tile(
            p_k, d_k, strides_k[1], o_col, m_col, i_batch, i_kv, row, D, BLOCK_D, N, TMA
        )  # [N, D]
        b_v = load_tile(
            p_v, d_v, strides_v[1], o_col, m_col, i_batch, i_kv, row, DV, BLOCK_DV, N, TMA
        )  # [N, DV]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        if p >= n_interior:
            b_s = mask_scores(b_s, rule, o_row, o_col, i_block, t, SPANS, N, B, N_BANDS)
        b_p = tl.exp2(b_s * scale_log2 - b_lse2[:, None])
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

    p_dq += head_offset(strides_dq, i_batch, i_head, start_q)
    store_rows(p_dq, o_q, strides_dq[1], m_row, b_dq * scale, D, BLOCK_D)


def launch_dq(
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
    packing: Packing | None,
    config: TileConfig,
    precision: str,
) -> None:
    """Writes dq, which has q's shape; lse2 and delta are [b, h, s]."""
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    b, h, s, d = q_heads.shape
    dv = v.shape[-1]
    # TMA cannot stop at the end of a packed sequence; what follows it may be NaN, and NaN * 0 too.
    tma = config.tma and not packing and takes_descriptor(k_heads) and takes_descriptor(v_heads)
    n_seqs, max_q = (packing.n_seqs, packing.max_q) if packing else (b, s)
    m = config.block_m
    n_tiles = (q_offset + max_q - 1) // m - q_offset // m + 1
    s2_dq_kernel[(n_tiles, h, n_seqs)](
        q,
        k,
        v,
        descriptor(k_heads, config.block_n, pad(d)) if tma else None,
        descriptor(v_heads, config.block_n, pad(dv)) if tma else None,
        dout,
        dq,
        lse2,
        delta,
        device_table(pattern, q.device),
        packing.cu_q if packing else None,
        packing.cu_k if packing else None,
        rows_and_heads(q_heads),
        rows_and_heads(k_heads),
        rows_and_heads(v_heads),
        rows_and_heads(head_major(dout)),
        rows_and_heads(head_major(dq)),
        *lse2.stride()[:2],
        s,
        k_heads.shape[2],
        q_offset,
        h // k_heads.shape[1],
        softmax_scale,
        softmax_scale * math.log2(math.e),
        D=d,
        DV=dv,
        BLOCK_D=pad(d),
        BLOCK_DV=pad(dv),
        M=m,
        N=config.block_n,
        B=pattern.block_size,
        N_BANDS=pattern.n_bands,
        TMA=tma,
        PACKED=packing is not None,
        PRECISION=precision,
        **config.options(),
    )
