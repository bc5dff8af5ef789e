"""Pages for tests: a pool that is poisoned wherever nothing alive lies, and dense truth beside it.

Pages are dealt in random order, and a page that is dead is dealt again to another head, so that a
kernel that follows page numbers, or reads a stale entry of the table, reads another head's keys.
"""

import math
from dataclasses import dataclass

import torch

from s2_kernels import LayerPattern
from s2_kernels.cache import alive_blocks
from s2_kernels.reference import masked_attention, token_mask


@dataclass(frozen=True)
class PagedCase:
    """Sequences of `lengths` tokens, the last `s` of them new."""

    pattern: LayerPattern
    lengths: tuple[int, ...]
    s: int = 1
    d: int = 32
    dv: int | None = None

    def __str__(self):
        p = self.pattern
        lengths = "_".join(map(str, self.lengths))
        return f"N{lengths}-S{self.s}-H{p.heads}-KV{p.kv_heads}-D{self.d}-B{p.block_size}"


@dataclass(frozen=True)
class Paged:
    """q [b, s, h, d], dense k [b, t, g, d] and v [b, t, g, dv], and the same in pages."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor


def make_paged(case: PagedCase, dtype=torch.float32, device="cpu", written=True) -> Paged:
    """Random inputs. Not `written`: the pages of the new tokens hold NaN where they belong."""
    random = torch.Generator().manual_seed(sum(case.lengths) + case.s)
    p, size, b, t = case.pattern, case.pattern.block_size, len(case.lengths), max(case.lengths)
    dv = case.dv or case.d

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    q, k = normal(b, case.s, p.heads, case.d), normal(b, t, p.kv_heads, case.d)
    v = normal(b, t, p.kv_heads, dv)
    needed = []
    for i, length in enumerate(case.lengths):
        first = max(0, length - case.s)
        for head, rule in enumerate(p.rules):
            old = alive_blocks(rule, first, size)
            new = range(first // size, -(-length // size))
            needed += [(i, head, block) for block in sorted({*old, *new})]
    pool = len(needed) + 3
    pages = torch.randperm(pool, generator=random)[: len(needed)]
    k_pages, v_pages = (torch.full((pool, size, n), math.nan, dtype=dtype) for n in (case.d, dv))
    # Stale entries name any page: of another head, of another block, poisoned.
    shape = (b, p.kv_heads, -(-t // size) + 1)
    table = torch.randint(0, pool, shape, generator=random, dtype=torch.int32)
    for (i, head, block), page in zip(needed, pages.tolist(), strict=True):
        table[i, head, block] = page
        end = case.lengths[i] if written else case.lengths[i] - case.s
        rows = range(block * size, max(block * size, min((block + 1) * size, end)))
        k_pages[page, : len(rows)] = k[i, rows.start : rows.stop, head]
        v_pages[page, : len(rows)] = v[i, rows.start : rows.stop, head]
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    return Paged(*(x.to(device) for x in (q, k, v, k_pages, v_pages, table, lengths)))


def truth_of(case: PagedCase, x: Paged, dtype=torch.float64):
    """out [b, s, h, dv] and lse [b, h, s] by a dense mask over dense keys, in float64."""
    out = torch.zeros(*x.q.shape[:3], x.v.shape[-1], dtype=dtype, device=x.q.device)
    lse = torch.full((x.q.shape[0], x.q.shape[2], case.s), -math.inf, dtype=dtype,
                     device=x.q.device)  # fmt: skip
    for i, length in enumerate(case.lengths):
        padding = max(0, case.s - length)
        if padding == case.s:
            continue
        real = case.s - padding
        mask = token_mask(case.pattern, real, length, length - real, x.q.device)
        q, k, v = (y.to(dtype) for y in (x.q[i, None, padding:], x.k[i, None], x.v[i, None]))
        got, got_lse = masked_attention(q, k[:, :length], v[:, :length], mask)
        out[i, padding:], lse[i, :, padding:] = got[0], got_lse[0]
    return out, lse
