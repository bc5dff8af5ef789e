"""The forward kernel: out and lse of S2 attention, for dense batches and packed sequences.

One program computes one query tile of one head. It walks two lists of KV blocks, computed from the
head's rule in a few scalar operations (see primitives.py): the interior blocks of all bands without
a mask, then the few that need one, sharing one body and one online softmax.

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
    on_grid,
    pad,
    rows_and_heads,
    takes_descriptor,
)
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    finish_softmax,
    head_offset,
    key_tile,
    load_rows,
    mask_scores,
    query_program,
    start_softmax,
    store_rows,
    walk_of,
)
from s2_kernels.tiles import add_values, query_operands, score


@triton.jit
def attend_tiles(
    program, walk, near, low, high, b_q, b_acc, b_m, b_l, k, v, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, MASKED: tl.constexpr, SPANS: tl.constexpr,
    N_SEGMENTS: tl.constexpr, N_BANDS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends from b_q [M, D] to the KV tiles low..high-1 of a program's walk."""
    t = program.t
    for p in tl.range(low, high):
        keys = key_tile(program, walk, near, p, N, B, N_SEGMENTS, N_BANDS)
        b_k, b_v, b_s = score(b_q, k, v, keys, D, DV, BLOCK_D, BLOCK_DV, N, TMA, PRECISION)
        if MASKED:
            b_s = mask_scores(
                b_s, walk.rule, program.positions, keys.positions, keys.block, t,
                SPANS, N, B, N_BANDS,
            )  # fmt: skip
        b_acc, b_m, b_l = add_values(b_s, b_v, b_acc, b_m, b_l, scale_log2, MASKED, PRECISION)
    return b_acc, b_m, b_l


@triton.jit(
    do_not_specialize=[
        "s", "t", "q_offset", "near_start", "near_row", "stride_lse_b", "stride_lse_h", "group"
    ]
)  # fmt: skip
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
    strides_q,
    strides_k,
    strides_v,
    strides_out,
    stride_lse_b,
    stride_lse_h,
    s,
    t,
    q_offset,
    near_start,
    near_row,
    group,
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
    """Grid: (query tiles, heads, batch)."""
    at = query_program(p_cu_q, p_cu_k, s, t, q_offset, group, M, B, PACKED)
    if at.first > at.last:
        return
    o_q = at.positions - q_offset  # rows of q in memory, from start_q on
    q, k, v = query_operands(at, p_q, p_k, p_v, d_k, d_v, strides_q, strides_k, strides_v)
    b_q = load_rows(q.base, o_q, q.stride, at.there, D, BLOCK_D)  # [M, D]
    b_acc, b_m, b_l = start_softmax(M, BLOCK_DV)

    SPANS: tl.constexpr = M > B
    N_SEGMENTS: tl.constexpr = 2 * N_BANDS + 1 if SPANS else N_BANDS + 1
    walk, near = walk_of(at, p_table, M, N, B, N_BANDS), (near_start, near_row)
    b_acc, b_m, b_l = attend_tiles(
        at, walk, near, 0, walk.interior, b_q, b_acc, b_m, b_l, k, v, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, N, B, False, SPANS, N_BANDS, N_BANDS, TMA, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = attend_tiles(
        at, walk, near, walk.interior, walk.tiles, b_q, b_acc, b_m, b_l, k, v, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, N, B, True, SPANS, N_SEGMENTS, N_BANDS, TMA, PRECISION,
    )  # fmt: skip
    b_out, b_lse = finish_softmax(b_acc, b_m, b_l)
    p_out += head_offset(strides_out, at.batch, at.head, at.start_q)
    store_rows(p_out, o_q, strides_out[1], at.there, b_out, DV, BLOCK_DV)
    p_lse += head_offset((stride_lse_b, 1, stride_lse_h), at.batch, at.head, at.start_q)
    tl.store(p_lse + o_q, b_lse, mask=at.there)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
    *,
    packing: Packing | None = None,
    near: Near | None = None,
    into: torch.Tensor | None = None,
    config: TileConfig | None = None,
    tf32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of one forward pass; inputs checked by the caller.

    Args:
        q, k, v: [b, s, h, d], [b, t, g, d], [b, t, g, dv] with a contiguous last dimension, or
            packed [T, h, d] and so on with `packing`.
        near: which keys they are, where not all.
        into: out's place, if it has one already: any strides but a contiguous last dimension.
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
    out = empty_like(q, dv) if into is None else into
    out_heads = head_major(out)
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    # TMA cannot stop at the end of a packed sequence; what follows it may be NaN, and NaN * 0 too.
    tma = config.tma and not packing and takes_descriptor(k_heads) and takes_descriptor(v_heads)
    n_seqs, max_q = (packing.n_seqs, packing.max_q) if packing else (b, s)
    m = config.block_m
    n_tiles = (q_offset + max_q - 1) // m - q_offset // m + 1
    on_grid(s2_forward_kernel, (n_tiles, h, n_seqs))(
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
        rows_and_heads(q_heads),
        rows_and_heads(k_heads),
        rows_and_heads(v_heads),
        rows_and_heads(out_heads),
        *lse.stride()[:2],
        s,
        count_keys(k, near, pattern),
        q_offset,
        *(near or (None, None)),
        h // k_heads.shape[1],
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
        PRECISION="tf32" if tf32 else "ieee",
        **config.options(),
    )
    return out, lse if packing is None else lse[0]
