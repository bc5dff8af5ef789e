"""A step's small operations as few kernels: norms, rotary embeddings, gated MLPs, by torch.compile.

transformers writes RMSNorm as eight operations and a rotary embedding as twelve. For one token each
is a kernel of two microseconds, and together they cost a captured step more than its attention.
While a step runs, `Fusion.active` puts compiled forwards on the modules of one model; before and
after it, and in any other model, modules run as transformers has them.

What is compiled is transformers' own code, module by module, so that a model of another kind gets
what is found in it. Roundings to 16 bits are kept where that code has them; sums over a row are
added in another order.
"""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

ROTARY = "apply_rotary_pos_emb"
_log = logging.getLogger(__name__)


class Fusion:
    """The compiled forwards of a model's modules.

    Each class is compiled once, for the shapes of this model's steps.

    Args:
        model: a decoder of transformers.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor"):
        self._backend = backend
        self._compiled: dict[type, Callable] = {}
        self._forwards: list[tuple[nn.Module, Callable]] = []
        self.counts = dict.fromkeys(("RMSNorms", "gated MLPs", "rotary embeddings"), 0)
        for module in model.modules():
            kind = None if "forward" in vars(module) else _kind(module)
            if kind is not None:
                self.counts[kind] += 1
                self._forwards.append((module, self._forward(module, kind)))

    def __str__(self) -> str:
        found = [f"{count} {name}" for name, count in self.counts.items() if count]
        return ", ".join(found) or "nothing"

    def _forward(self, module: nn.Module, kind: str) -> Callable:
        own = type(module)
        if own not in self._compiled:
            if kind == "rotary embeddings":  # attention itself stays as it is
                rotary = own.forward.__globals__[ROTARY]
                fused = _own_copy(own.forward, {ROTARY: self._compile(rotary)})
            else:
                fused = self._compile(own.forward)
            self._compiled[own] = fused
        return functools.partial(self._compiled[own], module)

    def _compile(self, function: Callable) -> Callable:
        # Dynamo counts how often a code object was compiled: this one is for these shapes alone.
        options = {"emulate_precision_casts": True} if self._backend == "inductor" else None
        return torch.compile(
            _own_copy(function), fullgraph=True, dynamic=False, backend=self._backend,
            options=options,
        )  # fmt: skip

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model's modules run the compiled forwards within it."""
        for module, forward in self._forwards:
            vars(module)["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del vars(module)["forward"]


def fusion_of(model: nn.Module) -> Fusion | None:
    """A `Fusion`, told in a line; None, and the reason told, where nothing can be compiled."""
    reason = no_compiler(model.device)
    if reason is not None:
        _log.warning("s2: small operations of a step are not fused: %s", reason)
        return None
    fusion = Fusion(model)
    _log.info("s2: fused in steps of one token: %s", fusion)
    return fusion


@functools.cache
def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make kernels for a device here; None where it can."""
    try:
        torch.compile(_own_copy(_twice), dynamic=False)(torch.ones(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"torch.compile: {str(error).strip().splitlines()[0]}"
    return None


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _kind(module: nn.Module) -> str | None:
    """What of a module is compiled, by what its class computes with; None: nothing."""
    parts = {name for name, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return "RMSNorms"
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= parts:
        return "gated MLPs"
    forward = type(module).forward
    if "q_proj" in parts and ROTARY in getattr(forward, "__code__", _NO_CODE).co_names:
        return "rotary embeddings"
    return None


_NO_CODE = (lambda: None).__code__


def _own_copy(function: Callable, replaced: dict | None = None) -> Callable:
    """The same function, with code of its own, that sees other globals where `replaced` has any."""
    seen = function.__globals__ if replaced is None else function.__globals__ | replaced
    copy = types.FunctionType(
        function.__code__.replace(), seen, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
