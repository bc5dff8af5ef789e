"""A step of decoding as one CUDA graph: the host launches once instead of a few hundred times.

A step of one token a sequence launches the same kernels on the same memory every time: the page
table and the lengths that they read lie on the device, and grids depend on shapes alone. So it is
captured once and replayed. The first step runs as usual and compiles what is not compiled yet. In
it and in the captured one small operations are fused (fusing.py). What the host has to do for a
step, new pages where a block begins, it does before the replay.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from s2megatron.serving.fusing import fusion_of
from s2megatron.serving.model import CACHE
from s2megatron.serving.projections import moves

if TYPE_CHECKING:
    from s2megatron.serving.cache import PagedCache

# Arguments of a step that a captured one honours; with any other that is set, the step runs as is.
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", CACHE, "use_cache",
    "return_dict", "logits_to_keep",
}  # fmt: skip


class DecodeGraph:
    """The captured step of one cache and its model, made at the second step.

    Args:
        fuse: compile the small operations of a step; where that cannot be done, it is told.
    """

    def __init__(self, model, cache: "PagedCache", fuse: bool):
        self.cache, self._model = cache, model
        self._fusion = fusion_of(model, cache.batch) if fuse else None
        self._forward = replace_forward(model)
        self.forget()

    @property
    def fused(self) -> str:
        """What of a step is fused, in words."""
        return "nothing" if self._fusion is None else str(self._fusion)

    def forget(self) -> None:
        """Of another text the first step runs as usual, and a new graph is captured."""
        self._replay: Callable[[], None] | None = None
        self._steps = 0

    def takes(self, arguments: dict) -> bool:
        """Whether a forward call is a step of one token a sequence and nothing else."""
        ids = arguments.get("input_ids")
        if ids is None or ids.shape[1] != 1 or self.cache.total == 0 or torch.is_grad_enabled():
            return False
        others = (value for name, value in arguments.items() if name not in _KNOWN)
        return not any(value is not None and value is not False for value in others)

    def run(self, arguments: dict):
        """One step; the attention mask is not read again: the cache knows where texts begin."""
        cache, ids = self.cache, arguments["input_ids"]
        position = arguments.get("position_ids")
        if position is None:
            if any(cache.starts):
                cache.count_by(rows=True)
            position = torch.full_like(ids, cache.total)
        position = position.expand_as(ids).contiguous()
        self._steps += 1
        if self._steps == 1:
            self._renew()
            # With tensors of the captured step's shapes: nothing is compiled during the capture.
            with self._fused():
                return self._forward(**arguments | {"position_ids": position})
        cache.step()
        if self._replay is None or self._moves != moves(self._model):  # it would read freed memory
            self._capture(ids, position)
        self._ids.copy_(ids)
        self._position.copy_(position)
        self._replay()
        cache.after_step()
        return CausalLMOutputWithPast(logits=self._logits.clone(), **{CACHE: cache})

    def _capture(self, ids: Tensor, position: Tensor) -> None:
        self._ids, self._position = ids.clone(), position.clone()

        def forward() -> Tensor:
            self.cache.capturing = True
            try:
                with self._fused():
                    return self._forward(
                        input_ids=self._ids, position_ids=self._position,
                        use_cache=True, return_dict=True, **{CACHE: self.cache},
                    ).logits  # fmt: skip
            finally:
                self.cache.capturing = False

        self._renew()
        self._moves = moves(self._model)
        self._replay, self._logits = capture(forward)

    def _renew(self) -> None:
        if self._fusion is not None:
            self._fusion.renew()

    def _fused(self):
        return contextlib.nullcontext() if self._fusion is None else self._fusion.active()


def capture(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Captures what `forward` launches, without running it: (what replays it, its output)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    return graph.replay, out


def replace_forward(model):
    """Makes `model` run the steps of caches that have a graph as one; returns its own forward."""
    own = model.__dict__.get("_s2_forward")
    if own is not None:
        return own
    own = model.forward

    @functools.wraps(own)
    def forward(*args, **arguments):
        cache = arguments.get(CACHE, arguments.get("past_key_values"))  # the old name still works
        graph = getattr(cache, "graph", None)
        if args or not isinstance(graph, DecodeGraph) or not graph.takes(arguments):
            return own(*args, **arguments)
        return graph.run(arguments)

    model.__dict__["_s2_forward"] = own
    model.forward = forward
    return own
