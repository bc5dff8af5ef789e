"""Which program works on which part of the backward pass over KV blocks, heaviest first.

A KV tile on the shard is seen by up to the whole sequence, one off it by the local window: columns
of the score matrix of very different length. A column that would keep one multiprocessor busy after
the others are done is cut into pieces, whose partial sums are added afterwards in a fixed order;
cutting more than balance needs would cost memory and time. The list is O(heads x blocks).
"""

import functools
import heapq
from typing import NamedTuple

import numpy as np
import torch

from s2_kernels.launch import upload
from s2_kernels.near import Near
from s2_kernels.pattern import HeadRule, LayerPattern

SHORTEST_PIECE = 32
"""Tiles below which a column is not cut: adding up its pieces would cost more than it saves."""

ITEM_OVERHEAD = 1
"""What starting and ending an item takes of a Hopper program, in half-tiles of 64 tokens."""


def round_up(n: int) -> int:
    """The next of eight sizes per power of two.

    Packed batches have other lengths every time. Rounded, a few work lists serve them all: a new
    one is copied to the device, which waits for it.
    """
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


class Dealt(NamedTuple):
    """Items dealt to persistent programs.

    Attributes:
        items: int32 [n_items, ...] on the device, those of one program after those of another.
        starts: int32 [programs + 1] on the device: program p has the items from starts[p] on, at
            least one.
    """

    items: torch.Tensor
    starts: torch.Tensor

    @property
    def programs(self) -> int:
        return self.starts.shape[0] - 1


def deal(items: np.ndarray, cost: np.ndarray, programs: int, device: torch.device) -> Dealt:
    """Deals items in their order, each to the program that has the least to do so far."""
    programs = min(programs, len(cost))
    load = [(0, program) for program in range(programs)]
    owner = np.empty(len(cost), dtype=np.int64)
    for i, c in enumerate(cost.tolist()):
        done, owner[i] = load[0]
        heapq.heapreplace(load, (done + c, owner[i]))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=programs))])
    order = np.argsort(owner, kind="stable")
    return Dealt(_on_device(items[order], device), _on_device(starts, device))


def count_query_tiles(s: int, q_offset: int = 0) -> int:
    """Tiles of 128 positions, on their grid, that s queries from q_offset on lie in."""
    return -(-(q_offset + s) // 128) - q_offset // 128


@functools.lru_cache(maxsize=256)
def query_tiles(
    pattern: LayerPattern,
    s: int,
    n_seqs: int,
    programs: int,
    device: torch.device,
    q_offset: int = 0,
    all_seen: int | None = None,
) -> Dealt:
    """The query tiles of 128 rows of all heads and sequences, for the Hopper kernels over queries.

    Items, int32 [n_items], count sequences, heads, and tiles from the last one back: programs work
    on few heads at a time, whose shards stay in the cache, and each head's heavy tiles come first.
    all_seen: every query sees so many half-tiles of keys, wherever it stands (`hopper.all_seen`).
    """
    size, group = pattern.block_size, pattern.heads // pattern.kv_heads
    row = (np.arange(count_query_tiles(s, q_offset))[::-1] + q_offset // 128) * 128
    first, last = row // size, (row + 127) // size
    blocks = np.arange(last[0] + 1)
    costs = []
    for rule in pattern.rules:
        dropped = np.sort(blocks + rule.lifetimes(len(blocks)).numpy())
        gone = np.searchsorted(dropped, last, side="right")
        edges = gone - np.searchsorted(dropped, first, side="right")
        kept = (first - gone) * (size // 64) + row // 64 - first * (size // 64)
        cost = kept + np.maximum(edges - 1, 0) + 2 + ITEM_OVERHEAD
        costs.append(np.repeat(cost[None], group, axis=0))
    cost = np.tile(np.concatenate(costs).ravel(), n_seqs)
    if all_seen is not None:
        cost = np.full_like(cost, all_seen + ITEM_OVERHEAD)
    return deal(np.arange(len(cost)), cost, programs, device)


class ColumnWork(NamedTuple):
    """The work of one launch.

    Attributes:
        items: int32 [n_items, 5] on the device: KV head, KV tile, piece, number of pieces, slot of
            the piece in the scratch memory (-1: the column is whole and writes its result itself).
        cut: int32 [n_cut, 4] on the device: KV head, KV tile (counted by rows of memory), first
            slot, number of pieces.
        n_slots: pieces that need scratch memory, per sequence.
    """

    items: torch.Tensor
    cut: torch.Tensor
    n_slots: int


def column_costs(pattern, heads, s, t, q_offset, tile_m, tile_n) -> np.ndarray:
    """Query tiles that each KV tile meets, over its group's query heads: [len(heads), tiles]."""
    start = np.arange(-(-t // tile_n), dtype=np.int64) * tile_n
    n_blocks = -(-t // pattern.block_size)
    costs = []
    for head in heads:
        life = pattern.rules[head].lifetimes(n_blocks).numpy()
        block = start // pattern.block_size
        end = np.minimum((block + life[block]) * pattern.block_size, q_offset + s)
        rows = np.maximum(end - np.maximum(start, q_offset), 0)
        costs.append(-(-rows // tile_m))
    return np.stack(costs) * (pattern.heads // pattern.kv_heads)


def _columns(costs: np.ndarray, heads: range, pattern, near: Near | None, per_block: int):
    """Head, KV tile and cost of the columns that are in memory, of costs [len(heads), tiles]."""
    head, column = np.indices(costs.shape)
    there = [_there(near, pattern.rules[h], column[0], per_block) for h in heads]
    there = np.concatenate(there)
    return (x.ravel()[there] for x in (head + heads.start, column, costs))


def _there(near: Near | None, rule: HeadRule, tiles: np.ndarray, per_block: int) -> np.ndarray:
    """Which KV tiles of a head are in memory, `per_block` of them to a block."""
    return np.full(len(tiles), True) if near is None else near.is_there(rule, tiles // per_block)


def _in_memory(near: Near | None, pattern: LayerPattern, head, tile, per_block: int) -> np.ndarray:
    """KV tiles, each of a head, counted by rows of memory."""
    if near is None:
        return tile
    found = np.array(tile)
    for i, rule in enumerate(pattern.rules):
        of = np.flatnonzero((head == i) & (tile >= 0))
        rows = near.rows(rule, tile[of] // per_block)
        found[of] = rows * per_block + tile[of] % per_block
    return found


def _cut(cost: np.ndarray, n_seqs: int, programs: int, longest: int | None = None):
    """Pieces of columns, heaviest first: (column, piece, number of pieces) each, and which are cut.

    Longest-first filling ends within one piece of perfect balance: half an even share is enough.
    longest: the most that a piece may cost all the same.
    """
    limit = max(SHORTEST_PIECE, int(cost.sum()) * n_seqs // (2 * programs))
    limit = min(limit, longest or limit)
    pieces = np.where(cost > limit, -(-cost // limit), 1)
    item = np.repeat(np.arange(len(cost)), pieces)
    piece = np.arange(len(item)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    order = np.argsort(-(cost / pieces)[item], kind="stable")
    return item[order], piece[order], pieces, pieces > 1


def _slots(item, piece, pieces, is_cut, width: int = 1):
    """Scratch memory for cut columns, `width` slots a piece: (of each item, of each column, all).

    The slot of a piece's first share; the first slot of a column; -1 where it is not cut.
    """
    taken = pieces * is_cut
    first = np.where(is_cut, width * (np.cumsum(taken) - pieces), -1)
    return np.where(is_cut[item], first[item] + piece, -1), first, width * int(taken.sum())


def _on_device(x: np.ndarray, device: torch.device) -> torch.Tensor:
    return upload(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)), device)


@functools.lru_cache(maxsize=256)
def column_work(
    pattern: LayerPattern,
    heads: range,
    s: int,
    t: int,
    q_offset: int,
    tile_m: int,
    tile_n: int,
    n_seqs: int,
    slots: int,
    device: torch.device,
    near: Near | None = None,
) -> ColumnWork:
    """The columns of some KV heads, cut and ordered for `slots` programs that run at a time.

    s, t: rows and KV tokens of the longest sequence; kernels clip to the sequence they work on.
    """
    costs = column_costs(pattern, heads, s, t, q_offset, tile_m, tile_n)
    head, column, cost = _columns(costs, heads, pattern, near, pattern.block_size // tile_n)
    item, piece, pieces, is_cut = _cut(cost, n_seqs, slots)
    slot, first_slot, n_slots = _slots(item, piece, pieces, is_cut)
    items = np.stack([head[item], column[item], piece, pieces[item], slot], axis=1)
    column = _in_memory(near, pattern, head, column, pattern.block_size // tile_n)
    cut = np.stack([head, column, first_slot, pieces], axis=1)[is_cut]
    return ColumnWork(_on_device(items, device), _on_device(cut, device), n_slots)


def _in_turn(items: np.ndarray, cost: np.ndarray, n_seqs: int) -> np.ndarray:
    """Items of n_seqs sequences, in the order to take them; they get the sequence as last column.

    By cost, in powers of two, so that what comes last is short; within one, by sequence and head
    (the first column): programs work on few heads at a time, whose queries stay in the cache.
    """
    sequence = np.tile(np.arange(n_seqs), len(items))
    items = np.concatenate([np.repeat(items, n_seqs, axis=0), sequence[:, None]], axis=1)
    cost = np.repeat(cost, n_seqs)
    power = np.frexp(np.maximum(cost, 1))[1]
    return items[np.lexsort([-cost, items[:, 0], sequence, -power])]


@functools.lru_cache(maxsize=256)
def column_pairs(
    pattern: LayerPattern,
    s: int,
    n_seqs: int,
    programs: int,
    device: torch.device,
    t: int | None = None,
    q_offset: int = 0,
    longest: int | None = None,
    near: Near | None = None,
) -> ColumnWork:
    """Pairs of columns of 64 tokens, for the Hopper kernel over them; and which of them are cut.

    Of t tokens (default s), for s queries from q_offset on.

    The two columns of a pair live equally long, and are neighbours among those that do. Items,
    int32 [n_items, 7]: KV head, its columns (the second may be -1), piece, number of pieces, slot
    of the first column's piece (the second's lies as many slots further as there are pieces),
    sequence. longest: half-tiles of a query head above which a pair is cut.
    """
    group, per_block = pattern.heads // pattern.kv_heads, pattern.block_size // 64
    column = np.arange(-(-(s if t is None else t) // 64))
    last = -(-(q_offset + s) // 64)
    begin = np.clip(column, q_offset // 64, last)
    parts = []
    for head, rule in enumerate(pattern.rules):
        block = column // per_block
        life = rule.lifetimes(int(block[-1]) + 1).numpy()[block]
        end = np.maximum(np.minimum((block + life) * per_block, last), begin)
        there = _there(near, rule, column, per_block)
        for value in np.unique(life[there]):
            columns = np.flatnonzero(there & (life == value))
            first, second = columns[::2], np.full(-(-len(columns) // 2), -1)
            second[: len(columns) // 2] = columns[1::2]
            cost = np.maximum(end[first], end[second]) - begin[first]  # end[-1] is the end of all
            cost = np.where(second < 0, end[first] - begin[first], cost)
            parts.append(np.stack([np.full(len(first), head), first, second, cost * group], axis=1))
    head, first, second, cost = np.concatenate(parts).T
    item, piece, pieces, is_cut = _cut(cost, n_seqs, programs, longest and longest * group)
    slot, first_slot, n_slots = _slots(item, piece, pieces, is_cut, width=2)
    items = np.stack([head[item], first[item], second[item], piece, pieces[item], slot], axis=1)
    cut = [
        np.stack(
            [
                head,
                _in_memory(near, pattern, head, column, per_block),
                first_slot + w * pieces,
                pieces,
            ],
            axis=1,
        )[is_cut & (column >= 0)]
        for w, column in enumerate((first, second))
    ]
    return ColumnWork(
        _on_device(_in_turn(items, (cost / pieces)[item], n_seqs), device),
        _on_device(np.concatenate(cut), device),
        n_slots,
    )


@functools.lru_cache(maxsize=256)
def single_columns(
    pattern: LayerPattern,
    s: int,
    n_seqs: int,
    programs: int,
    device: torch.device,
    t: int | None = None,
    q_offset: int = 0,
    near: Near | None = None,
) -> ColumnWork:
    """Columns of 64 tokens, for the Hopper kernel at wide heads; and which of them are cut.

    Of t tokens (default s), for s queries from q_offset on.
    Items, int32 [n_items, 6]: KV head, column, piece, number of pieces, slot of the piece
    (ColumnWork), sequence.
    """
    t = s if t is None else t
    costs = column_costs(pattern, range(pattern.kv_heads), s, t, q_offset, 64, 64)
    per_block = pattern.block_size // 64
    head, column, cost = _columns(costs, range(pattern.kv_heads), pattern, near, per_block)
    item, piece, pieces, is_cut = _cut(cost, n_seqs, programs)
    slot, first_slot, n_slots = _slots(item, piece, pieces, is_cut)
    items = np.stack([head[item], column[item], piece, pieces[item], slot], axis=1)
    row = _in_memory(near, pattern, head, column, per_block)
    return ColumnWork(
        _on_device(_in_turn(items, (cost / pieces)[item], n_seqs), device),
        _on_device(np.stack([head, row, first_slot, pieces], axis=1)[is_cut], device),
        n_slots,
    )
