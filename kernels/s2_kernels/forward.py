"""The forward kernel: out and lse of S2 attention, for dense batches and packed sequences.

One program computes one query tile of one head. It walks two lists of KV blocks, computed from the
head's rule in a few scalar operations (see primitives.py): the interior blocks of all bands without
a mask, then the few that need one, sharing one online softmax.

Shapes: b batch (or sequences, packed), s query tokens, t KV tokens, h query heads, g KV heads,
d head size, dv head size of V, B block size, M query rows and N KV rows of a tile.
    q [b, s, h, d]   k [b, t, g, d]   v [b, t, g, dv]   out [b, s, h, dv]   lse [b, h, s] float32
    packed: q [T, h, d] and so on, as b = 1 with the rows of sequence i from cu_seqlens[i] on.
"""

import math

import torch
import triton
import triton.language as tl

from s2_kernels.configs import TileConfig, fit, forward_config
from s2_kernels.launch import (
    Packing,
    capability,
    descriptor,
    device_table,
    empty_like,
    head_major,
    pad,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    attend,
    count_blocks,
    head_base,
    interior_columns,
    interior_segments,
    interior_tiles,
    load_rows,
    load_rule,
    load_tile,
    masked_columns,
    masked_segments,
    masked_tiles,
    sequence,
    store_rows,
    tile_column,
    tile_mask,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["s", "t", "q_offset", "stride_lse_b", "stride_lse_h", "heads", "group"]
)
def s2_forward_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_out,
    p_lse,
    p_table,
    p_cu_q,
    p_cu_k,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kg,
    stride_vb,
    stride_vt,
    stride_vg,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    q_offset,
    heads,
    group,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    STEP: tl.constexpr,
    N_BANDS: tl.constexpr,
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (query tiles, heads * batch), the last tiles first: they see the most."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_seq = tl.program_id(1) // heads
    i_head = tl.program_id(1) % heads
    i_kv = i_head // group
    start_q, s = sequence(p_cu_q, i_seq, s, PACKED)
    start_k, t = sequence(p_cu_k, i_seq, t, PACKED)
    i_batch = i_seq * 0 if PACKED else i_seq

    # Tiles lie on the grid of the KV blocks: the first may start before row 0 of the queries.
    first_row = (q_offset // M + i_tile) * M
    if first_row >= q_offset + s:
        return
    o_row = first_row + tl.arange(0, M)  # position in the KV sequence
    m_row = (o_row >= q_offset) & (o_row < q_offset + s)
    o_q = o_row - q_offset
    i_first = tl.maximum(first_row, q_offset) // B
    last_row = tl.minimum(first_row + M, q_offset + s) - 1
    i_last = last_row // B
    k_last = (t - 1) // B

    p_q = head_base(p_q, i_batch, i_head, start_q, stride_qb, stride_qs, stride_qh)
    p_k = head_base(p_k, i_batch, i_kv, start_k, stride_kb, stride_kt, stride_kg)
    p_v = head_base(p_v, i_batch, i_kv, start_k, stride_vb, stride_vt, stride_vg)
    b_q = load_rows(p_q, o_q, stride_qs, m_row, D, BLOCK_D, True)  # [M, D]
    b_acc = tl.zeros([M, BLOCK_DV], tl.float32)
    b_m = tl.full([M], float("-inf"), tl.float32)
    b_l = tl.zeros([M], tl.float32)

    rule = load_rule(p_table, i_kv, N_BANDS)
    SPANS: tl.constexpr = M > B
    N_MASKED: tl.constexpr = N_BANDS + 1 if SPANS else 1
    interior = interior_segments(rule, i_first, i_last, k_last, N_BANDS)
    n_interior = count_blocks(interior, N_BANDS)
    n_steps = interior_tiles(n_interior, N, B, STEP)
    for p in tl.range(0, n_steps):
        keys, values = (), ()
        for j in tl.static_range(STEP):
            o_col = interior_columns(interior, p * STEP + j, N, B, N_BANDS)
            row = start_k + tile_column(interior, p * STEP + j, N, B, N_BANDS) if TMA else 0
            keys += (load_tile(p_k, d_k, stride_kt, o_col, i_batch, i_kv, row, D, BLOCK_D, N, TMA),)
            values += (
                load_tile(p_v, d_v, stride_vt, o_col, i_batch, i_kv, row, DV, BLOCK_DV, N, TMA),
            )
        b_acc, b_m, b_l = attend(
            b_q, keys, values, None, b_acc, b_m, b_l, scale_log2, STEP, PRECISION
        )

    masked = masked_segments(rule, i_first, i_last, k_last, SPANS, N_BANDS)
    n_masked = count_blocks(masked, N_MASKED)
    n_left = n_interior * (B // N if N <= B else 1) - n_steps * STEP * (N // B if N > B else 1)
    for p in tl.range(0, masked_tiles(n_left, n_masked, last_row, t, N, B)):
        o_col, i_block = masked_columns(
            interior, n_interior, n_left, masked, n_masked, p, N, B, N_BANDS, N_MASKED
        )
        # Pointers, not TMA: past the sequence memory may hold NaN, and NaN * 0 is not 0.
        b_k = load_rows(p_k, o_col, stride_kt, o_col < t, D, BLOCK_D, True)
        b_v = load_rows(p_v, o_col, stride_vt, o_col < t, DV, BLOCK_DV, True)
        m_s = tile_mask(rule, o_row, o_col, i_block, t, SPANS, N, B, N_BANDS)
        b_acc, b_m, b_l = attend(
            b_q, (b_k,), (b_v,), m_s, b_acc, b_m, b_l, scale_log2, 1, PRECISION
        )

    sees = b_l > 0
    b_out = b_acc / tl.where(sees, b_l, 1.0)[:, None]
    b_lse = tl.where(sees, b_m * LN2 + tl.log(tl.where(sees, b_l, 1.0)), float("-inf"))
    p_out = head_base(p_out, i_batch, i_head, start_q, stride_ob, stride_os, stride_oh)
    store_rows(p_out, o_q, stride_os, m_row, b_out, DV, BLOCK_DV)
    p_lse = head_base(p_lse, i_batch, i_head, start_q, stride_lse_b, 1, stride_lse_h)
    tl.store(p_lse + o_q, b_lse, mask=m_row)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
    *,
    packing: Packing | None = None,
    config: TileConfig | None = None,
    tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of one forward pass; inputs checked by the caller.

    Args:
        q, k, v: [b, s, h, d], [b, t, g, d], [b, t, g, dv] with a contiguous last dimension, or
            packed [T, h, d] and so on with `packing`.
        config: tiles; default: the table of configs.py.
        tf32: let float32 inputs use tensor cores, at 10 bits of mantissa.

    Returns:
        out like q (dv columns); lse [b, h, s], or [h, T] packed, float32.
    """
    q_heads, k_heads, v_heads = head_major(q), head_major(k), head_major(v)
    b, h, s, d = q_heads.shape
    dv = v.shape[-1]
    config = config or forward_config(max(d, dv), q.dtype, capability(q.device))
    config = fit(config, pattern.block_size, gather=True)
    out = empty_like(q, dv)
    out_heads = head_major(out)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    tma = config.tma and takes_descriptor(k_heads) and takes_descriptor(v_heads)
    n_seqs, max_q = (packing.n_seqs, packing.max_q) if packing else (b, s)
    m = config.block_m
    n_tiles = (q_offset + max_q - 1) // m - q_offset // m + 1
    s2_forward_kernel[(n_tiles, h * n_seqs)](
        q,
        k,
        v,
        descriptor(k_heads, config.block_n, pad(d)) if tma else None,
        descriptor(v_heads, config.block_n, pad(dv)) if tma else None,
        out,
        lse,
        device_table(pattern, q.device),
        packing.cu_q if packing else None,
        packing.cu_k if packing else None,
        *rows_and_heads(q_heads),
        *rows_and_heads(k_heads),
        *rows_and_heads(v_heads),
        *rows_and_heads(out_heads),
        *lse.stride()[:2],
        s,
        k_heads.shape[2],
        q_offset,
        h,
        h // k_heads.shape[1],
        softmax_scale * math.log2(math.e),
        D=d,
        DV=dv,
        BLOCK_D=pad(d),
        BLOCK_DV=pad(dv),
        M=m,
        N=config.block_n,
        B=pattern.block_size,
        STEP=config.step,
        N_BANDS=pattern.n_bands,
        TMA=tma,
        PACKED=packing is not None,
        PRECISION="tf32" if tf32 else "ieee",
        **config.options(),
    )
    return out, lse if packing is None else lse[0]
