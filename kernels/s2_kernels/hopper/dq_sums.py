"""The sums of dq of backward_fused.py: how they lie in memory, and what stands before and after.

A sum is float32 [2, 64 * D / 2]: dq / scale of 64 rows of a head. Its halves are columns of the
head, one for each warpgroup. The elements lie as the registers of a warpgroup hold them
(`as_registers`), so that threads store 16 bytes at a time without bank conflicts. A head has a sum
for each 64 tokens, or, packed, two for each slot of packed.packed_slots.

Two small kernels in plain Triton: `s2_fused_terms_kernel` makes the row terms and sets the sums to
0; `s2_fused_dq_kernel` rounds the sums to dq.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from s2_kernels.configs import FUSED
from s2_kernels.hopper.primitives import (
    ROWS,
    TERM_LAYOUT,
    Descriptor,
    HostLayout,
    extents,
    strides_and_size,
)
from s2_kernels.launch import pad
from s2_kernels.primitives import LOG2E


@gluon.jit
def as_registers(b_x):
    """[64, N] in another order: 4 elements of a thread, then all threads, then the next 4."""
    N: gl.constexpr = b_x.shape[1]
    parts = b_x.reshape([4, 2, 8, N // 8, 4, 2])  # warp, upper or lower 8 rows, row; unit, columns
    return parts.permute([3, 0, 2, 4, 1, 5]).reshape([64, N])


@triton.jit
def place_of_tile(p_slots, i_tile, s, PACKED: tl.constexpr):
    """Of a head's i-th sum of dq: first row within its sequence, where that starts, its length,
    and where its row terms start."""
    if PACKED:
        p_slot = p_slots + i_tile // 2 * 4
        row = tl.load(p_slot) * 128 + i_tile % 2 * 64
        return row, tl.load(p_slot + 1), tl.load(p_slot + 2), tl.load(p_slot + 3)
    return i_tile * 64, i_tile * 0, i_tile * 0 + s, i_tile * 0


@triton.jit
def load_tile(p_x, strides, i_batch, i_head, o_row, length, BLOCK_D: tl.constexpr):
    """Rows of a head [64, BLOCK_D] in float32, zeros past its length."""
    o_d = tl.arange(0, BLOCK_D)
    p_x += i_batch.to(tl.int64) * strides[0] + i_head.to(tl.int64) * strides[2]
    mask = (o_row[1] < length)[:, None] & (o_d < strides[3])[None, :]
    p_rows = p_x + (o_row[0] + o_row[1]).to(tl.int64) * strides[1]
    return tl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["s", "rows", "heads"])
def s2_fused_terms_kernel(
    p_out,
    p_dout,
    p_lse,
    p_dlse,
    p_lse2,
    p_delta,
    p_sums,
    p_slots,
    strides_out,
    strides_dout,
    s,
    rows,
    heads,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The row terms of 64 rows, as backward.s2_row_terms_kernel, and their sums of dq set to 0.

    Grid: (tiles, heads * batch). lse, dlse: [b, h, s]; lse2, delta: [b, h, rows].
    """
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    o_sum = tl.arange(0, 64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_tile) * (64 * BLOCK_D)
    tl.store(p_sums + at + o_sum, tl.zeros([64, BLOCK_D], tl.float32))
    row, start, length, terms = place_of_tile(p_slots, i_tile, s, PACKED)
    o_row = row + tl.arange(0, 64)
    b_out = load_tile(p_out, strides_out, i_batch, i_head, (start, o_row), length, BLOCK_D)
    b_dout = load_tile(p_dout, strides_dout, i_batch, i_head, (start, o_row), length, BLOCK_D)
    b_delta = tl.sum(b_out * b_dout, 1)
    p_row = tl.program_id(1).to(tl.int64) * s + start + o_row
    b_lse = tl.load(p_lse + p_row, mask=o_row < length, other=float("-inf"))
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + p_row, mask=o_row < length, other=0.0)
    sees = b_lse != float("-inf")
    end = length if PACKED else rows
    p_term = tl.program_id(1).to(tl.int64) * rows + terms + o_row
    tl.store(p_delta + p_term, tl.where(sees, b_delta, 0.0), mask=o_row < end)
    tl.store(p_lse2 + p_term, tl.where(sees, b_lse * LOG2E, float("inf")), mask=o_row < end)


@triton.jit(do_not_specialize=["s", "heads"])
def s2_fused_dq_kernel(
    p_sums,
    p_dq,
    p_slots,
    strides_dq,
    s,
    heads,
    scale,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dq of 64 rows out of their sums. Grid: (tiles, heads * batch)."""
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, length, terms = place_of_tile(p_slots, i_tile, s, PACKED)
    if row < length:
        HALF: tl.constexpr = BLOCK_D // 2
        o_m, o_d = tl.arange(0, 64), tl.arange(0, BLOCK_D)
        # See as_registers: 16 rows a warp, of which a thread has two, 8 apart; pairs of columns.
        o_m_sum = o_m // 16 * 128 + o_m % 8 * 16 + o_m // 8 % 2 * 2
        o_d_sum = o_d // HALF * (64 * HALF) + o_d % HALF // 8 * 512 + o_d % 8 // 2 * 4 + o_d % 2
        at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_tile) * (64 * BLOCK_D)
        b_sum = tl.load(p_sums + at + o_m_sum[:, None] + o_d_sum[None, :])
        p_dq += i_batch.to(tl.int64) * strides_dq[0] + i_head.to(tl.int64) * strides_dq[2]
        p_rows = p_dq + (start + row + o_m).to(tl.int64) * strides_dq[1]
        mask = (row + o_m < length)[:, None] & (o_d < strides_dq[3])[None, :]
        b_dq = (b_sum * scale).to(p_dq.dtype.element_ty)
        tl.store(p_rows[:, None] + o_d[None, :], b_dq, mask=mask)


def sum_descriptor(sums: torch.Tensor) -> Descriptor:
    """A TMA descriptor over the sums of dq, which moves a warpgroup's half of a tile."""
    half = sums.shape[-1] // ROWS
    shape = [sums.numel() // half, half]
    return Descriptor(sums, shape, [half, 1], [ROWS, half], HostLayout.of(TERM_LAYOUT))


def begin(out, lse, dout, dlse, slots, n_tiles, rows):
    """Sums of 0 [b * h, n_tiles, 2, 64 * D / 2], and lse2 and delta [b, h, rows], all float32.

    Args:
        out, dout: [b, s, h, d] or packed [T, h, d]; lse, dlse (or None): contiguous [b, h, s].
        slots: packed.packed_slots, or None for a dense batch.
    """
    b, s, h, d, *_ = extents(out)
    lse2, delta = lse.new_empty((b, h, rows)), lse.new_empty((b, h, rows))
    sums = lse.new_empty((b * h, n_tiles, 2, ROWS * pad(d) // 2))
    s2_fused_terms_kernel[(n_tiles, b * h)](
        out,
        dout,
        lse,
        dlse,
        lse2,
        delta,
        sums,
        slots,
        strides_and_size(out),
        strides_and_size(dout),
        s,
        rows,
        h,
        BLOCK_D=pad(d),
        PACKED=slots is not None,
        **FUSED,
    )
    return sums, lse2, delta


def end(sums, dq, slots, scale):
    """Writes dq, of [b, s, h, d] or packed [T, h, d], from its sums."""
    _, s, h, d, *_ = extents(dq)
    s2_fused_dq_kernel[(sums.shape[1], sums.shape[0])](
        sums,
        dq,
        slots,
        strides_and_size(dq),
        s,
        h,
        scale,
        BLOCK_D=pad(d),
        PACKED=slots is not None,
        **FUSED,
    )
