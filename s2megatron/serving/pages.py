"""The host's bookkeeping of pages: one pool for all layers, sequences and KV heads.

A page holds one block of one KV head of one layer of one sequence. Nothing here asks a GPU for
anything: which blocks live is arithmetic on lengths that the host knows (s2_kernels.cache).
"""

import numpy as np
import torch

from s2_kernels import LayerPattern
from s2_kernels.cache import alive_blocks, dying_blocks, most_pages
from s2megatron.errors import ConfigError

PREFILL_TOKENS = 1024
"""Tokens of a chunk that is written before it is attended to: all its pages live for so long."""


def pages_needed(patterns: tuple[LayerPattern, ...], sequences: int, max_length: int) -> int:
    """Pages that so many sequences of up to `max_length` tokens need, whatever they do.

    What is alive at the worst moment, and for one layer at a time the blocks of a chunk of a
    prompt's continuation, which live until its last query has seen them.
    """
    alive = sum(most_pages(pattern, max_length) for pattern in patterns)
    chunk = min(PREFILL_TOKENS, max_length)
    extra = max(pattern.kv_heads * (chunk // pattern.block_size + 1) for pattern in patterns)
    return sequences * (alive + extra)


class PagePool:
    """Page numbers: the free ones, and the table of those that are taken, on host and device.

    Attributes:
        table: int32 [layers, sequences, kv_heads, blocks] on the device. Entries of dead blocks are
            stale; `flush` brings what changed there.
        table_of_layer: the same, a view per layer.
    """

    def __init__(self, patterns, sequences: int, max_length: int, pages: int, device):
        self.patterns = patterns
        self.size = patterns[0].block_size
        blocks = -(-max_length // self.size)
        shape = (len(patterns), sequences, patterns[0].kv_heads, blocks)
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self.table_of_layer = self.table.unbind()
        self._host = np.zeros(shape, dtype=np.int32)
        self._free = list(range(pages - 1, -1, -1))
        self._changed: list[tuple[np.ndarray, np.ndarray]] = []
        self.pages = pages

    @property
    def taken(self) -> int:
        return self.pages - len(self._free)

    def grow(self, layer: int, sequence: int, old: int, new: int, *, alive_only: bool) -> None:
        """Takes pages for the blocks that begin between `old` and `new` tokens.

        Args:
            alive_only: only for those that are alive after `new` tokens (a whole prompt).
        """
        first, end = -(-old // self.size), -(-new // self.size)
        if first >= end:
            return
        for head, rule in enumerate(self.patterns[layer].rules):
            blocks = range(first, end)
            if alive_only:
                blocks = [k for k in alive_blocks(rule, new, self.size) if k >= first]
            self._take(layer, sequence, head, np.asarray(blocks, dtype=np.int64))

    def _take(self, layer: int, sequence: int, head: int, blocks: np.ndarray) -> None:
        count = len(blocks)
        if count > len(self._free):
            raise ConfigError(
                f"the page pool is too small: {self.pages} pages are taken, layer {layer + 1} "
                f"needs {count} more; give the cache more pages (without `pages` it takes enough)"
            )
        if count == 0:
            return
        pages = np.asarray(self._free[-count:], dtype=np.int32)
        del self._free[-count:]
        self._host[layer, sequence, head, blocks] = pages
        row = np.ravel_multi_index((layer, sequence, head, 0), self._host.shape)
        self._changed.append((row + blocks, pages))

    def shrink(self, layer: int, sequence: int, old: int, new: int) -> None:
        """Frees the blocks that die between `old` and `new` tokens."""
        rows = self._host[layer, sequence]
        for block in range(old // self.size + 1, new // self.size + 1):
            for head, rule in enumerate(self.patterns[layer].rules):
                self._free.extend(int(rows[head, dead]) for dead in dying_blocks(rule, block))

    def flush(self) -> None:
        """Brings the entries that changed to the device, in the order of the current stream."""
        if not self._changed:
            return
        where, pages = (np.concatenate(part) for part in zip(*self._changed, strict=True))
        self._changed.clear()
        where, pages = (torch.from_numpy(x).to(self.table.device) for x in (where, pages))
        self.table.view(-1).index_copy_(0, where, pages)
