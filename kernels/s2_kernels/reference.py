"""S2 attention with a dense mask, in the inputs' own precision: the specification.

Every backend is compared with this file in float64: out, lse, dq, dk and dv. It needs memory for
the whole score matrix, so it is for tests and small shapes.

Shapes: b batch, s query tokens, t KV tokens, h query heads, g KV heads, d head size.
"""

import math

import torch

from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern


def token_mask(
    pattern: LayerPattern, s: int, t: int, q_offset: int = 0, device=None, near: Near | None = None
) -> torch.Tensor:
    """Bool [kv_heads, s, t]: query token i, at position q_offset + i, attends to KV token j.

    near: which token that is, where not the one at position j.
    """
    if near is not None:
        return _mask_with_near(pattern, s, t, q_offset, near).to(device)
    rows = torch.arange(q_offset, q_offset + s, device=device)
    cols = torch.arange(t, device=device)
    n_blocks = -(-max(q_offset + s, t) // pattern.block_size)
    blocks = pattern.block_mask(n_blocks).to(device)
    kept = blocks[:, rows // pattern.block_size][:, :, cols // pattern.block_size]
    return kept & (rows[:, None] >= cols)


def _mask_with_near(pattern: LayerPattern, s: int, t: int, q_offset: int, near: Near):
    """The columns of the mask over all positions that are in memory; False where nothing is."""
    size = pattern.block_size
    n_keys = t + (near.start - near.row) * size
    whole = token_mask(pattern, s, n_keys, q_offset)
    blocks = near.blocks(pattern, -(-t // size))
    columns = (blocks[..., None] * size + torch.arange(size)).flatten(1)[:, :t]
    seen = whole.gather(2, columns.clamp(min=0)[:, None].expand(-1, s, -1))
    return seen & (columns >= 0)[:, None]


def masked_attention(q, k, v, mask, softmax_scale=None):
    """Softmax attention under a boolean mask, differentiable, in the dtype of q.

    Args:
        q: [b, s, h, d]. k: [b, t, g, d]. v: [b, t, g, dv]. Query head i reads KV head i // (h / g).
        mask: bool [g, s, t] (or [h, s, t]).
        softmax_scale: default 1 / sqrt(d).

    Returns:
        out [b, s, h, dv]; lse [b, h, s], the natural log of the softmax denominator. A query that
        sees nothing has out 0 and lse -inf, and no gradient.
    """
    heads = q.shape[2]
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    mask = mask.repeat_interleave(heads // mask.shape[0], dim=0)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    sees = mask.any(-1)
    # A finite fill keeps rows that see nothing free of NaN, in the gradient too.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.where(mask, (scores - lse[..., None]).exp(), 0)
    out = torch.einsum("bhst,bthd->bshd", probs, v)
    return out, lse.masked_fill(~sees, -math.inf)


def reference_attention(
    q, k, v, pattern: LayerPattern, *, softmax_scale=None, q_offset=0, near: Near | None = None
):
    """`masked_attention` under the pattern's mask; arguments as in `s2_attention`."""
    mask = token_mask(pattern, q.shape[1], k.shape[1], q_offset, q.device, near)
    return masked_attention(q, k, v, mask, softmax_scale)
