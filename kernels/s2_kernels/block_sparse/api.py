"""`block_sparse_attention`: any per-head block mask, for research, by index tables.

The mask becomes two lists of blocks on the device, by query block and by KV block, O(kept blocks).
Kernels (block_sparse/kernels.py) walk them with the helpers of the S2 kernels. Patterns that are
lifetimes belong in `s2_attention`, which needs no table.
"""

import hashlib
import warnings
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from s2_kernels.api import check_scale, check_triton
from s2_kernels.autograd import once, refuse_other_modes
from s2_kernels.pattern import BLOCK_SIZES
from s2_kernels.versions import NO_TRITON

if NO_TRITON is None:
    from s2_kernels.block_sparse.kernels import launch_backward, launch_forward


class BlockTables(NamedTuple):
    """A block mask as lists, int32 on the device. List (head, i) is entries[ends[j]:ends[j + 1]]
    with j = head * blocks + i.

    Attributes:
        row_ends, row_blocks: KV blocks of each query block, [mask heads * nq + 1] and [kept].
        column_ends, column_blocks: query blocks of each KV block.
        mask_heads, nq, nk: shape of the mask.
    """

    row_ends: torch.Tensor
    row_blocks: torch.Tensor
    column_ends: torch.Tensor
    column_blocks: torch.Tensor
    mask_heads: int
    nq: int
    nk: int


_tables = WeakTensorKeyDictionary()  # mask -> what it held, and its tables, per device
_told: set[bytes] = set()


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention to the blocks of a mask (GPU; Triton). Deterministic, forward and backward.

    Query token i attends to KV token j if and only if j <= i and block_mask keeps their blocks.
    The tables are built at the first call with a mask, which waits for the GPU, and kept as long
    as the mask tensor lives unchanged. A mask on the CPU is compared with what it held, at every
    call; so is one made under `torch.inference_mode`, which waits for the GPU where it lies there.
    Of any other on a GPU torch counts the changes, but for those made past it (`.data`, DLPack, a
    kernel of one's own): hand over a clone after these.

    Warns once per mask when it is not KV-efficient (a block is dropped and picked up again, so that
    a KV cache can never free it) and when a query block sees nothing.

    Args:
        q: [b, s, h, d]. k: [b, t, g, d]. v: [b, t, g, dv]. As in `s2_attention`.
        block_mask: bool [h or g, ceil(s / block_size), ceil(t / block_size)], on any device; what
            lies above the diagonal is not read.
        block_size: tokens, one of 16, 32, 64, 128, 256.
        softmax_scale: above 0; default 1 / sqrt(d).
        return_lse: also return lse [b, h, s], float32, differentiable.

    Returns:
        out [b, s, h, dv], or (out, lse). A query that sees nothing has out 0, lse -inf and no
        gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; names the argument and the value.
        RuntimeError: forward-mode AD, torch.func, or a second derivative.
    """
    _check(q, k, v, block_mask, block_size)
    refuse_other_modes("block_sparse_attention", q, k, v)
    scale = check_scale(softmax_scale, q)
    tables = _tables_of(block_mask, q.device)
    out, lse = _BlockSparseAttention.apply(q, k, v, tables, block_size, scale)
    return (out, lse) if return_lse else out


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tables, block_size, scale):
        out, lse = launch_forward(q, k, v, tables, block_size, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.block_size, ctx.scale = tables, block_size, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        problem = (ctx.tables, ctx.block_size, ctx.scale)
        grads = once(launch_backward, q, k, v, out, lse, dout, dlse, *problem)
        return *grads, None, None, None


def _check(q, k, v, block_mask, block_size) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be [b, seq, heads, d]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: must be the same"
            )
    if k.shape[:3] != v.shape[:3] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be [b, s, h, d], "
            "[b, t, g, d], [b, t, g, dv]"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads: must be a multiple of k's {kv_heads}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={block_size}: must be one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    shape = (-(-q.shape[1] // block_size), -(-k.shape[1] // block_size))
    fits = block_mask.dim() == 3 and block_mask.shape[0] in (heads, kv_heads)
    if block_mask.dtype != torch.bool or not fits or tuple(block_mask.shape[1:]) != shape:
        raise ValueError(
            f"block_mask is {block_mask.dtype} {tuple(block_mask.shape)}: must be bool, one "
            f"entry per block of {block_size}, [{heads} (or {kv_heads}), {shape[0]}, {shape[1]}]"
        )
    check_triton(q, k, v, way_out="s2_kernels.reference.masked_attention takes it (PyTorch)")


def _tables_of(block_mask: torch.Tensor, device: torch.device) -> BlockTables:
    """The tables of a mask, from the cache while the mask is unchanged."""
    held, per_device = _tables.get(block_mask, (None, None))
    if held is None or not _still_holds(block_mask, held):
        per_device = {}
        _tables[block_mask] = (_held(block_mask), per_device)
    if device not in per_device:
        mask = block_mask.tril()
        _warn(mask)
        lists = (*_lists(mask, device), *_lists(mask.transpose(1, 2), device))
        per_device[device] = BlockTables(*lists, *block_mask.shape)
    return per_device[device]


def _held(block_mask: torch.Tensor) -> int | torch.Tensor:
    """What tells later whether a mask has changed: torch's count of its changes, or a copy.

    numpy and whoever else shares memory on the CPU changes a mask uncounted, and torch counts none
    of a tensor that was made under inference_mode.
    """
    if block_mask.device.type == "cpu" or block_mask.is_inference():
        return block_mask.clone()
    return block_mask._version


def _still_holds(block_mask: torch.Tensor, held: int | torch.Tensor) -> bool:
    if isinstance(held, int):
        return block_mask._version == held
    return torch.equal(block_mask, held)


def _lists(mask, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each list of the last dimension ends, and the entries one after the other."""
    ends = torch.nn.functional.pad(mask.sum(-1).flatten().cumsum(0), (1, 0))
    entries = mask.nonzero()[:, -1]
    return ends.to(device, torch.int32), entries.to(device, torch.int32)


def _warn(mask: torch.Tensor) -> None:
    """Tells what is odd about a causal mask, once per content."""
    content = hashlib.sha256(str(tuple(mask.shape)).encode())
    content.update(mask.cpu().numpy().tobytes())
    if content.digest() in _told:
        return
    _told.add(content.digest())
    # Picked up: not seen one query block earlier, though the KV block was there already.
    picked_up = (mask[:, 1:] & ~mask[:, :-1]).tril()
    if picked_up.any():
        head, query, block = picked_up.nonzero()[0].tolist()
        warnings.warn(
            f"block_mask is not KV-efficient: {int(picked_up.any(1).sum())} KV blocks are dropped "
            f"and picked up again (first: head {head}, KV block {block} at query block "
            f"{query + 1}), so a KV cache can never free them",
            stacklevel=4,
        )
    blind = ~mask.any(-1)
    if blind.any():
        head, query = blind.nonzero()[0].tolist()
        warnings.warn(
            f"block_mask: {int(blind.sum())} query blocks see nothing (first: head {head}, query "
            f"block {query}); their output is 0 and their lse -inf",
            stacklevel=4,
        )
