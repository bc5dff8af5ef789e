"""A step of decoding as one CUDA graph: the host launches once instead of a few hundred times.

A step of one token a sequence launches the same kernels on the same memory every time: the page
table and the lengths that they read lie on the device, and grids depend on shapes alone. So it is
captured once and replayed. The first step runs as usual and compiles what is not compiled yet. In
it and in the captured one small operations are fused (fusing.py). What the host has to do for a
step, new pages where a block begins, it does before the replay.
"""

import contextlib
import copy
import inspect
import types
import weakref
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

    It holds neither of them: a cache that nobody has any more frees its pages at once. A copy of it
    is of the copied cache and the same model, and has captured nothing.

    Args:
        fuse: compile the small operations of a step; where that cannot be done, it is told.
    """

    def __init__(self, model, cache: "PagedCache", fuse: bool):
        self._cache, self._model = weakref.ref(cache), weakref.ref(model)
        self._fusion = fusion_of(model, cache.batch) if fuse else None
        self._forward = replace_forward(model)
        self.forget()

    def __deepcopy__(self, memo: dict) -> "DecodeGraph":
        copied = copy.copy(self)
        copied._cache = weakref.ref(copy.deepcopy(self._cache(), memo))
        copied.forget()
        return copied

    @property
    def fused(self) -> str:
        """What of a step is fused, in words."""
        return "nothing" if self._fusion is None else str(self._fusion)

    def forget(self) -> None:
        """Of another text the first step runs as usual, and a new graph is captured."""
        self._replay: Callable[[], None] | None = None
        self._steps = 0

    def takes(self, model, arguments: dict) -> bool:
        """Whether a forward call of `model` is a step of one token a sequence and nothing else."""
        cache, ids = self._cache(), arguments.get("input_ids")
        if ids is None or tuple(ids.shape) != (cache.batch, 1) or cache.total == 0:
            return False
        if model is not self._model():
            return False
        if arguments.get("return_dict") is False:
            return False
        others = (value for name, value in arguments.items() if name not in _KNOWN)
        return not any(value is not None and value is not False for value in others)

    @torch.no_grad()
    def run(self, arguments: dict):
        """One step; the attention mask is not read again: the cache knows where texts begin.

        Raises:
            ValueError: position_ids that do not go on from what the cache holds.
        """
        cache, ids = self._cache(), arguments["input_ids"]
        position = arguments.get("position_ids")
        if position is None:
            if any(cache.starts):
                cache.count_by(rows=True)
            position = torch.full_like(ids, cache.total)
        elif not cache.positions_count_on:
            cache.refuse_other_positions(position)
        position = position.expand_as(ids).contiguous()
        self._steps += 1
        if self._steps == 1:
            self._renew()
            # With tensors of the captured step's shapes: nothing is compiled during the capture.
            with self._fused():
                return self._forward.own(**arguments | {"position_ids": position})
        cache.step()
        # It would read freed memory:
        if self._replay is None or self._moves != moves(self._model()):
            self._capture(ids, position)
        self._ids.copy_(ids)
        self._position.copy_(position)
        self._replay()
        cache.after_step()
        return CausalLMOutputWithPast(logits=self._logits.clone(), **{CACHE: cache})

    def _capture(self, ids: Tensor, position: Tensor) -> None:
        self._ids, self._position = ids.clone(), position.clone()

        def forward() -> Tensor:
            cache = self._cache()
            cache.capturing = True
            try:
                with self._fused():
                    return self._forward.own(
                        input_ids=self._ids, position_ids=self._position,
                        use_cache=True, return_dict=True, **{CACHE: cache},
                    ).logits  # fmt: skip
            finally:
                cache.capturing = False

        self._renew()
        self._moves = moves(self._model())
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


class Stepping:
    """A model's forward that runs the steps of caches with a graph as one, and all else as before.

    Copied or pickled with its model, it is the copy's.
    """

    def __init__(self, model, before: Callable | None):
        self._model, self._before = weakref.ref(model), before
        names = inspect.signature(self.own).parameters.values()
        self._names = [x.name for x in names if x.kind is x.POSITIONAL_OR_KEYWORD]

    @property
    def own(self) -> Callable:
        """The forward of the model's class, or what somebody had put in its place before."""
        model = self._model()
        return self._before or types.MethodType(type(model).forward, model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args, **arguments):
        named = dict(zip(self._names, args, strict=False)) | arguments
        cache = named.get(CACHE, named.get("past_key_values"))  # the old name still works
        graph = getattr(cache, "graph", None)
        # Where there are more than the names are for, the call is not right.
        known = len(named) == len(args) + len(arguments)
        if known and isinstance(graph, DecodeGraph) and graph.takes(self._model(), named):
            return graph.run(named)
        return self.own(*args, **arguments)

    def __deepcopy__(self, memo: dict) -> "Stepping":
        return Stepping(copy.deepcopy(self._model(), memo), copy.deepcopy(self._before, memo))

    def __reduce__(self):
        return Stepping, (self._model(), self._before)


def replace_forward(model) -> Stepping:
    """Makes `model` run the steps of caches that have a graph as one."""
    before = vars(model).get("forward")
    if not isinstance(before, Stepping):
        model.forward = Stepping(model, before)
    return model.forward
