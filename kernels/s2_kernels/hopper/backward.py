"""The backward pass on Hopper: row terms, then dk and dv, then dq, each kernel by itself.

Seven matrix products where five would do: dq is not added up across programs, so that the same bits
come out every time and no float32 copy of dq is needed. docs/kernels.md has the comparison.
"""

import torch

from s2_kernels.backward import row_terms
from s2_kernels.hopper.backward_dkdv import launch_hopper_dkdv
from s2_kernels.hopper.backward_dq import launch_hopper_dq
from s2_kernels.launch import empty_like, head_major, takes_descriptor
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
    q_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, as s2_kernels.backward.launch_backward; `hopper.why_not` was asked before."""
    dout = dout if takes_descriptor(head_major(dout)) else dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    lse2, delta = row_terms(out, lse, dout, dlse)
    dq, dk, dv = (empty_like(x, x.shape[-1]) for x in (q, k, v))
    inputs = (q, k, v, dout, lse2, delta)
    launch_hopper_dkdv(*inputs, dk, dv, pattern, softmax_scale, q_offset)
    launch_hopper_dq(*inputs, dq, pattern, softmax_scale, q_offset)
    return dq, dk, dv
