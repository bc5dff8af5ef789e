"""Which tensors a model has: Megatron's keys, Hugging Face's, and how one becomes the other.

Megatron's tensors are global here: whole over tensor, pipeline and expert ranks, as torch_dist
stores them. Layer keys are given without their prefix (`decoder.layers.`), because Megatron either
stacks all layers of a name in one tensor or gives every layer its own key.

Legend: h hidden, d head size, g KV heads, G query heads per KV head, f feed-forward size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2megatron.convert.model import CheckpointModel

LAYERS = "decoder.layers"

# Norms go by one name where a layer spec fuses them into the next matrix, by another where not.
INPUT_NORM = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
MLP_NORM = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the Hugging Face tensors it holds."""

    megatron: tuple[str, ...]
    """Key, and other keys that some layer specs use for the same tensor."""
    hugging_face: tuple[str, ...]
    shape: tuple[int, ...]
    """Megatron's global shape; a vocabulary's rows are those that carry a token."""
    kind: str = "copy"
    """"copy", "vocab" (padded rows at the end), "qkv" or "gate_up"."""
    layer: int | None = None
    """0-based; None for tensors outside the layers."""
    expert: int | None = None

    def split(self, tensor: Tensor, model: CheckpointModel) -> list[Tensor]:
        """Megatron's tensor -> Hugging Face's, in the order of `hugging_face`."""
        if self.kind == "qkv":
            return split_qkv(tensor, model)
        if self.kind == "gate_up":
            return list(tensor.chunk(2))
        return [tensor[: self.shape[0]]]

    def merge(self, parts: list[Tensor], model: CheckpointModel) -> Tensor:
        """Hugging Face's tensors -> Megatron's; a vocabulary without its padding."""
        if self.kind == "qkv":
            return merge_qkv(parts, model)
        return torch.cat(parts) if self.kind == "gate_up" else parts[0]

    def part_shapes(self, model: CheckpointModel) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""
        rest = self.shape[1:]
        if self.kind == "qkv":
            rows = (model.heads, model.kv_heads, model.kv_heads)
            return [(n * model.head_dim, *rest) for n in rows]
        if self.kind == "gate_up":
            return [(self.shape[0] // 2, *rest)] * 2
        return [self.shape]


def split_qkv(tensor: Tensor, model: CheckpointModel) -> list[Tensor]:
    """[g * (G + 2) * d, ...] -> q [g * G * d, ...], k and v [g * d, ...].

    Megatron keeps per query group its query heads, then its key and value head.
    """
    rest = tensor.shape[1:]
    grouped = tensor.view(model.kv_heads, model.group + 2, model.head_dim, *rest)
    parts = grouped.split((model.group, 1, 1), dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def merge_qkv(parts: list[Tensor], model: CheckpointModel) -> Tensor:
    """The opposite of `split_qkv`."""
    rest = parts[0].shape[1:]
    grouped = [part.view(model.kv_heads, -1, model.head_dim, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def tensor_rules(model: CheckpointModel, mixtral_names: bool = False) -> Iterator[TensorRule]:
    """All tensors of the model, in Hugging Face's order.

    Args:
        mixtral_names: the experts go by Mixtral's names (block_sparse_moe, w1, w2, w3).
    """
    vocab = (model.vocab, model.hidden)
    yield TensorRule(
        ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocab, "vocab"
    )
    for layer in range(model.layers):
        yield from _attention_rules(model, layer)
        if model.is_moe(layer):
            yield from _expert_rules(model, layer, mixtral_names)
        else:
            yield from _mlp_rules(model, layer)
    yield TensorRule(("decoder.final_layernorm.weight",), ("model.norm.weight",), (model.hidden,))
    if not model.tied_embeddings:
        yield TensorRule(("output_layer.weight",), ("lm_head.weight",), vocab, "vocab")


def _attention_rules(model: CheckpointModel, layer: int) -> Iterator[TensorRule]:
    prefix, h, d = f"model.layers.{layer}", model.hidden, model.head_dim
    rows = (model.heads + 2 * model.kv_heads) * d
    qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
    yield TensorRule(
        INPUT_NORM,
        (f"{prefix}.input_layernorm.weight",),
        (h,),
        layer=layer,
    )
    yield TensorRule(
        ("self_attention.linear_qkv.weight",),
        tuple(f"{name}.weight" for name in qkv),
        (rows, h),
        "qkv",
        layer,
    )
    if model.qkv_bias:
        yield TensorRule(
            ("self_attention.linear_qkv.bias",),
            tuple(f"{name}.bias" for name in qkv),
            (rows,),
            "qkv",
            layer,
        )
    if model.qk_norm:
        for name in "qk":
            yield TensorRule(
                (f"self_attention.{name}_layernorm.weight",),
                (f"{prefix}.self_attn.{name}_norm.weight",),
                (d,),
                layer=layer,
            )
    yield TensorRule(
        ("self_attention.linear_proj.weight",),
        (f"{prefix}.self_attn.o_proj.weight",),
        (h, model.heads * d),
        layer=layer,
    )
    yield TensorRule(
        MLP_NORM,
        (f"{prefix}.post_attention_layernorm.weight",),
        (h,),
        layer=layer,
    )


def _mlp_rules(model: CheckpointModel, layer: int) -> Iterator[TensorRule]:
    prefix, h, f = f"model.layers.{layer}.mlp", model.hidden, model.ffn
    yield TensorRule(
        ("mlp.linear_fc1.weight",),
        (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"),
        (2 * f, h),
        "gate_up",
        layer,
    )
    yield TensorRule(
        ("mlp.linear_fc2.weight",), (f"{prefix}.down_proj.weight",), (h, f), layer=layer
    )


def _expert_rules(model: CheckpointModel, layer: int, mixtral_names: bool) -> Iterator[TensorRule]:
    prefix = f"model.layers.{layer}." + ("block_sparse_moe" if mixtral_names else "mlp")
    gate, up, down = ("w1", "w3", "w2") if mixtral_names else ("gate_proj", "up_proj", "down_proj")
    h, f = model.hidden, model.expert_ffn
    yield TensorRule(
        ("mlp.router.weight",), (f"{prefix}.gate.weight",), (model.experts, h), layer=layer
    )
    for expert in range(model.experts):
        names = f"{prefix}.experts.{expert}"
        yield TensorRule(
            ("mlp.experts.experts.linear_fc1.weight",),
            (f"{names}.{gate}.weight", f"{names}.{up}.weight"),
            (2 * f, h),
            "gate_up",
            layer,
            expert,
        )
        yield TensorRule(
            ("mlp.experts.experts.linear_fc2.weight",),
            (f"{names}.{down}.weight",),
            (h, f),
            layer=layer,
            expert=expert,
        )
