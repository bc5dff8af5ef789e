"""Which pages of a KV head are alive: the KV cache reduction, as arithmetic on lifetimes.

A page holds one block of one KV head. After `tokens` tokens the next query stands in block
i = tokens // block_size, and of the blocks written so far page k is *alive* if that query, or any
later one, still attends to it: i - k < lifetime(k). A page that is dead is never asked for again
(pattern.py), so that its memory may hold another block at once.

Nothing here holds a tensor or walks over the tokens. The costs are O(bands), or O(pages alive)
where pages are listed.
"""

from s2_kernels.pattern import HeadRule, LayerPattern


def alive_blocks(rule: HeadRule, tokens: int, block_size: int) -> list[int]:
    """The blocks of a KV head that are alive after `tokens` tokens, from the first to the last."""
    alive = []
    for low, high, stride in kept_ranges(rule, tokens // block_size):
        first = low + (-(low + rule.shift)) % stride
        alive.extend(range(first, min(high, _written(tokens, block_size) - 1) + 1, stride))
    return sorted(alive)


def alive_count(rule: HeadRule, tokens: int, block_size: int) -> int:
    """How many blocks `alive_blocks` lists, in O(bands)."""
    last = _written(tokens, block_size) - 1
    return sum(
        count_selected(low, min(high, last), stride, rule.shift)
        for low, high, stride in kept_ranges(rule, tokens // block_size)
    )


def dying_blocks(rule: HeadRule, block: int) -> list[int]:
    """The blocks that die when block `block` begins: block - 1 was the last to attend to them."""
    ages = {band.reach for band in rule.bands}
    return [k for age in sorted(ages) if (k := block - age) >= 0 and rule.lifetime(k) == age]


def most_alive(rule: HeadRule, tokens: int, block_size: int) -> int:
    """The most blocks alive at a time while a text grows, token by token, to `tokens` tokens.

    With the block that is being written: it is taken once those that die with it are free.
    """
    blocks = _written(tokens, block_size)
    # One period of the widest stride later as many blocks are selected, or more, while the text is
    # shorter than a band: the most is found among the last so many.
    first = max(0, blocks - rule.bands[-1].stride)
    return max((alive_count(rule, i * block_size + 1, block_size) for i in range(first, blocks)),
               default=0)  # fmt: skip


def most_pages(pattern: LayerPattern, tokens: int) -> int:
    """The pages that one sequence of a layer needs to grow to `tokens` tokens, all KV heads."""
    return sum(most_alive(rule, tokens, pattern.block_size) for rule in pattern.rules)


def alive_pages(pattern: LayerPattern, tokens: int) -> int:
    """The pages that are alive in one sequence of a layer after `tokens` tokens, all KV heads."""
    return sum(alive_count(rule, tokens, pattern.block_size) for rule in pattern.rules)


def _written(tokens: int, block_size: int) -> int:
    """How many blocks the tokens lie in, the last one filled in part."""
    return -(-tokens // block_size)


def kept_ranges(rule: HeadRule, block: int):
    """Per band, the blocks (low, high, stride) that query block `block` keeps, each listed once.

    A block belongs to the band of its age: narrower bands keep it too, but are not asked.
    """
    youngest = 0
    for reach, stride in rule.bands:
        yield max(0, block - reach + 1), block - youngest, stride
        youngest = reach


def count_selected(low: int, high: int, stride: int, shift: int) -> int:
    """How many blocks k of low..high have (k + shift) % stride == 0."""
    if high < low:
        return 0
    return (high + shift) // stride - (low - 1 + shift) // stride
