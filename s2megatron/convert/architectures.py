"""Which Hugging Face architectures are converted, and what of either side is refused.

`from_megatron` and `from_hugging_face` describe a model (model.py) from Megatron's arguments and
from a transformers configuration; what cannot be described is refused by name. `to_config` writes
the description as a config.json, in the fields that transformers 4 and 5 both read.
"""

from dataclasses import dataclass, replace

from s2megatron.convert.model import CheckpointModel
from s2megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Hugging Face model type and the switches that are fixed by it."""

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    head_dim: bool = True
    """Has a head_dim of its own; else hidden_size / num_attention_heads."""
    fixed: tuple[tuple[str, object], ...] = ()
    """config.json fields that are written as they stand, and must be so when read."""


ARCHITECTURES = {
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        fixed=(("attention_bias", False), ("mlp_bias", False)),
    ),
    "mistral": Architecture(class_name="MistralForCausalLM", fixed=(("sliding_window", None),)),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM",
        qkv_bias=True,
        head_dim=False,
        fixed=(("use_sliding_window", False),),
    ),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM",
        qk_norm=True,
        fixed=(("attention_bias", False), ("use_sliding_window", False)),
    ),
    "mixtral": Architecture(
        class_name="MixtralForCausalLM",
        experts=True,
        fixed=(("sliding_window", None), ("router_jitter_noise", 0.0)),
    ),
    "qwen3_moe": Architecture(
        class_name="Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=True,
        fixed=(("attention_bias", False), ("use_sliding_window", False)),
    ),
}

# Llama 3's rope scaling as Megatron has it: only the factor is an option.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Megatron option -> the only values that have a place in these architectures
_MEGATRON_FIXED = {
    "add_bias_linear": (False,),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0, 0.0, None),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_mlp_glu_interleave_size": (None,),
}

# What balances experts by a loss; sinkhorn and quantile_balancing choose other experts.
_LOSSES = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}


def from_megatron(args, where: str, *, vocab: int) -> CheckpointModel:
    """The model of a Megatron run.

    Args:
        args: Megatron's validated arguments, as saved in checkpoints.
        where: what to name in errors ("checkpoint DIR" or "--config FILE").
        vocab: tokens without padding.

    Raises:
        ConfigError: an option that no supported Hugging Face architecture has a place for.
    """
    for name, allowed in _MEGATRON_FIXED.items():
        value = getattr(args, name, allowed[0])
        _refuse_unless(value in allowed, where, name, value, repr(allowed[0]))
    balancing = getattr(args, "moe_router_load_balancing_type", None) or "none"
    kinds = {balancing} if isinstance(balancing, str) else set(balancing)
    _refuse_unless(
        not getattr(args, "num_experts", None) or kinds <= _LOSSES,
        where, "moe_router_load_balancing_type", balancing, "losses, which do not route,",
    )  # fmt: skip
    grouped = getattr(args, "group_query_attention", False)
    experts = getattr(args, "num_experts", None) or 0
    expert_ffn = (args.moe_ffn_hidden_size or args.ffn_hidden_size) if experts else 0
    moe_layers = _moe_layers(args) if experts else ()
    return CheckpointModel(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=_dense_ffn(args.ffn_hidden_size, expert_ffn, moe_layers),
        heads=args.num_attention_heads,
        kv_heads=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocab=vocab,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        qk_norm=bool(getattr(args, "qk_layernorm", False)),
        norm_eps=args.layernorm_epsilon,
        rope_theta=float(args.rotary_base),
        llama3_factor=_llama3_factor(args),
        max_positions=args.max_position_embeddings,
        experts=experts,
        experts_per_token=args.moe_router_topk if experts else 0,
        expert_ffn=expert_ffn,
        renormalized_router=not (experts and getattr(args, "moe_router_pre_softmax", False)),
        moe_layers=moe_layers,
    )


def _refuse_unless(fits: bool, where: str, name: str, value, only: str) -> None:
    if not fits:
        raise ConfigError(
            f"{where}: megatron.{name}={value!r} has no place in the Hugging Face models "
            f"supported ({', '.join(ARCHITECTURES)}): only {only} can be converted"
        )


def _llama3_factor(args) -> float | None:
    if not getattr(args, "use_rope_scaling", False):
        return None
    return float(getattr(args, "rope_scaling_factor", 8.0))


def _dense_ffn(ffn: int, expert_ffn: int, moe_layers: tuple[bool, ...]) -> int:
    """The size of the MLPs that are not experts, or the experts' where there is no such layer."""
    return expert_ffn if moe_layers and all(moe_layers) else ffn


def _moe_layers(args) -> tuple[bool, ...]:
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        return tuple(i % frequency == 0 for i in range(args.num_layers))
    return tuple(bool(x) for x in frequency)


def choose_architecture(model: CheckpointModel, asked_for: str | None, where: str) -> str:
    """The model type to write: the one asked for, or the plainest that has a place for all.

    Raises:
        ConfigError: the one asked for is unknown, or has no place for something; or none has.
    """
    if asked_for is not None and asked_for not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: architecture {asked_for!r} is not supported; "
            f"one of {', '.join(ARCHITECTURES)}"
        )
    names = [asked_for] if asked_for else list(ARCHITECTURES)
    reasons = {name: _misfit(model, name) for name in names}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if fitting:
        return fitting[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(f"{where}: has no place in Hugging Face's {told}")


def _misfit(model: CheckpointModel, name: str) -> str | None:
    """Why the architecture cannot hold the model, or None."""
    kind = ARCHITECTURES[name]
    if bool(model.experts) != kind.experts:
        return "num_experts: it has " + ("no experts" if model.experts else "experts")
    if model.qkv_bias != kind.qkv_bias:
        return "add_qkv_bias: it has " + ("always" if kind.qkv_bias else "no") + " QKV biases"
    if model.qk_norm != kind.qk_norm:
        return "qk_layernorm: it has " + ("always" if kind.qk_norm else "no") + " q and k norms"
    if not kind.head_dim and model.head_dim * model.heads != model.hidden:
        return "kv_channels: its heads are hidden_size / num_attention_heads"
    if name == "mixtral" and not all(model.moe_layers):
        return "moe_layer_freq: all its layers hold experts"
    if name == "mixtral" and not model.renormalized_router:
        return "moe_router_pre_softmax: its router's weights add up to one"
    return None


def to_config(model: CheckpointModel, name: str) -> dict:
    """config.json of a model, without what Megatron does not know (token ids, dtype)."""
    kind = ARCHITECTURES[name]
    config = {
        "architectures": [kind.class_name],
        "model_type": name,
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_dropout": 0.0,
        **rope_config(model),
        **dict(kind.fixed),
    }
    if kind.head_dim:
        config["head_dim"] = model.head_dim
    if name == "mixtral":
        config |= {
            "intermediate_size": model.expert_ffn,
            "num_local_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
        }
    elif name == "qwen3_moe":
        config |= {
            "moe_intermediate_size": model.expert_ffn,
            "num_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "norm_topk_prob": model.renormalized_router,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, moe in enumerate(model.moe_layers) if not moe],
        }
    return config


def rope_config(model: CheckpointModel) -> dict:
    """Rope fields under the names that transformers 4 wrote and 5 still reads."""
    scaling = None
    if model.llama3_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.llama3_factor, **LLAMA3}
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}


# Fields of config.json that are sizes; transformers takes zeros and negative numbers.
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_EXPERT_SIZES = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": (
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    ),
}  # fmt: skip


def from_hugging_face(config, where: str) -> CheckpointModel:
    """The model of a transformers configuration.

    Raises:
        ConfigError: an architecture or a field that Megatron has no place for.
    """

    def refuse(name: str, value, way_out: str):
        raise ConfigError(f"{where}: {name}={value!r}: {way_out}")

    name = config.model_type
    if name not in ARCHITECTURES:
        refuse("model_type", name, f"not supported; one of {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[name]
    if getattr(config, "auto_map", None):
        refuse("auto_map", config.auto_map, "models with code of their own are not supported")
    if getattr(config, "quantization_config", None):
        refuse("quantization_config", "...", "quantized weights cannot be trained; dequantize them")
    _check_fields(config, kind, refuse)
    heads = config.num_attention_heads
    theta, factor = _rope(config, refuse)
    model = CheckpointModel(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        llama3_factor=factor,
        max_positions=config.max_position_embeddings,
    )
    return _with_experts(model, config) if kind.experts else model


def _check_fields(config, kind: Architecture, refuse) -> None:
    """Calls `refuse(field, value, way out)` for a field that Megatron has no place for."""
    expected = {"hidden_act": "silu", "attention_dropout": 0.0, **dict(kind.fixed)}
    for field, value in expected.items():
        found = getattr(config, field, value)
        if found != value:
            refuse(field, found, f"Megatron here has no place for it: only {value!r}")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        refuse("layer_types", sorted(layer_types), "only full_attention layers are supported")
    if (getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        refuse("partial_rotary_factor", config.partial_rotary_factor, "only 1.0 is supported")
    own_head_dim = ("head_dim",) if getattr(config, "head_dim", None) is not None else ()
    for field in _SIZES + own_head_dim + _EXPERT_SIZES.get(config.model_type, ()):
        value = getattr(config, field)
        if type(value) is not int or value < 1:
            refuse(field, value, "must be a whole number of at least 1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        refuse("num_key_value_heads", kv_heads, f"does not divide num_attention_heads={heads}")


def _with_experts(model: CheckpointModel, config) -> CheckpointModel:
    if config.model_type == "mixtral":
        return replace(
            model,
            experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            expert_ffn=config.intermediate_size,
            moe_layers=(True,) * model.layers,
        )
    dense = set(config.mlp_only_layers or ())
    step = config.decoder_sparse_step
    moe_layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(model.layers))
    return replace(
        model,
        ffn=_dense_ffn(model.ffn, config.moe_intermediate_size, moe_layers),
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_ffn=config.moe_intermediate_size,
        renormalized_router=bool(config.norm_topk_prob),
        moe_layers=moe_layers,
    )


def _rope(config, refuse) -> tuple[float, float | None]:
    """(theta, Llama 3's factor or None), from transformers 5's or 4's fields."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse("rope_scaling.rope_type", kind, "only 'default' and 'llama3' are supported")
    scaled = kind == "llama3"
    known = {"rope_type", "type", "rope_theta"} | ({"factor", *LLAMA3} if scaled else set())
    for name, value in rope.items():
        if name not in known and value is not None and (name, value) != _WHOLE_ROTATION:
            refuse(f"rope_scaling.{name}", value, f"rope of type {kind!r} has no place for it")
    numbers = ("rope_theta", "factor") if scaled else ("rope_theta",)
    for name in numbers:
        value = rope.get(name)
        if type(value) not in (int, float) or not value > 0:
            refuse(f"rope_scaling.{name}", value, "must be a number above 0")
    for name, value in LLAMA3.items() if scaled else ():
        if rope.get(name) != value:
            refuse(f"rope_scaling.{name}", rope.get(name), f"Megatron's is fixed at {value}")
    return float(rope["rope_theta"]), float(rope["factor"]) if scaled else None


_WHOLE_ROTATION = ("partial_rotary_factor", 1.0)
