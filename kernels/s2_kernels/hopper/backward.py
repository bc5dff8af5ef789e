"""The backward pass on Hopper: dq and the row terms, then dk and dv, each kernel by itself.

Seven matrix products where five would do: dq is not added up across programs, so that the same bits
come out every time and no float32 copy of dq is needed. docs/kernels.md has the comparison. Head
sizes above 128 have kernels of their own, which take the row terms from the portable one.
"""

import torch

from s2_kernels.backward import gradients_like, row_terms
from s2_kernels.hopper import WIDEST, all_seen
from s2_kernels.hopper.backward_dkdv import launch_hopper_dkdv
from s2_kernels.hopper.backward_dkdv_wide import launch_hopper_dkdv_wide
from s2_kernels.hopper.backward_dq import launch_hopper_dq
from s2_kernels.hopper.backward_dq_wide import launch_hopper_dq_wide
from s2_kernels.hopper.primitives import term_lead
from s2_kernels.launch import Packing, takes_descriptor
from s2_kernels.near import Near
from s2_kernels.pattern import LayerPattern


def launch_hopper_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    pattern: LayerPattern,
    softmax_scale: float,
    packing: Packing | None = None,
    q_offset: int = 0,
    near: Near | None = None,
    spare: int = 0,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, as s2_kernels.backward.launch_backward; `hopper.why_not` was asked before."""
    if near is None and all_seen(pattern, k.shape[-3], q_offset) is not None:
        q_offset = k.shape[-3]  # any position past the keys; here columns and rows begin together
    out, dout = (x if takes_descriptor(x) else x.contiguous() for x in (out, dout))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = into or gradients_like(q, k, v, near, pattern)
    if q.shape[-1] > WIDEST:
        inputs = (q, k, v, dout, *row_terms(out, lse, dout, dlse, term_lead(q_offset)))
        launch_hopper_dq_wide(*inputs, dq, pattern, softmax_scale, q_offset, near, spare)
        launch_hopper_dkdv_wide(*inputs, dk, dv, pattern, softmax_scale, q_offset, near, spare)
        return dq, dk, dv
    common = (pattern, softmax_scale, packing, q_offset, near, spare)
    lse2, delta = launch_hopper_dq(q, k, v, out, lse, dout, dlse, dq, *common)
    launch_hopper_dkdv(q, k, v, dout, lse2, delta, dk, dv, *common)
    return dq, dk, dv
