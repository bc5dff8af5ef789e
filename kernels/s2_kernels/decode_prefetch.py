"""What a program of decoding asks for while the kernel before it still runs: jit helpers.

With programmatic dependent launch a program may start early, but must not read what the kernel
before writes: lengths, page table, the newest keys. It can guess from what lies there and have the
pages brought into the L2 cache. When it may read, the first keys are there or on their way.
"""

import triton
import triton.language as tl

from s2_kernels.decode_lists import (
    count_tiles,
    listed_tiles,
    live_segments,
    own_tiles,
    positions_of,
    share_of,
    tile_blocks,
)
from s2_kernels.primitives import load_rule

_PREFETCH = (
    "{.reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; "
    "mov.u32 $0, 0;}"
)
PREFETCH_L2 = tl.constexpr(_PREFETCH)


@triton.jit
def rows_of(p_pool, page, row, stride_page, stride_row, ROWS: tl.constexpr):
    """(address, bytes) of ROWS contiguous rows of each page [X]."""
    p_rows = p_pool + page * stride_page + row * stride_row
    size = ROWS * stride_row * (p_pool.dtype.element_ty.primitive_bitwidth // 8)
    return p_rows.to(tl.int64), size


@triton.jit
def prefetch_share(
    p_k, p_v, p_pages, p_lengths, p_table, strides_k, strides_v, stride_table_b, stride_table_h,
    stride_table_k, s, kv_heads, n_tiles_q, n_units, n_blocks, n_pages, TOKENS: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, U: tl.constexpr, N_BANDS: tl.constexpr, START: tl.constexpr,
    TILES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Asks for a program's first TILES tiles while the kernel before may still run.

    What is read here may be about to change, so it is a guess, checked against the sizes of table
    and pool; whatever comes, a cache holds what is in memory. `.cg`: nothing of it stays in L1.
    """
    o_unit = tl.arange(0, U)
    n_listed = count_tiles(
        p_lengths, p_table, o_unit, s, kv_heads, n_tiles_q, n_units, TOKENS, N, B, N_BANDS, ".cg"
    )
    i_program = tl.program_id(0)
    split, _, u, end_unit, start, low, high = share_of(i_program, n_listed, o_unit, n_units, START)
    if u < end_unit:
        i_seq, i_kv = u // (n_tiles_q * kv_heads), u % kv_heads
        length = tl.load(p_lengths + i_seq, cache_modifier=".cg")
        first, last = positions_of(u // kv_heads % n_tiles_q, length, s, TOKENS)
        segments = live_segments(load_rule(p_table, i_kv, N_BANDS), first, last, B, N_BANDS)
        n_tiles = listed_tiles(segments, last, N, B, N_BANDS)
        own_low, own_high = own_tiles(n_tiles, split, start, low, high, START)
        # A thread asks for a few rows, one half of the threads of K and the other of V.
        CHUNKS: tl.constexpr = THREADS // (2 * TILES)
        ROWS: tl.constexpr = N // CHUNKS
        o_thread = tl.arange(0, THREADS)
        o = o_thread % (THREADS // 2)
        p = own_low + o // CHUNKS
        block = tile_blocks(segments, p, N, B, N_BANDS)
        ask = (p < own_high) & (block >= 0) & (block < n_blocks)
        p_entry = p_pages + i_seq.to(tl.int64) * stride_table_b + i_kv * stride_table_h
        page = tl.load(p_entry + block * stride_table_k, ask, other=-1, cache_modifier=".cg")
        ask = ask & (page >= 0) & (page < n_pages)
        page, row = page.to(tl.int64), p % (B // N) * N + o % CHUNKS * ROWS
        k_rows, k_size = rows_of(p_k, page, row, strides_k[0], strides_k[1], ROWS)
        v_rows, v_size = rows_of(p_v, page, row, strides_v[0], strides_v[1], ROWS)
        of_k = o_thread < THREADS // 2
        tl.inline_asm_elementwise(
            PREFETCH_L2, "=r,l,r,r",
            [tl.where(of_k, k_rows, v_rows), ask.to(tl.int32), tl.where(of_k, k_size, v_size)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
