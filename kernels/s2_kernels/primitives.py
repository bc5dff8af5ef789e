"""The jit helpers that forward and backward share: which tiles, which entries, softmax, loads.

A rule on the device is one row of `LayerPattern.table()`: shift, then (reach, stride) from the
narrowest to the widest band. For a *query tile* (rows of the blocks i_first..i_last) the KV blocks
it visits form, per band, an arithmetic progression; a tuple `(start, stride, count, start, ...)` of
such segments is a list of blocks that costs a few scalar registers, and `block_at` is its p-th
entry. So one pipelined loop walks all bands: no index table, no drain between shard and window.

First on the list come the *interior* blocks, seen entirely by every row, from far to near. The last
ones need a mask: the diagonal, the end of the sequence, and, where a query tile spans several
blocks, the few blocks at the far edge of a band that only some rows still keep. The forward walks
the two parts in two loops over one body; the backward, short of registers, in one loop whose mask
is a branch that all threads take or none.

Positions count tokens in the KV sequence, and blocks count block_size tokens: lifetimes and masks
are asked with them. Rows are places in memory, what is loaded and stored (`KeyTile`): the query of
position i lies in row i - q_offset of its sequence, where the kernels call rows o_q. Keys lie in
the rows of their positions, or where `key_row` says.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rule(p_table, i_head, N_BANDS: tl.constexpr):
    """The rule of a KV head: (shift, reach_0, stride_0, reach_1, ...), int32 scalars."""
    p_row = p_table + i_head * (1 + 2 * N_BANDS)
    rule = (tl.load(p_row),)
    for j in tl.static_range(N_BANDS):
        rule += (tl.load(p_row + 1 + 2 * j), tl.load(p_row + 2 + 2 * j))
    return rule


@triton.jit
def lifetime(rule, i_block, N_BANDS: tl.constexpr):
    """Lifetime in blocks of KV block(s) i_block, a scalar or a tile."""
    life = i_block * 0
    for j in tl.static_range(N_BANDS):
        kept = (i_block + rule[0]) % rule[2 + 2 * j] == 0
        life = tl.where(kept, rule[1 + 2 * j], life)
    return life


@triton.jit
def segment(low, high, shift, stride):
    """The blocks of low..high that a stride selects, as (start, stride, count)."""
    low = tl.maximum(low, 0)
    start = low + (stride - (low + shift) % stride) % stride
    count = tl.where(start <= high, (high - start) // stride + 1, 0)
    return (start, stride, count)


@triton.jit
def band_segments(rule, i_first, i_last, k_last, EDGE: tl.constexpr, N_BANDS: tl.constexpr):
    """Per band, from far to near, the blocks before i_first that a query tile visits.

    A block belongs to the band of its age at i_first, so it is listed once. EDGE=False lists those
    that i_last keeps as well (interior), EDGE=True the others. The last KV block is in neither.
    """
    segments = ()
    for j in tl.static_range(N_BANDS - 1, -1, -1):
        reach = rule[1 + 2 * j]
        high = i_first - 1 if j == 0 else i_first - tl.maximum(rule[1 + 2 * (j - 1)], 1)
        high = tl.minimum(high, k_last - 1)
        if EDGE:
            low = i_first - reach + 1
            high = tl.minimum(high, i_last - reach)
        else:
            low = i_last - reach + 1
        if j == 0:  # the narrowest band keeps every block
            low = tl.maximum(low, 0)
            segments = segments + (low, 1, tl.maximum(high - low + 1, 0))  # noqa: RUF005 - Triton has no (*a, b)
        else:
            segments = segments + segment(low, high, rule[0], rule[2 + 2 * j])
    return segments


@triton.jit
def kept_segments(rule, i_first, i_last, k_last, SPANS: tl.constexpr, N_BANDS: tl.constexpr):
    """The list of blocks of a query tile: N_BANDS segments of interior blocks, then masked ones.

    Masked are N_BANDS far edges, if the query tile SPANS blocks, and the diagonal. The last KV
    block is masked even when the tile lies beyond it: the sequence may end inside the block.
    """
    segments = band_segments(rule, i_first, i_last, k_last, False, N_BANDS)
    if SPANS:
        segments += band_segments(rule, i_first, i_last, k_last, True, N_BANDS)
    start = tl.minimum(i_first, k_last)
    count = tl.minimum(i_last, k_last) - start + 1
    if i_first > k_last:  # queries past the keys: do they still keep the last block?
        count = tl.where(i_first - start < lifetime(rule, start, N_BANDS), count, 0)
    segments = segments + (start, 1, count)  # noqa: RUF005 - Triton has no (*a, b)
    return segments  # not the sum itself: Triton 3.8 returns constants only of a variable


@triton.jit
def count_blocks(segments, N_SEGMENTS: tl.constexpr):
    total = 0
    for j in tl.static_range(N_SEGMENTS):
        total += segments[3 * j + 2]
    return total


@triton.jit
def block_at(segments, position, N_SEGMENTS: tl.constexpr):
    """The block(s) at a position (scalar or tile) of a list of segments."""
    block = segments[0] + position * segments[1]
    for j in tl.static_range(1, N_SEGMENTS):
        position = position - segments[3 * j - 1]
        block = tl.where(position >= 0, segments[3 * j] + position * segments[3 * j + 1], block)
    return block


@triton.jit
def count_tiles(segments, last_row, t, N: tl.constexpr, B: tl.constexpr, N_SEGMENTS: tl.constexpr):
    """Number of KV tiles of N columns in a list of blocks."""
    n_blocks = count_blocks(segments, N_SEGMENTS)
    if N <= B:
        # The last block is the diagonal: leave out its parts that no row reaches.
        beyond = B // N - 1 - tl.minimum(last_row, t - 1) % B // N
        return n_blocks * (B // N) - tl.where(segments[3 * N_SEGMENTS - 1] > 0, beyond, 0)
    else:
        return tl.cdiv(n_blocks, N // B)


@triton.jit
def count_interior_tiles(segments, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr):
    """How many tiles, from the first on, need no mask."""
    n_blocks = count_blocks(segments, N_BANDS)
    return n_blocks * (B // N) if N <= B else n_blocks // (N // B)


@triton.jit
def key_row(rule, position, near_start, near_row, B: tl.constexpr, N_BANDS: tl.constexpr):
    """Where the key(s) of a position lie in memory, in tokens from the sequence's first.

    near_start None: at their position. Else it is a block, and only what is kept forever of those
    before it is in memory (near.Near). Positions beyond any sequence give rows beyond any.
    """
    if near_start is None:
        row = position
    else:
        stride = rule[2 * N_BANDS]
        i_block = position // B
        far = (i_block - (stride - rule[0] % stride) % stride) // stride
        i_row = tl.where(i_block < near_start, far, i_block - near_start + near_row)
        row = i_row * B + position % B
    return row


class KeyTile(NamedTuple):
    """A tile of keys: which they are, and where they lie.

    Attributes:
        positions: [N], in the KV sequence: what lifetimes and masks are asked with.
        block: of the positions: a scalar, or [N] where N > B.
        there: [N], which of them exist.
        rows: [N], where they lie in memory, counted from the sequence's first key.
        first_row: where the first lies, counted from the tensor's first row: for TMA.
    """

    positions: tl.tensor
    block: tl.tensor
    there: tl.tensor
    rows: tl.tensor
    first_row: tl.tensor


@triton.jit
def key_tile(
    program, walk, near, p,
    N: tl.constexpr, B: tl.constexpr, N_SEGMENTS: tl.constexpr, N_BANDS: tl.constexpr,
):  # fmt: skip
    """The p-th tile of a program's walk; near: near_start and near_row of `key_row`.

    Where a tile gathers several blocks, positions past the end of the list lie beyond any sequence.
    """
    o_n = tl.arange(0, N)
    if N <= B:
        first = block_at(walk.blocks, p // (B // N), N_SEGMENTS) * B + p % (B // N) * N
        o_col, i_block = first + o_n, first // B
    else:
        first = 0
        entry = p * (N // B) + o_n // B
        i_block = block_at(walk.blocks, entry, N_SEGMENTS)
        listed = entry < count_blocks(walk.blocks, N_SEGMENTS)
        i_block = tl.where(listed, i_block, (1 << 30) // B)
        o_col = i_block * B + o_n % B
    o_k = o_col
    near_start, near_row = near
    if near_start is not None:
        # The first row of a tile within a block says where it lies: one division for all.
        if N <= B:
            first = key_row(walk.rule, first, near_start, near_row, B, N_BANDS)
            o_k = first + o_n
        else:
            o_k = key_row(walk.rule, o_col, near_start, near_row, B, N_BANDS)
    tile = KeyTile(o_col, i_block, o_col < program.t, o_k, program.start_k + first)
    return tile


@triton.jit
def mask_scores(
    b_s,
    rule,
    o_row,
    o_col,
    i_block,
    t,
    SPANS: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    N_BANDS: tl.constexpr,
):
    """Scores [M, N], -inf where position o_row [M] does not see o_col [N], in block(s) i_block."""
    m_s = (o_col[None, :] <= o_row[:, None]) & (o_col < t)[None, :]
    if SPANS:
        i_life = lifetime(rule, i_block, N_BANDS)
        if N > B:
            i_life, i_block = i_life[None, :], i_block[None, :]
        m_s &= o_row[:, None] // B - i_block < i_life
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def start_softmax(M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """b_acc, b_m and b_l of rows that have seen nothing yet, for `online_softmax`."""
    b_acc = tl.zeros([M, BLOCK_DV], tl.float32)
    b_m = tl.full([M], float("-inf"), tl.float32)
    b_l = tl.zeros([M, 8], tl.float32)
    return b_acc, b_m, b_l


@triton.jit
def online_softmax(b_s, b_acc, b_m, b_l, scale_log2, MASKED: tl.constexpr):
    """One step of the softmax over keys, in base 2, for a tile of raw scores [M, N].

    b_acc [M, DV], b_m [M]: the output so far and the running maximum of the scaled scores. b_l
    [M, 8]: the running sum, in parts that a thread adds up alone; `finish_softmax` adds the parts.
    Returns the unnormalised probabilities [M, N] and the new b_acc, b_m, b_l.
    """
    M: tl.constexpr = b_s.shape[0]
    N: tl.constexpr = b_s.shape[1]
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    b_shift = b_m_new
    if MASKED:  # a row that has seen nothing yet has maximum -inf: with 0, exp2 gives 0
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_rescale = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_l = b_l * b_rescale[:, None] + tl.sum(tl.reshape(b_p, (M, N // 8, 8)), 1)
    return b_p, b_acc * b_rescale[:, None], b_m_new, b_l


@triton.jit
def finish_softmax(b_acc, b_m, b_l):
    """(out [M, DV], natural lse [M]); a row that saw nothing has out 0 and lse -inf."""
    b_sum = tl.sum(b_l, 1)
    sees = b_sum > 0
    b_sum = tl.where(sees, b_sum, 1.0)
    b_lse = tl.where(sees, b_m * LN2 + tl.log(b_sum), float("-inf"))
    return b_acc / b_sum[:, None], b_lse


@triton.jit
def load_rows(p_base, o_row, stride, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [rows, BLOCK_D] through pointers; rows outside m_row and columns past D are 0."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = m_row[:, None] & (o_d < D)[None, :] if D != BLOCK_D else m_row[:, None]
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def store_rows(p_base, o_row, stride, m_row, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the rows of m_row of a tile [rows, BLOCK_D], in the pointer's type."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = m_row[:, None] & (o_d < D)[None, :] if D != BLOCK_D else m_row[:, None]
    tl.store(p_tile, b_x.to(p_base.dtype.element_ty), mask=mask)


@triton.jit
def add_rows(p_base, o_row, stride, m_row, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds the rows of m_row of a tile [rows, BLOCK_D] to memory, atomically, in no fixed order."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = m_row[:, None] & (o_d < D)[None, :] if D != BLOCK_D else m_row[:, None]
    tl.atomic_add(p_tile, b_x, mask=mask, sem="relaxed")


@triton.jit
def load_tile(
    p_base,
    desc,
    stride,
    o_row,
    m_row,
    i_batch,
    i_head,
    row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile [ROWS, BLOCK_D] through a TMA descriptor, from `row` on, or the rows o_row by pointers.

    The descriptor, over [batch, head, row, d], needs no address per thread, and takes any stride
    between heads. Rows past the tensor are 0; pointers leave out any row outside m_row [ROWS].
    """
    if TMA:
        return desc.load([i_batch, i_head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        return load_rows(p_base, o_row, stride, m_row, D, BLOCK_D)


@triton.jit
def sequence(p_cu, i_seq, length, PACKED: tl.constexpr):
    """(first row in memory, length) of a sequence: read from cu_seqlens when PACKED."""
    if PACKED:
        start = tl.load(p_cu + i_seq)
        return start, tl.load(p_cu + i_seq + 1) - start
    else:
        return i_seq * 0, length


@triton.jit
def head_offset(strides, i_batch, i_head, row):
    """Offset of a row of a head, strides (batch, row, head).

    64-bit: a tensor may hold more than 2^31 elements.
    """
    offset = i_batch.to(tl.int64) * strides[0] + i_head.to(tl.int64) * strides[2]
    return offset + row.to(tl.int64) * strides[1]


@triton.jit
def query_tile(i_tile, q_offset, s, M: tl.constexpr, B: tl.constexpr):
    """The i_tile-th query tile: positions [M], m_row [M], and its first and last position.

    Tiles lie on the grid of the KV blocks, so the first may begin before the queries do; m_row
    marks the positions that queries have.
    """
    first = (q_offset // M + i_tile) * M
    o_row = first + tl.arange(0, M)
    m_row = (o_row >= q_offset) & (o_row < q_offset + s)
    return o_row, m_row, tl.maximum(first, q_offset), tl.minimum(first + M, q_offset + s) - 1


class QueryProgram(NamedTuple):
    """What a program over query rows works on: a tile of rows of a head of a sequence.

    Attributes:
        head, kv_head, batch: which; batch is 0 where sequences are packed.
        start_q, start_k: where the sequence begins in memory.
        t: the position at which its keys end.
        positions: [M], of the queries in the KV sequence: what lifetimes and masks are asked with.
        there: [M], which of them exist.
        first, last: the first and last position; a tile without rows has last < first.
    """

    head: tl.tensor
    kv_head: tl.tensor
    batch: tl.tensor
    start_q: tl.tensor
    start_k: tl.tensor
    t: tl.tensor
    positions: tl.tensor
    there: tl.tensor
    first: tl.tensor
    last: tl.tensor


@triton.jit
def query_program(
    p_cu_q, p_cu_k, s, t, q_offset, group, M: tl.constexpr, B: tl.constexpr, PACKED: tl.constexpr
):
    """Of a grid (query tiles, heads, batch), the last tiles first: they see the most."""
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_seq = tl.program_id(1), tl.program_id(2)
    i_kv = i_head // group
    start_q, s = sequence(p_cu_q, i_seq, s, PACKED)
    start_k, t = sequence(p_cu_k, i_seq, t, PACKED)
    i_batch = i_seq * 0 if PACKED else i_seq
    positions, m_row, first, last = query_tile(i_tile, q_offset, s, M, B)
    program = QueryProgram(
        i_head, i_kv, i_batch, start_q, start_k, t, positions, m_row, first, last
    )
    return program


class Walk(NamedTuple):
    """The KV tiles of a program: their list, how many they are, and how many need no mask."""

    rule: tl.tensor
    blocks: tl.tensor
    tiles: tl.tensor
    interior: tl.tensor


@triton.jit
def walk_of(
    program, p_table, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr
):
    """The KV tiles that a query program sees. A list has as many segments as `N_SEGMENTS` says."""
    first, last, t = program.first, program.last, program.t
    SPANS: tl.constexpr = M > B
    N_SEGMENTS: tl.constexpr = 2 * N_BANDS + 1 if SPANS else N_BANDS + 1
    rule = load_rule(p_table, program.kv_head, N_BANDS)
    k_last = tl.maximum(t - 1, 0) // B
    kept = kept_segments(rule, first // B, last // B, k_last, SPANS, N_BANDS)
    n_tiles = count_tiles(kept, last, t, N, B, N_SEGMENTS)
    walk = Walk(rule, kept, n_tiles, count_interior_tiles(kept, N, B, N_BANDS))
    return walk


@triton.jit
def load_terms(
    p_base, desc, o_row, m_row, i_batch, i_head, row, ROWS: tl.constexpr, TMA: tl.constexpr
):
    """One float32 per row, [ROWS], by a descriptor over [batch, head, row] or by pointers.

    Through TMA it waits in shared memory; pointers would cost each thread registers and copies for
    every column of the transposed scores that it holds. What lies outside m_row is not meaningful.
    """
    if TMA:
        return desc.load([i_batch, i_head, row]).reshape(ROWS)
    else:
        return tl.load(p_base + o_row, mask=m_row, other=0.0)
