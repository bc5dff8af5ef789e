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
        start = low + (stride - (low + rule[0]) % stride) % stride
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
    """Where program i's tiles begin: shares differ by one tile at most, the larger come first."""
    return i_program * (total // n_programs) + tl.minimum(i_program, total % n_programs)


@triton.jit
def program_of(tile, total, n_programs):
    """The program whose share a tile is in: what `first_tile` says, the other way round."""
    share, larger = total // n_programs, total % n_programs
    beyond = tile - larger * (share + 1)
    return tl.where(beyond < 0, tile // (share + 1), larger + beyond // tl.maximum(share, 1))


@triton.jit
def share_of(
    i_program, p_lengths, p_table, p_ends, s, kv_heads, n_tiles_q, n_units,
    TOKENS: tl.constexpr, N: tl.constexpr, B: tl.constexpr, U: tl.constexpr, N_BANDS: tl.constexpr,
):  # fmt: skip
    """A program's units i_unit..end_unit-1, tiles before the first of them, own tiles low..high-1.

    The lists of all units are counted at once, in a tile of U. The first program leaves `p_ends`.
    """
    o_unit = tl.arange(0, U)
    m_unit = o_unit < n_units
    length = tl.load(p_lengths + o_unit // (n_tiles_q * kv_heads), mask=m_unit, other=0)
    first, last = positions_of(o_unit // kv_heads % n_tiles_q, length, s, TOKENS)
    rule = load_rule(p_table, o_unit % kv_heads, N_BANDS)
    segments = live_segments(rule, first, last, B, N_BANDS)
    n_listed = tl.where(m_unit, listed_tiles(segments, last, N, B, N_BANDS), 0)
    ends = tl.cumsum(n_listed, 0)
    total = tl.sum(n_listed, 0)
    if i_program == 0:
        tl.store(p_ends + o_unit, ends, mask=m_unit)

    low = first_tile(i_program, total, tl.num_programs(0))
    high = first_tile(i_program + 1, total, tl.num_programs(0))
    i_unit = tl.sum((ends <= low).to(tl.int32), 0)
    end_unit = tl.minimum(tl.sum((ends - n_listed < high).to(tl.int32), 0), n_units)
    start = tl.max(tl.where(ends <= low, ends, 0), 0)
    return i_unit, tl.where(low < high, end_unit, i_unit), start, low, high
