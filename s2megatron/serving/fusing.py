"""A step's small operations as few kernels: norms, rotary embeddings, gated MLPs, by torch.compile.

transformers writes RMSNorm as eight operations and a rotary embedding as twelve. For one token each
is a kernel of two microseconds, and together they cost a captured step more than its attention.
While a step runs, `Fusion.active` puts compiled forwards on the modules of one model; before and
after it, and in any other model, modules run as transformers has them.

What is compiled is transformers' own code, module by module, so that a model of another kind gets
what is found in it. Only the sum of a layer's residual belongs to no module: `_fused_layer` adds it
where a layer was seen to compute what `_is_prenorm` says. Roundings to 16 bits are kept where that
code has them; sums over a row are added in another order.
"""

import contextlib
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from s2megatron.serving.projections import GROUPS, Ahead, OneProduct, is_replaced, merge

ROTARY = "apply_rotary_pos_emb"
PRENORM = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""What the layers of a decoder with norms before attention and MLP are called in transformers."""
_log = logging.getLogger(__name__)


class Fusion:
    """The compiled forwards of a model's modules, and the products that are merged in it.

    Each class is compiled once, for the shapes of this model's steps. Making it moves weights of
    the model (projections.py), and where they were moved away since, it is made anew.

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
        self._forwards: list[tuple[nn.Module, Callable]] = []
        self.counts: dict[str, int] = {}
        self._merged = merge(model)
        self._norm_after = _norms_after(model)
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
        if _is_rmsnorm(module):
            name, forward = "RMSNorms", self._kept(self._once(own, own), module)
        elif _is_gated(module):
            weights = self._weights(module)
            fused = self._once((_mlp, own, weights is None), _mlp)
            name, forward = "gated MLPs", functools.partial(fused, module, weights)
        elif "q_proj" in parts and (rotary := _rotary_of(own)) is not None:
            # Attention itself stays as it is.
            replaced = {ROTARY: self._rotary(rotary)}
            name = "rotary embeddings"
            forward = functools.partial(_own_copy(own, replaced), module)
        elif _is_untouched(module, parts) and self._once_known(own, lambda: _is_prenorm(module)):
            name, forward = "residual sums", self._layer(module)
        else:
            return None
        self.counts[name] = self.counts.get(name, 0) + 1
        return forward

    def _rotary(self, rotary: Callable) -> Callable:
        """A rotary function compiled: a kernel for q and k together where it treats them alike."""
        if not self._once_known((_rotates_alike, rotary), lambda: _rotates_alike(rotary)):
            return self._once(rotary, rotary)
        together = self._once((_rotate_both, rotary), _rotate_both, force_pointwise_cat=True)

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
        """The forward of a layer that `_is_prenorm` holds for."""
        after = self._norm_after.get(layer)
        if _is_gated(layer.mlp):
            weights = self._weights(layer.mlp)
            norms = [type(x).forward for x in (layer.post_attention_layernorm, after) if x]
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
        """Merges again where a merged weight is no longer what the model has: it was moved.

        It reads pointers, on the host, and may launch copies: never inside a capture.
        """
        if not all(merged.holds() for merged in self._merged):
            self._make()
            _log.info("s2: weights of the model were replaced; fused from now on: %s", self)

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


def _rotary_of(forward: Callable) -> Callable | None:
    """The function by which an attention module's forward rotates; None where it has another."""
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    found = forward.__globals__.get(ROTARY)
    return found if isinstance(found, types.FunctionType) else None


def _rotate_both(
    rotary: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotary` of q [b, h, s, d] and k [b, g, s, d] as of one tensor with h + g heads."""
    both, _ = rotary(torch.cat((q, k), dim=1), k[:, :0], cos, sin)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


def _rotates_alike(rotary: Callable) -> bool:
    """Whether a rotary function is `_rotate_both` of itself, tried out."""
    x = torch.linspace(-1, 1, 2 * 6 * 3 * 8).view(2, 6, 3, 8)
    q, k, cos, sin = x[:, :4], x[:, 4:], x[:, 0], x[:, 1]
    try:
        expected = rotary(q, k, cos, sin)
    except (RuntimeError, TypeError):  # it takes other shapes or arguments
        return False
    got = _rotate_both(rotary, q, k, cos, sin)
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _is_rmsnorm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return {*names} <= {name for name, _ in module.named_children()}


def _is_untouched(layer: nn.Module, parts: set[str]) -> bool:
    """Whether a layer has the parts of `PRENORM`, and nobody has replaced what one of them does."""
    if not parts >= {*PRENORM} or any("forward" in vars(getattr(layer, x)) for x in PRENORM):
        return False
    return not any(is_replaced(getattr(layer, name)) for name in PRENORM[2:])  # not called as such


def _is_prenorm(layer: nn.Module) -> bool:
    """Whether a layer is x + attn(norm(x)), then x + mlp(norm(x)), tried out with other parts."""
    parts = {name: torch.full((1, 1, 2), 10.0**i) for i, name in enumerate(PRENORM)}
    seen = []

    def part(name: str) -> Callable:
        def forward(hidden_states, *_, **__):
            seen.append((name, hidden_states.flatten().tolist()))
            return (parts[name], None) if name == "self_attn" else parts[name]

        return forward

    modules = {name: getattr(layer, name) for name in PRENORM}
    for name, module in modules.items():
        vars(module)["forward"] = part(name)
    try:
        out = type(layer).forward(layer, torch.full((1, 1, 2), 0.5))
    finally:
        for module in modules.values():
            del vars(module)["forward"]
    expected = [(name, [x, x]) for name, x in zip(PRENORM, (0.5, 1, 10.5, 100), strict=True)]
    return seen == expected and isinstance(out, Tensor) and out.flatten().tolist() == [1010.5] * 2


def _norms_after(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The norm that reads what a layer gives: the next layer's, or the one after all layers.

    It is what decoders look like, not known: `Ahead` gives a norm only what it is called with.
    """
    after = {}
    for parent in model.modules():
        layers = getattr(parent, "layers", None)
        if isinstance(layers, nn.ModuleList):
            readers = [*layers[1:], parent]
            norms = [getattr(x, PRENORM[0], None) for x in layers[1:]]
            norms.append(getattr(parent, "norm", None))
            for layer, reader, norm in zip(layers, readers, norms, strict=True):
                hooked = any(
                    map(is_replaced, (layer, reader) if reader is not parent else (layer,))
                )
                if norm is not None and _is_rmsnorm(norm) and not is_replaced(norm) and not hooked:
                    after[layer] = norm
    return after


def _norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    return type(norm).forward(norm, hidden)


def _mlp(mlp: nn.Module, weights: tuple | None, x: Tensor) -> Tensor:
    """A gated MLP with transformers' own code; with `weights`, gate and up are one product."""
    return type(mlp).forward(mlp if weights is None else OneProduct(mlp, x, *weights), x)


def _add_norm(norm: nn.Module, residual: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    hidden = residual + added
    return hidden, _norm(norm, hidden)


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
