"""The kernel that writes new keys and values into pages, and its launcher (shapes: decode.py)."""

import torch
import triton
import triton.language as tl

from s2_kernels.configs import FUSED
from s2_kernels.launch import device_table, on_grid, pad, takes_pdl
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import lifetime, load_rule


@triton.jit(
    do_not_specialize=["stride_table_b", "stride_table_h", "stride_table_k", "s"],
    do_not_specialize_on_alignment=["p_pages", "p_lengths"],  # those of some of a step's sequences
)
def s2_write_kernel(
    p_k,
    p_v,
    p_k_pages,
    p_v_pages,
    p_pages,
    p_lengths,
    p_table,
    strides_k,
    strides_v,
    strides_k_pages,
    strides_v_pages,
    stride_table_b,
    stride_table_h,
    stride_table_k,
    s,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    N_BANDS: tl.constexpr,
    ALIVE_ONLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (groups of ROWS rows that s tokens can touch, KV heads, sequences)."""
    if PDL:  # in this order: what starts now may count on all that was before this kernel
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_kv, i_seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    begin = length - s
    row = (tl.maximum(begin, 0) // ROWS + tl.program_id(0)) * ROWS
    i_block = row // B
    if row >= length:
        return
    if ALIVE_ONLY:
        life = lifetime(load_rule(p_table, i_kv, N_BANDS), i_block, N_BANDS)
        if length // B - i_block >= life:
            return
    o_page = i_seq * stride_table_b + i_kv * stride_table_h + i_block * stride_table_k
    page = tl.load(p_pages + o_page).to(tl.int64)
    o_row = row + tl.arange(0, ROWS)
    o_b = o_row % B
    m_row = (o_row >= begin) & (o_row < length)
    o_token = (o_row - begin).to(tl.int64)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_k, m_v = m_row[:, None] & (o_d < D)[None, :], m_row[:, None] & (o_dv < DV)[None, :]
    p_from = p_k + i_seq * strides_k[0] + o_token * strides_k[1] + i_kv * strides_k[2]
    b_k = tl.load(p_from[:, None] + o_d[None, :], mask=m_k)
    p_from = p_v + i_seq * strides_v[0] + o_token * strides_v[1] + i_kv * strides_v[2]
    b_v = tl.load(p_from[:, None] + o_dv[None, :], mask=m_v)
    p_to = p_k_pages + page * strides_k_pages[0] + o_b * strides_k_pages[1]
    tl.store(p_to[:, None] + o_d[None, :], b_k, mask=m_k)
    p_to = p_v_pages + page * strides_v_pages[0] + o_b * strides_v_pages[1]
    tl.store(p_to[:, None] + o_dv[None, :], b_v, mask=m_v)


def launch_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    pattern: LayerPattern,
    *,
    alive_only: bool,
) -> None:
    """Writes s new tokens [b, s, g, d] into pages; arguments as in `write_pages`."""
    (b, s, kv_heads, d), dv, size = k.shape, v.shape[-1], pattern.block_size
    rows = min(size, 32)
    groups = triton.cdiv(s - 1, rows) + 1
    pdl = takes_pdl(s2_write_kernel, k.device)
    on_grid(s2_write_kernel, (groups, kv_heads, b))(
        k,
        v,
        k_pages,
        v_pages,
        page_table,
        lengths,
        device_table(pattern, k.device),
        k.stride()[:3],
        v.stride()[:3],
        k_pages.stride()[:2],
        v_pages.stride()[:2],
        *page_table.stride(),
        s,
        D=d,
        DV=dv,
        BLOCK_D=pad(d),
        BLOCK_DV=pad(dv),
        B=size,
        ROWS=rows,
        N_BANDS=pattern.n_bands,
        ALIVE_ONLY=alive_only,
        PDL=pdl,
        num_warps=4,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
    )
