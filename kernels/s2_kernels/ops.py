"""The Triton kernels as two `torch.library` operators, one forward and one backward.

torch.compile, export and activation recompute see one opaque operator with known output shapes and
strides, and never look into launchers. The pattern goes in as a string (`LayerPattern.key`).

Shapes as in forward.py; sequences are packed when cu_seqlens_q is given.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2_kernels import hopper
from s2_kernels.autograd import once
from s2_kernels.backward import launch_backward
from s2_kernels.forward import launch_forward
from s2_kernels.launch import Packing, capability, empty_like
from s2_kernels.pattern import LayerPattern


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What to compute, beside the tensors: the operators take its `fields`, in this order.

    Attributes:
        pattern: `LayerPattern.key`. A string costs the dispatcher nothing; 160 numbers 0.2 ms.
        softmax_scale: above 0.
        max_seqlen_q, max_seqlen_k: of packed sequences, the longest; not read for dense batches.
        q_offset: position of the first query token in the KV sequence.
        deterministic: of the backward pass of "triton": the same bits every time.
        backend: "triton", "hopper", or "auto": the second where it can, each pass by itself.
    """

    pattern: str
    softmax_scale: float
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    q_offset: int = 0
    deterministic: bool = True
    backend: str = "auto"

    @property
    def fields(self) -> tuple[str, float, int, int, int, bool, str]:
        return (
            self.pattern,
            self.softmax_scale,
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.q_offset,
            self.deterministic,
            self.backend,
        )


def _packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k) -> Packing | None:
    return None if cu_seqlens_q is None else Packing(cu_seqlens_q, cu_seqlens_k, max_q, max_k)


def _operator(function: Callable) -> Callable:
    """Registers a function that changes no argument as an operator of its name, and returns that.

    As `torch.library.custom_op` does, which also looks for aliases in the results of every call,
    and whose calls take the host twice as long.
    """
    name = f"s2_kernels::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    return getattr(torch.ops.s2_kernels, function.__name__).default


@_operator
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: str,
    softmax_scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_offset: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out, laid out in memory like q, and lse; inputs checked by the caller (api.py).

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], or None for dense batches.
        pattern and what follows: the fields of a `Problem`.
    """
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = LayerPattern.from_key(pattern)
    if hopper.takes(q, k, v, rule, packing, q_offset, backend, "forward"):
        from s2_kernels.hopper import forward, forward_wide  # import Gluon

        if q.shape[-1] > hopper.WIDEST:
            return forward_wide.launch_hopper_forward_wide(q, k, v, rule, softmax_scale, q_offset)
        return forward.launch_hopper_forward(q, k, v, rule, softmax_scale, packing, q_offset)
    return launch_forward(q, k, v, rule, softmax_scale, q_offset, packing=packing)


@torch.library.register_fake("s2_kernels::attention")
def _(q, k, v, cu_seqlens_q, *rest):
    heads, tokens = q.shape[-2], q.shape[-3]
    lse_shape = (heads, tokens) if q.dim() == 3 else (q.shape[0], heads, tokens)
    return empty_like(q, v.shape[-1]), q.new_empty(lse_shape, dtype=torch.float32)


@_operator
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: str,
    softmax_scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_offset: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, laid out like q, k and v. Arguments as in `attention`, dlse like lse."""
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rule = LayerPattern.from_key(pattern)
    if hopper.takes(q, k, v, rule, packing, q_offset, backend, "backward"):
        from s2_kernels.hopper.backward import launch_hopper_backward  # imports Gluon

        return launch_hopper_backward(
            q, k, v, out, lse, dout, dlse, rule, softmax_scale, packing, q_offset
        )
    return launch_backward(
        q,
        k,
        v,
        out,
        lse,
        dout,
        dlse,
        rule,
        softmax_scale,
        q_offset,
        packing=packing,
        deterministic=deterministic,
        # Reductions through TMA are Hopper's; the interpreter has none.
        tma_add=q.is_cuda and capability(q.device)[0] >= 9,
    )


@torch.library.register_fake("s2_kernels::attention_backward")
def _(q, k, v, *rest):
    return tuple(empty_like(x, x.shape[-1]) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *fields = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.fields = fields
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = once(
        attention_backward, q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.fields
    )
    return *grads, *(None,) * (len(ctx.fields) + 2)


torch.library.register_autograd("s2_kernels::attention", _backward, setup_context=_save)


class _Attention(torch.autograd.Function):
    """What `register_autograd` makes of `attention`, at a quarter of the host's time."""

    @staticmethod
    def forward(ctx, *inputs):
        output = attention(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """`attention`, by the way that takes the host the least time.

    torch.compile and export are given the operator with its gradient. Otherwise a plain
    `autograd.Function` calls the two operators, which dispatch modes (selective recompute, fake
    tensors) see as well.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    eager = needs_grad and not torch.compiler.is_compiling()
    run = _Attention.apply if eager else attention
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, *problem.fields)
