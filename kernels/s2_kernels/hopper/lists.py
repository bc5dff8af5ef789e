"""Which KV half-tiles a query tile sees, and which columns are worked on together: arithmetic only.

All of it counts in positions of the KV sequence: where a key or a query lies in memory is for who
loads it (primitives.QueryItem). A half-tile of number i has the positions from 64 * i on.

Plain Triton, so that the interpreter can run it (tests/kernels/test_hopper_lists.py); Gluon cannot.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from s2_kernels.primitives import band_segments, block_at, count_blocks, lifetime

FAR = tl.constexpr(1 << 30)
"""A position, or row, beyond any sequence: TMA reads zeros there, and writes nothing."""


class QueryList(NamedTuple):
    """The KV half-tiles that a tile of 128 query rows sees, but for the two on its diagonal.

    Attributes:
        position: of the tile's first row, a multiple of 128.
        kept: segments of blocks that both halves of the tile see (`kept_half` is their p-th
            half-tile).
        edges: segments of blocks that only the upper rows still keep (blocks of 64, then).
        n_kept, n_edges: how many half-tiles each of them has.
        unseen: 1 if the lower rows do not see the first half-tile on the diagonal (a window of one
            block of 64), else 0.
    """

    position: tl.tensor
    kept: tuple
    edges: tuple
    n_kept: tl.tensor
    n_edges: tl.tensor
    unseen: tl.tensor


@triton.jit
def query_list(rule, position, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The `QueryList` of a tile that begins at a position, for the rule of its KV head."""
    first, last = position // B, (position + 127) // B
    kept = band_segments(rule, last, last, first, False, N_BANDS)  # before first, seen by last
    n_kept = count_blocks(kept, N_BANDS) * (B // 64) + position // 64 - first * (B // 64)
    edges = ()
    for j in tl.static_range(N_BANDS):  # what first is the last block to see
        reach = rule[1 + 2 * j]
        block = first - reach + 1
        dropped = (block >= 0) & (block < first) & (first < last)
        dropped &= lifetime(rule, tl.maximum(block, 0), N_BANDS) == reach
        if j + 1 < N_BANDS:  # heads with fewer bands repeat their last one
            dropped &= reach != rule[3 + 2 * j]
        edges = edges + (block, 1, dropped.to(tl.int32))  # noqa: RUF005 - Triton has no (*a, b)
    unseen = ((first < last) & (lifetime(rule, first, N_BANDS) < 2)).to(tl.int32)
    tiles = QueryList(position, kept, edges, n_kept, count_blocks(edges, N_BANDS), unseen)
    return tiles


@triton.jit
def kept_half(tiles, p, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The p-th half-tile that both halves see: of the blocks, then of the diagonal's own block."""
    block = block_at(tiles.kept, p // (B // 64), N_BANDS)
    i_half = block * (B // 64) + p % (B // 64)
    before = tiles.position // 64 - tiles.n_kept + p  # the last ones stand right before the tile
    return tl.where(before >= tiles.position // B * (B // 64), before, i_half)


@triton.jit
def listed_position(tiles, p, B: tl.constexpr, N_BANDS: tl.constexpr):
    """Where the p-th half-tile after the diagonal begins: seen by both, other edges, then FAR.

    As the forward kernel walks them, which has the first of the edges in the diagonal's tile.
    """
    edge = p - tiles.n_kept + 1
    i_half = tl.where(
        p < tiles.n_kept, kept_half(tiles, p, B, N_BANDS), block_at(tiles.edges, edge, N_BANDS)
    )
    return tl.where((p < tiles.n_kept) | (edge < tiles.n_edges), i_half * 64, FAR)


@triton.jit
def off_diagonal(tiles, p, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The p-th half-tile of a list that has the edges first, up to the diagonal."""
    i_half = kept_half(tiles, p - tiles.n_edges, B, N_BANDS)
    return tl.where(p < tiles.n_edges, block_at(tiles.edges, p, N_BANDS), i_half)


@triton.jit
def listed_half(tiles, p, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The p-th half-tile of such a list, with the two on the diagonal at its end."""
    i_half = off_diagonal(tiles, p, B, N_BANDS)
    diagonal = tiles.position // 64 + p - tiles.n_edges - tiles.n_kept
    return tl.where(p < tiles.n_edges + tiles.n_kept, i_half, diagonal)


@triton.jit
def column_rows(rule, column, first, n_rows, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The query half-tiles [begin, end) that see a column, a KV half-tile; none without one.

    There are query half-tiles from `first` to n_rows - 1. first None: from 0, one for each column.
    """
    block = column // (B // 64)
    beyond = (n_rows - 1) // (B // 64) + 1  # keeps the product below inside int32
    end = tl.minimum(block + lifetime(rule, block, N_BANDS), beyond) * (B // 64)
    end = tl.where(column < 0, column, tl.minimum(end, n_rows))
    begin = column
    if first is not None:
        begin = tl.minimum(tl.maximum(column, first), n_rows)
    return begin, tl.maximum(end, begin)


@triton.jit
def first_selected(rule, j: tl.constexpr):
    """The first block that band j selects."""
    stride = rule[2 + 2 * j]
    return (stride - rule[0] % stride) % stride


@triton.jit
def class_column(rule, c, j: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The c-th column of those that live as long as band j reaches: wider bands select no other."""
    stride, first = rule[2 + 2 * j], first_selected(rule, j)
    i = c // (B // 64)
    if j + 1 < N_BANDS:
        period = rule[4 + 2 * j] // stride  # of which one is the wider band's
        left_out = (first_selected(rule, j + 1) - first) // stride
        rest = i % tl.maximum(period - 1, 1)
        i = i // tl.maximum(period - 1, 1) * period + rest + (rest >= left_out).to(tl.int32)
    return (first + i * stride) * (B // 64) + c % (B // 64)


@triton.jit
def pair_of_sequence(rule, u, length, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The u-th pair of columns of a sequence, those that live longest first; -1: no such column."""
    n_blocks = (length + B - 1) // B
    column_0, column_1 = -1 + u * 0, -1 + u * 0
    n_wider = u * 0
    for j in tl.static_range(N_BANDS - 1, -1, -1):
        stride = rule[2 + 2 * j]
        n_selected = (n_blocks - first_selected(rule, j) + stride - 1) // stride
        n_selected = tl.maximum(n_selected, 0)
        n = (n_selected - n_wider) * (B // 64)
        c = 2 * u
        column_0 = tl.where((u >= 0) & (c < n), class_column(rule, c, j, B, N_BANDS), column_0)
        column_1 = tl.where(
            (u >= 0) & (c + 1 < n), class_column(rule, c + 1, j, B, N_BANDS), column_1
        )
        u = tl.where((u >= 0) & (c < n), -1, u - (n + 1) // 2)
        n_wider = n_selected
    n_columns = (length + 63) // 64
    column_0 = tl.where(column_0 < n_columns, column_0, -1)
    return column_0, tl.where(column_1 < n_columns, column_1, -1)
