"""Which program works on which part of the backward pass over KV blocks, heaviest first.

A KV tile on the shard is seen by up to the whole sequence, one off it by the local window: columns
of the score matrix of very different length. A column that would keep one multiprocessor busy after
the others are done is cut into pieces, whose partial sums are added afterwards in a fixed order;
cutting more than balance needs would cost memory and time. The list is O(heads x blocks).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from s2_kernels.pattern import LayerPattern

SHORTEST_PIECE = 32
"""Tiles below which a column is not cut: adding up its pieces would cost more than it saves."""


def round_up(n: int) -> int:
    """The next of eight sizes per power of two.

    Packed batches have other lengths every time. Rounded, a few work lists serve them all: a new
    one is copied to the device, which waits for it.
    """
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


class ColumnWork(NamedTuple):
    """The work of one launch.

    Attributes:
        items: int32 [n_items, 5] on the device: KV head, KV tile, piece, number of pieces, slot of
            the piece in the scratch memory (-1: the column is whole and writes its result itself).
        cut: int32 [n_cut, 4] on the device: KV head, KV tile, first slot, number of pieces.
        n_slots: pieces that need scratch memory, per sequence.
    """

    items: torch.Tensor
    cut: torch.Tensor
    n_slots: int


def column_costs(pattern, heads, s, t, q_offset, tile_m, tile_n) -> np.ndarray:
    """Query tiles that each KV tile meets, over its group's query heads: [len(heads), tiles]."""
    start = np.arange(-(-t // tile_n), dtype=np.int64) * tile_n
    n_blocks = -(-t // pattern.block_size)
    costs = []
    for head in heads:
        life = pattern.rules[head].lifetimes(n_blocks).numpy()
        block = start // pattern.block_size
        end = np.minimum((block + life[block]) * pattern.block_size, q_offset + s)
        rows = np.maximum(end - np.maximum(start, q_offset), 0)
        costs.append(-(-rows // tile_m))
    return np.stack(costs) * (pattern.heads // pattern.kv_heads)


@functools.lru_cache(maxsize=256)
def column_work(
    pattern: LayerPattern,
    heads: range,
    s: int,
    t: int,
    q_offset: int,
    tile_m: int,
    tile_n: int,
    n_seqs: int,
    slots: int,
    device: torch.device,
) -> ColumnWork:
    """The columns of some KV heads, cut and ordered for `slots` programs that run at a time.

    s, t: rows and KV tokens of the longest sequence; kernels clip to the sequence they work on.
    """
    costs = column_costs(pattern, heads, s, t, q_offset, tile_m, tile_n)
    head, column = np.indices(costs.shape)
    head, column, cost = head.ravel() + heads.start, column.ravel(), costs.ravel()
    # Longest-first filling ends within one piece of perfect balance: half an even share is enough.
    limit = max(SHORTEST_PIECE, int(cost.sum()) * n_seqs // (2 * slots))
    pieces = np.where(cost > limit, -(-cost // limit), 1)
    is_cut = pieces > 1
    first_slot = np.where(is_cut, np.cumsum(pieces * is_cut) - pieces, -1)

    item = np.repeat(np.arange(len(cost)), pieces)
    piece = np.arange(len(item)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    slot = np.where(is_cut[item], first_slot[item] + piece, -1)
    items = np.stack([head[item], column[item], piece, pieces[item], slot], axis=1)
    order = np.lexsort((column[item], head[item], -(cost / pieces)[item]))
    cut = np.stack([head, column, first_slot, pieces], axis=1)[is_cut]

    def on_device(x):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

    return ColumnWork(on_device(items[order]), on_device(cut), int((pieces * is_cut).sum()))
