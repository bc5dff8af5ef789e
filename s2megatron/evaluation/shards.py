"""Which shard a position belongs to, and where facts lie in the block grid.

A layer cuts the sequence into blocks. A head with a stride keeps every stride-th block forever, and
which ones repeats with that stride: block k and block k + stride have one fate. So the **shard** of
a position is its block's number mod the layer's *period*, the least common multiple of the strides
with which the layer's heads keep blocks forever. Where these have few factors in common (29, 31 and
37 repeat after 33,263 blocks), positions are counted by each stride in turn. If a model answers
well from some shards only, the heads that hold the others do not do their part.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from s2_kernels import FOREVER, LayerPattern
from s2megatron.errors import ConfigError

EDGE_NAMES = (
    "fact in one block",
    "edge between key and value",
    "edge in the value",
)

MOST_SHARDS = 256
"""Of a period that positions are counted by: beyond, a shard would have no answers to speak of."""


@dataclass(frozen=True, order=True)
class Grid:
    """One way in which layers cut the sequence."""

    block_size: int
    """Tokens."""
    period: int
    """Blocks; 1 where no head keeps only some blocks forever."""

    def __str__(self) -> str:
        shards = f", {self.period} shards" if self.period > 1 else ""
        return f"blocks of {self.block_size}{shards}"

    def shard(self, position: int) -> int:
        """0 to period - 1."""
        return position // self.block_size % self.period

    def edge(self, source: int, tokens: int) -> str:
        """How a block edge meets a value of so many tokens at `source`: one of EDGE_NAMES."""
        if source // self.block_size != (source + tokens - 1) // self.block_size:
            return EDGE_NAMES[2]
        return EDGE_NAMES[1] if source % self.block_size == 0 else EDGE_NAMES[0]


def grids(patterns: Iterable[LayerPattern]) -> list[Grid]:
    """The different grids of the layers that are not dense."""
    return sorted({g for pattern in patterns if not pattern.is_dense for g in _grids(pattern)})


def _grids(pattern: LayerPattern) -> list[Grid]:
    strides = {rule.bands[-1].stride for rule in pattern.rules if rule.bands[-1].reach == FOREVER}
    period = math.lcm(*strides)
    periods = {period} if period <= MOST_SHARDS else strides
    return [Grid(pattern.block_size, period) for period in periods]


def parse_grid(text: str) -> Grid:
    """Of "BLOCK:STRIDE", as 64:16. Raises ConfigError."""
    block, _, stride = text.partition(":")
    if not (block.isdigit() and stride.isdigit() and int(block) and int(stride)):
        raise ConfigError(
            f"--grid {text}: must be BLOCK:STRIDE, tokens a block and blocks, as 64:16"
        )
    return Grid(int(block), int(stride))
