"""Into how many groups of heads context parallelism cuts an exchange, to hide it behind attention.

All but the first group's exchange runs beside the kernels of the group before. More groups leave
less of it exposed, and make smaller launches. So there are as few as leave little.
"""

import functools
from collections.abc import Callable, Sequence

from s2_kernels import LayerPattern
from s2_kernels.exchange import Chunks, block_bytes, received_blocks
from s2megatron.machine import load_machine

Cut = Callable[[int, int], Sequence[Chunks]]
"""Cuts a number of blocks among a number of ranks."""

GPU = "h100"
"""Whose rates are read, the planner's (`machine.load_machine`), whatever GPU runs: all ranks must
choose alike. Attention's were measured; of the two links they are guesses (gpus/h100.yaml)."""
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

    Both times follow from bytes and operations, of the rank that receives most of the first 16, and
    from the rates by which the planner predicts them. The answer is the same on all ranks.

    Args:
        pattern: for this tensor-parallel rank's heads.
        cut, ranks, blocks: how the sequence lies on the ranks.
        head_sizes: of K and of V, added up.
    """
    chunks = cut(ranks, blocks)
    most = max(received_blocks(pattern, chunks, rank) for rank in range(min(ranks, 16)))
    size = block_bytes(pattern, batch=1, head_sizes=head_sizes, element_bytes=element_bytes)
    machine, tokens = load_machine(GPU), blocks * pattern.block_size
    exchange = (machine.node if within_a_node else machine.cluster).seconds(most * size)
    flops = 2 * head_sizes * pattern.kept_pairs(tokens) / ranks
    rates = machine.attention_rates(pattern)
    attention = machine.attention_seconds(flops, rates.forward, tokens // ranks)
    fitting = [n for n in range(1, MOST_GROUPS + 1) if pattern.kv_heads % n == 0]
    return next((n for n in fitting if exchange / n <= EXPOSED * attention), fitting[-1])
