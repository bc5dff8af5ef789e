"""The model that a checkpoint holds, in terms that Megatron and Hugging Face share.

Both directions go through `CheckpointModel`: one side describes what is in the checkpoint, the
other what is wanted, and two descriptions can be compared field by field. Options of either side
that have no field here are refused by name (architectures.py), so nothing is dropped on the way.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class CheckpointModel:
    """Sizes and switches that decide which tensors there are and what the model computes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Rows that carry a token; Megatron's tensors may have more (`padded_vocab`)."""
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    llama3_factor: float | None
    """Factor of Llama 3's rope scaling, or None for plain rope."""
    max_positions: int
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    renormalized_router: bool = True
    """The chosen experts' weights add up to one."""
    moe_layers: tuple[bool, ...] = ()
    """Which layers hold experts, one entry per layer."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) holds experts."""
        return bool(self.moe_layers) and self.moe_layers[layer]


# field -> (name under `megatron:` in a run file, name in Hugging Face's config.json)
FIELD_NAMES = {
    "layers": ("num_layers", "num_hidden_layers"),
    "hidden": ("hidden_size", "hidden_size"),
    "ffn": ("ffn_hidden_size", "intermediate_size"),
    "heads": ("num_attention_heads", "num_attention_heads"),
    "kv_heads": ("num_query_groups", "num_key_value_heads"),
    "head_dim": ("kv_channels", "head_dim"),
    "vocab": ("vocab_size", "vocab_size"),
    "tied_embeddings": (
        "untie_embeddings_and_output_weights (the opposite)",
        "tie_word_embeddings",
    ),
    "qkv_bias": ("add_qkv_bias", "model_type"),
    "qk_norm": ("qk_layernorm", "model_type"),
    "norm_eps": ("norm_epsilon", "rms_norm_eps"),
    "rope_theta": ("rotary_base", "rope_theta"),
    "llama3_factor": ("use_rope_scaling and rope_scaling_factor", "rope_scaling.factor"),
    "max_positions": ("max_position_embeddings", "max_position_embeddings"),
    "experts": ("num_experts", "num_experts"),
    "experts_per_token": ("moe_router_topk", "num_experts_per_tok"),
    "expert_ffn": ("moe_ffn_hidden_size", "moe_intermediate_size"),
    "renormalized_router": ("moe_router_pre_softmax (the opposite)", "norm_topk_prob"),
    "moe_layers": ("moe_layer_freq", "decoder_sparse_step and mlp_only_layers"),
}


def differences(a: CheckpointModel, b: CheckpointModel) -> list[str]:
    """Names of the fields in which two descriptions differ."""
    return [f.name for f in fields(CheckpointModel) if getattr(a, f.name) != getattr(b, f.name)]
