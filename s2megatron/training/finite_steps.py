"""A step with a gradient that is not a number ends the run before it changes a weight.

Megatron's own check (`check_for_nan_in_loss_and_grad`, on by default) asks for the norm of every
bucket of gradients, and the host waits for each answer (docs/configuration.md: 1.4 to 4% of a
step). It leaves the first iteration out. Without it a NaN goes into every weight, and the run goes
on, with "nan iterations" in its log. The norm of all gradients, by which they are clipped, is the
same on all ranks and on the host before the weights change. So to look at it costs nothing.

Seen with megatron-core 0.19.2 (core/optimizer/optimizer.py).
"""

import functools
import math
from collections.abc import Callable


def refuse_steps_that_are_not_finite() -> None:
    """Replaces methods of Megatron's, once a process, for optimizers made before or after.

    A step then raises FloatingPointError, on all ranks. Under fp16 with a loss scale Megatron
    skips such steps itself, before it asks for a norm.
    """
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    for kind in (ChainedOptimizer, LayerWiseDistributedOptimizer):
        for name in {"get_grad_norm", "_compute_grad_norms_by_group"} & vars(kind).keys():
            if not hasattr(own := vars(kind)[name], "looks_at_norms"):
                setattr(kind, name, _that_looks(own))


def _that_looks(norms_of: Callable) -> Callable:
    @functools.wraps(norms_of)
    def mended(self):
        norms = norms_of(self)
        skips_above = min(x.config.grad_norm_skip_threshold for x in self.chained_optimizers)
        for norm in norms.values() if isinstance(norms, dict) else (norms,):
            if must_stop(norm, skips_above):
                from megatron.training import get_args

                raise FloatingPointError(refusal(norm, get_args()))
        return norms

    mended.looks_at_norms = True
    return mended


def must_stop(norm: float | None, skips_above: float) -> bool:
    """Whether a step of gradients with this norm would spoil the weights.

    Args:
        norm: None or 0: there are no gradients here.
        skips_above: the norm above which Megatron leaves a step out (`grad_norm_skip_threshold`).
    """
    return bool(norm) and not math.isfinite(norm) and not norm > skips_above


def refusal(norm: float, args) -> str:
    """What to tell of the iteration that Megatron, with these arguments, is in."""
    if args.check_for_nan_in_loss_and_grad:
        found = "Megatron's own check begins with the run's second iteration"
    else:
        found = (
            "megatron.check_for_nan_in_loss_and_grad=true names the rank and the bucket, before "
            "the ranks' gradients are added up"
        )
    return (
        f"iteration {args.curr_iteration + 1}: the norm of the gradients is {norm}. No weight has "
        "changed, and nothing was saved: the last checkpoint stays as it is. Mostly it is the "
        f"learning rate (megatron.lr: {args.lr}), weights that came from elsewhere, or the data; "
        f"{found}"
    )
