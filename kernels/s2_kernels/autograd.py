"""Autograd may ask the kernels for one backward pass. Everything else is refused by name.

Without these checks forward mode would see tensors without a tangent, that is, derivatives of zero.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

WAY_OUT = "; the reference has it: backend='reference', or s2_kernels.reference.masked_attention"


def refuse_other_modes(name: str, *tensors: torch.Tensor, way_out: str = WAY_OUT) -> None:
    """Raises where forward-mode AD or a transform of torch.func asks for a derivative.

    Under torch.compile tensors do not say whether they carry a tangent: any dual level counts.

    Raises:
        RuntimeError: names the mode and the way out.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{name} takes part in no transform of torch.func{way_out}")
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_compiling() or any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(f"{name} has no derivative in forward mode{way_out}")


class _Once(torch.autograd.Function):
    """A backward pass under create_graph: it has no gradient itself, and says so."""

    @staticmethod
    def forward(ctx, run, *inputs):
        return run(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"s2_attention has no second derivative{WAY_OUT}")


def once(run: Callable, *inputs):
    """`run(*inputs)`, a backward pass whose results cannot be differentiated in silence."""
    return _Once.apply(run, *inputs) if torch.is_grad_enabled() else run(*inputs)
