"""A step's small operations as few kernels: norms, rotary embeddings, gated MLPs, by torch.compile.

transformers writes RMSNorm as eight operations and a rotary embedding as twelve. For one token each
is a kernel of two microseconds, and together they cost a captured step more than its attention.
While a step runs, `Fusion.active` puts compiled forwards on the modules of one model; before and
after it, and in any other model, modules run as transformers has them.

What is compiled is transformers' own code, module by module, so that a model of another kind gets
what is found in it (recognition.py). What belongs to no module is done where a layer was seen to
compute what `is_prenorm` says: `_end` adds its residuals and computes the norm that comes next.
Roundings to 16 bits are kept where that code has them; sums over a row are added in another order.

Projections of one input are one product (projections.py). A layer of Llama is eleven kernels then:
q with k and v; rotary embedding; writing the pages; attention in two; o; sum and norm; gate with
up; activation; down; sum and norm.
"""

import contextlib
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from s2megatron.serving.projections import GROUPS, Ahead, OneProduct, is_replaced, merge
from s2megatron.serving.recognition import (
    ROTARY,
    is_gated,
    is_prenorm,
    is_rmsnorm,
    is_rotary_tables,
    is_untouched,
    norms_after,
    rotary_of,
    rotate_both,
    rotates_alike,
)

_log = logging.getLogger(__name__)


class Fusion:
    """The compiled forwards of a model's modules, and the products that are merged in it.

    Each class is compiled once, for the shapes of this model's steps. Making it moves weights of
    the model (projections.py). Where they were moved away since, or modules were swapped, hooked or
    given another forward, it is made anew (`renew`).

    Args:
        model: a decoder of transformers.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor"):
        self._model = weakref.ref(model)
        self._backend = backend
        self._compiled: dict[tuple, Callable] = {}
        self._ahead = Ahead()
        self._make()

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.counts.items()) or "nothing"

    def _make(self) -> None:
        model = self._model()
        self._known = [(weakref.ref(x), touched) for x, touched in _parts(model)]
        self._forwards: list[tuple[nn.Module, Callable]] = []
        self.counts: dict[str, int] = {}
        self._merged = merge(model)
        self._norm_after = norms_after(model)
        for module in model.modules():
            forward = None if "forward" in vars(module) else self._forward(module)
            if forward is not None:
                self._forwards.append((module, forward))
        for merged in self._merged:
            if merged.names == GROUPS[0]:
                first, *others = merged.layers
                self._forwards.append((first, functools.partial(self._ahead.first, merged)))
                self._forwards += [(x, self._kept(nn.Linear.forward, x)) for x in others]
        if self._merged:
            self.counts["merged projections"] = len(self._merged)

    def _forward(self, module: nn.Module) -> Callable | None:
        """What a module runs in place of its forward; None: its own."""
        parts = {name for name, _ in module.named_children()}
        own = type(module).forward
        if is_rmsnorm(module):
            name, forward = "RMSNorms", self._kept(self._once(own, own), module)
        elif is_gated(module):
            weights = self._weights(module)
            fused = self._once((_mlp, own, weights is None), _mlp)
            name, forward = "gated MLPs", functools.partial(fused, module, weights)
        elif is_rotary_tables(module):
            name = "rotary tables"
            forward = functools.partial(self._once((_own_forward, own), _own_forward), module)
        elif "q_proj" in parts and (rotary := rotary_of(own)) is not None:
            # Attention itself stays as it is, but for decorators (recognition.rotary_of).
            replaced = {ROTARY: self._rotary(rotary)}
            name = "rotary embeddings"
            forward = functools.partial(_own_copy(inspect.unwrap(own), replaced), module)
        elif is_untouched(module, parts) and self._once_known(own, lambda: is_prenorm(module)):
            name, forward = "residual sums", self._layer(module)
        else:
            return None
        self.counts[name] = self.counts.get(name, 0) + 1
        return forward

    def _rotary(self, rotary: Callable) -> Callable:
        """A rotary function compiled: a kernel for q and k together where it treats them alike."""
        if not self._once_known((rotates_alike, rotary), lambda: rotates_alike(rotary)):
            return self._once(rotary, rotary)
        together = self._once((rotate_both, rotary), rotate_both, force_pointwise_cat=True)

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **options):
            if rest or options:  # such as another dimension of heads
                return self._once(rotary, rotary)(q, k, cos, sin, *rest, **options)
            return together(rotary, q, k, cos, sin)

        return rotate

    def _kept(self, own: Callable, module: nn.Module) -> Callable:
        return functools.partial(self._ahead.forward, own, module)

    def _weights(self, mlp: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """The merged weight and bias of a gated MLP; None where it has none."""
        found = (x for x in self._merged if x.owner is mlp and x.names == GROUPS[1])
        return next(((x.weight, x.bias) for x in found), None)

    def _layer(self, layer: nn.Module) -> Callable:
        """The forward of a layer that `is_prenorm` holds for."""
        after = self._norm_after.get(layer)
        if is_gated(layer.mlp):
            weights = self._weights(layer.mlp)
            norms = type(layer.post_attention_layernorm), type(after)
            key = (_end, type(layer.mlp).forward, *norms, weights is None)
            end = functools.partial(self._once(key, _end), layer, after, weights)
        else:
            end = functools.partial(self._end_of_another, layer, after)

        def forward(hidden_states: Tensor, **options) -> Tensor:
            normed = layer.input_layernorm(hidden_states)
            attended, _ = layer.self_attn(hidden_states=normed, **options)
            hidden, normed = end(hidden_states, attended)
            if normed is not None:
                self._ahead.keep(after, hidden, normed)
            return hidden

        return forward

    def _end_of_another(self, layer, after, residual: Tensor, attended: Tensor):
        """`_end` of a layer whose MLP runs as it is, such as one with experts."""

        def add_norm(norm: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self._once((_add_norm, type(norm).forward), _add_norm)(norm, x, y)

        hidden, normed = add_norm(layer.post_attention_layernorm, residual, attended)
        added = layer.mlp(normed)
        return (hidden + added, None) if after is None else add_norm(after, hidden, added)

    def _once(self, key, function: Callable, **options) -> Callable:
        return self._once_known(key, lambda: self._compile(function, **options))

    def _once_known(self, key, made: Callable):
        if key not in self._compiled:
            self._compiled[key] = made()
        return self._compiled[key]

    def _compile(self, function: Callable, **options) -> Callable:
        """With options of inductor."""
        # Dynamo counts how often a code object was compiled: this one is for these shapes alone.
        options = options | {"emulate_precision_casts": True}
        options = options if self._backend == "inductor" else None
        return torch.compile(
            _own_copy(function), fullgraph=True, dynamic=False, backend=self._backend,
            options=options,
        )  # fmt: skip

    def renew(self) -> None:
        """Makes all anew where the model is another: weights moved, modules swapped or touched.

        It reads pointers, on the host, and may launch copies: never inside a capture.
        """
        if not self._is_known() or not all(merged.holds() for merged in self._merged):
            self._make()
            _log.info("s2: the model was changed; fused from now on: %s", self)

    def _is_known(self) -> bool:
        now = _parts(self._model())
        return len(now) == len(self._known) and all(
            module is known() and touched == before
            for (module, touched), (known, before) in zip(now, self._known, strict=True)
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model's modules run the compiled forwards within it; `renew` comes before."""
        for module, forward in self._forwards:
            vars(module)["forward"] = forward
        try:
            yield
        finally:
            self._ahead.forget()
            for module, _ in self._forwards:
                del vars(module)["forward"]


def _parts(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """All modules within a model, and whether somebody has replaced what they compute, or looks on.

    The model's own forward is ours (graph.py), and nothing of it is fused.
    """
    return [(x, is_replaced(x)) for x in model.modules() if x is not model]


_FUSIONS: weakref.WeakKeyDictionary[nn.Module, dict[int, Fusion]] = weakref.WeakKeyDictionary()
"""Of each model, by the sequences of a step: caches of one size compile once."""


def fusion_of(model: nn.Module, batch: int) -> Fusion | None:
    """The `Fusion` for steps of `batch` tokens, told in a line when it is made.

    None, and the reason told, where nothing can be compiled.
    """
    reason = no_compiler(model.device)
    if reason is not None:
        _log.warning("s2: small operations of a step are not fused: %s", reason)
        return None
    made = _FUSIONS.setdefault(model, {})
    if batch not in made:
        made[batch] = Fusion(model)
        _log.info("s2: fused in steps of one token: %s", made[batch])
    return made[batch]


@functools.cache
def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make kernels for a device here; None where it can."""
    try:
        torch.compile(_own_copy(_twice), dynamic=False)(torch.ones(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return "torch.compile: " + " ".join(str(error).split("\n\n")[0].split())
    return None


def _twice(x: Tensor) -> Tensor:
    return x + x


def _own_forward(module: nn.Module, *given, **named):
    return type(module).forward(module, *given, **named)


def _mlp(mlp: nn.Module, weights: tuple | None, x: Tensor) -> Tensor:
    """A gated MLP with transformers' own code; with `weights`, gate and up are one product."""
    return type(mlp).forward(mlp if weights is None else OneProduct(mlp, x, *weights), x)


def _add_norm(norm: nn.Module, residual: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + added
    return hidden, _own_forward(norm, hidden)


def _end(
    layer: nn.Module, after: nn.Module | None, weights: tuple | None,
    residual: Tensor, attended: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A layer from the end of attention on, and the norm that comes `after` it."""
    hidden, normed = _add_norm(layer.post_attention_layernorm, residual, attended)
    added = _mlp(layer.mlp, weights, normed)
    return (hidden + added, None) if after is None else _add_norm(after, hidden, added)


def _own_copy(function: Callable, replaced: dict | None = None) -> Callable:
    """The same function, with code of its own, that sees other globals where `replaced` has any."""
    seen = function.__globals__ if replaced is None else function.__globals__ | replaced
    copy = types.FunctionType(
        function.__code__.replace(), seen, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
