"""The Triton kernels as two `torch.library` operators, one forward and one backward.

torch.compile, export and activation recompute see one opaque operator with known output shapes and
strides, and never look into launchers. The pattern goes in as a string (`LayerPattern.key`).

Shapes as in forward.py; sequences are packed when cu_seqlens_q is given.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from s2_kernels import hopper, plans
from s2_kernels.autograd import once
from s2_kernels.backward import launch_backward
from s2_kernels.forward import launch_forward
from s2_kernels.launch import Packing, capability, empty_like, takes_descriptor
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern
from s2_kernels.plans import Plan, Plans


class Problem(NamedTuple):
    """What to compute, beside the tensors: the operators take its fields, in this order.

    A tuple: it is part of the key of a plan, and costs the host little to make and to compare.

    Attributes:
        pattern: `LayerPattern.key`. A string costs the dispatcher nothing; 160 numbers 0.2 ms.
        softmax_scale: above 0.
        max_seqlen_q, max_seqlen_k: of packed sequences, the longest; not read for dense batches.
        q_offset: position of the first query token in the KV sequence.
        deterministic: of the backward pass of "triton": the same bits every time.
        backend: "triton", "hopper", or "auto": the second where it can, each pass by itself.
        near_start, near_row: of `near.Near`; 0 where there is none.
        spare: multiprocessors that persistent (Hopper) kernels leave to others.
    """

    pattern: str
    softmax_scale: float
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    q_offset: int = 0
    deterministic: bool = True
    backend: str = "auto"
    near_start: int = 0
    near_row: int = 0
    spare: int = 0

    @property
    def near(self) -> Near | None:
        return Near(self.near_start, self.near_row) if self.near_start else None


def _packing(cu_seqlens_q, cu_seqlens_k, problem: Problem) -> Packing | None:
    """How sequences are packed, if they are; k like q, where it has no offsets of its own."""
    if cu_seqlens_q is None:
        return None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return Packing(cu_seqlens_q, cu_seqlens_k, problem.max_seqlen_q, problem.max_seqlen_k)


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


_PLANS = Plans()


def _layout(x: Tensor) -> tuple:
    """What the launchers look at in a tensor, but for its address."""
    return x.shape, x.stride(), x.dtype, x.device


def _key(q, k, v, cu_seqlens_q, cu_seqlens_k, problem) -> tuple:
    """Of a forward pass, and part of that of a backward pass."""
    key = (problem, *_layout(q), *_layout(k), *_layout(v))
    return key if cu_seqlens_q is None else (*key, cu_seqlens_q.shape, cu_seqlens_k is None)


def known_plan(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, into: Tensor | None = None
) -> Plan | None:
    """The plan of a forward pass that ran before: so its inputs need not be checked again."""
    if not plans.ON or _are_seen(q, k, v):
        return None
    key = _key(q, k, v, None, None, problem)
    return _PLANS.get(key if into is None else (*_layout(into), *key))


def _own_offsets(cu_seqlens_q, cu_seqlens_k) -> Tensor | None:
    """cu_seqlens_k where k is not packed like q: a plan knows tensors apart by their places."""
    if cu_seqlens_q is None or cu_seqlens_k.data_ptr() == cu_seqlens_q.data_ptr():
        return None
    return cu_seqlens_k


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, into=None) -> tuple[Tensor, ...]:
    """out and lse, or lse alone, by the plan of such a pass, or as `launch_attention`."""
    inputs = (q, k, v, cu_seqlens_q, _own_offsets(cu_seqlens_q, cu_seqlens_k))
    launcher = functools.partial(launch_attention, problem=problem)
    if not q.is_cuda:
        return launcher(*inputs, into)
    key = _key(*inputs, problem)
    if into is None:
        return _PLANS.run(key, launcher, inputs, q.device)
    return _PLANS.run((*_layout(into), *key), launcher, (*inputs, into), q.device)


def launch_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, into=None, *, problem) -> tuple:
    """What it allocates for its caller: out and lse, or lse alone where out has its place.

    The tensors may be stand-ins (recording.Operand), which take note of the launch.
    """
    rule = LayerPattern.from_key(problem.pattern)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, problem)
    scale, q_offset, near = problem.softmax_scale, problem.q_offset, problem.near
    if hopper.takes(q, k, v, rule, packing, q_offset, problem.backend, "forward", near):
        from s2_kernels.hopper import forward, forward_wide  # import Gluon

        if q.shape[-1] > hopper.WIDEST:
            launch, options = forward_wide.launch_hopper_forward_wide, {}
        else:
            launch, options = forward.launch_hopper_forward, dict(packing=packing)
        options |= dict(q_offset=q_offset, near=near, spare=problem.spare, into=into)
        made = launch(q, k, v, rule, scale, **options)
    else:
        options = dict(packing=packing, near=near, into=into)
        made = launch_forward(q, k, v, rule, scale, q_offset, **options)
    return made if into is None else made[1:]


def _backward(
    q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, problem, into=()
) -> tuple[Tensor, ...]:
    """dq, dk and dv, by the plan of such a pass, or as `_launch_backward`."""
    packing = (cu_seqlens_q, _own_offsets(cu_seqlens_q, cu_seqlens_k))
    inputs = (q, k, v, out, lse, dout, dlse, *packing)
    launcher = functools.partial(_launch_backward, problem=problem)
    if not q.is_cuda:
        return launcher(*inputs, *into)
    key = _backward_key(*inputs, problem, into)
    if _PLANS.get(key) is None:
        # A plan has no copies, and gradients may come in any layout.
        out, dout = (x if takes_descriptor(x) else x.contiguous() for x in (out, dout))
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        inputs = (q, k, v, out, lse, dout, dlse, *packing)
        key = _backward_key(*inputs, problem, into)
    return _PLANS.run(key, launcher, (*inputs, *into), q.device)


def _backward_key(q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, problem, into):
    gradients = (
        out.stride(),
        lse.stride(),
        dout.stride(),
        dout.dtype,
        None if dlse is None else dlse.stride(),
        *(x.stride() for x in into),
    )
    return gradients, *_key(q, k, v, cu_seqlens_q, cu_seqlens_k, problem)


def _launch_backward(q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, *into, problem):
    """What it allocates for its caller: dq, dk and dv, or nothing where they have their places."""
    rule = LayerPattern.from_key(problem.pattern)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, problem)
    scale, q_offset, near = problem.softmax_scale, problem.q_offset, problem.near
    inputs = (q, k, v, out, lse, dout, dlse, rule, scale)
    if hopper.takes(q, k, v, rule, packing, q_offset, problem.backend, "backward", near):
        from s2_kernels.hopper.backward import launch_hopper_backward  # imports Gluon

        made = launch_hopper_backward(*inputs, packing, q_offset, near, problem.spare, into or None)
    else:
        made = launch_backward(
            *inputs,
            q_offset,
            packing=packing,
            near=near,
            into=into or None,
            deterministic=problem.deterministic,
            # Reductions through TMA are Hopper's; the interpreter has none.
            tma_add=q.is_cuda and capability(q.device)[0] >= 9,
        )
    return () if into else made


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
    near_start: int = 0,
    near_row: int = 0,
    spare: int = 0,
) -> tuple[Tensor, Tensor]:
    """out, laid out in memory like q, and lse; inputs checked by the caller (api.py).

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], or None for dense batches.
        pattern and what follows: the fields of a `Problem`.
    """
    lengths, near = (max_seqlen_q, max_seqlen_k, q_offset), (near_start, near_row)
    rest = (*lengths, deterministic, backend, *near, spare)
    problem = Problem(pattern, softmax_scale, *rest)
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, problem)


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
    near_start: int = 0,
    near_row: int = 0,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, laid out like q, k and v. Arguments as in `attention`, dlse like lse."""
    lengths, near = (max_seqlen_q, max_seqlen_k, q_offset), (near_start, near_row)
    rest = (*lengths, deterministic, backend, *near, spare)
    problem = Problem(pattern, softmax_scale, *rest)
    return _backward(q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k, problem)


@torch.library.register_fake("s2_kernels::attention_backward")
def _(q, k, v, *rest):
    return tuple(empty_like(x, x.shape[-1]) for x in (q, k, v))


def _save(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, problem, output):
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.problem = problem
    ctx.set_materialize_grads(False)


def _save_of_operator(ctx, inputs, output):
    _save(ctx, *inputs[:5], Problem(*inputs[5:]), output)


def _gradients(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k)
    return once(gradients, *inputs, ctx.problem)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward`, by the way that takes the host the least time."""
    inputs = (q, k, v, out, lse, dout, dlse, cu_seqlens_q, cu_seqlens_k)
    if torch.compiler.is_compiling() or _are_seen(q, k, v, dout):
        return attention_backward(*inputs, *problem)
    return _backward(*inputs, problem)


def _backward_of_operator(ctx, dout, dlse):
    return *_gradients(ctx, dout, dlse), *(None,) * (len(Problem._fields) + 2)


torch.library.register_autograd(
    "s2_kernels::attention", _backward_of_operator, setup_context=_save_of_operator
)


class _Attention(torch.autograd.Function):
    """What `register_autograd` makes of `attention`, at a quarter of the host's time."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, problem, plan):
        output = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, plan)
        _save(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, problem, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        return *_gradients(ctx, dout, dlse), None, None, None, None


def _are_seen(*tensors: Tensor) -> bool:
    """Whether somebody looks on: a dispatch mode (recompute, fake tensors) or a tensor's class.

    Then the operators are called. Otherwise what they do is done at once, which is what the
    dispatcher would come to.
    """
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(type(x) is not Tensor and type(x) is not Parameter for x in tensors)


def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, plan):
    """out and lse, without a gradient; by the plan where there is one."""
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    made = None
    if plan is not None:
        made = plan.run(inputs, q.device)
    elif _are_seen(q, k, v):
        return attention(*inputs, *problem)
    return _forward(*inputs, problem) if made is None else made


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    problem: Problem,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, by the way that takes the host the least time.

    torch.compile and export are given the operator with its gradient. Otherwise a plain
    `autograd.Function` calls the two operators, which dispatch modes (selective recompute, fake
    tensors) see as well, or what is beneath them, where nobody looks on.

    Args:
        plan: as `known_plan` found it.
    """
    if torch.compiler.is_compiling():
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *problem)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    run = _Attention.apply if needs_grad else _attention
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, problem, plan)


def attend_into(q: Tensor, k: Tensor, v: Tensor, into: Tensor, problem: Problem) -> Tensor:
    """`attention`, outside of autograd; out is written into a tensor of the caller's. Returns lse.

    Operators change no argument: where they are called, and where TMA cannot store, out is copied.
    """
    if _are_copied((q, k, v), (into,)):
        out, lse = attention(q, k, v, None, None, *problem)
        into.copy_(out)
        return lse
    return _forward(q, k, v, None, None, problem, into)[0]


def gradients_into(q, k, v, out, lse, dout, into: tuple[Tensor, ...], problem: Problem) -> None:
    """`attention_backward`, dq, dk and dv being written as in `attend_into`."""
    inputs = (q, k, v, out, lse, dout, None, None, None)
    if _are_copied((q, k, v, dout), into):
        for x, made in zip(into, attention_backward(*inputs, *problem), strict=True):
            x.copy_(made)
    else:
        _backward(*inputs, problem, into)


def _are_copied(inputs: tuple[Tensor, ...], into: tuple[Tensor, ...]) -> bool:
    seen = torch.compiler.is_compiling() or _are_seen(*inputs, *into)
    return seen or not all(map(takes_descriptor, into))
