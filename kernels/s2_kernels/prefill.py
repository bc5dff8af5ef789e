"""Chunked prefill: many new tokens of a sequence, at the pace of the training kernels.

The paged decode kernel (decode.py) takes any number of tokens, but is made for a few: it splits the
keys, so that every program reads pages and little is computed from each. A chunk of a prompt has
thousands of queries. Here the live pages that it sees are copied, once, into one tensor, in the
order in which context parallelism has keys of other ranks (near.py): of each head the blocks kept
forever, and then every block from the chunk's window on. The forward kernel takes them as they are.

What is copied is little: at 128k tokens, window 1,024 and stride 16, a chunk of 8,192 copies 16,832
rows of a KV head, of 131,072. A dense head copies all, so no more KV heads are taken at a time than
`SCRATCH_BYTES` hold.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from s2_kernels.api import check_place, check_scale, s2_attention
from s2_kernels.autograd import refuse_other_modes
from s2_kernels.near import Near, forever_before
from s2_kernels.paged import (
    NO_GRADIENT,
    check_backend,
    check_pages,
    check_queries,
    paged_reference,
)
from s2_kernels.pattern import FOREVER, LayerPattern

SCRATCH_BYTES = 512 << 20
"""Of copied keys and values at a time; one KV head's, where these are more."""

FEWEST = 256
"""New tokens of a sequence from which on `takes_prefill` prefers it.

There a dense layer takes as long either way (an H200, 128k tokens: 1.7 and 1.8 ms). A sparse one
does from about 600 on; at 256 it loses 0.2 ms. docs/benchmarks/raw/chunks-h200-2026-11-28.txt.
"""


def takes_prefill(tokens: int, block_size: int) -> bool:
    """Whether so many new tokens of a sequence are a chunk of a prompt rather than a draft."""
    return tokens >= max(FEWEST, 2 * block_size)


def paged_prefill(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    pattern: LayerPattern,
    *,
    lengths: Sequence[int],
    softmax_scale: float | None = None,
    backend: str = "auto",
    into: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """`paged_attention` of the last tokens of sequences whose lengths the host knows.

    The keys and values of these tokens are in their pages already (`write_pages`). No gradient, and
    no part of a CUDA graph: what is copied depends on the lengths. One sequence after the other.

    Args:
        q: [b, s, h, d]: token j of sequence i stands at position lengths[i] - s + j. At least two
            blocks of them, and none is padding.
        k_pages: [pages, block_size, d]; v_pages: [pages, block_size, dv]; page_table: int32
            [b, g, blocks]: as in `paged_attention`.
        pattern: lifetimes for exactly these h and g heads.
        lengths: the tokens of each sequence, the new ones included.
        softmax_scale: above 0; default 1 / sqrt(d).
        backend: "triton" (the training kernels: Hopper's own where they take it, else portable),
            "reference" (PyTorch, any device), "auto": "triton" on a GPU.
        into: [b, s, h, dv] in q's dtype, where the result is written; its last dimension is
            contiguous. Default: a new tensor.
        check: False leaves the checks out, for who calls again with what has been checked.

    Returns:
        out [b, s, h, dv].

    Raises:
        ValueError: names the argument, the value and the way out.
        RuntimeError: forward-mode AD, or torch.func.
    """
    if check:
        some = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        check_pages(k_pages, v_pages, page_table, some, pattern, q)
        check_queries(q, k_pages, pattern)
        check_backend(backend, q, k_pages, v_pages)
        _check_lengths(q, page_table, lengths, pattern.block_size)
        refuse_other_modes("paged_prefill", q, k_pages, v_pages, way_out=NO_GRADIENT)
    scale = check_scale(softmax_scale, q)
    shape = (*q.shape[:3], v_pages.shape[-1])
    if into is not None:
        check_place(into, shape, q)
    out = into if into is not None else q.new_empty(shape)
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        known = torch.tensor(lengths, dtype=torch.int32, device=q.device)
        with torch.no_grad():
            made, _ = paged_reference(q, k_pages, v_pages, page_table, known, pattern, scale)
            return out.copy_(made)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        _attend(q[one], k_pages, v_pages, page_table[i], pattern, length, scale, out[one])
    return out


def _attend(q, k_pages, v_pages, page_table, pattern, length: int, scale: float, out) -> None:
    """One sequence, a few KV heads at a time."""
    s, group = q.shape[1], q.shape[2] // pattern.kv_heads
    row_bytes = (q.shape[-1] + out.shape[-1]) * q.itemsize
    heads = _heads_at_a_time(pattern, _head_bytes(pattern, row_bytes, s, length))
    backend = "auto" if q.is_cuda else "triton"
    for first in range(0, pattern.kv_heads, heads):
        kv = slice(first, min(first + heads, pattern.kv_heads))
        part = pattern if heads == pattern.kv_heads else _part(pattern, kv.start, kv.stop)
        k, v, near = copy_seen(k_pages, v_pages, page_table[kv], part, s, length)
        queries = slice(kv.start * group, kv.stop * group)
        with torch.no_grad():
            s2_attention(
                q[:, :, queries], k, v, part, softmax_scale=scale, q_offset=length - s, near=near,
                backend=backend, into=out[:, :, queries],
            )  # fmt: skip


def copy_seen(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    pattern: LayerPattern,
    s: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, Near | None]:
    """k [1, rows, g, d], v [1, rows, g, dv] that the last s of `length` tokens see, and near.

    Args:
        page_table: int32 [g, blocks], of one sequence.
    """
    near, blocks = _seen(pattern, s, length, page_table.device)
    pages, n_rows = page_table.gather(1, blocks), _n_rows(near, length, pattern.block_size)
    k, v = (_rows(x, pages, n_rows) for x in (k_pages, v_pages))
    return k, v, near


def scratch_bytes(pattern: LayerPattern, row_bytes: int, s: int, length: int) -> int:
    """What `paged_prefill` copies at a time for s new tokens of a sequence of `length`.

    Args:
        row_bytes: of the key and the value of one token of one KV head.
    """
    head = _head_bytes(pattern, row_bytes, s, length)
    return head * _heads_at_a_time(pattern, head)


class Kind(NamedTuple):
    """Chunks that one kernel attends from.

    Attributes:
        pattern: of the KV heads that are taken at a time.
        length: of the sequence, the chunk included; rows: of keys; near: which keys they are.
    """

    pattern: LayerPattern
    length: int
    rows: int
    near: Near | None


def kinds_of_chunks(
    pattern: LayerPattern, row_bytes: int, s: int, most: int, longest: int
) -> Iterator[Kind]:
    """A chunk of s tokens of each kind that kernels are compiled for (ahead.py).

    Kernels know where a chunk stands by arguments that they are not compiled for, but for three
    cases: it is the first, it is not and every key is near, or near begins later.

    Args:
        row_bytes: of the key and the value of one token of one KV head.
        most: the most tokens of a chunk.
        longest: the most of a sequence, and at least s.
    """
    parts = {pattern.n_bands: pattern}  # kernels know of the pattern its bands and its block size
    fewest = _heads_at_a_time(pattern, _head_bytes(pattern, row_bytes, min(most, longest), longest))
    for heads in range(fewest, pattern.kv_heads):
        for first in range(0, pattern.kv_heads, heads):
            part = _part(pattern, first, min(first + heads, pattern.kv_heads))
            parts.setdefault(part.n_bands, part)
    for part in parts.values():
        for length in sorted({s, min(s + 1, longest), longest}):
            near = _near(part, s, length)
            yield Kind(part, length, _n_rows(near, length, part.block_size), near)


def _head_bytes(pattern: LayerPattern, row_bytes: int, s: int, length: int) -> int:
    return _n_rows(_near(pattern, s, length), length, pattern.block_size) * row_bytes


def _heads_at_a_time(pattern: LayerPattern, head_bytes: int) -> int:
    return min(pattern.kv_heads, max(1, SCRATCH_BYTES // head_bytes))


@functools.lru_cache(64)
def _part(pattern: LayerPattern, first: int, end: int) -> LayerPattern:
    """The pattern of KV heads first..end-1 and their query heads."""
    rules = pattern.rules[first:end]
    return LayerPattern(pattern.heads // pattern.kv_heads * len(rules), pattern.block_size, rules)


@functools.lru_cache(256)
def _near(pattern: LayerPattern, s: int, length: int) -> Near | None:
    """Where near begins for the last s of `length` tokens; None: everything is near."""
    reaches = [band.reach for rule in pattern.rules for band in rule.bands]
    reach = max((reach for reach in reaches if reach != FOREVER), default=1)
    start = (length - s) // pattern.block_size - reach + 1
    if start < 1:
        return None
    return Near(start, max(forever_before(rule, start) for rule in pattern.rules))


@functools.lru_cache(64)
def _seen(pattern: LayerPattern, s: int, length: int, device) -> tuple[Near | None, torch.Tensor]:
    """near, and int64 [g, block rows] on `device`: the block in each row of the keys.

    A row that a head has no live block for gets one of the new blocks, which is finite.
    """
    size, near = pattern.block_size, _near(pattern, s, length)
    end = -(-length // size)
    if near is None:
        blocks = torch.arange(end).expand(pattern.kv_heads, -1)
    else:
        blocks = near.blocks(pattern, near.row + end - near.start)
    lives = torch.stack([rule.lifetimes(end) for rule in pattern.rules])
    age = (length - s) // size - blocks
    alive = (blocks >= 0) & (age < lives.gather(1, blocks.clamp(min=0)))
    whole = -(-(length - s) // size)  # the first block that is new from its first token on
    return near, torch.where(alive, blocks, whole).to(device)


def _n_rows(near: Near | None, length: int, size: int) -> int:
    """Rows of keys: what lies past the end of the sequence is left out."""
    return length if near is None else length - (near.start - near.row) * size


def _rows(pages: torch.Tensor, which: torch.Tensor, n_rows: int) -> torch.Tensor:
    """[1, rows, g, d] of pages [g, blocks], copied head after head."""
    return pages[which].flatten(1, 2)[:, :n_rows].transpose(0, 1)[None]


def _check_lengths(q, page_table, lengths, size: int) -> None:
    b, s, most = q.shape[0], q.shape[1], page_table.shape[2] * size
    if len(lengths) != b:
        raise ValueError(f"lengths={list(lengths)}: must be {b}, one of each sequence in q")
    if not all(s <= length <= most for length in lengths):
        raise ValueError(
            f"lengths={list(lengths)}: must be at least the {s} new tokens, and at most {most}: "
            f"page_table has {page_table.shape[2]} blocks"
        )
    if s < 2 * size:
        raise ValueError(
            f"q has {s} tokens: must be at least {2 * size}, two blocks; fewer are for "
            "paged_attention"
        )
