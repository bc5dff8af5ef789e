"""The parts of a unit of decoding added up: by a program of decode.py, or by a kernel that follows.

A part is what one program made of its tiles of a unit: out, normalised, and the log of the
softmax's sum (lse), of each row. Parts are added up by the numbers of their programs, never in the
order in which these ended, and in tiles of the same shape both ways (`merge_tile`): the same bits.
"""

import triton
import triton.language as tl

from s2_kernels.decode_lists import kept_ends, parts_of
from s2_kernels.launch import pad


@triton.jit
def store_rows_of(
    u, o_m, n_rows, b_out, b_lse, p_out, p_lse, strides_out, stride_lse, kv_heads, n_tiles_q,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Stores out [M, BLOCK_DV] and lse [M] of rows o_m [M] of unit u, which has n_rows."""
    i_seq = (u // (kv_heads * n_tiles_q)).to(tl.int64)
    o_token = u // kv_heads % n_tiles_q * TOKENS + o_m // GROUP
    o_head = u % kv_heads * GROUP + o_m % GROUP
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < n_rows
    p_row = p_out + i_seq * strides_out[0] + o_token.to(tl.int64) * strides_out[1]
    p_row += o_head * strides_out[2]
    m_out = m_m[:, None] & (o_dv < DV)[None, :]
    tl.store(p_row[:, None] + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    o_lse = (i_seq * kv_heads * GROUP + o_head) * stride_lse + o_token
    tl.store(p_lse + o_lse, b_lse, mask=m_m)


@triton.jit
def merge_parts(
    u, i_first, i_stop, o_m, n_rows, p_part, p_part_lse, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, RM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [ROWS, BLOCK_DV] and lse [ROWS] of rows o_m [ROWS] of unit u, which has n_rows.

    Adds up the parts of programs i_first..i_stop-1 in this order, PARTS at a time; a part has room
    for RM rows. `.cg`: they were written on other multiprocessors, so what an L1 cache may hold of
    that memory is old.
    """
    ROWS: tl.constexpr = o_m.shape[0]
    o_dv = tl.arange(0, BLOCK_DV)
    b_acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for i in tl.range(i_first, i_stop, PARTS):
        o_i = i + tl.arange(0, PARTS)
        m_part = (o_i < i_stop)[:, None] & (o_m < n_rows)[None, :]
        o_part = (o_i + u).to(tl.int64)[:, None] * RM + o_m[None, :]  # [PARTS, ROWS]
        b_lse = tl.load(p_part_lse + o_part, m_part, other=float("-inf"), cache_modifier=".cg")
        mask = m_part[:, :, None] & (o_dv < DV)[None, None, :]
        p_parts = p_part + (o_part * DV)[:, :, None] + o_dv[None, None, :]
        b_part = tl.load(p_parts, mask, other=0.0, cache_modifier=".cg")
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp(b_lse - b_shift[None, :])
        b_scale = tl.exp(b_max - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_weight, 0)
        b_acc = b_acc * b_scale[:, None] + tl.sum(b_part * b_weight[:, :, None], 0)
        b_max = b_new
    sees = b_sum > 0
    b_sum = tl.where(sees, b_sum, 1.0)
    return b_acc / b_sum[:, None], tl.where(sees, b_max + tl.log(b_sum), float("-inf"))


@triton.jit(do_not_specialize=["s", "stride_lse", "n_units", "n_tiles_q", "kv_heads", "n_programs"])
def s2_merge_kernel(
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_ends,
    strides_out,
    stride_lse,
    s,
    kv_heads,
    n_tiles_q,
    n_units,
    n_programs,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    START: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (units, groups of ROWS rows). A unit of one part or none has its output already."""
    u = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, total, start, n_tiles = kept_ends(u, p_ends, n_units, START)
    i_first, i_stop = parts_of(u, split, total, start, n_tiles, n_units, n_programs, START)
    if i_stop - i_first < 2:
        return
    n_rows = tl.minimum(s - u // kv_heads % n_tiles_q * TOKENS, TOKENS) * GROUP
    o_m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_out, b_lse = merge_parts(
        u, i_first, i_stop, o_m, n_rows, p_part, p_part_lse, DV, BLOCK_DV, TOKENS * GROUP, PARTS
    )
    store_rows_of(
        u, o_m, n_rows, b_out, b_lse, p_out, p_lse, strides_out, stride_lse, kv_heads, n_tiles_q,
        DV, BLOCK_DV, GROUP, TOKENS,
    )  # fmt: skip


def merge_tile(rows: int, dv: int, threads: int, parts: int) -> tuple[int, int]:
    """(rows, parts) that a merge adds up at a time: up to 128 numbers a thread, which do not spill.

    All parts of a unit at once where that goes: each round of a merge waits for memory once more.
    The same for both ways to merge: other tiles add up in another order.

    Args:
        rows: of a unit. parts: that a unit has, about.
    """
    at_once = min(max(triton.next_power_of_2(parts), 4), 32)
    most = max(1, 128 * threads // (at_once * pad(dv)))
    return min(triton.next_power_of_2(rows), most, 8), at_once
