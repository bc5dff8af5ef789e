"""`s2_attention`: checks the inputs and chooses a backend."""

import math

import torch

from s2_kernels.blocked import blocked_attention
from s2_kernels.pattern import LayerPattern
from s2_kernels.reference import reference_attention

BACKENDS = ("auto", "triton", "blocked", "reference")


def s2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: LayerPattern,
    *,
    softmax_scale: float | None = None,
    q_offset: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in which every KV head keeps the blocks that `pattern` gives it.

    Args:
        q: [b, s, h, d], any strides (Megatron's [s, b, h, d] goes in as `q.transpose(0, 1)`).
        k: [b, t, g, d]; v: [b, t, g, dv]; h a multiple of g, and query head i reads KV head
            i // (h / g). Nothing is repeated in memory.
        pattern: lifetimes for exactly these h and g heads (`LayerPattern.shard` under TP).
        softmax_scale: default 1 / sqrt(d).
        q_offset: position of the first query token in the KV sequence (tokens).
        return_lse: also return lse [b, h, s]: the natural log of the softmax denominator,
            float32 (float64 for float64 inputs), differentiable.
        backend: "blocked" (PyTorch, any device), "triton" (GPU), "reference" (dense mask; tests),
            or "auto": the fastest that is exact on this device.

    Returns:
        out [b, s, h, dv] in q's dtype, or (out, lse). A query that sees no key (q_offset + s beyond
        t) has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; names the argument and the value.
    """
    _check(q, k, v, pattern, q_offset, backend)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
    if backend == "triton":
        raise ValueError(
            "backend='triton': this version of s2_kernels has no Triton kernels; "
            "use backend='blocked' (PyTorch, any device) or 'auto'"
        )
    run = reference_attention if backend == "reference" else blocked_attention
    out, lse = run(q, k, v, pattern, softmax_scale=scale, q_offset=q_offset)
    return (out, lse) if return_lse else out


def _check(q, k, v, pattern, q_offset, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be [batch, seq, heads, d]")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: must be a floating-point type")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: must be the same"
            )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be [b, s, h, d], "
            "[b, t, g, d], [b, t, g, dv]"
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q {tuple(q.shape)}, v {tuple(v.shape)}: must not be empty")
    if q.shape[2] != pattern.heads or k.shape[2] != pattern.kv_heads:
        raise ValueError(
            f"q has {q.shape[2]} heads and k has {k.shape[2]}, the pattern {pattern.heads} and "
            f"{pattern.kv_heads}: build it for these heads, or take pattern.shard(rank, world)"
        )
    if q_offset < 0:
        raise ValueError(f"q_offset={q_offset}: must be at least 0")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
