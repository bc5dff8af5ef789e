"""Keys of which, far back, only those that are kept forever are in memory: rows and positions.

Under context parallelism a chunk of a sequence sees *near*, whole blocks up to its own end, and
*far*, of all that lies before near only the blocks that a head keeps forever. K and V hold both,
one after the other, and the kernels walk their lists by positions as ever. A position is turned
into a row of memory where a tile is loaded or stored, and nowhere else (`primitives.key_row`).

    block rows    0 .. row - 1               row ..
    hold          forever blocks of a head   every block of the sequence
                  before `start`, ascending  from `start` on
"""

from typing import NamedTuple

import numpy as np
import torch

from s2_kernels.cache import count_selected
from s2_kernels.pattern import FOREVER, HeadRule, LayerPattern


class Near(NamedTuple):
    """Where near begins; both in blocks, and above 0 for `start`.

    Attributes:
        start: the first block of near, counted from the start of the sequence.
        row: where it lies in memory. A head may have fewer far blocks than that: what lies between
            belongs to nobody, and must be finite.
    """

    start: int
    row: int

    def is_there(self, rule: HeadRule, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of a head are in memory; blocks ascend from 0."""
        lives = rule.lifetimes(int(blocks[-1]) + 1).numpy()[blocks]
        return (blocks >= self.start) | (lives == FOREVER)

    def rows(self, rule: HeadRule, blocks: np.ndarray) -> np.ndarray:
        """The block rows of blocks that are there."""
        stride = rule.bands[-1].stride
        far = (blocks - -rule.shift % stride) // stride
        return np.where(blocks < self.start, far, blocks - self.start + self.row)

    def row_slices(self, rule: HeadRule, kept: list[slice]) -> list[slice]:
        """Where slices of blocks, which are there, lie in memory; in the same order."""
        found = []
        for blocks in kept:
            whole = range(blocks.start, blocks.stop, blocks.step)
            n_far = len(range(blocks.start, min(blocks.stop, self.start), blocks.step))
            for part, step in ((whole[:n_far], 1), (whole[n_far:], blocks.step)):
                if part:
                    first = int(self.rows(rule, np.array(part[0])))
                    found.append(slice(first, first + (len(part) - 1) * step + 1, step))
        return found

    def blocks(self, pattern: LayerPattern, n_rows: int) -> torch.Tensor:
        """The block in each block row, int64 [kv_heads, n_rows]; -1 where there is none."""
        rows = torch.arange(n_rows)
        strides, shifts = torch.tensor([(r.bands[-1].stride, r.shift) for r in pattern.rules]).T
        far = rows * strides[:, None] + (-shifts % strides)[:, None]
        forever = torch.tensor([r.bands[-1].reach == FOREVER for r in pattern.rules])
        far = torch.where((far < self.start) & forever[:, None], far, -1)
        return torch.where(rows < self.row, far, rows - self.row + self.start)

    def check(self, pattern: LayerPattern, tokens: int, q_offset: int) -> None:
        """Refuses what queries from q_offset on cannot see, or `tokens` in memory cannot hold.

        Raises:
            ValueError: names the field, the value and what would do.
        """
        size = pattern.block_size
        if self.start < 1:
            raise ValueError(
                f"near.start={self.start}: must be at least 1 block; else give no near"
            )
        far = max(forever_before(rule, self.start) for rule in pattern.rules)
        if self.row < far:
            raise ValueError(
                f"near.row={self.row}: a head keeps {far} blocks before near.start={self.start} "
                f"forever; must be at least {far}"
            )
        if tokens <= self.row * size:
            raise ValueError(
                f"near.row={self.row}: k has {tokens} tokens, which end before that block of {size}"
            )
        reaches = [band.reach for rule in pattern.rules for band in rule.bands]
        reach = max((reach for reach in reaches if reach != FOREVER), default=1)
        if q_offset < (self.start + reach - 1) * size:
            raise ValueError(
                f"near.start={self.start}: q_offset={q_offset} sees a window of {reach} blocks; "
                f"near must begin at or before block {q_offset // size - reach + 1}"
            )


def forever_before(rule: HeadRule, block: int) -> int:
    """How many blocks before `block` the head keeps forever."""
    widest = rule.bands[-1]
    if widest.reach != FOREVER:
        return 0
    return count_selected(0, block - 1, widest.stride, rule.shift)


def count_keys(k: torch.Tensor, near: Near | None, pattern: LayerPattern) -> int:
    """The position at which the keys of k end, [b, t, g, d] or packed [T, g, d]."""
    tokens = k.shape[-3]
    return tokens if near is None else tokens + (near.start - near.row) * pattern.block_size


def clear_far(near: Near | None, pattern: LayerPattern, *gradients: torch.Tensor) -> None:
    """Sets far's gradients [b, t, g, d] to 0: no kernel writes those of rows that no head has."""
    if near is None or not near.row:
        return
    for x in gradients:
        x.narrow(1, 0, near.row * pattern.block_size).zero_()
