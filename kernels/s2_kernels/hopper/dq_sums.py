"""The sums of dq of backward_fused.py: how they lie in memory, and what stands before and after.

A sum is float32 [2, 64 * D / 2]: dq / scale of 64 rows of a head, or int32 (see below). Its halves
are columns of the head, one for each warpgroup. The elements lie as the registers of a warpgroup
hold them (`as_registers`), so that threads store 16 bytes at a time without bank conflicts. A head
has a sum for each 64 tokens, or, packed, two for each slot of packed.packed_slots.

Small kernels in plain Triton: `s2_hopper_sums_begin_kernel` makes the row terms and sets the sums
to 0; `s2_hopper_sums_end_kernel` rounds the sums to dq.

Whole numbers add up to the same in any order. For them a row has a unit, how many make 1: a power
of two such that no sum of any of its terms leaves 31 bits. With probabilities that add up to 1,

    |dq / scale| <= (|dO| max_j |v_j| + |delta|) max_jc |k_jc|

with the lengths of vectors (Cauchy-Schwarz); `s2_hopper_sums_limits_kernel` looks for the two
maxima. The bound lies some 10 to 13 powers of two above typical gradients, which leaves them 17 to
20 bits; bfloat16 keeps 8. Where it is infinite or NaN, the row's dq comes out as NaN.
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
def place_of_tile(p_slots, i_tile, s, q_offset, PACKED: tl.constexpr):
    """Of a head's i-th sum of dq: first row within its sequence, where that starts, its length,
    and where its row terms start. The row is below 0 where the first query lies further on."""
    if PACKED:
        p_slot = p_slots + i_tile // 2 * 4
        row = tl.load(p_slot) * 128 + i_tile % 2 * 64
        return row, tl.load(p_slot + 1), tl.load(p_slot + 2), tl.load(p_slot + 3)
    return i_tile * 64 - q_offset % 64, i_tile * 0, i_tile * 0 + s, i_tile * 0 + q_offset % 4


@triton.jit
def load_tile(p_x, strides, i_batch, i_head, o_row, length, BLOCK_D: tl.constexpr):
    """Rows of a head [64, BLOCK_D] in float32, zeros where it has none."""
    o_d = tl.arange(0, BLOCK_D)
    p_x += i_batch.to(tl.int64) * strides[0] + i_head.to(tl.int64) * strides[2]
    there = (o_row[1] >= 0) & (o_row[1] < length)
    mask = there[:, None] & (o_d < strides[3])[None, :]
    p_rows = p_x + (o_row[0] + o_row[1]).to(tl.int64) * strides[1]
    return tl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["s", "rows", "q_offset", "heads", "group"])
def s2_hopper_sums_begin_kernel(
    p_out,
    p_dout,
    p_lse,
    p_dlse,
    p_lse2,
    p_delta,
    p_sums,
    p_slots,
    p_unit,
    p_limits,
    strides_out,
    strides_dout,
    s,
    rows,
    q_offset,
    heads,
    group,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The row terms of 64 rows, as backward.s2_row_terms_kernel, and their sums of dq set to 0.

    Grid: (tiles, heads * batch). lse, dlse: [b, h, s]; lse2, delta: [b, h, rows].
    """
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    o_sum = tl.arange(0, 64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_tile) * (64 * BLOCK_D)
    tl.store(p_sums + at + o_sum, tl.zeros([64, BLOCK_D], p_sums.dtype.element_ty))
    row, start, length, terms = place_of_tile(p_slots, i_tile, s, q_offset, PACKED)
    o_row = row + tl.arange(0, 64)
    b_out = load_tile(p_out, strides_out, i_batch, i_head, (start, o_row), length, BLOCK_D)
    b_dout = load_tile(p_dout, strides_dout, i_batch, i_head, (start, o_row), length, BLOCK_D)
    b_delta = tl.sum(b_out * b_dout, 1)
    p_row = tl.program_id(1).to(tl.int64) * s + start + o_row
    there = (o_row >= 0) & (o_row < length)
    b_lse = tl.load(p_lse + p_row, mask=there, other=float("-inf"))
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + p_row, mask=there, other=0.0)
    sees = b_lse != float("-inf")
    stored = there
    if not PACKED:  # of rows that are not there, too: TMA reads some of them
        stored = (terms + o_row >= 0) & (terms + o_row < rows)
    p_term = tl.program_id(1).to(tl.int64) * rows + terms + o_row
    tl.store(p_delta + p_term, tl.where(sees, b_delta, 0.0), mask=stored)
    tl.store(p_lse2 + p_term, tl.where(sees, b_lse * LOG2E, float("inf")), mask=stored)
    if p_unit is not None:
        p_limit = p_limits + (i_batch * (heads // group) + i_head // group) * 2
        k_max, v_max = tl.load(p_limit), tl.load(p_limit + 1)
        b_limit = (tl.sqrt(tl.sum(b_dout * b_dout, 1)) * v_max + tl.abs(b_delta)) * k_max
        # One power of two more than needed, for what P and dS are rounded to.
        b_unit = tl.exp2(tl.minimum(29 - tl.ceil(tl.log2(tl.maximum(b_limit, 1e-30))), 100.0))
        tl.store(
            p_unit + p_term, tl.where(b_limit < float("inf"), b_unit, float("nan")), mask=stored
        )


@triton.jit(do_not_specialize=["s", "kv_heads"])
def s2_hopper_sums_limits_kernel(
    p_k, p_v, p_limits, strides_k, strides_v, s, kv_heads, BLOCK_D: tl.constexpr
):
    """The largest |k_jc| and |v_j| of each KV head, float32 [b, g, 2], which are 0 before.

    Grid: (tiles, g * b). They are compared as whole numbers: those of positive floats are in the
    same order, and NaN is the largest.
    """
    i_batch, i_kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    rows = (tl.program_id(0) * 64, tl.arange(0, 64))
    length = s - tl.program_id(0) * 64
    b_k = load_tile(p_k, strides_k, i_batch, i_kv, rows, length, BLOCK_D)
    b_v = load_tile(p_v, strides_v, i_batch, i_kv, rows, length, BLOCK_D)
    k_bits = tl.max(tl.max(tl.abs(b_k).to(tl.int32, bitcast=True), 1), 0)
    v_bits = tl.max(tl.sqrt(tl.sum(b_v * b_v, 1)).to(tl.int32, bitcast=True), 0)
    tl.atomic_max(p_limits + tl.program_id(1) * 2, k_bits, sem="relaxed")
    tl.atomic_max(p_limits + tl.program_id(1) * 2 + 1, v_bits, sem="relaxed")


@triton.jit(do_not_specialize=["s", "rows", "q_offset", "heads"])
def s2_hopper_sums_end_kernel(
    p_sums,
    p_dq,
    p_slots,
    p_unit,
    strides_dq,
    s,
    rows,
    q_offset,
    heads,
    scale,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dq of 64 rows out of their sums. Grid: (tiles, heads * batch)."""
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, length, terms = place_of_tile(p_slots, i_tile, s, q_offset, PACKED)
    if row < length:
        HALF: tl.constexpr = BLOCK_D // 2
        o_m, o_d = tl.arange(0, 64), tl.arange(0, BLOCK_D)
        there = (row + o_m >= 0) & (row + o_m < length)
        # See as_registers: 16 rows a warp, of which a thread has two, 8 apart; pairs of columns.
        o_m_sum = o_m // 16 * 128 + o_m % 8 * 16 + o_m // 8 % 2 * 2
        o_d_sum = o_d // HALF * (64 * HALF) + o_d % HALF // 8 * 512 + o_d % 8 // 2 * 4 + o_d % 2
        at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i_tile) * (64 * BLOCK_D)
        b_sum = tl.load(p_sums + at + o_m_sum[:, None] + o_d_sum[None, :])
        if p_unit is not None:
            p_term = p_unit + tl.program_id(1).to(tl.int64) * rows + terms
            b_sum /= tl.load(p_term + row + o_m, mask=there, other=1.0)[:, None]
        p_dq += i_batch.to(tl.int64) * strides_dq[0] + i_head.to(tl.int64) * strides_dq[2]
        p_rows = p_dq + (start + row + o_m).to(tl.int64) * strides_dq[1]
        mask = there[:, None] & (o_d < strides_dq[3])[None, :]
        b_dq = (b_sum * scale).to(p_dq.dtype.element_ty)
        tl.store(p_rows[:, None] + o_d[None, :], b_dq, mask=mask)


def sum_descriptor(sums: torch.Tensor) -> Descriptor:
    """A TMA descriptor over the sums of dq, which moves a warpgroup's half of a tile."""
    half = sums.shape[-1] // ROWS
    shape = [sums.numel() // half, half]
    return Descriptor(sums, shape, [half, 1], [ROWS, half], HostLayout.of(TERM_LAYOUT))


def begin_sums(out, lse, dout, dlse, slots, n_tiles, rows, q_offset, kv=None):
    """Sums of 0 [b * h, n_tiles, 2, 64 * D / 2]; lse2, delta and unit, float32 [b, h, rows].

    Args:
        out, dout: [b, s, h, d] or packed [T, h, d]; lse, dlse (or None): contiguous [b, h, s].
        slots: packed.packed_slots, or None for a dense batch.
        kv: k and v, where sums are to be whole numbers; otherwise unit is None.
    """
    b, s, h, d, *_ = extents(out)
    lse2, delta = lse.new_empty((b, h, rows)), lse.new_empty((b, h, rows))
    unit = limits = None
    dtype, g = torch.float32, h
    if kv:
        dtype, g, unit = torch.int32, kv[0].shape[-2], torch.empty_like(delta)
        limits = lse.new_zeros((b, g, 2))
        s2_hopper_sums_limits_kernel[(triton.cdiv(s, ROWS), b * g)](
            *kv,
            limits.view(torch.int32),
            *(strides_and_size(x) for x in kv),
            s,
            g,
            BLOCK_D=pad(d),
            **FUSED,
        )
    sums = lse.new_empty((b * h, n_tiles, 2, ROWS * pad(d) // 2), dtype=dtype)
    s2_hopper_sums_begin_kernel[(n_tiles, b * h)](
        out,
        dout,
        lse,
        dlse,
        lse2,
        delta,
        sums,
        slots,
        unit,
        limits,
        strides_and_size(out),
        strides_and_size(dout),
        s,
        rows,
        q_offset,
        h,
        h // g,
        BLOCK_D=pad(d),
        PACKED=slots is not None,
        **FUSED,
    )
    return sums, lse2, delta, unit


def round_sums(sums, dq, slots, q_offset, scale, unit):
    """Writes dq, of [b, s, h, d] or packed [T, h, d], from its sums; unit: of begin_sums."""
    _, s, h, d, *_ = extents(dq)
    s2_hopper_sums_end_kernel[(sums.shape[1], sums.shape[0])](
        sums,
        dq,
        slots,
        unit,
        strides_and_size(dq),
        s,
        0 if unit is None else unit.shape[-1],
        q_offset,
        h,
        scale,
        BLOCK_D=pad(d),
        PACKED=slots is not None,
        **FUSED,
    )
