"""Into how many groups of heads context parallelism cuts an exchange, to hide it behind attention.

All but the first group's exchange runs beside the kernels of the group before. More groups leave
less of it exposed, and make smaller launches. So there are as few as leave little.
"""

import functools
from collections.abc import Callable, Sequence

from s2_kernels import LayerPattern
from s2_kernels.exchange import Chunks, block_bytes, received_blocks

Cut = Callable[[int, int], Sequence[Chunks]]
"""Cuts a number of blocks among a number of ranks."""

NODE_BYTES, NETWORK_BYTES, FLOPS = 200e9, 40e9, 500e12
"""A second, of one rank: over NVLink, over a network adapter; and of attention's products. For this
choice alone, estimates for H100: docs/scaling.md has the planner's constants."""
EXPOSED = 0.05
"""Of attention's forward pass: what the exchange that nothing hides may take."""
MOST_GROUPS = 4
"""Chosen by themselves. Each group is a launch per chunk, which must still fill a GPU."""
SPARE = 8
"""Multiprocessors left to NCCL beside a persistent kernel. Its items are dealt out before it
starts, so that a program which waits for a multiprocessor ends late."""


@functools.lru_cache(maxsize=256)
def choose_groups(
    pattern: LayerPattern,
    cut: Cut,
    ranks: int,
    blocks: int,
    *,
    head_sizes: int,
    element_bytes: int,
    within_a_node: bool,
) -> int:
    """How many groups of KV heads leave at most `EXPOSED` of attention's time for the first.

    Both times follow from bytes and operations, of the rank that receives most of the first 16. The
    answer is the same on all ranks.

    Args:
        pattern: for this tensor-parallel rank's heads.
        cut, ranks, blocks: how the sequence lies on the ranks.
        head_sizes: of K and of V, added up.
    """
    chunks = cut(ranks, blocks)
    most = max(received_blocks(pattern, chunks, rank) for rank in range(min(ranks, 16)))
    size = block_bytes(pattern, batch=1, head_sizes=head_sizes, element_bytes=element_bytes)
    exchange = most * size / (NODE_BYTES if within_a_node else NETWORK_BYTES)
    pairs = pattern.kept_pairs(blocks * pattern.block_size)
    attention = 2 * head_sizes * pairs / ranks / FLOPS
    fitting = [n for n in range(1, MOST_GROUPS + 1) if pattern.kv_heads % n == 0]
    return next((n for n in fitting if exchange / n <= EXPOSED * attention), fitting[-1])
