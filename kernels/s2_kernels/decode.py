"""Attention of a few query tokens, or many, against paged KV: the Triton kernels of decoding.

On a Hopper, few tokens go to the kernel of hopper/decode.py, whose units, lists and shares are the
same.

A *unit* is a query tile of one KV head of one sequence, with all query heads of the group. Its list
of live pages is arithmetic on lifetimes, so the list's length follows from the sequence's length
alone. Where the units are about as long, each is cut into as many even pieces, one per program.
Else all lists, one behind the other, are cut into even ranges (decode_lists.py). A program writes
one part (output and log of the softmax's sum) for every unit that it does a piece of. Parts are
added up in their order: by the program that is the last to write one of the unit (`one_launch`), or
by `s2_merge_kernel`, with the same bits. The grid depends on shapes alone and the host reads
nothing, so that a CUDA graph can hold it. The same inputs give the same bits on the same GPU;
another number of programs adds in another order.

A list is computed from lifetimes, never from page numbers: the entry of a dead block may be stale,
and its page may belong to another head or hold NaN.

Shapes: b sequences, s new tokens, h query heads, g KV heads, G = h / g, d head size, dv head size
of V, B block size, M rows of a unit (tokens x G, padded), N KV rows of a tile, U units.
    q [b, s, h, d]   k_pages [pages, B, d]   v_pages [pages, B, dv]   out [b, s, h, dv]
    page_table int32 [b, g, blocks]: the page of a block   lengths int32 [b]: tokens, new ones too
Token j of the s new ones stands at position length - s + j; before position 0 there is padding.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from s2_kernels import hopper
from s2_kernels.configs import FUSED
from s2_kernels.decode_lists import (
    count_tiles,
    has_begin,
    keep_ends,
    listed_tiles,
    live_segments,
    own_tiles,
    parts_of,
    positions_of,
    share_of,
    tile_blocks,
)
from s2_kernels.decode_merge import merge_parts, merge_tile, s2_merge_kernel, store_rows_of
from s2_kernels.launch import arrivals_for, capability, device_table, on_grid, pad, takes_pdl
from s2_kernels.pattern import LayerPattern
from s2_kernels.primitives import (
    finish_softmax,
    lifetime,
    load_rule,
    online_softmax,
    start_softmax,
)

MOST_UNITS = 4096
"""Units of a launch: every program adds up the lengths of all lists."""


@dataclass(frozen=True)
class DecodeConfig:
    """KV rows of a tile, warps, stages, and programs per multiprocessor of the decode kernel.

    pdl: where the GPU can, start a kernel's programs before the last ones of the kernel before it
    have ended, to wait there (programmatic dependent launch).
    start: what the begin of a unit costs, in tiles, 1 or more.
    maxnreg: registers a thread, 0 for as many as the compiler likes.
    ahead: page numbers that a program asks for at once when it begins a unit, a power of two.
    one_launch: parts are merged by the last program that wrote one, not by a second kernel.
    """

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int
    pdl: bool = True
    start: int = 4
    maxnreg: int = 0
    ahead: int = 1
    one_launch: bool = False

    def __post_init__(self):
        if self.start < 1:
            raise ValueError(f"start={self.start}: must be 1 or more")

    def __str__(self) -> str:
        name = f"n{self.block_n}w{self.num_warps}s{self.num_stages}x{self.per_sm}c{self.start}"
        name += f"r{self.maxnreg}" if self.maxnreg else ""
        name += f"a{self.ahead}" if self.ahead != 1 else ""
        return name + ("one" if self.one_launch else "") + ("" if self.pdl else "nopdl")


@triton.jit
def load_page(p_pages, block, stride, N: tl.constexpr, B: tl.constexpr):
    """The page(s) of `tile_blocks`."""
    if N <= B:
        return tl.load(p_pages + block * stride)
    else:
        return tl.load(p_pages + block * stride, mask=block >= 0, other=0)


@triton.jit
def first_pages(
    p_pages, stride, segments, low, high, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The page(s) of tile `low`; of tiles low..low + AHEAD - 1, where AHEAD > 1 (N <= B)."""
    if AHEAD > 1:
        low = tl.minimum(low + tl.arange(0, AHEAD), high - 1)
    return load_page(p_pages, tile_blocks(segments, low, N, B, N_BANDS), stride, N, B)


@triton.jit
def load_paged(p_pool, page, row, m_row, stride_page, stride_row, D: tl.constexpr,
               BLOCK_D: tl.constexpr, N: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Tile [N, BLOCK_D] of rows of one page, or of one page per row; 0 outside m_row [N].

    What lies in a page past the end of the sequence is not loaded: it may be NaN, and NaN * 0 too.
    """
    o_d = tl.arange(0, BLOCK_D)
    page = page.to(tl.int64)  # a pool may hold more than 2^31 elements
    if N <= B:
        p_tile = p_pool + page * stride_page + (row[:, None] * stride_row + o_d[None, :])
    else:
        p_tile = p_pool + (page * stride_page + row * stride_row)[:, None] + o_d[None, :]
    mask = m_row[:, None] & (o_d < D)[None, :] if D != BLOCK_D else m_row[:, None]
    return tl.load(p_tile, mask=mask, other=0.0)


@triton.jit
def attend_pages(
    b_q, o_row, rule, segments, low, high, last, scale_log2, p_k, p_v, p_pages, pages,
    stride_k_page, stride_k_row, stride_v_page, stride_v_row, stride_pages,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B: tl.constexpr, N_BANDS: tl.constexpr,
    ONE_TOKEN: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [M, BLOCK_DV] and lse [M] of the rows b_q [M, D] over tiles low..high-1 of a list.

    The page number of a tile is asked for one tile ahead: so the loads of K and V, which the
    compiler starts several tiles ahead, never wait for it. But the first of these loads come at
    once. `pages` [AHEAD] asked for their page numbers together, and the L1 cache has them by then.
    """
    b_acc, b_m, b_l = start_softmax(M, BLOCK_DV)
    o_n = tl.arange(0, N)
    block = tile_blocks(segments, low, N, B, N_BANDS)
    page = pages
    if AHEAD > 1:
        tl.debug_barrier()  # else ptxas waits for the page numbers before it asks for q
        page = tl.sum(tl.where(tl.arange(0, AHEAD) == 0, pages, 0), 0)
    for p in tl.range(low, high):
        i_next = tile_blocks(segments, tl.minimum(p + 1, high - 1), N, B, N_BANDS)
        page_next = load_page(p_pages, i_next, stride_pages, N, B)
        if N <= B:
            row = p % (B // N) * N + o_n
            o_col = block * B + row
            m_col = o_col <= last
        else:
            row = o_n % B
            o_col = block * B + row
            m_col = (block >= 0) & (o_col <= last)
        b_k = load_paged(p_k, page, row, m_col, stride_k_page, stride_k_row, D, BLOCK_D, N, B)
        b_v = load_paged(p_v, page, row, m_col, stride_v_page, stride_v_row, DV, BLOCK_DV, N, B)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        m_s = m_col[None, :]
        if not ONE_TOKEN:  # one token attends to all that is listed; of several, each to its own
            life = lifetime(rule, block, N_BANDS)
            if N > B:
                life, block = life[None, :], block[None, :]
            m_s = m_s & (o_col[None, :] <= o_row[:, None]) & (o_row[:, None] // B - block < life)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_p, b_acc, b_m, b_l = online_softmax(b_s, b_acc, b_m, b_l, scale_log2, True)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        block, page = i_next, page_next
    return finish_softmax(b_acc, b_m, b_l)


@triton.jit(
    do_not_specialize=[
        "stride_table_b",
        "stride_table_h",
        "stride_table_k",
        "s",
        "stride_lse",
        "n_units",
        "n_tiles_q",
    ],
    do_not_specialize_on_alignment=["p_pages", "p_lengths"],  # those of some of a step's sequences
)
def s2_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_pages,
    p_lengths,
    p_table,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_ends,
    p_arrived,
    strides_q,
    strides_k,
    strides_v,
    stride_table_b,
    stride_table_h,
    stride_table_k,
    strides_out,
    stride_lse,
    s,
    n_tiles_q,
    n_units,
    scale_log2,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    U: tl.constexpr,
    N_BANDS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    START: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (programs,). Program i computes its share of all units' tiles (`share_of`).

    Its part of unit u is row block i + u of p_part [programs + units, rows, dv]: along the tiles
    neither number falls, and one of them grows from part to part. Who merges them is told by one of

    - p_ends [1 + units]: how the units were cut, for `s2_merge_kernel`;
    - p_arrived [units]: how many parts of a unit are written, 0 at first and at last. The program
      that writes the last one adds all of them up.
    """
    i_program = tl.program_id(0)
    kv_heads: tl.constexpr = KV_HEADS  # whole numbers that are known need no division
    if ONE_TOKEN:
        n_tiles_q = 1
    if PDL:  # launched while the kernel before still runs; what it wrote is read from here on
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    o_unit = tl.arange(0, U)
    n_listed = count_tiles(
        p_lengths, p_table, o_unit, s, kv_heads, n_tiles_q, n_units, TOKENS, N, B, N_BANDS
    )
    split, total, i_unit, end_unit, start, low, high = share_of(
        i_program, n_listed, o_unit, n_units, START
    )
    if p_ends is not None and i_program == 0:
        keep_ends(p_ends, n_listed, o_unit, split, n_units, START)
    o_m = tl.arange(0, M)
    for u in tl.range(i_unit, end_unit):
        i_kv = u % kv_heads
        i_tile = u // kv_heads % n_tiles_q
        i_seq = (u // (n_tiles_q * kv_heads)).to(tl.int64)
        length = tl.load(p_lengths + i_seq)
        first, last = positions_of(i_tile, length, s, TOKENS)
        rule = load_rule(p_table, i_kv, N_BANDS)
        segments = live_segments(rule, first, last, B, N_BANDS)
        n_tiles = listed_tiles(segments, last, N, B, N_BANDS)
        own_low, own_high = own_tiles(n_tiles, split, start, low, high, START)
        n_rows = tl.minimum(s - i_tile * TOKENS, TOKENS) * GROUP
        if own_low < own_high:
            p_row_pages = p_pages + i_seq * stride_table_b + i_kv * stride_table_h
            pages = first_pages(
                p_row_pages, stride_table_k, segments, own_low, own_high, N, B, N_BANDS, AHEAD
            )
            o_token = i_tile * TOKENS + o_m // GROUP
            o_row = length - s + o_token
            m_q = (o_m < n_rows) & (o_row >= 0)
            o_d = tl.arange(0, BLOCK_D)
            p_row = p_q + i_seq * strides_q[0] + o_token.to(tl.int64) * strides_q[1]
            p_row += (i_kv * GROUP + o_m % GROUP) * strides_q[2]
            m_q = m_q[:, None] & (o_d < D)[None, :]
            b_q = tl.load(p_row[:, None] + o_d[None, :], mask=m_q, other=0.0)
            b_out, b_lse = attend_pages(
                b_q, o_row, rule, segments, own_low, own_high, last, scale_log2, p_k, p_v,
                p_row_pages, pages, strides_k[0], strides_k[1], strides_v[0], strides_v[1],
                stride_table_k, D, DV, BLOCK_D, BLOCK_DV, M, N, B, N_BANDS, ONE_TOKEN, AHEAD,
                PRECISION,
            )  # fmt: skip
            b_out = tl.where((o_row >= 0)[:, None], b_out, 0.0)
            b_lse = tl.where(o_row >= 0, b_lse, float("-inf"))
            if own_high - own_low == n_tiles:  # the whole unit: there is nothing to merge
                store_rows_of(
                    u, o_m, n_rows, b_out, b_lse, p_out, p_lse, strides_out, stride_lse, kv_heads,
                    n_tiles_q, DV, BLOCK_DV, GROUP, TOKENS,
                )  # fmt: skip
            else:
                RM: tl.constexpr = TOKENS * GROUP
                o_dv = tl.arange(0, BLOCK_DV)
                o_part = (i_program + u).to(tl.int64) * RM + o_m
                m_m = o_m < n_rows
                m_out = m_m[:, None] & (o_dv < DV)[None, :]
                tl.store(p_part + (o_part * DV)[:, None] + o_dv[None, :], b_out, mask=m_out)
                tl.store(p_part_lse + o_part, b_lse, mask=m_m)
                if p_arrived is not None:
                    i_first, i_stop = parts_of(
                        u, split, total, start, n_tiles, n_units, tl.num_programs(0), START
                    )
                    # All threads have written before one of them counts the part (release); who
                    # counts the last one sees what was written before all counts (acquire).
                    tl.debug_barrier()
                    arrived = tl.atomic_add(p_arrived + u, 1, sem="acq_rel")
                    if arrived == i_stop - i_first - 1:
                        tl.store(p_arrived + u, 0)  # for the next launch
                        for row in tl.range(0, RM, ROWS):
                            o_r = row + tl.arange(0, ROWS)
                            b_o, b_l = merge_parts(
                                u, i_first, i_stop, o_r, n_rows, p_part, p_part_lse, DV, BLOCK_DV,
                                RM, PARTS,
                            )  # fmt: skip
                            store_rows_of(
                                u, o_r, n_rows, b_o, b_l, p_out, p_lse, strides_out, stride_lse,
                                kv_heads, n_tiles_q, DV, BLOCK_DV, GROUP, TOKENS,
                            )  # fmt: skip
        elif (n_tiles == 0) & has_begin(split, start, low, high):  # padding
            b_out = tl.zeros([M, BLOCK_DV], tl.float32)
            b_lse = tl.full([M], float("-inf"), tl.float32)
            store_rows_of(
                u, o_m, n_rows, b_out, b_lse, p_out, p_lse, strides_out, stride_lse, kv_heads,
                n_tiles_q, DV, BLOCK_DV, GROUP, TOKENS,
            )  # fmt: skip
        start += n_tiles + START


def decode_config(d, dv, rows: int, block_size: int, dtype: torch.dtype, device) -> DecodeConfig:
    """Tiles of up to 32 KiB of K and V, one in flight beside the one computed, two programs a time.

    Other GPUs than Hopper may have 99 KiB of shared memory for a program: there less is in flight.
    """
    hopper, few = capability(device) == (9, 0), rows <= 16
    hopper = hopper and (few or dtype != torch.float32)  # whose products take more registers
    wide = pad(max(d, dv)) > (128 if hopper else 64)
    block_n = 32768 // (dtype.itemsize * (pad(d) + pad(dv)))
    if not hopper and not few and wide:
        block_n //= 2
    block_n = min(max(block_n, 16), 128 if few and block_size >= 64 else 64)
    warps = 8 if dtype == torch.float32 or (wide and not few) else 4
    stages = 3 if few or hopper else 2
    return DecodeConfig(block_n, warps, stages, 2, ahead=8 if few else 1, one_launch=few)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough for lists to be cut
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_of(s: int, group: int) -> tuple[int, int]:
    """(rows of a unit's tile, query tokens in it): all tokens in one tile where they are few.

    Powers of two: kernels are compiled for them, and a server meets every s (ahead.py).
    """
    tokens = triton.next_power_of_2(s)
    if tokens * group <= 64:
        return max(16, triton.next_power_of_2(tokens * group)), tokens
    m = max(64, triton.next_power_of_2(group))
    return m, m // group


def launch_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    pattern: LayerPattern,
    softmax_scale: float,
    *,
    config: DecodeConfig | None = None,
    programs: int | None = None,
    after_write: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [b, s, h, dv] and lse [b, h, s] float32; inputs as in the module, checked by the caller.

    Args:
        config: tiles of the kernel here. Default: the one for Hopper, where it takes the inputs
            (hopper/decode.py), else `decode_config`.
        programs: how many share the work (default: as many as run at a time).
        after_write: as in `paged_attention`; read by the kernel for Hopper.
    """
    b, s, h, _ = q.shape
    out = q.new_empty((b, s, h, v_pages.shape[-1]))
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    one = b * pattern.kv_heads <= MOST_UNITS
    if one and config is None and hopper.takes_decode(q, k_pages, v_pages, pattern):
        from s2_kernels.hopper.decode import launch_hopper_decode  # imports Gluon

        inputs = (q, k_pages, v_pages, page_table, lengths, pattern, softmax_scale)
        launch_hopper_decode(*inputs, out, lse, programs=programs, after_write=after_write)
        return out, lse
    group = h // pattern.kv_heads
    m, tokens = tile_of(s, group)
    # So many query tokens at once that no launch has more than MOST_UNITS units.
    step = max(1, MOST_UNITS // (b * pattern.kv_heads)) * tokens
    pages, rest = (k_pages, v_pages, page_table), (m, tokens, config, programs)
    for begin in range(0, s, step):
        part, after = slice(begin, begin + step), max(0, s - begin - step)
        whole = s <= step  # every step of decoding: no time for slices
        x, y, z = (q, out, lse) if whole else (q[:, part], out[:, part], lse[:, :, part])
        ends = lengths if after == 0 else lengths - after
        _launch(x, *pages, ends, pattern, softmax_scale, y, z, *rest)
    return out, lse


def _launch(q, k_pages, v_pages, page_table, lengths, pattern, scale, out, lse, m, tokens,
            config, programs):  # fmt: skip
    (b, s, h, d), dv = q.shape, v_pages.shape[-1]
    kv_heads, group = pattern.kv_heads, h // pattern.kv_heads
    config = config or decode_config(d, dv, m, pattern.block_size, q.dtype, q.device)
    pdl = config.pdl and takes_pdl(s2_decode_kernel, q.device)
    threads = 32 * config.num_warps
    programs = programs or config.per_sm * multiprocessors(q.device)
    n_tiles_q = triton.cdiv(s, tokens)
    units, rows = b * kv_heads * n_tiles_q, tokens * group
    part = lse.new_empty((programs + units, rows, dv))
    part_lse = lse.new_empty((programs + units, rows))
    one = config.one_launch
    ends = None if one else lengths.new_empty((1 + units,))
    merge_rows, at_once = merge_tile(rows, dv, threads, programs // units)
    on_grid(s2_decode_kernel, (programs,))(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        device_table(pattern, q.device),
        out,
        lse,
        part,
        part_lse,
        ends,
        arrivals_for(q, units) if one else None,
        q.stride()[:3],
        k_pages.stride()[:2],
        v_pages.stride()[:2],
        *page_table.stride(),
        out.stride()[:3],
        lse.stride(1),
        s,
        n_tiles_q,
        units,
        scale * math.log2(math.e),
        KV_HEADS=kv_heads,
        D=d,
        DV=dv,
        BLOCK_D=pad(d),
        BLOCK_DV=pad(dv),
        GROUP=group,
        TOKENS=tokens,
        M=m,
        N=config.block_n,
        B=pattern.block_size,
        U=32 if units <= 32 else max(128, triton.next_power_of_2(units)),
        N_BANDS=pattern.n_bands,
        ONE_TOKEN=s == 1,
        ROWS=merge_rows if one else 1,
        PARTS=at_once if one else 1,
        AHEAD=config.ahead if config.block_n <= pattern.block_size else 1,
        PRECISION="ieee",
        START=config.start,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
        **({"maxnreg": config.maxnreg} if config.maxnreg else {}),
    )
    if one:
        return
    on_grid(s2_merge_kernel, (units, triton.cdiv(rows, merge_rows)))(
        out,
        lse,
        part,
        part_lse,
        ends,
        out.stride()[:3],
        lse.stride(1),
        s,
        kv_heads,
        n_tiles_q,
        units,
        programs,
        DV=dv,
        BLOCK_DV=pad(dv),
        GROUP=group,
        TOKENS=tokens,
        ROWS=merge_rows,
        PARTS=at_once,
        START=config.start,
        PDL=pdl,
        num_warps=config.num_warps,
        **FUSED,
        **({"launch_pdl": True} if pdl else {}),
    )
