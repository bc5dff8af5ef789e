"""The kernel that copies and adds up blocks, and its launcher (`moves.py` has the specification).

Shapes: both tensors [b, n, B, g, d] with strides of their own; a tile is ROWS tokens of one block.
"""

import torch
import triton
import triton.language as tl

from s2_kernels.launch import on_grid, pad
from s2_kernels.moves import Blocks
from s2_kernels.plans import Plans

TILE = 8192
"""Elements of a tile: 32 to 64 registers of each of 128 threads."""
_PLANS = Plans()


@triton.jit
def block_tile(p, strides, p_slots, p_heads, i_block, i_batch, o_row, o_d):
    """Pointers [ROWS, BLOCK_D] to tokens o_row of block i_block of a list; in 64 bits."""
    slot = tl.load(p_slots + i_block)
    p += i_batch.to(tl.int64) * strides[0] + slot * strides[1]
    if p_heads is not None:
        p += tl.load(p_heads + i_block) * strides[3]
    return p + o_row[:, None].to(tl.int64) * strides[2] + o_d[None, :]


@triton.jit
def s2_move_blocks_kernel(
    p_to,
    p_from,
    p_to_slots,
    p_to_heads,
    p_slots,
    p_heads,
    p_starts,
    strides_to,
    strides_from,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid: (blocks that are written, tiles of a block, batch). Without p_from they become 0."""
    i_block, i_batch = tl.program_id(0), tl.program_id(2)
    o_row, o_d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    p_to = block_tile(p_to, strides_to, p_to_slots, p_to_heads, i_block, i_batch, o_row, o_d)
    if ADD:
        first, last = i_block, i_block + 1
        if p_starts is not None:
            first, last = tl.load(p_starts + i_block), tl.load(p_starts + i_block + 1)
        b_sum = tl.load(p_to, mask=m_d).to(tl.float32)  # [ROWS, D]
        for i in tl.range(first, last):
            p = block_tile(p_from, strides_from, p_slots, p_heads, i, i_batch, o_row, o_d)
            b_sum += tl.load(p, mask=m_d).to(tl.float32)
        tl.store(p_to, b_sum.to(p_to.dtype.element_ty), mask=m_d)
    elif p_from is None:
        tl.store(p_to, tl.zeros([ROWS, BLOCK_D], p_to.dtype.element_ty), mask=m_d)
    else:
        p = block_tile(p_from, strides_from, p_slots, p_heads, i_block, i_batch, o_row, o_d)
        tl.store(p_to, tl.load(p, mask=m_d), mask=m_d)


def move_blocks(
    to: Blocks, source: Blocks | None, starts: torch.Tensor | None, *, add: bool
) -> None:
    """`moves.copy_blocks` or, with `add`, `moves.add_blocks`; by the plan of such a move.

    Without a source it is `moves.clear_blocks`.

    Raises:
        ValueError: a last dimension is not contiguous.
    """
    source = source or Blocks(None, None, None)
    for x in (to.x, source.x):
        if x is not None and x.stride(-1) != 1:
            raise ValueError(
                f"blocks of a tensor with strides {x.stride()}: its last dimension must be "
                "contiguous; call contiguous() on it"
            )
    tensors = (to.x, source.x, *to[1:], *source[1:], starts)
    launcher = launch_add if add else launch_copy
    key = (add, *(x is not None and (x.shape, x.stride(), x.dtype) for x in tensors[:2]))
    key += tuple(None if x is None else len(x) for x in tensors[2:])
    _PLANS.run((*key, to.x.device), launcher, tensors, to.x.device)


def launch_copy(*tensors: torch.Tensor | None) -> None:
    """Tensors as the kernel takes them, from p_to to p_starts."""
    _launch(tensors, add=False)


def launch_add(*tensors: torch.Tensor | None) -> None:
    """As `launch_copy`."""
    _launch(tensors, add=True)


def _launch(tensors: tuple, *, add: bool) -> None:
    to, source, slots, *_ = tensors
    b, _, size, _, d = to.shape
    rows = min(size, max(1, TILE // pad(d)))
    on_grid(s2_move_blocks_kernel, (len(slots), size // rows, b))(
        *tensors,
        to.stride()[:4],
        (to if source is None else source).stride()[:4],
        D=d,
        BLOCK_D=pad(d),
        ROWS=rows,
        ADD=add,
        num_warps=4,
    )
