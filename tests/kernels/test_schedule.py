"""Work lists of the Hopper kernels: everything once, every program busy, nobody long after."""

import numpy as np
import pytest
import torch
from attention_cases import _ls

from s2_kernels import dense, ranges
from s2_kernels.launch import fresh_counter
from s2_kernels.schedule import (
    column_pairs,
    count_query_tiles,
    deal,
    query_tiles,
    single_columns,
)

CPU = torch.device("cpu")
PATTERNS = {
    "mha": _ls(4, 4, 64, 4, 4),
    "gqa": _ls(8, 2, 64, 2, 4, head_step=2),
    "block128": _ls(2, 2, 128, 2, 4),
    "ranges": ranges(heads=2, block_size=64, bands=[(2, 1), (6, 2), (None, 4)]),
    "dense": dense(heads=2),
}


def owners(dealt):
    """The program of every item."""
    starts = dealt.starts.numpy()
    assert starts[0] == 0 and starts[-1] == len(dealt.items)
    assert (np.diff(starts) >= 1).all()
    return np.repeat(np.arange(dealt.programs), np.diff(starts))


OFFSETS = [(64, 64, 0), (700, 700, 0), (5000, 5000, 0), (700, 5000, 3333), (100, 250, 127)]
"""Queries, keys, position of the first query."""


@pytest.mark.parametrize("s, t, q_offset", OFFSETS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_query_tile_once(pattern, s, t, q_offset):
    tiles = len({position // 128 for position in range(q_offset, q_offset + s)})
    assert count_query_tiles(s, q_offset) == tiles
    dealt = query_tiles(pattern, s, 2, 132, CPU, q_offset)
    owners(dealt)
    assert sorted(dealt.items.tolist()) == list(range(2 * pattern.heads * tiles))


def test_query_tiles_that_see_all_keys_are_dealt_out_evenly():
    dealt = query_tiles(dense(heads=2), 66 * 128, 1, 132, CPU, 0, 5)
    assert np.bincount(owners(dealt)).tolist() == [1] * 132


@pytest.mark.parametrize("programs, longest", [(3, None), (132, None), (132, 7)])
@pytest.mark.parametrize("s, t, q_offset", OFFSETS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_column_once_and_each_piece(pattern, s, t, q_offset, programs, longest):
    work = column_pairs(pattern, s, 2, programs, CPU, t, q_offset, longest)
    columns, slots = -(-t // 64), []
    seen = {}
    for head, first, second, piece, pieces, slot, sequence in work.items.tolist():
        for w, column in enumerate((first, second)):
            if column >= 0:
                seen.setdefault((sequence, head, column), []).append((piece, pieces))
            if slot >= 0:
                slots.append((sequence, slot + w * pieces))
        if second >= 0:  # they live equally long
            block = 64 * np.array([first, second]) // pattern.block_size
            assert pattern.lifetime(head, int(block[0])) == pattern.lifetime(head, int(block[1]))
    assert len(seen) == 2 * pattern.kv_heads * columns
    for parts in seen.values():
        assert sorted(parts) == [(i, len(parts)) for i in range(len(parts))]
    assert sorted(slots) == [(s, i) for s in range(2) for i in range(work.n_slots)]
    cut = {(head, column): (slot, pieces) for head, column, slot, pieces in work.cut.tolist()}
    for (_, head, column), parts in seen.items():
        assert (len(parts) > 1) == ((head, column) in cut)
        assert len(parts) == cut.get((head, column), (0, 1))[1]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_no_piece_is_longer_than_asked(pattern):
    n, rows, per_block = 5000, 79, pattern.block_size // 64
    for head, *columns, _, pieces, _, _ in column_pairs(
        pattern, n, 1, 3, CPU, longest=7
    ).items.tolist():
        blocks = [column // per_block for column in columns if column >= 0]
        ends = [(block + pattern.lifetime(head, block)) * per_block for block in blocks]
        assert -(-(min(max(ends), rows) - columns[0]) // pieces) <= 7


@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("s, t, q_offset", OFFSETS[2:4])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_single_column_once_and_each_piece(pattern, s, t, q_offset, programs):
    work = single_columns(pattern, s, 2, programs, CPU, t, q_offset)
    seen, slots = {}, []
    for head, column, piece, pieces, slot, sequence in work.items.tolist():
        seen.setdefault((sequence, head, column), []).append((piece, pieces))
        if slot >= 0:
            slots.append((sequence, slot))
    assert len(seen) == 2 * pattern.kv_heads * -(-t // 64)
    assert all(sorted(x) == [(i, len(x)) for i in range(len(x))] for x in seen.values())
    assert sorted(slots) == [(s, i) for s in range(2) for i in range(work.n_slots)]
    cut = {(head, column): pieces for head, column, _, pieces in work.cut.tolist()}
    assert {key[1:]: len(x) for key, x in seen.items() if len(x) > 1} == cut


def test_pieces_at_an_offset_cover_what_the_queries_see():
    """No pair of columns is longer than the rows from its first column, or the first query, on."""
    pattern, s, t, q_offset = _ls(1, 1, 64, 4, 4), 8192, 32768, 8000
    first_row, end_row = q_offset // 64, -(-(q_offset + s) // 64)
    whole = column_pairs(pattern, q_offset + s, 1, 132, CPU)
    work = column_pairs(pattern, s, 1, 132, CPU, t, q_offset)
    pieces = {first: n for _, first, _, _, n, *_ in work.items.tolist()}
    assert max(pieces.values()) > 1
    # Before the window of the first query only the shard is seen, past the last query nothing is.
    cut = {column for column, n in pieces.items() if n > 1}
    assert all(column % 4 == 0 and column < end_row - 32 for column in cut)
    assert set(range(0, first_row, 8)) <= cut  # every pair of the shard, as long
    assert len({pieces[column] for column in range(0, first_row, 8)}) == 1
    assert pieces[0] < {first: n for _, first, _, _, n, *_ in whole.items.tolist()}[0]


def busiest_program(pattern, n: int, *, cut: bool) -> float:
    """Its work over the mean of 132, where who is done takes the next item; columns whole if not
    `cut`."""
    blocks = n // 64
    lives = [rule.lifetimes(blocks).numpy() for rule in pattern.rules]
    load = np.zeros(132)
    work = column_pairs(pattern, n, 1, 132, CPU)
    for head, first, second, piece, pieces, *_ in work.items.tolist():
        last = max(first, second)
        cost = min(last + lives[head][last], blocks) - first
        if cut:
            load[load.argmin()] += cost / pieces
        elif piece == 0:
            load[load.argmin()] += cost
    return load.max() / load.mean()


@pytest.mark.parametrize(
    ("pattern", "n", "whole"),
    [(_ls(8, 8, 64, 16, 32), 32768, 1.32), (_ls(4, 4, 64, 4, 32), 65536, 3.0)],
    ids=["8 heads, 32k", "4 heads, 64k"],
)
def test_long_columns_do_not_keep_one_program_busy(pattern, n, whole):
    """Columns of the shard go on to the end: whole, they would keep some programs busy alone."""
    assert busiest_program(pattern, n, cut=False) > whole
    assert busiest_program(pattern, n, cut=True) < 1.03


def test_nothing_is_cut_that_need_not_be():
    """8,192 tokens and 32 heads: 64 columns of the shard are seven times as long as the others."""
    pattern = _ls(32, 32, 64, 16, 32)
    assert len(column_pairs(pattern, 8192, 1, 132, CPU).cut) == 0
    assert busiest_program(pattern, 8192, cut=False) < 1.03


def test_columns_come_in_turn():
    """Long ones first, in powers of two; of those the sequences and heads one after the other."""
    pattern = _ls(4, 4, 64, 2, 4)
    work = column_pairs(pattern, 8192, 2, 2, CPU)  # for two programs nothing is cut
    lives = [rule.lifetimes(128).numpy() for rule in pattern.rules]
    keys = []
    for head, first, second, _, _, _, sequence in work.items.tolist():
        cost = min((first if second < 0 else second) + lives[head][first], 128) - first
        keys.append((-int(cost).bit_length(), sequence, head, -cost))
    assert keys == sorted(keys) and len({key[:3] for key in keys}) > 16


def test_fewer_items_than_programs():
    dealt = deal(np.arange(3), np.array([5, 1, 1]), 132, CPU)
    assert dealt.programs == 3 and dealt.items.tolist() == [0, 1, 2]


def test_every_launch_has_a_counter_of_its_own():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counters = [fresh_counter(device) for _ in range(600)]  # more than are made at once
    for counter in counters:
        assert counter.item() == 0 and counter.data_ptr() % 16 == 0
        counter += 1
    assert len({counter.data_ptr() for counter in counters}) == 600
