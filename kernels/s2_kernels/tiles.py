"""What a program begins with, and what a tile of keys or of queries adds, however it was found.

Patterns of lifetimes (forward.py, backward_dq.py, backward_dkdv.py) and block masks
(block_sparse/kernels.py) differ in how a program finds its tiles and in what it masks. Which rows
it works on, and what it does with a tile, is here. Shapes and formulas as in forward.py and
backward.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from s2_kernels.primitives import head_offset, load_terms, load_tile, online_softmax


class Matrix(NamedTuple):
    """The rows of one head, [rows, D] of [.., BLOCK_D]: by pointer or by TMA descriptor.

    Attributes:
        base: pointer to the head's first row (of the sequence, where sequences are packed).
        desc: descriptor over [batch, head, row, d]; `base` once more where there is none, since
            Triton 3.6 cannot return a tuple that holds None.
        stride: from row to row.
        batch, head: where the head lies, for the descriptor.
    """

    base: tl.tensor
    desc: tl.tensor
    stride: tl.tensor
    batch: tl.tensor
    head: tl.tensor


@triton.jit
def matrix_of(p_x, d_x, strides, i_batch, i_head, first):
    """A head's rows from row `first` on, of a tensor with strides (batch, row, head).

    d_x: its descriptor, or None. Packed sequences begin at some row of batch 0, others at row 0.
    """
    p_x += head_offset(strides, i_batch, i_head, first)
    if d_x is None:
        d_x = p_x
    matrix = Matrix(p_x, d_x, strides[1], i_batch, i_head)
    return matrix


@triton.jit
def query_operands(at, p_q, p_k, p_v, d_k, d_v, strides_q, strides_k, strides_v):
    """q of the head that a program over query rows works on, and k and v of its KV head.

    at: a `QueryProgram`, or the same of block_sparse.
    """
    q = matrix_of(p_q, None, strides_q, at.batch, at.head, at.start_q)
    k = matrix_of(p_k, d_k, strides_k, at.batch, at.kv_head, at.start_k)
    v = matrix_of(p_v, d_v, strides_v, at.batch, at.kv_head, at.start_k)
    return q, k, v


@triton.jit
def load(of, o_row, m_row, row, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
         TMA: tl.constexpr):  # fmt: skip
    """Tile [ROWS, BLOCK_D] of a Matrix: the rows o_row, or through TMA from `row` in memory on."""
    return load_tile(
        of.base, of.desc, of.stride, o_row, m_row, of.batch, of.head, row, D, BLOCK_D, ROWS, TMA
    )


@triton.jit
def score(b_q, k, v, keys, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK_DV: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Of a `KeyTile`: keys [N, D], values [N, DV], and the raw scores [M, N] of b_q [M, D]."""
    b_k = load(k, keys.rows, keys.there, keys.first_row, D, BLOCK_D, N, TMA)
    b_v = load(v, keys.rows, keys.there, keys.first_row, DV, BLOCK_DV, N, TMA)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    return b_k, b_v, b_s


@triton.jit
def add_values(b_s, b_v, b_acc, b_m, b_l, scale_log2, MASKED: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Forward: out [M, DV], maximum and sum with a tile's scores b_s [M, N] and values b_v."""
    b_p, b_acc, b_m, b_l = online_softmax(b_s, b_acc, b_m, b_l, scale_log2, MASKED)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def add_to_dq(b_s, b_k, b_v, b_dout, b_lse2, b_delta, b_dq, scale_log2, PRECISION: tl.constexpr):
    """dq [M, D] / scale with the share of a tile of keys, whose scores are b_s [M, N]."""
    b_p = tl.exp2(b_s * scale_log2 - b_lse2[:, None])
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def add_to_dkdv(
    b_s, b_q, b_dout, b_v, b_dk, b_dv, lse2, delta, o_row, m_row, row, scale_log2,
    M: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv with the share of a tile of queries, whose scores are b_s [N, M].

    lse2, delta: the row terms as Matrix, without a stride. Also returns dS^T [N, M].
    """
    b_lse2 = load_terms(
        lse2.base, lse2.desc, o_row, m_row, lse2.batch, lse2.head, row, M, TMA
    )  # [M]
    b_p = tl.exp2(b_s * scale_log2 - b_lse2[None, :])
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
    # Read late: in registers from the start, the two terms would spill.
    b_delta = load_terms(delta.base, delta.desc, o_row, m_row, delta.batch, delta.head, row, M, TMA)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    return tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION), b_dv, b_ds
