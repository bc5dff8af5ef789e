"""Attention against paged KV: checks, choice of backend, and the specification in PyTorch.

A page holds one block of one KV head, in a pool that heads, layers and sequences share. A page
table says where each block of a KV head lies; entries of dead blocks are not read.
"""

import math

import torch

from s2_kernels.api import check_scale, check_triton
from s2_kernels.autograd import refuse_other_modes
from s2_kernels.cache import alive_blocks
from s2_kernels.pattern import LayerPattern
from s2_kernels.reference import masked_attention
from s2_kernels.versions import NO_TRITON

if NO_TRITON is None:
    from s2_kernels.decode import launch_decode
    from s2_kernels.decode_write import launch_write
    from s2_kernels.plans import Plans

    _PLANS = Plans()

BACKENDS = ("auto", "triton", "reference")
NO_GRADIENT = ": no derivative goes through pages; s2_attention has one of dense keys and values"
_WAY_OUT = "backend='reference' (PyTorch, any device) takes it"


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    pattern: LayerPattern,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    after_write: bool = False,
    check: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last tokens of each sequence to its live pages.

    One token of each sequence is a step of decoding, a few are a draft to verify, many a chunk of
    a prompt (paged prefill). The keys and values of these tokens are in their pages already
    (`write_pages`). No gradient, on any device. On a GPU the host reads nothing and the grid
    depends on shapes alone, so that a CUDA graph can hold the call.

    Args:
        q: [b, s, h, d]. Token j of sequence i stands at position lengths[i] - s + j; where that is
            negative (padding in front) out is 0.
        k_pages: [pages, block_size, d]; v_pages: [pages, block_size, dv]. Any strides with a
            contiguous last dimension. What lies past the end of a sequence may be NaN.
        page_table: int32 [b, g, blocks]: the page of each block of each KV head. Only the entries
            of blocks that a query attends to are read; they are not checked on a GPU.
        lengths: int32 [b] on q's device: the tokens of each sequence, the new ones included, at
            most blocks * block_size. Not checked on a GPU, which would wait for it.
        pattern: lifetimes for exactly these h and g heads.
        softmax_scale: above 0; default 1 / sqrt(d).
        return_lse: also return lse [b, h, s], the natural log of the softmax denominator, float32.
        backend: "triton" (head sizes 32 to 256 in multiples of 16; on a Hopper, for few tokens,
            the kernel made for it), "reference" (PyTorch, any device), "auto": "triton" on a GPU.
        after_write: the last kernel launched on this stream is that of `write_pages`, for the same
            tokens. Older pages, q, lengths and page_table are then read while it may still run. A
            page that several sequences share may hold a new token of one of them only where that
            ends a block, and the others go on behind it.
        check: False leaves the checks out, for who calls again with what has been checked.

    Returns:
        out [b, s, h, dv], or (out, lse).

    Raises:
        ValueError: names the argument, the value and the way out.
        RuntimeError: forward-mode AD, or torch.func.
    """
    if check:
        check_pages(k_pages, v_pages, page_table, lengths, pattern, q)
        check_queries(q, k_pages, pattern)
        check_backend(backend, q, k_pages, v_pages)
        refuse_other_modes("paged_attention", q, k_pages, v_pages, way_out=NO_GRADIENT)
    scale = check_scale(softmax_scale, q)
    operands = (q, k_pages, v_pages, page_table, lengths)
    with torch.no_grad():
        if _on_triton(backend, q) and q.shape[0] > 0:
            out, lse = _planned(launch_decode, operands, pattern, scale, after_write=after_write)
        else:
            out, lse = paged_reference(*operands, pattern, scale)
    return (out, lse) if return_lse else out


def write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    pattern: LayerPattern,
    *,
    alive_only: bool = False,
    backend: str = "auto",
    check: bool = True,
) -> None:
    """Writes the keys and values of the last s tokens of each sequence into their pages.

    Args:
        k: [b, s, g, d]; v: [b, s, g, dv]: token j at position lengths[i] - s + j; tokens at
            negative positions (padding) are left out.
        k_pages, v_pages, page_table, lengths, pattern: as in `paged_attention`.
        alive_only: leave out blocks that are dead once these tokens are written (a prompt that
            attention has seen already); else every block of the new tokens must have a page.
        backend, check: as in `paged_attention`.

    Raises:
        ValueError: as `paged_attention`.
    """
    if check:
        check_pages(k_pages, v_pages, page_table, lengths, pattern, k)
        _check_new_tokens(k, v, k_pages, v_pages, page_table)
        check_backend(backend, k, k_pages, v_pages)
    if k.shape[0] == 0:
        return
    if _on_triton(backend, k):
        new = (_last_contiguous(k), _last_contiguous(v))
        pages = (k_pages, v_pages, page_table, lengths)
        _planned(launch_write, (*new, *pages), pattern, alive_only=alive_only)
    else:
        write_reference(k, v, k_pages, v_pages, page_table, lengths, pattern, alive_only=alive_only)


def _planned(launcher, tensors, pattern, *rest, **options):
    """`launcher(*tensors, pattern, ...)`, prepared once for tensors of these layouts (plans.py)."""
    if not tensors[0].is_cuda:
        return launcher(*tensors, pattern, *rest, **options)
    layouts = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
    key = (launcher.__name__, pattern.key, rest, *options.values(), tensors[0].device, layouts)

    def launch(*operands):
        return launcher(*operands, pattern, *rest, **options)

    return _PLANS.run(key, launch, tensors, tensors[0].device)


def check_queries(q, k_pages, pattern) -> None:
    if q.dim() != 4 or q.shape[2] != pattern.heads or q.shape[3] != k_pages.shape[2]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: must be [b, s, {pattern.heads}, {k_pages.shape[2]}], "
            "as the pattern's heads and the head size of k_pages are"
        )
    if q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: must hold at least one token")


def _check_new_tokens(k, v, k_pages, v_pages, page_table) -> None:
    b, kv_heads = page_table.shape[:2]
    for name, x, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (b, kv_heads, pages.shape[2]):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: must be [{b}, s, {kv_heads}, {pages.shape[2]}]"
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} tokens and v {v.shape[1]}: must be as many")


def check_pages(k_pages, v_pages, page_table, lengths, pattern, x) -> None:
    """Raises ValueError where pool, table and lengths do not fit the pattern and `x` [b, ...]."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 3 or pages.shape[1] != pattern.block_size:
            raise ValueError(
                f"{name} has shape {tuple(pages.shape)}: must be [pages, {pattern.block_size}, "
                "head size]: a page holds one block of the pattern"
            )
        if pages.dtype != x.dtype or pages.device != x.device:
            raise ValueError(
                f"{name} is {pages.dtype} on {pages.device}, the new tokens are {x.dtype} on "
                f"{x.device}: must be the same"
            )
    b = x.shape[0]
    for name, table, shape in (
        ("page_table", page_table, (b, pattern.kv_heads, *page_table.shape[2:3])),
        ("lengths", lengths, (b,)),
    ):
        if table.shape != shape or len(shape) not in (1, 3):
            wanted = "[b, g, blocks]" if name == "page_table" else "[b]"
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: must be {wanted} with b = {b} sequences "
                f"and g = {pattern.kv_heads} KV heads"
            )
        if table.dtype != torch.int32 or table.device != x.device:
            raise ValueError(
                f"{name} is {table.dtype} on {table.device}: must be int32 on {x.device}"
            )
    if lengths.device.type == "cpu":
        most = page_table.shape[2] * pattern.block_size
        if max(lengths.tolist(), default=0) > most:
            raise ValueError(
                f"lengths={lengths.tolist()}: page_table has {page_table.shape[2]} blocks of "
                f"{pattern.block_size} tokens for a sequence, {most} in all: give it more"
            )


def check_backend(backend: str, x, k_pages, v_pages) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if _on_triton(backend, x):
        check_triton(_last_contiguous(x), k_pages, v_pages, _WAY_OUT)


def _on_triton(backend: str, x) -> bool:
    return backend == "triton" or (backend == "auto" and x.is_cuda)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def paged_reference(q, k_pages, v_pages, page_table, lengths, pattern, softmax_scale):
    """`paged_attention` in PyTorch, one KV head of one sequence at a time: the specification.

    Softmax in float32, or in float64 for float64 inputs.
    """
    b, s, h, _ = q.shape
    group, size, dv = h // pattern.kv_heads, pattern.block_size, v_pages.shape[-1]
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(b, s, h, dv)
    lse = q.new_full((b, h, s), -math.inf, dtype=exact)
    for i, length in enumerate(lengths.clamp(min=0).tolist()):
        padding = max(0, s - length)
        first = length - s + padding  # the position of the first real query
        if first == length:
            continue
        for head, rule in enumerate(pattern.rules):
            old = [k for k in alive_blocks(rule, first, size) if k < first // size]
            blocks = torch.tensor(old + list(range(first // size, (length - 1) // size + 1)))
            columns = (blocks[:, None] * size + torch.arange(size)).flatten()
            columns = columns[columns < length]
            pages = page_table[i, head, blocks.to(page_table.device)].long()
            k, v = (x[pages].flatten(0, 1)[: len(columns)].to(exact) for x in (k_pages, v_pages))
            rows = torch.arange(first, length)
            lifetimes = rule.lifetimes(int(blocks[-1]) + 1)[columns // size]
            age = rows[:, None] // size - columns // size
            mask = ((rows[:, None] >= columns) & (age < lifetimes)).to(q.device)
            heads = slice(head * group, (head + 1) * group)
            queries = q[i : i + 1, padding:, heads].to(exact)
            got, got_lse = masked_attention(
                queries, k[None, :, None], v[None, :, None], mask[None], softmax_scale
            )
            out[i, padding:, heads] = got[0].to(q.dtype)
            lse[i, heads, padding:] = got_lse[0]
    return out, lse


@torch.no_grad()
def write_reference(k, v, k_pages, v_pages, page_table, lengths, pattern, *, alive_only) -> None:
    """`write_pages` in PyTorch."""
    s, size = k.shape[1], pattern.block_size
    for i, length in enumerate(lengths.clamp(min=0).tolist()):
        position = torch.arange(max(0, length - s), length)
        for head, rule in enumerate(pattern.rules):
            kept = position
            if alive_only:
                alive = torch.zeros(-(-length // size) + 1, dtype=torch.bool)
                alive[alive_blocks(rule, length, size)] = True
                kept = position[alive[position // size]]
            token = (kept - (length - s)).to(k.device)
            page = page_table[i, head, (kept // size).to(page_table.device)].long()
            row = (kept % size).to(page.device)
            k_pages[page, row] = k[i, token, head]
            v_pages[page, row] = v[i, token, head]
