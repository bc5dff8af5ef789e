"""Which pages a unit of decoding reads, and which units a program computes: jit helpers.

A unit is a query tile of one KV head of one sequence; its list holds the blocks that its positions
attend to, computed from lifetimes. Per band the blocks form an arithmetic progression, so that a
list is a few numbers: (start, stride, count) per band, the farthest band first.
"""

import triton
import triton.language as tl

from s2_kernels.primitives import load_rule


@triton.jit
def positions_of(i_tile, length, s, TOKENS: tl.constexpr):
    """First and last position of a query tile; the last is negative where all is padding."""
    first = length - s + i_tile * TOKENS
    last = tl.minimum(first + TOKENS, length) - 1
    return tl.maximum(first, 0), last


@triton.jit
def live_segments(rule, first, last, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The blocks that positions first..last attend to: per band (start, stride, count), far first.

    What any of them keeps, the first keeps or it lies between them. Each block is listed once, in
    the band of its age at the first; the block of the last position is the last on the list.
    Scalars, or one list per element of a tile.
    """
    i_first, i_last = first // B, last // B
    segments = ()
    for j in tl.static_range(N_BANDS - 1, -1, -1):
        stride = rule[2 + 2 * j]
        low = tl.maximum(i_first - rule[1 + 2 * j] + 1, 0)
        high = i_last if j == 0 else i_first - rule[2 * j - 1]
        beyond = (low + rule[0]) % stride  # divisions take long, and all programs wait for these
        start = low + tl.where(beyond > 0, stride - beyond, 0)
        count = tl.where((start <= high) & (last >= 0), (high - start) // stride + 1, 0)
        segments += (start, stride, count)
    return segments


@triton.jit
def listed_blocks(segments, N_BANDS: tl.constexpr):
    """How many blocks are on a list."""
    total = segments[2]
    for j in tl.static_range(1, N_BANDS):
        total += segments[3 * j + 2]
    return total


@triton.jit
def listed_tiles(segments, last, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr):
    """How many tiles of N rows the listed blocks fill, up to position `last` in the last block."""
    n_blocks = listed_blocks(segments, N_BANDS)
    if N <= B:
        unused = B // N - 1 - tl.maximum(last, 0) % B // N
        return n_blocks * (B // N) - tl.where(n_blocks > 0, unused, 0)
    else:
        return tl.cdiv(n_blocks, N // B)


@triton.jit
def listed_block(segments, position, N_BANDS: tl.constexpr):
    """The block(s) at a position (scalar or tile) of a list."""
    block = segments[0] + position * segments[1]
    for j in tl.static_range(1, N_BANDS):
        position = position - segments[3 * j - 1]
        block = tl.where(position >= 0, segments[3 * j] + position * segments[3 * j + 1], block)
    return block


@triton.jit
def tile_blocks(segments, p, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr):
    """The block of tile p, a scalar; or that of each of its N rows, where a tile holds several."""
    if N <= B:
        return listed_block(segments, p // (B // N), N_BANDS)
    else:
        position = p * (N // B) + tl.arange(0, N) // B
        beyond = position >= listed_blocks(segments, N_BANDS)
        return tl.where(beyond, -1, listed_block(segments, position, N_BANDS))


@triton.jit
def first_tile(i_program, total, n_programs):
    """Where a program's share of a flat list begins: i * total / n, of n that get a tile each."""
    n = tl.maximum(tl.minimum(n_programs, total), 1)
    i = tl.minimum(i_program, n)
    return i * (total // n) + i * (total % n) // n


@triton.jit
def program_of(tile, total, n_programs):
    """The program whose share a tile is in: what `first_tile` says, the other way round."""
    n = tl.minimum(n_programs, total)
    return (((tile.to(tl.int64) + 1) * n - 1) // tl.maximum(total, 1)).to(tl.int32)


@triton.jit
def piece_of(n_tiles, piece, split):
    """Tiles low..high-1 of one of `split` even pieces of a unit; of fewer where it is short."""
    pieces = tl.minimum(n_tiles, split)
    low = n_tiles * piece // tl.maximum(pieces, 1)
    high = n_tiles * (piece + 1) // tl.maximum(pieces, 1)
    return low, tl.where(piece < pieces, high, low)


@triton.jit
def count_tiles(
    p_lengths, p_table, o_unit, s, kv_heads, n_tiles_q, n_units, TOKENS: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr,
):  # fmt: skip
    """The tiles of every unit o_unit [U], counted at once: int32 [U], 0 behind the last unit."""
    m_unit = o_unit < n_units
    p_length = p_lengths + o_unit // (n_tiles_q * kv_heads)
    length = tl.load(p_length, mask=m_unit, other=0)
    first, last = positions_of(o_unit // kv_heads % n_tiles_q, length, s, TOKENS)
    rule = load_rule(p_table, o_unit % kv_heads, N_BANDS)
    segments = live_segments(rule, first, last, B, N_BANDS)
    return tl.where(m_unit, listed_tiles(segments, last, N, B, N_BANDS), 0)


@triton.jit
def share_of(i_program, n_listed, o_unit, n_units, START: tl.constexpr):
    """A program's part of all units' tiles n_listed [U], two ways, the one that ends earlier.

    o_unit: 0 to U - 1, of how many n_units are units.

    Cut by units, each in `split` even pieces, or `group` whole units a program: no program begins
    in the middle of its work with another unit. Where lengths differ too much for that, the lists
    one behind the other are cut into even ranges. To begin a unit costs as much as START tiles (1
    or more), so that many come before the first tile of each on the flat list.

    Returns (split, or 0 where the list is flat; the flat list's length; units i_unit..end_unit-1;
    the flat list's tiles before unit i_unit; the program's own tiles low..high-1 on it, or low, the
    piece of each unit).
    """
    n_programs = tl.num_programs(0)
    split, group = tl.maximum(n_programs // n_units, 1), tl.cdiv(n_units, n_programs)
    total, longest = tl.sum(n_listed, 0), tl.max(n_listed, 0)
    # Tiles of the last program to end, times programs and split; too large for an int32.
    by_units = longest.to(tl.float32) * (group * n_programs)
    start, low, high = 0, 0, 0
    if by_units <= (total.to(tl.float32) + START * n_programs) * split:
        # No more pieces than keep the longest one as short: every piece costs a begin and a merge.
        split = tl.maximum(tl.cdiv(longest, tl.maximum(tl.cdiv(longest, split), 1)), 1)
        i_unit = tl.minimum(i_program // split * group, n_units)
        end_unit = tl.minimum(i_unit + group, n_units)
        low = i_program % split
    else:
        split = 0
        ends, n_weighed, total = flat_ends(n_listed, o_unit, n_units, START)
        low = first_tile(i_program, total, n_programs)
        high = first_tile(i_program + 1, total, n_programs)
        i_unit = tl.minimum(tl.sum((ends <= low).to(tl.int32), 0), n_units)
        end_unit = tl.sum(((ends - n_weighed < high) & (o_unit < n_units)).to(tl.int32), 0)
        end_unit = tl.where(low < high, end_unit, i_unit)
        start = tl.max(tl.where(ends <= low, ends, 0), 0)
    return split, total, i_unit, end_unit, start, low, high


@triton.jit
def own_tiles(n_tiles, split, start, low, high, START: tl.constexpr):
    """Which tiles of a unit are a program's (`share_of`), the next unit's tiles come after."""
    if split > 0:
        own_low, own_high = piece_of(n_tiles, low, split)
    else:
        own_low = tl.maximum(low - start - START, 0)
        own_high = tl.minimum(high - start - START, n_tiles)
    return own_low, own_high


@triton.jit
def has_begin(split, start, low, high):
    """Whether a program has the begin of a unit: one of them has, also if the unit has no tile."""
    return tl.where(split > 0, low == 0, (low <= start) & (start < high))


@triton.jit
def flat_ends(n_listed, o_unit, n_units, START: tl.constexpr):
    """Where each unit ends on the flat list, what it takes of the list, and the list's length."""
    n_weighed = n_listed + tl.where(o_unit < n_units, START, 0)
    return tl.cumsum(n_weighed, 0), n_weighed, tl.sum(n_weighed, 0)


@triton.jit
def keep_ends(p_ends, n_listed, o_unit, split, n_units, START: tl.constexpr):
    """For `s2_merge_kernel`: `split`, then each unit's tiles, or its end on the flat list."""
    ends = n_listed
    if split == 0:
        ends, _, _ = flat_ends(n_listed, o_unit, n_units, START)
    tl.store(p_ends, split)
    tl.store(p_ends + 1 + o_unit, ends, mask=o_unit < n_units)


@triton.jit
def kept_ends(u, p_ends, n_units, START: tl.constexpr):
    """What `keep_ends` left of unit u: (split, the flat list's length, the unit's start, tiles)."""
    split = tl.load(p_ends)
    end = tl.load(p_ends + 1 + u)
    before = tl.load(p_ends + tl.maximum(u, 1))
    total = tl.load(p_ends + n_units)
    start = tl.where((split == 0) & (u > 0), before, 0)
    return split, total, start, tl.where(split > 0, end, end - start - START)


@triton.jit
def parts_of(u, split, total, start, n_tiles, n_units, n_programs, START: tl.constexpr):
    """(first, stop): the programs whose parts make up unit u, which has n_tiles, 0 or more.

    split, total: as `share_of` returns them. start: the flat list's tiles before the unit.
    """
    if split > 0:
        i_first = u // tl.cdiv(n_units, n_programs) * split
        i_stop = i_first + tl.minimum(split, n_tiles)
    else:
        i_first = program_of(start + START, total, n_programs)
        i_stop = program_of(start + START + n_tiles - 1, total, n_programs) + 1
        i_stop = tl.where(n_tiles > 0, i_stop, i_first)
    return i_first, i_stop
