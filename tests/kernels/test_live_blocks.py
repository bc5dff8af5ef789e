"""The arithmetic of live pages against the definition: one lifetime, one block at a time."""

from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import any_pattern

from s2_kernels import dense, local_stride, sliding_window
from s2_kernels.cache import (
    alive_blocks,
    alive_count,
    alive_pages,
    dying_blocks,
    most_alive,
    most_pages,
)


def by_definition(pattern, head, tokens):
    """Blocks that hold tokens and that the query of the next token attends to."""
    block, written = tokens // pattern.block_size, -(-tokens // pattern.block_size)
    return [k for k in range(written) if block - k < pattern.lifetime(head, k)]


@given(any_pattern(), st.integers(0, 2000))
def test_alive_blocks_are_those_of_the_lifetimes(pattern, tokens):
    for head, rule in enumerate(pattern.rules):
        expected = by_definition(pattern, head, tokens)
        assert alive_blocks(rule, tokens, pattern.block_size) == expected
        assert alive_count(rule, tokens, pattern.block_size) == len(expected)


@given(any_pattern(), st.integers(1, 60))
def test_a_dead_block_stays_dead_and_dies_once(pattern, blocks):
    """The cache that frees what dies and adds what begins holds what is alive, at every block."""
    size = pattern.block_size
    for head, rule in enumerate(pattern.rules):
        held, most = set(), 0
        for block in range(blocks):
            dying = set(dying_blocks(rule, block))
            assert dying <= held
            held -= dying
            assert sorted(held) == alive_blocks(rule, block * size, size)
            held.add(block)
            most = max(most, len(held))
            assert sorted(held) == by_definition(pattern, head, block * size + 1)
        assert most_alive(rule, blocks * size, size) == most


@given(any_pattern(), st.integers(0, 3000))
def test_pages_of_a_layer_are_those_of_its_heads(pattern, tokens):
    alive = sum(len(by_definition(pattern, h, tokens)) for h in range(pattern.kv_heads))
    assert alive_pages(pattern, tokens) == alive <= most_pages(pattern, tokens)


def test_the_numbers_that_the_documents_name():
    """128k tokens, blocks of 64, window 1,024: 143 of 2,048 pages at the most, 14.3 times fewer."""
    tokens = 131072
    sixteenth = local_stride(heads=32, kv_heads=8, local_blocks=16, stride=16)
    assert most_pages(sixteenth, tokens) == 8 * 143
    assert most_pages(dense(heads=32, kv_heads=8), tokens) == 8 * 2048
    assert most_pages(sliding_window(heads=1, local_blocks=16), tokens) == 16
    assert most_pages(sixteenth, 0) == alive_pages(sixteenth, 0) == 0
