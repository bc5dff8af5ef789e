"""The attention kernels that attention.py compares: how each is made ready to run.

A provider takes a `Setting` and the command line, and returns a `Ready`. To add one, write such a
function and enter it in PREPARE.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One row of measurements; tensors are drawn in the layout that the provider likes best."""

    heads: int
    kv_heads: int
    stride: int
    tokens: int
    d: int
    block: int
    local: int
    dtype: str

    def pattern(self, block=None):
        """The mask; with another block size, the same window in tokens and stride in blocks."""
        from s2_kernels import local_stride

        block = block or self.block
        return local_stride(
            heads=self.heads,
            kv_heads=self.kv_heads,
            block_size=block,
            local_blocks=max(1, self.local // block),
            stride=self.stride,
        )

    def tensors(self, layout):
        """q, k, v, which take gradients, and the gradient of out."""
        import torch

        generator = torch.Generator("cuda").manual_seed(0)

        def draw(heads):
            shape = (1, heads, self.tokens, self.d)
            shape = shape if layout == "bhsd" else (1, self.tokens, heads, self.d)
            dtype = getattr(torch, self.dtype)
            return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

        leaves = [draw(h).requires_grad_() for h in (self.heads, self.kv_heads, self.kv_heads)]
        return leaves, draw(self.heads)


@dataclass
class Ready:
    """A provider ready to run: the forward pass, its inputs, dout, and the pairs it keeps."""

    forward: Callable
    leaves: list
    dout: object
    pairs: int


def dense_pairs(p):
    return p.heads * p.tokens * (p.tokens + 1) // 2


def sdpa(backend, p, a):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves, dout = p.tensors("bhsd")

    def forward():
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=True, enable_gqa=p.kv_heads != p.heads
            )

    return Ready(forward, leaves, dout, dense_pairs(p))


def flex(p, a):
    """The same tokens, by a mask function; block mask in flex's own blocks of 128."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pattern, group = p.pattern(), p.heads // p.kv_heads
    local = max(1, p.local // p.block)
    shifts = torch.tensor([rule.shift for rule in pattern.rules], device="cuda")

    def kept(b, h, i, j):
        block = j // p.block
        near = i // p.block - block < local
        return (i >= j) & (near | ((block + shifts[h // group]) % p.stride == 0))

    torch._dynamo.reset()
    leaves, dout = p.tensors("bhsd")
    size = (p.tokens, p.tokens)
    mask = create_block_mask(kept, None, p.heads, *size, device="cuda", _compile=True)
    run = torch.compile(flex_attention, dynamic=False)
    gqa = p.kv_heads != p.heads
    pairs = pattern.kept_pairs(p.tokens)
    return Ready(lambda: run(*leaves, block_mask=mask, enable_gqa=gqa), leaves, dout, pairs)


def dkernel(p, a):
    sys.path.insert(0, a.dkernel)
    from dkernel import LocalStrideSparseAttention

    leaves, dout = p.tensors("bhsd")
    gqa = dict(num_kv_heads=p.kv_heads) if p.kv_heads != p.heads else {}
    run = LocalStrideSparseAttention(
        p.heads, p.tokens, p.block, max(1, p.local // p.block), p.stride, seq_dim=2, **gqa
    ).to("cuda")
    return Ready(lambda: run(*leaves), leaves, dout, p.pattern().kept_pairs(p.tokens))


def first(result):
    """out, of a function that may return (out, lse)."""
    return result[0] if isinstance(result, tuple) else result


def fa4(p, a):
    from flash_attn.cute import flash_attn_func

    leaves, dout = p.tensors("bshd")

    def forward():
        return first(flash_attn_func(*leaves, causal=True))

    return Ready(forward, leaves, dout, dense_pairs(p))


def fa4_sparse(p, a):
    """FlashAttention-4's block sparsity takes blocks of 128 tokens: the mask is made of those."""
    import cutlass.cute as cute
    import torch
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return kv_idx <= q_idx

    pattern = p.pattern(block=128)
    full = pattern.block_mask(-(-p.tokens // 128)).cuda()
    full = full.repeat_interleave(p.heads // p.kv_heads, 0)
    full.diagonal(dim1=1, dim2=2).zero_()  # the diagonal blocks are the masked ones
    n = full.shape[1]

    def lists(mask):
        """Counts [1, h, n] and indices [1, h, n, longest list], those that count first."""
        counts = mask.sum(-1, dtype=torch.int32)
        longest = max(1, counts.max().item())
        order = [m.byte().argsort(dim=-1, descending=True, stable=True) for m in mask]
        return counts[None], torch.stack([o[:, :longest].int() for o in order])[None]

    ones = torch.ones((1, p.heads, n), dtype=torch.int32, device=full.device)
    diagonal = torch.arange(n, dtype=torch.int32, device=full.device)
    diagonal = diagonal.repeat(1, p.heads, 1)[..., None]
    both = [
        BlockSparseTensorsTorch(ones, diagonal, *lists(mask), block_size=(128, 128))
        for mask in (full, full.transpose(1, 2))
    ]
    leaves, dout = p.tensors("bshd")

    def forward():
        return first(
            flash_attn_func(
                *leaves,
                mask_mod=causal,
                block_sparse_tensors=both[0],
                block_sparse_tensors_bwd=both[1],
            )
        )

    return Ready(forward, leaves, dout, pattern.kept_pairs(p.tokens))


def s2(backend, deterministic, p, a):
    from s2_kernels import s2_attention

    leaves, dout = p.tensors("bshd")
    pattern = p.pattern()

    def forward():
        return s2_attention(*leaves, pattern, backend=backend, deterministic=deterministic)

    return Ready(forward, leaves, dout, pattern.kept_pairs(p.tokens))


PREPARE = {
    "fa2": functools.partial(sdpa, "FLASH_ATTENTION"),
    "cudnn": functools.partial(sdpa, "CUDNN_ATTENTION"),
    "flex": flex,
    "dkernel": dkernel,
    "fa4": fa4,
    "fa4-sparse": fa4_sparse,
    "s2": functools.partial(s2, "auto", True),
    "s2-portable": functools.partial(s2, "triton", True),
    "s2-portable-fused": functools.partial(s2, "triton", False),
}


def missing(provider, a) -> str | None:
    """Why a provider cannot run here, if it cannot."""
    if provider == "dkernel" and not a.dkernel:
        return "give --dkernel PATH"
    if provider.startswith("fa4"):
        has_flash_attn = importlib.util.find_spec("flash_attn") is not None
        if not has_flash_attn or importlib.util.find_spec("flash_attn.cute") is None:
            return "flash-attn-4 is not installed"
    return None
