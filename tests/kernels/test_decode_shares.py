"""How the programs of decoding share the tiles of all units, counted out under the interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from s2_kernels.decode_lists import (
    has_begin,
    keep_ends,
    kept_ends,
    own_tiles,
    parts_of,
    share_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H100 = 264
"""Programs: two on each of 132 multiprocessors."""


@triton.jit
def shares_kernel(
    p_listed, p_pieces, p_begins, p_own_parts, p_ends, n_units, START: tl.constexpr, U: tl.constexpr
):
    """p_pieces [programs, units, 2]: the tiles low..high-1 of each unit that are a program's.

    p_begins [units]: counted up by programs that have its begin. p_own_parts [units, 2]: whose
    parts make up a unit, as a program that has a piece of it works it out by itself.
    """
    o_unit = tl.arange(0, U)
    n_listed = tl.load(p_listed + o_unit, mask=o_unit < n_units, other=0)
    i = tl.program_id(0)
    split, total, i_unit, end_unit, start, low, high = share_of(i, n_listed, o_unit, n_units, START)
    if i == 0:
        keep_ends(p_ends, n_listed, o_unit, split, n_units, START)
    for u in tl.range(i_unit, end_unit):
        n_tiles = tl.load(p_listed + u)
        own_low, own_high = own_tiles(n_tiles, split, start, low, high, START)
        tl.atomic_add(p_begins + u, has_begin(split, start, low, high).to(tl.int32))
        if own_low < own_high:
            n = tl.num_programs(0)
            i_first, i_stop = parts_of(u, split, total, start, n_tiles, n_units, n, START)
            tl.store(p_own_parts + u * 2, i_first)
            tl.store(p_own_parts + u * 2 + 1, i_stop)
        start += n_tiles + START
        tl.store(p_pieces + (i * n_units + u) * 2, own_low)
        tl.store(p_pieces + (i * n_units + u) * 2 + 1, own_high)


@triton.jit
def parts_kernel(p_ends, p_parts, n_units, n_programs, START: tl.constexpr):
    u = tl.program_id(0)
    split, total, start, n_tiles = kept_ends(u, p_ends, n_units, START)
    i_first, i_stop = parts_of(u, split, total, start, n_tiles, n_units, n_programs, START)
    tl.store(p_parts + u * 2, i_first)
    tl.store(p_parts + u * 2 + 1, i_stop)


def shares(tiles: list[int], programs: int, start: int):
    """Of each program {unit: its tiles}, and of each unit the programs whose parts are merged."""
    units, rows = len(tiles), triton.next_power_of_2(len(tiles))
    listed = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    pieces = torch.zeros(programs, units, 2, dtype=torch.int32, device=DEVICE)
    ends = torch.full((1 + units,), -1, dtype=torch.int32, device=DEVICE)
    begins = torch.zeros(units, dtype=torch.int32, device=DEVICE)
    parts, own_parts = torch.zeros(2, units, 2, dtype=torch.int32, device=DEVICE)
    out = (pieces, begins, own_parts, ends)
    shares_kernel[(programs,)](listed, *out, units, START=start, U=rows)
    parts_kernel[(units,)](ends, parts, units, programs, START=start)
    assert begins.tolist() == [1] * units
    has = listed > 0
    assert torch.equal(parts[has], own_parts[has])
    own = [{u: range(*pair) for u, pair in enumerate(of_one) if pair[0] < pair[1]}
           for of_one in pieces.tolist()]  # fmt: skip
    return own, [range(*pair) for pair in parts.tolist()]


def cost(own: dict[int, range], start: int) -> int:
    """Tiles of a program, and what it costs to begin with another unit in between."""
    return sum(map(len, own.values())) + start * (len(own) - 1)


@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize(
    "tiles",
    [[143] * 8, [7], [0, 0], [3] * 5, [0, 9, 0, 1, 40, 0], [5, 143, 143, 20, 80, 60, 1, 2] * 2],
    ids=lambda tiles: f"{len(tiles)}-{sum(tiles)}",
)
@pytest.mark.parametrize("programs", [1, 6, 33])
def test_every_tile_is_computed_once_and_merged(tiles, programs, start):
    own, parts = shares(tiles, programs, start)
    for u, n in enumerate(tiles):
        by_program = [(i, mine[u]) for i, mine in enumerate(own) if u in mine]
        assert [tile for _, piece in by_program for tile in piece] == list(range(n))
        assert [i for i, _ in by_program] == list(parts[u])
    rows = [i + u for i, mine in enumerate(own) for u in mine]  # where a part is written
    assert len(set(rows)) == len(rows) and max(rows, default=0) < programs + len(tiles)


# Units of 143 tiles, as 128k tokens with stride 16 have, 8 a sequence.
@pytest.mark.parametrize(
    ("units", "most"), [(8, 5), (64, 36), (128, 72)], ids=lambda x: f"{x}"
)  # fmt: skip
def test_units_of_one_length_are_cut_evenly(units, most):
    """No program begins in the middle of its work with another unit: batches 1, 8, 16."""
    own, _ = shares([143] * units, H100, 4)
    assert all(len(mine) <= 1 for mine in own)
    assert max(cost(mine, 4) for mine in own) == most
    # A block more or less in some of them changes nothing of that.
    own, _ = shares([143 + u % 3 for u in range(units)], H100, 4)
    assert all(len(mine) <= 1 for mine in own)


def test_units_of_any_length_end_together():
    """A program that begins with another unit in between computes fewer tiles."""
    tiles = [20 + (37 * u) % 260 for u in range(40)]
    own, _ = shares(tiles, 64, 4)
    costs = [cost(mine, 4) for mine in own]
    assert max(costs) <= sum(tiles) / 64 + 4 + 1
    assert max(len(mine) for mine in own) > 1


def test_more_units_than_programs_are_shared_whole():
    own, parts = shares([143] * 512, H100, 12)
    assert all(len(mine) in (0, 2) for mine in own) and all(len(part) == 1 for part in parts)
