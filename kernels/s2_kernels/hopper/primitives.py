"""What the Hopper kernels share: items of persistent programs, half-tiles, barriers, descriptors.

A *half-tile* is 64 rows, what one warpgroup's tensor cores take: of queries or of KV. Blocks have
64 tokens or a multiple, so that a half-tile lies in one block.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.launch import pad, tma_strides
from s2_kernels.primitives import block_at, count_blocks, kept_segments, load_rule

ROWS = 64
"""Rows of a half-tile."""


@gluon.jit
def dealt_items(p_starts):
    """This program's items: the first, and how many (schedule.deal)."""
    first = gl.load(p_starts + gl.program_id(0))
    return first, gl.load(p_starts + gl.program_id(0) + 1) - first


@gluon.jit
def keep_order(ready, phase):
    """A second wait for what has been waited for: keeps what stands before it before it.

    ptxas moves a wait for the tensor cores up over the arithmetic that it was to overlap with, but
    not over the loop that waits for a barrier.
    """
    mbarrier.wait(ready, phase)


@gluon.jit
def query_item(item, heads, n_tiles_q):
    """Batch, head and query tile of an item of schedule.query_tiles."""
    return item // n_tiles_q // heads, item // n_tiles_q % heads, n_tiles_q - 1 - item % n_tiles_q


@gluon.jit
def work_list(
    item, p_table, heads, group, n_tiles_q, s, t, q_offset, B: gl.constexpr, N_BANDS: gl.constexpr
):
    """An item over queries: batch, head, first row of its tile of 128, its list of KV blocks.

    Returns (i_batch, i_head, row, rule, kept, n_interior, n_halves): the list in half-tiles, of
    which the first n_interior are seen by every row.
    """
    i_batch, i_head, i_tile = query_item(item, heads, n_tiles_q)
    row = q_offset + i_tile * 128
    last_row = gl.minimum(row + 128, q_offset + s) - 1
    k_last = gl.maximum(t - 1, 0) // B
    rule = load_rule(p_table, i_head // group, N_BANDS)
    kept = kept_segments(rule, row // B, last_row // B, k_last, True, N_BANDS)
    n_halves = count_blocks(kept, 2 * N_BANDS + 1) * (B // 64)
    return i_batch, i_head, row, rule, kept, count_blocks(kept, N_BANDS) * (B // 64), n_halves


@gluon.jit
def half_block(kept, position, B: gl.constexpr, N_SEGMENTS: gl.constexpr):
    """The half-tile of KV, in units of 64 rows, at a position of the list."""
    block = block_at(kept, position // (B // 64), N_SEGMENTS)
    return block * (B // 64) + position % (B // 64)


@gluon.jit
def make_barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers that COUNT arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_notes(N: gl.constexpr):
    """N int32 in shared memory, by which the producer tells the consumers what to do with a load.

    Written before the barrier that the load completes, so that who waited for it may read them.
    """
    return gl.allocate_shared_memory(gl.int32, [N, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def write(notes, index, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    notes.index(index).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def read(notes, index, layout: gl.constexpr):
    """A note, [1]."""
    return notes.index(index).load(layout)


@gluon.jit
def read_scalar(notes, index):
    return gl.max(read(notes, index, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def load_rows(desc, i_batch, i_head, row, ready, buffer):
    """64 rows of a head into a buffer [64, D]; zeros where they lie outside of the tensor."""
    D: gl.constexpr = buffer.shape[1]
    tma.async_copy_global_to_shared(
        desc, [i_batch, i_head, row, 0], ready, buffer.reshape([1, 1, 64, D])
    )


@gluon.jit
def store_rows(desc, i_batch, i_head, row, buffer):
    """64 rows of a head out of a buffer [64, D]; rows outside of the tensor are left out."""
    D: gl.constexpr = buffer.shape[1]
    tma.async_copy_shared_to_global(desc, [i_batch, i_head, row, 0], buffer.reshape([1, 1, 64, D]))


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    """A TMA descriptor over [batch, head, row, d] that moves [1, 1, 64, padded d]."""
    box = [1, 1, ROWS, pad(x.shape[-1])]
    return TensorDescriptor(x, list(x.shape), tma_strides(x), box, box_layout(box[-1], x.dtype))


@functools.cache
def box_layout(columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box of 64 rows lies in shared memory: swizzled, as the tensor cores read it."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, columns], dtype)


TERM_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
"""How the row terms lie in shared memory: plain, [1, 64] float32."""


def term_descriptor(x: torch.Tensor) -> TensorDescriptor:
    """A TMA descriptor over row terms [batch, head, rows] as [batch * head, rows]: [1, 64]."""
    flat = x.flatten(0, 1)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, ROWS], TERM_LAYOUT)
