"""Corrections of Megatron's optimizers, without which a run could not be resumed.

All of it was seen with megatron-core 0.19.2 (megatron/core/optimizer/distrib_optimizer.py, and
optimizer.py for SGD, which has no function that makes its state before a load fills it). torch's
AdamW keeps a `step` tensor for every parameter; Transformer Engine's and Apex's fused Adam keep one
number in every parameter group, which is the case that Megatron's own code is written for.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


def mend_distributed_optimizer() -> None:
    """Replaces the methods below, once a process; every optimizer made before or after has them."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if getattr(DistributedOptimizer, "_s2_mended", False):
        return
    for name, mend in (
        ("state_dict", _with_state_to_describe),
        ("load_state_dict", _with_own_steps),
        ("_set_main_param_and_optimizer_states", _without_step),
        ("sharded_param_state_fully_reshardable", _at_positions_without_padding),
    ):
        setattr(DistributedOptimizer, name, mend(getattr(DistributedOptimizer, name)))
    DistributedOptimizer._s2_mended = True


def mend_sgd() -> None:
    """Without the distributed optimizer, which refuses SGD; once a process."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for kind in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        if not getattr(kind.sharded_state_dict, "makes_momentum", False):
            kind.sharded_state_dict = _with_momentum(kind.sharded_state_dict)


def _with_momentum(sharded_state_dict: Callable) -> Callable:
    @functools.wraps(sharded_state_dict)
    def mended(self, *args, **kwargs):
        if self.init_state_fn is None:
            self.init_state_fn = _make_momentum
        return sharded_state_dict(self, *args, **kwargs)

    mended.makes_momentum = True
    return mended


def _make_momentum(optimizer: torch.optim.SGD, config=None) -> None:
    """What SGD has after its first step; the checkpoint's numbers take the place of the zeros."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def has_torch_steps(optimizer) -> bool:
    """Whether the inner optimizer is torch's Adam, with a step for each parameter."""
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _with_state_to_describe(state_dict: Callable) -> Callable:
    """A load starts by describing what is to be loaded, before there is any state.

    With torch's AdamW Megatron then looks for the common step of no parameters and stops
    (`assert len(steps) == 1`). Here what AdamW would make at its first step is made before.
    """

    @functools.wraps(state_dict)
    def mended(self):
        if has_torch_steps(self) and not self.optimizer.state:
            self.init_state_fn(self.optimizer)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return state_dict(self)

    return mended


def _with_own_steps(load_state_dict: Callable) -> Callable:
    """Gives every parameter a step tensor of its own, with the step of the checkpoint.

    Megatron hands one tensor to all parameters, and torch's AdamW adds 1 to it once for each of
    them: after a step of a model of 100 tensors Adam would correct its bias for 100 steps.
    """

    @functools.wraps(load_state_dict)
    def mended(self, state_dict):
        load_state_dict(self, state_dict)
        if has_torch_steps(self):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return mended


def _without_step(set_states: Callable) -> Callable:
    """The step is the parameter groups' and comes from there; a parameter's own state has none.

    Megatron copies every tensor of torch's state, `step` too. In the fully reshardable format there
    is none to copy (KeyError); in the other one it
    is the step from before the load.
    In that one, besides, nothing says that the copy into a float32 parameter needs no gradient.
    """

    @functools.wraps(set_states)
    def mended(self, model_param, tensors):
        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})

    return mended


def _at_positions_without_padding(describe: Callable) -> Callable:
    """Finds each parameter's state where the gathered buffer has it.

    Megatron joins the buckets of a buffer without the padding at their ends, and then cuts out each
    parameter at its position in the padded buffer: behind the first padded bucket every parameter
    is saved with its neighbour's moments and main weights, at most with a warning.
    """

    @functools.wraps(describe)
    def mended(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            for buffer in self.buffers:
                stack.enter_context(_unpadded_positions(buffer))
            return describe(self, *args, **kwargs)

    return mended


@contextlib.contextmanager
def _unpadded_positions(buffer) -> Iterator[None]:
    """`buffer.param_index_map`, as if no bucket of the buffer had padding at its end."""
    padded = buffer.param_index_map
    padding_before, total = [], 0
    for bucket in buffer.buckets:
        padding_before.append(total)
        total += bucket.grad_data.numel() - bucket.numel_unpadded
    buffer.param_index_map = {
        param: (start - padding_before[bucket], end - padding_before[bucket], bucket)
        for param, (start, end, bucket) in padded.items()
    }
    try:
        yield
    finally:
        buffer.param_index_map = padded
