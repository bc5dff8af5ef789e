"""The backward pass: dq, dk and dv of S2 attention, for dense batches and packed sequences.

With P = exp(S * scale - lse), dP = dO V^T and delta = rowsum(dO * O) - dlse:

    dS = P * (dP - delta)      dV = P^T dO      dK = scale * dS^T Q      dQ = scale * dS K

Two variants. *Separate*: a kernel over KV tiles for dk and dv (4 matmuls a tile) and one over query
tiles for dq (3 matmuls); the same bits every time. *Fused*: the kernel over KV tiles also adds its
share of dq to a float32 buffer (5 matmuls), in an order that varies from run to run.

Shapes as in forward.py, and delta and lse2 (lse in base 2) [b, h, s] float32.
"""

import torch
import triton
import triton.language as tl

from s2_kernels.backward_dkdv import launch_dkdv
from s2_kernels.backward_dq import launch_dq
from s2_kernels.configs import FUSED, TileConfig, backward_config, fit
from s2_kernels.launch import (
    Packing,
    capability,
    empty_like,
    head_major,
    on_grid,
    pad,
    rows_and_heads,
)
from s2_kernels.near import Near, clear_far
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import LOG2E, head_offset, load_rows
from s2_kernels.recording import CannotRecordError, Operand

TERM_ROWS = 64
"""Rows of a program of the row terms kernel."""


@triton.jit(do_not_specialize=["s", "heads", "stride_lse_b", "stride_lse_h", "rows", "lead"])
def s2_row_terms_kernel(
    p_out,
    p_dout,
    p_lse,
    p_dlse,
    p_lse2,
    p_delta,
    strides_out,
    strides_dout,
    stride_lse_b,
    stride_lse_h,
    s,
    rows,
    lead,
    heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
):
    """delta = rowsum(dO * O) - dlse, and lse in base 2. Grid: (row tiles, heads * batch).

    lse2 is +inf for a row that sees nothing, so that its probabilities come out as 0. Both are
    [b, h, rows]: s rows and padding, which makes their strides fit TMA. lead: so many terms of
    padding stand before the rows; None is 0.
    """
    i_batch = tl.program_id(1) // heads
    i_head = tl.program_id(1) % heads
    o_term = tl.program_id(0) * M + tl.arange(0, M)
    o_row, m_row = o_term, o_term < s
    if lead is not None:
        o_row = o_term - lead
        m_row = (o_row >= 0) & (o_row < s)
    p_out += head_offset(strides_out, i_batch, i_head, i_batch * 0)
    p_dout += head_offset(strides_dout, i_batch, i_head, i_batch * 0)
    b_out = load_rows(p_out, o_row, strides_out[1], m_row, DV, BLOCK_DV)  # [M, DV]
    b_dout = load_rows(p_dout, o_row, strides_dout[1], m_row, DV, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)  # [M]
    o_lse = head_offset((stride_lse_b, 1, stride_lse_h), i_batch, i_head, i_batch * 0) + o_row
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_lse, mask=m_row, other=0.0)
    b_lse = tl.load(p_lse + o_lse, mask=m_row, other=0.0)
    # A row that sees nothing passes no gradient on, not even a NaN that came in for its lse.
    sees = b_lse != float("-inf")
    b_delta = tl.where(sees, b_delta, 0.0)
    b_lse = tl.where(sees, b_lse * LOG2E, float("inf"))
    o_out = tl.program_id(1).to(tl.int64) * rows + o_term
    tl.store(p_delta + o_out, b_delta, mask=o_term < rows)
    tl.store(p_lse2 + o_out, b_lse, mask=o_term < rows)


def row_terms(out, lse, dout, dlse, lead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What the backward kernels need of each row, float32 [b, h, rows]: lse2 and delta.

    There are `lead` terms, s rows, and padding to a multiple of 4.
    """
    out_heads, dout_heads = head_major(out), head_major(dout)
    b, h, s, dv = out_heads.shape
    rows = -(-(lead + s) // 4) * 4  # 16 bytes: what TMA asks of strides
    lse2, delta = lse.new_empty((b, h, rows)), lse.new_empty((b, h, rows))
    on_grid(s2_row_terms_kernel, (triton.cdiv(rows, TERM_ROWS), h * b))(
        out,
        dout,
        lse,
        dlse,
        lse2,
        delta,
        rows_and_heads(out_heads),
        rows_and_heads(dout_heads),
        *lse.stride()[:2],
        s,
        rows,
        lead or None,
        h,
        DV=dv,
        BLOCK_DV=pad(dv),
        M=TERM_ROWS,
        **FUSED,
    )
    return lse2, delta


def launch_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    pattern: LayerPattern,
    softmax_scale: float,
    q_offset: int = 0,
    *,
    packing: Packing | None = None,
    near: Near | None = None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    deterministic: bool = True,
    dkdv_config: TileConfig | None = None,
    dq_config: TileConfig | None = None,
    tf32: bool = False,
    tma_add: bool = True,
    slots: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of one forward pass; inputs checked by the caller.

    Args:
        q, k, v, out, lse: as in `launch_forward`; dout like out, dlse like lse or None.
        deterministic: the separate variant, else the fused one.
        near: which keys k and v are, where not all; far blocks that no head has get gradients of 0.
        into: the places of dq, dk and dv, if they have some already, as in `launch_forward`. There
            far blocks that no head has are left as they are.
        dkdv_config, dq_config: tiles of the kernels over KV and over query tiles; default: the
            table of configs.py.
        tma_add, slots: as in `launch_dkdv`.
    """
    if packing:
        lse, dlse = lse[None], None if dlse is None else dlse[None]
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = into or gradients_like(q, k, v, near, pattern)
    lse2, delta = row_terms(out, lse, dout, dlse)
    kind = "separate" if deterministic else "fused"
    size, where = max(q.shape[-1], v.shape[-1]), capability(q.device)
    dkdv_config = dkdv_config or backward_config(kind, size, q.dtype, where)
    dkdv_config = fit(dkdv_config, pattern.block_size, gather=False)
    precision = "tf32" if tf32 else "ieee"
    common = (pattern, softmax_scale, q_offset, packing, near)
    inputs = (q, k, v, dout, lse2, delta)
    if deterministic:
        dq_config = dq_config or backward_config("dq", size, q.dtype, where)
        dq_config = fit(dq_config, pattern.block_size, gather=True)
        launch_dkdv(*inputs, dk, dv, *common, dkdv_config, precision, slots=slots)
        launch_dq(*inputs, dq, *common, dq_config, precision)
        return dq, dk, dv
    if isinstance(q, Operand):
        raise CannotRecordError("sums of dq in a buffer")
    b, _, s, d = head_major(q).shape
    for kv_heads, heads in _head_chunks(q, k, v):
        shape = (b, len(heads), s, d)
        dq_sum = torch.zeros(shape, dtype=torch.float32, device=q.device)
        launch_dkdv(
            *inputs,
            dk,
            dv,
            *common,
            dkdv_config,
            precision,
            kv_heads=kv_heads,
            dq_sum=dq_sum,
            tma_add=tma_add,
            slots=slots,
        )
        head_major(dq)[:, heads.start : heads.stop].copy_(dq_sum)
        del dq_sum  # before the next chunk's
    return dq, dk, dv


def gradients_like(q, k, v, near: Near | None, pattern: LayerPattern):
    """Memory for dq, dk and dv; 0 where no kernel writes, in far blocks that no head has."""
    dq, dk, dv = (empty_like(x, x.shape[-1]) for x in (q, k, v))
    clear_far(near, pattern, dk, dv)
    return dq, dk, dv


def _head_chunks(q, k, v):
    """KV heads in chunks whose float32 sum of dq takes 4% of the memory of the pass, or one head.

    Yields the ranges of KV heads and of their query heads.
    """
    h, g = q.shape[-2], k.shape[-2]
    pass_bytes = sum(x.numel() * x.element_size() for x in (q, q, k, k, v, v)) * 4 // 3
    head_bytes = q.numel() // g * 4
    chunk = max(1, min(g, int(pass_bytes * 0.04) // head_bytes))
    for first in range(0, g, chunk):
        kv_heads = range(first, min(first + chunk, g))
        yield kv_heads, range(kv_heads.start * (h // g), kv_heads.stop * (h // g))
