"""Under full activation recompute, attention is not computed again: its output was kept.

Megatron's checkpointed layers run twice, first without gradients, then again in the backward pass.
Attention is the expensive part of the second run, and its output (with lse) is all that its
backward pass needs besides q, k and v. So the first run leaves both here and the second takes them.
They are tokens x heads x (d x 2 + 4) bytes a layer and microbatch in flight, for this rank's tokens
and heads. Under context parallelism the second run exchanges nothing either.
"""

from collections import deque

import torch
from torch import Tensor

from s2megatron.attention.context_parallel import ContextAttention


class OutputKeeper:
    """One layer's attention outputs, from a forward pass without gradients to its recomputation.

    First in, first out: in every schedule of Megatron's a layer's microbatches are recomputed in
    the order in which they ran. A few rows of q are kept too; if the recomputed ones are not close
    to them, the order was another one, and the run stops.
    """

    def __init__(self, attention: ContextAttention):
        self.attention = attention
        self._kept: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [b, s, h, d], k and v [b, s, g, d]; training only."""
        if not torch.is_grad_enabled():
            out, lse = self.attention.forward(q, k, v)
            self._kept.append((out, lse, _sample(q)))
            return out
        if not self._kept:  # a layer that is not checkpointed
            return self.attention.attend(q, k, v)
        out, lse, before = self._kept.popleft()
        _require_close(_sample(q.detach()), before)
        return _Recomputed.apply(q, k, v, out, lse, self.attention)


def _sample(q: Tensor) -> Tensor:
    """The first, a middle and the last token's queries, as a copy."""
    return torch.stack([q[:, i] for i in (0, q.shape[1] // 2, q.shape[1] - 1)]).float()


def _require_close(now: Tensor, before: Tensor) -> None:
    """Stops the run where two samples are not of one microbatch; does not wait for the GPU."""
    close = (now - before).norm() <= 0.1 * before.norm()
    torch._assert_async(
        close,
        "s2megatron: recomputed attention inputs are not those of the forward pass; set "
        "sparsity.keep_attention_output to false",
    )


class _Recomputed(torch.autograd.Function):
    """out as it was kept, with the gradients of attention."""

    @staticmethod
    def forward(ctx, q, k, v, out, lse, attention):
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention = attention
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return *ctx.attention.backward(*ctx.saved_tensors, dout), None, None, None
