"""The jit helpers that forward and backward share: which tiles, which entries, softmax, loads.

A rule on the device is one row of `LayerPattern.table()`: shift, then (reach, stride) from the
narrowest to the widest band. For a *query tile* (rows of the blocks i_first..i_last) the KV blocks
it visits form, per band, arithmetic progressions; a tuple `(start, stride, count, start, ...)` of
such segments is a list of blocks that costs a few scalar registers, and `block_at` is its p-th
entry. So one pipelined loop walks all bands: no index table, no drain between shard and window.

There are two lists. *Interior* blocks are seen entirely by every row, and need no mask. The
*masked* ones are the diagonal, the tail of the sequence, and, where a query tile spans several
blocks, the few blocks at the far edge of a band that only some rows still keep.

Positions: rows and columns count tokens in the KV sequence; blocks count block_size tokens.
"""

import triton
import triton.language as tl


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
        segments = segments + segment(low, high, rule[0], rule[2 + 2 * j])
    return segments


@triton.jit
def interior_segments(rule, i_first, i_last, k_last, N_BANDS: tl.constexpr):
    """The blocks that every row of the query tile sees in full, from far to near."""
    return band_segments(rule, i_first, i_last, k_last, False, N_BANDS)


@triton.jit
def masked_segments(rule, i_first, i_last, k_last, SPANS: tl.constexpr, N_BANDS: tl.constexpr):
    """The blocks that need a mask: far edges if the query tile SPANS blocks, then the diagonal.

    The last KV block is here even when the tile lies beyond it: it may end inside the block.
    """
    start = tl.minimum(i_first, k_last)
    count = tl.minimum(i_last, k_last) - start + 1
    alive = i_first - start < lifetime(rule, start, N_BANDS)
    diagonal = (start, 1, tl.where(alive, count, 0))
    if SPANS:
        return band_segments(rule, i_first, i_last, k_last, True, N_BANDS) + diagonal
    else:
        return diagonal


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
def tile_column(segments, p, N: tl.constexpr, B: tl.constexpr, N_SEGMENTS: tl.constexpr):
    """First column of the p-th tile of a list, where a tile is (part of) one block."""
    PARTS: tl.constexpr = B // N
    return block_at(segments, p // PARTS, N_SEGMENTS) * B + p % PARTS * N


@triton.jit
def interior_tiles(n_interior, N: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr):
    """How many times STEP tiles of N columns fit in n_interior blocks."""
    return n_interior * (B // N) // STEP if N <= B else n_interior // (N // B * STEP)


@triton.jit
def interior_columns(interior, p, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr):
    """Columns [N] of the p-th interior tile."""
    o_n = tl.arange(0, N)
    if N <= B:
        return tile_column(interior, p, N, B, N_BANDS) + o_n
    else:
        return block_at(interior, p * (N // B) + o_n // B, N_BANDS) * B + o_n % B


@triton.jit
def masked_tiles(n_left, n_masked, last_row, t, N: tl.constexpr, B: tl.constexpr):
    """Number of KV tiles in n_masked blocks and the n_left tiles (N <= B) or blocks before them."""
    if N <= B:
        # The last block is the diagonal: leave out its parts that no row reaches.
        beyond = B // N - 1 - tl.minimum(last_row, t - 1) % B // N
        return n_left + tl.where(n_masked > 0, n_masked * (B // N) - beyond, 0)
    else:
        return tl.cdiv(n_left + n_masked, N // B)


@triton.jit
def masked_columns(
    interior,
    n_interior,
    n_left,
    masked,
    n_masked,
    p,
    N: tl.constexpr,
    B: tl.constexpr,
    N_BANDS: tl.constexpr,
    N_MASKED: tl.constexpr,
):
    """Columns [N] of the p-th masked tile, and their block: a scalar, or [N] where N > B.

    Before the masked blocks come the n_left last interior ones, which fill no step of the interior
    loop. Columns past the end of the list lie in block 2^30 / B, beyond any sequence.
    """
    o_n = tl.arange(0, N)
    if N <= B:
        column = tile_column(masked, p - n_left, N, B, N_MASKED)
        left = tile_column(interior, n_interior * (B // N) - n_left + p, N, B, N_BANDS)
        column = tl.where(p < n_left, left, column)
        return column + o_n, column // B
    else:
        position = p * (N // B) + o_n // B
        i_block = tl.where(
            position < n_left,
            block_at(interior, n_interior - n_left + position, N_BANDS),
            block_at(masked, position - n_left, N_MASKED),
        )
        i_block = tl.where(position < n_left + n_masked, i_block, (1 << 30) // B)
        return i_block * B + o_n % B, i_block


@triton.jit
def tile_mask(
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
    """Mask [M, N]: query positions o_row [M] see the KV positions o_col [N] of block(s) i_block."""
    m_s = (o_col[None, :] <= o_row[:, None]) & (o_col < t)[None, :]
    if SPANS:
        i_life = lifetime(rule, i_block, N_BANDS)
        if N > B:
            i_life, i_block = i_life[None, :], i_block[None, :]
        m_s &= o_row[:, None] // B - i_block < i_life
    return m_s


@triton.jit
def attend(
    b_q,
    keys,
    values,
    m_s,
    b_acc,
    b_m,
    b_l,
    scale_log2,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax, in base 2, over STEP tiles of keys [N, D] and values [N, DV].

    m_s [M, N] masks the scores, or is None. b_acc [M, DV], b_m [M], b_l [M]: the output so far, the
    running maximum of the scaled scores and the running sum; returns the new ones.
    """
    scores = ()
    b_m_new = b_m
    for j in tl.static_range(STEP):
        b_s = tl.dot(b_q, tl.trans(keys[j]), input_precision=PRECISION)  # [M, N]
        if m_s is not None:
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_m_new = tl.maximum(b_m_new, tl.max(b_s, 1) * scale_log2)
        scores += (b_s,)
    b_shift = b_m_new
    if m_s is not None:
        # A row that has seen nothing yet has maximum -inf: subtract 0, so that exp2 gives 0.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_rescale = tl.exp2(b_m - b_shift)
    b_l = b_l * b_rescale
    b_acc = b_acc * b_rescale[:, None]
    for j in tl.static_range(STEP):
        b_p = tl.exp2(scores[j] * scale_log2 - b_shift[:, None])  # [M, N]
        b_l += tl.sum(b_p, 1)
        b_v = values[j]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_m_new, b_l


@triton.jit
def load_rows(
    p_base,
    o_row,
    stride,
    m_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Tile [rows, BLOCK_D] through pointers; rows outside m_row and columns past D are 0."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASK_ROWS and D != BLOCK_D:
        return tl.load(p_tile, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif D != BLOCK_D:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_rows(p_base, o_row, stride, m_row, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the rows of m_row of a tile [rows, BLOCK_D], in the pointer's type."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = m_row[:, None] & (o_d < D)[None, :] if D != BLOCK_D else m_row[:, None]
    tl.store(p_tile, b_x.to(p_base.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(
    p_base,
    desc,
    stride,
    o_row,
    i_batch,
    i_head,
    row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tile [ROWS, BLOCK_D] that lies inside the tensor.

    Through the descriptor over [batch, head, row, d] from `row` on (no address per thread, any
    stride between heads), or else the rows o_row [ROWS] through pointers.
    """
    if TMA:
        return desc.load([i_batch, i_head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        return load_rows(p_base, o_row, stride, o_row >= 0, D, BLOCK_D, False)


@triton.jit
def sequence(p_cu, i_seq, length, PACKED: tl.constexpr):
    """(first row in memory, length) of a sequence: read from cu_seqlens when PACKED."""
    if PACKED:
        start = tl.load(p_cu + i_seq)
        return start, tl.load(p_cu + i_seq + 1) - start
    else:
        return i_seq * 0, length


@triton.jit
def head_base(p_base, i_batch, i_head, start, stride_batch, stride_row, stride_head):
    """Pointer to row `start` of a head; 64-bit, as a tensor may hold more than 2^31 elements."""
    offset = i_batch.to(tl.int64) * stride_batch + i_head.to(tl.int64) * stride_head
    return p_base + offset + start.to(tl.int64) * stride_row
