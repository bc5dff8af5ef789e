"""Which blocks of one KV head vLLM must hold: arithmetic on lifetimes, no vLLM.

With tensor parallelism all ranks share one page table, and KV head j of a rank is another head of
the model on every rank. What is held is then what any of these heads keeps: a block lives as long
as its longest lifetime. Where the ranks' heads have the same rules, that is the rule itself.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from s2_kernels.cache import alive_blocks, alive_count, dying_blocks, most_alive
from s2_kernels.pattern import HeadRule, LayerPattern


@dataclass(frozen=True)
class HeldBlocks:
    """The blocks that are held for one KV head of every tensor-parallel rank.

    Attributes:
        block_size: tokens per block.
        rules: the different rules of the ranks' heads, in a fixed order.
    """

    block_size: int
    rules: tuple[HeadRule, ...]

    def lifetime(self, block: int) -> int:
        """In blocks, the longest of the rules'."""
        return max(rule.lifetime(block) for rule in self.rules)

    def alive(self, tokens: int) -> list[int]:
        """The blocks alive after `tokens` tokens, from the first to the last."""
        if len(self.rules) == 1:
            return alive_blocks(self.rules[0], tokens, self.block_size)
        lists = (alive_blocks(rule, tokens, self.block_size) for rule in self.rules)
        return sorted(set().union(*lists))

    def dying(self, block: int) -> list[int]:
        """The blocks that die when block `block` begins."""
        if len(self.rules) == 1:
            return dying_blocks(self.rules[0], block)
        ages = {band.reach for rule in self.rules for band in rule.bands}
        return [k for age in sorted(ages) if (k := block - age) >= 0 and self.lifetime(k) == age]

    def most(self, tokens: int, in_flight: int) -> int:
        """The most blocks held at a time while a text grows to `tokens` tokens.

        Args:
            in_flight: the most tokens that are scheduled and not yet computed: their blocks are all
                held, and nothing that dies with them is free yet.
        """
        blocks = -(-tokens // self.block_size)
        return min(blocks, self._most_alive(blocks) + -(-in_flight // self.block_size))

    def _most_alive(self, blocks: int) -> int:
        if len(self.rules) == 1:
            return most_alive(self.rules[0], blocks * self.block_size, self.block_size)
        return _most_alive_of_several(self, blocks)

    def longest_hit(self, is_cached: Callable[[int], bool], blocks: int) -> int:
        """The most blocks, up to `blocks`, after which all that is alive is cached.

        Args:
            is_cached: whether the prefix cache holds a block; asked for each block at most once.
        """
        is_cached = functools.cache(is_cached)
        while blocks > 0:
            alive = self.alive(blocks * self.block_size)
            missing = next((block for block in alive if not is_cached(block)), None)
            if missing is None:
                break
            blocks = missing  # at every length between the two, the missing block is alive as well
        return blocks


@functools.lru_cache(maxsize=4096)
def _most_alive_of_several(held: HeldBlocks, blocks: int) -> int:
    """As cache.most_alive: the most is found within the last period of the widest strides."""
    period = math.lcm(*(rule.bands[-1].stride for rule in held.rules))
    size = held.block_size
    first = max(0, blocks - period)
    return max((len(held.alive(i * size + 1)) for i in range(first, blocks)), default=0)


def held_by_ranks(pattern: LayerPattern, ranks: int) -> tuple[HeldBlocks, ...]:
    """Per KV head of a tensor-parallel rank, what is held for it and its like on other ranks.

    Raises:
        ValueError: the heads do not divide over the ranks.
    """
    shards = [pattern.shard(rank, ranks) for rank in range(ranks)]
    return tuple(
        HeldBlocks(pattern.block_size, tuple(sorted(set(rules), key=_order)))
        for rules in zip(*(shard.rules for shard in shards), strict=True)
    )


def places(held: tuple[HeldBlocks, ...]) -> list[int]:
    """Per head of a layer, how many heads before it are equal; 0 for all that are dense."""
    return [
        0 if all(rule.is_dense for rule in one.rules) else held[:i].count(one)
        for i, one in enumerate(held)
    ]


def _order(rule: HeadRule):
    return rule.bands, rule.shift


def held_share(pattern: LayerPattern, ranks: int, tokens: int) -> float:
    """Pages held per rank over those that its own heads keep, after `tokens` tokens."""
    size = pattern.block_size
    heads = held_by_ranks(pattern, ranks)
    held = sum(len(head.alive(tokens)) for head in heads)
    kept = sum(alive_count(rule, tokens, size) for rule in pattern.shard(0, ranks).rules)
    return held / kept
