"""Linear layers that read one input as one product: q, k and v of attention, gate and up of an MLP.

For one token a product takes as long as its weights take to be read, and a small one does not fill
a GPU. So `merge` lays the weights of such layers one after another in memory, and one product reads
them all. There is no second copy: the parameters of the layers become views of the merged memory
and keep their names, shapes, values and gradients.

Such a layer is only touched where it is an ordinary `nn.Linear` (`_is_plain`). What moves its
parameter away again, such as `model.to` or `load_state_dict(assign=True)`, is seen by
`Merged.holds`; what writes into it, such as `load_state_dict`, writes into the merged weight.
"""

import collections
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What layers of one input are called in transformers, in the order in which they are called."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOVES: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody has replaced what a module computes, or looks on by a hook."""
    return "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)


@dataclass(frozen=True)
class Merged:
    """Linear layers of one input [..., in] and their merged weight [sum of out, in] and bias."""

    owner: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Linear, ...]
    weight: Tensor
    bias: Tensor | None

    def holds(self) -> bool:
        """Whether the layers are still there, untouched, and their parameters still views."""
        now = tuple(getattr(self.owner, name, None) for name in self.names)
        same = all(new is old for new, old in zip(now, self.layers, strict=True))
        return same and all(map(_is_plain, now)) and self._begins(now)

    def _begins(self, layers: tuple[nn.Linear, ...]) -> bool:
        weights, biases = _parameters(layers)
        if not _adjacent(weights) or weights[0].data_ptr() != self.weight.data_ptr():
            return False
        if self.bias is None:
            return biases == []
        return _adjacent(biases) and biases[0].data_ptr() == self.bias.data_ptr()

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What every layer gives for x [..., in], as slices of one product."""
        out = F.linear(x, self.weight, self.bias)
        return out.split([layer.out_features for layer in self.layers], dim=-1)


def merge(model: nn.Module) -> list[Merged]:
    """Merges what can be merged in a model, and returns it with what was merged before.

    Memory grows by the weights of one group of layers at a time. A CUDA graph that was captured
    before reads memory that is free now: see `moves`.
    """
    used = collections.Counter(
        id(parameter)
        for module in model.modules()
        for parameter in vars(module)["_parameters"].values()
    )
    merged, moved = [], False
    # Parameters made under inference mode could not be trained afterwards.
    with torch.inference_mode(False), torch.no_grad():
        for owner, names in _owners(model):
            layers = tuple(getattr(owner, name) for name in names)
            if not all(map(_is_plain, layers)) or not _fit(layers, used):
                continue
            tensors = [x for x in _parameters(layers) if x]
            for group in tensors:
                moved |= not _adjacent(group)
                if not _adjacent(group):
                    _lay_together(group)
            joined = [_view_of_all(group) for group in tensors]
            weight, bias = joined if len(joined) == 2 else (joined[0], None)
            merged.append(Merged(owner, names, layers, weight, bias))
    if moved:
        _MOVES[model] = moves(model) + 1
        if merged[0].weight.is_cuda:
            torch.cuda.empty_cache()  # the pieces are too small for what is asked for next
    return merged


def moves(model: nn.Module) -> int:
    """How often `merge` has moved weights of a model: graphs captured before read freed memory."""
    return _MOVES.get(model, 0)


class Ahead:
    """Results that came with another module's, kept until their own module is called.

    A module called with another input than was expected computes for itself.
    """

    def __init__(self):
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """`out` is what `module` gives for this very `x`."""
        self._kept[module] = (x, out)

    def forward(self, own: Callable, module: nn.Module, x: Tensor) -> Tensor:
        """The forward of a module: what is kept for it, else `own(module, x)`."""
        expected, out = self._kept.pop(module, (None, None))
        return out if expected is x else own(module, x)

    def first(self, merged: Merged, x: Tensor) -> Tensor:
        """The forward of the first of merged layers: the others' results are kept."""
        outputs = merged.outputs(x)
        for layer, out in zip(merged.layers[1:], outputs[1:], strict=True):
            self.keep(layer, x, out)
        return outputs[0]

    def forget(self) -> None:
        self._kept.clear()


class OneProduct:
    """What the forward of a gated MLP takes for `self`: gate and up are slices of one product.

    It is for use inside torch.compile, where modules keep their own forwards.
    """

    def __init__(self, mlp: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None):
        sizes = [mlp.gate_proj.out_features, mlp.up_proj.out_features]
        gate, up = F.linear(x, weight, bias).split(sizes, dim=-1)
        self._mlp = mlp
        self.gate_proj = lambda given: gate if given is x else mlp.gate_proj(given)
        self.up_proj = lambda given: up if given is x else mlp.up_proj(given)

    def __getattr__(self, name: str):
        return getattr(self._mlp, name)


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    for module in model.modules():
        for names in GROUPS:
            if {*names} <= {name for name, _ in module.named_children()}:
                yield module, names


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear and no more: not quantised, adapted, wrapped, or hooked."""
    if type(layer) is not nn.Linear or is_replaced(layer):
        return False
    own = layer._parameters
    return {*own} == {"weight", "bias"} and all(
        type(x) is nn.Parameter and x.is_contiguous() and not x.is_inference()
        for x in own.values()
        if x is not None
    )


def _parameters(layers: tuple[nn.Linear, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases; a layer without a bias has none in the second list."""
    return [x.weight for x in layers], [x.bias for x in layers if x.bias is not None]


def _fit(layers: tuple[nn.Linear, ...], used: collections.Counter) -> bool:
    """Whether weights, and biases if there are any, can be one tensor each."""
    weights, biases = _parameters(layers)
    alike = {(x.dtype, x.device, x.requires_grad, layer.in_features)
             for layer in layers for x in layer.parameters()}  # fmt: skip
    return (
        len(alike) == 1
        and weights[0].device.type != "meta"
        and len(biases) in (0, len(layers))
        and all(used[id(x)] == 1 for x in weights + biases)
        and all(_adjacent(group) or all(map(_owns_memory, group)) for group in (weights, biases))
    )


def _owns_memory(x: Tensor) -> bool:
    """Whether nothing else lies in its storage: else moving it would free nothing."""
    return x.untyped_storage().nbytes() == x.nbytes


def _adjacent(tensors: list[Tensor]) -> bool:
    """Whether contiguous tensors lie one after another in one storage."""
    storage = tensors[0].untyped_storage().data_ptr() if tensors else 0
    at = tensors[0].data_ptr() if tensors else 0
    for x in tensors:
        if x.data_ptr() != at or x.untyped_storage().data_ptr() != storage:
            return False
        at += x.nbytes
    return True


def _lay_together(tensors: list[Tensor]) -> None:
    """Moves parameters [out, ...] into one storage, one after another."""
    joined = torch.cat([x.data for x in tensors])
    for x, part in zip(tensors, joined.split([len(x) for x in tensors]), strict=True):
        x.data = part


def _view_of_all(tensors: list[Tensor]) -> Tensor:
    """Adjacent tensors [out, ...] as one [sum of out, ...]."""
    first = tensors[0].detach()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())
