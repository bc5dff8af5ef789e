"""What modules of transformers compute, as far as a fused step has to know it (fusing.py).

Some of it is told by names, which transformers keeps from model to model. What names do not tell is
tried out: a layer is run with parts that record what they are given.
"""

import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2megatron.serving.projections import is_replaced

ROTARY = "apply_rotary_pos_emb"
PRENORM = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""What the layers of a decoder with norms before attention and MLP are called in transformers."""


def rotary_of(forward: Callable) -> Callable | None:
    """The function by which an attention module's forward rotates; None where it has another.

    transformers 5.24 decorates the forward, for the sake of callers with an argument's old name.
    """
    forward = inspect.unwrap(forward)
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    found = forward.__globals__.get(ROTARY)
    return found if isinstance(found, types.FunctionType) else None


def rotate_both(
    rotary: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotary` of q [b, h, s, d] and k [b, g, s, d] as of one tensor with h + g heads."""
    both, _ = rotary(torch.cat((q, k), dim=1), k[:, :0], cos, sin)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


def rotates_alike(rotary: Callable) -> bool:
    """Whether a rotary function is `rotate_both` of itself, tried out."""
    x = torch.linspace(-1, 1, 2 * 6 * 3 * 8).view(2, 6, 3, 8)
    q, k, cos, sin = x[:, :4], x[:, 4:], x[:, 0], x[:, 1]
    try:
        expected = rotary(q, k, cos, sin)
        got = rotate_both(rotary, q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError):  # it takes or gives something else
        return False
    return len(expected) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def is_rotary_tables(module: nn.Module) -> bool:
    """Whether a module gives cos and sin of positions, by frequencies that stay what they are."""
    kind = getattr(module, "rope_type", None)
    if not type(module).__name__.endswith("RotaryEmbedding") or not isinstance(kind, str):
        return False
    return "dynamic" not in kind and kind != "longrope"


def is_rmsnorm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def is_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return {*names} <= {name for name, _ in module.named_children()}


def is_untouched(layer: nn.Module, parts: set[str]) -> bool:
    """Whether a layer has the parts of `PRENORM`, and nobody has replaced what one of them does."""
    if not parts >= {*PRENORM} or any("forward" in vars(getattr(layer, x)) for x in PRENORM):
        return False
    return not any(is_replaced(getattr(layer, name)) for name in PRENORM[2:])  # not called as such


def is_prenorm(layer: nn.Module) -> bool:
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


def norms_after(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The norm that reads what a layer gives: the next layer's, or the one after all layers.

    It is what decoders look like, not known: `Ahead` gives a norm only what it is called with.
    """
    after = {}
    for parent in model.modules():
        layers = getattr(parent, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            norms = [getattr(x, PRENORM[0], None) for x in layers[1:]]
            norms.append(getattr(parent, "norm", None))
            for layer, reader, norm in zip(layers, [*layers[1:], None], norms, strict=True):
                known = norm is not None and is_rmsnorm(norm)
                # A hook may change in place what a layer gives or the next one takes.
                parts = (x for x in (layer, reader, norm) if x is not None)
                if known and not any(map(is_replaced, parts)):
                    after[layer] = norm
    return after
