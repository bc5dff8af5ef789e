"""The Hopper backend: Gluon kernels behind the same launchers as the portable Triton kernels.

What a kernel here cannot take runs on the portable kernels, which compute the same.
"""

import functools
import importlib.util
import logging

import torch

from s2_kernels.launch import Packing, capability, takes_descriptor
from s2_kernels.near import Near, count_keys
from s2_kernels.pattern import LayerPattern

HAS_GLUON = importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None

MOST_ROWS = 16
"""Rows of a unit of decoding, query heads of a group times new tokens, that its kernel takes."""
FEWEST_QUERIES = 128
"""Queries of a longer sequence below which the portable kernels run: a query tile would be mostly
empty, and a work list would be made for every token that is decoded."""
WIDEST = 128
"""Head size above which other kernels run: forward_wide, backward_dq_wide, backward_dkdv_wide."""


def all_seen(pattern: LayerPattern, t: int, q_offset: int) -> int | None:
    """KV half-tiles of 64 tokens, where every query sees every key; else None.

    That is, all queries stand past the keys of a dense pattern: what a rank of context parallelism
    sees of the blocks that live forever. A half-tile of which a part exists would need a mask.
    """
    past = q_offset >= t and t % 64 == 0 and pattern.is_dense
    return t // 64 if past else None


def why_not(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    packing: Packing | None,
    q_offset: int = 0,
    near: Near | None = None,
) -> str | None:
    """What keeps the Hopper kernels from these inputs; None where they take them.

    Without lengths and positions, which change from call to call: it is announced once per text.
    """
    if not HAS_GLUON:
        return "this Triton has no Gluon for Hopper (3.6 has)"
    if not q.is_cuda or capability(q.device)[0] != 9:
        return "the GPU is not a Hopper"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} (bfloat16 and float16 only)"
    if pattern.block_size < 64:
        return f"block_size {pattern.block_size} (64, 128 and 256 only)"
    if q.shape[-1] < 48 or q.shape[-1] != v.shape[-1]:
        return f"head sizes {q.shape[-1]} and {v.shape[-1]} (one size from 48 to 256 only)"
    if packing is not None and q.shape[-1] > WIDEST:
        return f"packed sequences with head size {q.shape[-1]} (up to {WIDEST})"
    if packing is not None and q_offset:
        return "packed sequences at a q_offset other than 0"
    n_keys = count_keys(k, near, pattern)
    past = packing is None and q_offset + q.shape[1] > n_keys
    if past and (near or all_seen(pattern, n_keys, q_offset) is None):
        return "queries at positions past the last key"
    if packing is None and q.shape[1] < min(FEWEST_QUERIES, n_keys):
        return f"fewer than {FEWEST_QUERIES} queries of a longer sequence"
    if packing is not None and packing.cu_k.data_ptr() != packing.cu_q.data_ptr():
        return "packed sequences with cu_seqlens_k of their own"
    if not (takes_descriptor(q) and takes_descriptor(k) and takes_descriptor(v)):
        return "strides or addresses that TMA does not take (multiples of 16 bytes only)"
    return None


def takes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    packing: Packing | None,
    q_offset: int,
    backend: str,
    which: str,
    near: Near | None = None,
) -> bool:
    """Whether a pass, "forward" or "backward", runs here: asked for and possible, or "auto".

    Raises:
        ValueError: asked for and not possible.
    """
    if backend == "triton":
        return False
    reason = why_not(q, k, v, pattern, packing, q_offset, near)
    if reason and backend == "hopper":
        raise ValueError(
            f"backend='hopper' does not take {reason}: q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"q_offset {q_offset}; choose 'auto' or 'triton'"
        )
    if reason and q.is_cuda and capability(q.device)[0] == 9:
        announce(which, reason)
    return reason is None


def why_not_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pattern: LayerPattern
) -> str | None:
    """What keeps the decode kernel for Hopper from these inputs; None where it takes them."""
    if not HAS_GLUON:
        return "this Triton has no Gluon for Hopper (3.6 has)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} (bfloat16 and float16 only)"
    if pattern.block_size < 64:
        return f"block_size {pattern.block_size} (64, 128 and 256 only)"
    sizes = q.shape[-1], v_pages.shape[-1]
    if min(sizes) < 48 or max(sizes) > 256:
        return f"head sizes {sizes[0]} and {sizes[1]} (48 to 256 only)"
    if not (takes_descriptor(k_pages) and takes_descriptor(v_pages)):
        return "pages whose strides or addresses TMA does not take (multiples of 16 bytes only)"
    return None


def takes_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, pattern: LayerPattern
) -> bool:
    """Whether decoding runs here: on a Hopper, of few tokens, and nothing keeps it from it."""
    if not q.is_cuda or capability(q.device)[0] != 9:
        return False
    rows = (1 << (q.shape[1] - 1).bit_length()) * (q.shape[2] // pattern.kv_heads)
    if rows > MOST_ROWS:
        return False
    reason = why_not_decode(q, k_pages, v_pages, pattern)
    if reason:
        announce("decode", reason)
    return reason is None


@functools.cache
def announce(which: str, reason: str) -> None:
    """Says once per pass and reason that the portable kernels run instead."""
    logging.getLogger("s2_kernels").warning(
        "s2_attention: portable Triton %s kernel instead of the Hopper one: %s", which, reason
    )
