"""Blocks of some heads, moved between tensors: what an exchange packs, unpacks and adds up.

A rank of context parallelism sends rows, each one block of one KV head, picked from its keys, and
finds places for those that come. `exchange.py` says which; here they are copied, or added up. On a
GPU one Triton kernel does it (`moves_kernel.py`), that reads and writes each block once. PyTorch
does it elsewhere, and is the specification: the kernel gives the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Some blocks of a tensor.

    Attributes:
        x: [b, n, B, g, d], any strides but a contiguous last dimension.
        slots: which of the n each is, int64 [blocks].
        heads: which of the g, int64 [blocks]; None: the first.
    """

    x: Tensor
    slots: Tensor
    heads: Tensor | None

    @property
    def index(self) -> tuple:
        """x[index] is [blocks, b, B, d]."""
        heads = torch.zeros_like(self.slots) if self.heads is None else self.heads
        return slice(None), self.slots, slice(None), heads


def of_tokens(x: Tensor, block: int, slots: Tensor, heads: Tensor) -> Blocks:
    """Blocks of [b, t, g, d]: of whole blocks of tokens."""
    return Blocks(x.unflatten(1, (-1, block)), slots, heads)


def of_rows(rows: Tensor, which: Tensor) -> Blocks:
    """Rows of [R, b, B, d], each a block of one head."""
    return Blocks(rows.transpose(0, 1).unsqueeze(3), which, None)


def copy_blocks(to: Blocks, source: Blocks) -> None:
    """to's blocks become source's, one by one. Nothing is copied twice to one place."""
    if not len(to.slots):
        return
    if to.x.is_cuda:
        from s2_kernels.moves_kernel import move_blocks  # imports Triton

        move_blocks(to, source, None, add=False)
    else:
        to.x[to.index] = source.x[source.index]


def clear_blocks(to: Blocks) -> None:
    """to's blocks become 0.

    On a GPU `x[index] = 0` would not do: PyTorch copies the 0 from the host for it, and waits.
    """
    if not len(to.slots):
        return
    if to.x.is_cuda:
        from s2_kernels.moves_kernel import move_blocks  # imports Triton

        move_blocks(to, None, None, add=False)
    else:
        to.x[to.index] = 0


def add_blocks(to: Blocks, source: Blocks, starts: Tensor | None = None) -> None:
    """Adds to each block of `to` its blocks of `source`, one after the other, and rounds once.

    Sums are in float32, or float64 where `to` is.

    Args:
        starts: int64 [blocks of to + 1]: block i gets those from starts[i] to starts[i + 1] - 1;
            None: block i gets the i-th.
    """
    if not len(to.slots):
        return
    if to.x.is_cuda and to.x.dtype != torch.float64:  # the kernel's sums are in float32
        from s2_kernels.moves_kernel import move_blocks  # imports Triton

        move_blocks(to, source, starts, add=True)
        return
    wide = torch.promote_types(to.x.dtype, torch.float32)
    total, more = to.x[to.index].to(wide), source.x[source.index].to(wide)
    first = torch.arange(len(to.slots), device=to.slots.device) if starts is None else starts[:-1]
    count = torch.ones_like(first) if starts is None else starts.diff()
    for i in range(int(count.max())):
        which = (count > i).nonzero().flatten()
        total[which] += more[first[which] + i]
    to.x[to.index] = total.to(to.x.dtype)
