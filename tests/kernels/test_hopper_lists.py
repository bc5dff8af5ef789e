"""The Hopper kernels' lists of KV half-tiles and of columns, by the interpreter: no GPU needed.

What each warpgroup attends to, by the rules in hopper/forward.py and backward_dq.py, against the
definition: row i of blocks sees block k while 0 <= i - k < lifetime.
"""

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import _ls

from s2_kernels import dense, ranges, sliding_window
from s2_kernels.hopper.lists import (
    FAR,
    column_rows,
    listed_half,
    listed_position,
    pair_of_sequence,
    query_list,
)
from s2_kernels.primitives import load_rule

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter, which is off with a GPU"
)

PATTERNS = {
    "plain": _ls(3, 3, 64, 4, 5),
    "shard_at_the_edge": _ls(4, 4, 64, 4, 4),
    "one_block_window": _ls(2, 2, 64, 1, 3),
    "block128": _ls(2, 2, 128, 2, 3),
    "block256": _ls(2, 2, 256, 2, 3),
    "many_edges": ranges(heads=3, block_size=64, bands=[(2, 1), (7, 3), (20, 6)]),
    "three_ranges": ranges(heads=4, block_size=64, bands=[(2, 1), (5, 2), (None, 4)]),
    "dense_heads": _ls(3, 3, 64, 2, 4, dense_heads=1),
    "window": sliding_window(heads=1, block_size=64, local_blocks=3),
    "dense": dense(heads=1, block_size=64),
}
BLOCKS = 26
"""Half-tiles of the longest sequence."""


@triton.jit
def lists_kernel(
    p_table, p_out, position, i_kv, MOST: tl.constexpr, B: tl.constexpr, BANDS: tl.constexpr
):
    """n_kept, n_edges, unseen, then listed_position and listed_half of 0..MOST-1."""
    rule = load_rule(p_table, i_kv, BANDS)
    tiles = query_list(rule, position, B, BANDS)
    tl.store(p_out, tiles.n_kept)
    tl.store(p_out + 1, tiles.n_edges)
    tl.store(p_out + 2, tiles.unseen)
    for p in range(MOST):
        tl.store(p_out + 3 + p, listed_position(tiles, p, B, BANDS))
        tl.store(p_out + 3 + MOST + p, listed_half(tiles, p, B, BANDS))


@triton.jit
def pairs_kernel(p_table, p_out, n_slots, length, i_kv, B: tl.constexpr, BANDS: tl.constexpr):
    """Two columns of every slot of a sequence, and where the queries that see them end."""
    rule = load_rule(p_table, i_kv, BANDS)
    for u in range(n_slots):
        column_0, column_1 = pair_of_sequence(rule, u, length, B, BANDS)
        n_rows = (length + 63) // 64
        tl.store(p_out + u * 4, column_0)
        tl.store(p_out + u * 4 + 1, column_1)
        _, end_0 = column_rows(rule, column_0, None, n_rows, B, BANDS)
        _, end_1 = column_rows(rule, column_1, None, n_rows, B, BANDS)
        tl.store(p_out + u * 4 + 2, end_0)
        tl.store(p_out + u * 4 + 3, end_1)


@triton.jit
def rows_kernel(
    p_table, p_out, first, n_rows, n_columns, i_kv, B: tl.constexpr, BANDS: tl.constexpr
):
    """Of each column the query half-tiles that see it, of those from first to n_rows - 1."""
    rule = load_rule(p_table, i_kv, BANDS)
    for column in range(n_columns):
        begin, end = column_rows(rule, column, first, n_rows, B, BANDS)
        tl.store(p_out + column * 2, begin)
        tl.store(p_out + column * 2 + 1, end)


def seen_by(pattern, head, half):
    """The KV half-tiles that query half-tile `half` sees, by the definition."""
    per = pattern.block_size // 64
    i = half // per
    return [k for k in range(half + 1) if i - k // per < pattern.lifetime(head, k // per)]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_each_warpgroup_attends_to_what_its_rows_see(pattern):
    table, most = pattern.table(), BLOCKS + 2
    for head in range(pattern.kv_heads):
        for row in range(0, BLOCKS * 64, 128):
            out = torch.zeros(3 + 2 * most, dtype=torch.int32)
            lists_kernel[(1,)](table, out, row, head, most, pattern.block_size, pattern.n_bands)
            n_kept, n_edges, unseen, *rest = out.tolist()
            paired, listed = [x // 64 for x in rest[:most]], rest[most:]
            upper, lower = seen_by(pattern, head, row // 64), seen_by(pattern, head, row // 64 + 1)
            kept, others = paired[:n_kept], paired[n_kept : n_kept + max(n_edges - 1, 0)]
            after = n_kept + len(others)
            assert paired[after : after + 1] == [FAR.value // 64]
            # The forward kernel: a diagonal tile each, what both see, the other edges.
            edge = listed[:1] if n_edges else []
            assert sorted([*edge, row // 64, *kept, *others]) == upper
            first = [] if unseen else [row // 64]
            assert sorted([*first, row // 64 + 1, *kept]) == lower
            # dq: one list, of which each warpgroup passes over one end.
            n = n_edges + n_kept + 2
            assert sorted(listed[: n - 1]) == upper
            assert sorted([*listed[n_edges : n - 2], *first, listed[n - 1]]) == lower
            assert listed[n - 2 : n] == [row // 64, row // 64 + 1]


@pytest.mark.parametrize("length", [1, 64, 65, 700, 1500, BLOCKS * 64])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_column_of_a_packed_sequence_once(pattern, length):
    size = pattern.block_size
    extra = pattern.n_bands // 2 if size == 64 else size // 256
    slots, columns = -(-length // 128) + extra, -(-length // 64)
    for head in range(pattern.kv_heads):
        out = torch.zeros(slots, 4, dtype=torch.int32)
        pairs_kernel[(1,)](pattern.table(), out, slots, length, head, size, pattern.n_bands)
        seen = []
        for column_0, column_1, end_0, end_1 in out.tolist():
            lives = {pattern.lifetime(head, c * 64 // size) for c in (column_0, column_1) if c >= 0}
            assert len(lives) <= 1
            for column, end in ((column_0, end_0), (column_1, end_1)):
                if column < 0:
                    assert end == column  # no rows
                    continue
                seen.append(column)
                block = column * 64 // size
                rows = [i for i in range(column, columns)
                        if i * 64 // size - block < pattern.lifetime(head, block)]  # fmt: skip
                assert list(range(column, end)) == rows
        assert sorted(seen) == list(range(columns))


@pytest.mark.parametrize("first, n_rows", [(0, BLOCKS), (9, 17)])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_rows_of_a_column_where_queries_begin_later_or_end_before_the_keys(pattern, first, n_rows):
    columns = BLOCKS + 5
    for head in range(pattern.kv_heads):
        out, size = torch.zeros(columns, 2, dtype=torch.int32), pattern.block_size
        rows_kernel[(1,)](pattern.table(), out, first, n_rows, columns, head, size, pattern.n_bands)
        for column, (begin, end) in enumerate(out.tolist()):
            rows = [i for i in range(first, n_rows) if column in seen_by(pattern, head, i)]
            assert list(range(begin, end)) == rows and first <= begin <= n_rows
