"""Norms that Megatron's optimizers find, looked at. Run by in_process.py."""

import math
from types import SimpleNamespace

import megatron.training
from megatron.core.optimizer import layer_wise_optimizer, optimizer

from s2megatron.training.finite_steps import refuse_steps_that_are_not_finite


def finds(norm: float):
    return lambda *_, **__: norm


def norms_that_stop() -> dict[str, list[bool]]:
    """For each kind of optimizer that asks for a norm, whether NaN and 1 end the run."""
    for _ in range(2):  # a second time changes nothing
        refuse_steps_that_are_not_finite()
    args = SimpleNamespace(curr_iteration=4, lr=0.1, check_for_nan_in_loss_and_grad=False)
    megatron.training.get_args = lambda: args
    found = {}
    for kind in (optimizer.ChainedOptimizer, layer_wise_optimizer.LayerWiseDistributedOptimizer):
        made = object.__new__(kind)
        part = SimpleNamespace(
            config=SimpleNamespace(grad_norm_skip_threshold=math.inf),
            get_grads_for_grad_norm=list,
        )
        made.chained_optimizers = [part]
        found[kind.__name__] = []
        for norm in (math.nan, 1.0):
            part.get_grad_norm = layer_wise_optimizer.get_grad_norm_fp32 = finds(norm)
            try:
                made.get_grad_norm()
                found[kind.__name__].append(False)
            except FloatingPointError as error:
                found[kind.__name__].append("iteration 5:" in str(error))
    return found
