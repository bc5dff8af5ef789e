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
    on_grid,
    pad,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    head_offset,
    key_tile,
    load_rows,
    mask_scores,
    query_program,
    store_rows,
    walk_of,
)
from s2_kernels.tiles import add_to_dq, matrix_of, query_operands, score


@triton.jit(
    do_not_specialize=[
        "s", "t", "q_offset", "near_start", "near_row", "stride_lse_b", "stride_lse_h", "group"
    ]
)  # fmt: skip
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
    near_start,
    near_row,
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
    at = query_program(p_cu_q, p_cu_k, s, t, q_offset, group, M, B, PACKED)
    if at.first > at.last:
        return
    o_q = at.positions - q_offset  # rows of q in memory, from start_q on
    q, k, v = query_operands(at, p_q, p_k, p_v, d_k, d_v, strides_q, strides_k, strides_v)
    dout = matrix_of(p_dout, None, strides_dout, at.batch, at.head, at.start_q)
    start = head_offset((stride_lse_b, 1, stride_lse_h), at.batch, at.head, at.start_q)
    b_q = load_rows(q.base, o_q, q.stride, at.there, D, BLOCK_D)  # [M, D]
    b_dout = load_rows(dout.base, o_q, dout.stride, at.there, DV, BLOCK_DV)  # [M, DV]
    b_lse2 = tl.load(p_lse2 + start + o_q, mask=at.there, other=float("inf"))  # [M]
    b_delta = tl.load(p_delta + start + o_q, mask=at.there, other=0.0)
    b_dq = tl.zeros([M, BLOCK_D], tl.float32)

    SPANS: tl.constexpr = M > B
    N_SEGMENTS: tl.constexpr = 2 * N_BANDS + 1 if SPANS else N_BANDS + 1
    walk = walk_of(at, p_table, M, N, B, N_BANDS)
    for p in tl.range(0, walk.tiles):
        keys = key_tile(at, walk, (near_start, near_row), p, N, B, N_SEGMENTS, N_BANDS)
        b_k, b_v, b_s = score(b_q, k, v, keys, D, DV, BLOCK_D, BLOCK_DV, N, TMA, PRECISION)
        if p >= walk.interior:
            b_s = mask_scores(
                b_s, walk.rule, at.positions, keys.positions, keys.block, at.t,
                SPANS, N, B, N_BANDS,
            )  # fmt: skip
        b_dq = add_to_dq(b_s, b_k, b_v, b_dout, b_lse2, b_delta, b_dq, scale_log2, PRECISION)

    p_dq += head_offset(strides_dq, at.batch, at.head, at.start_q)
    store_rows(p_dq, o_q, strides_dq[1], at.there, b_dq * scale, D, BLOCK_D)


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
    near: Near | None,
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
    on_grid(s2_dq_kernel, (n_tiles, h, n_seqs))(
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
        count_keys(k, near, pattern),
        q_offset,
        *(near or (None, None)),
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
