"""What a cache has to know of a model: the pattern of every layer, and that they fit its heads."""

from dataclasses import fields

from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from s2_kernels import LayerPattern
from s2_kernels.record import read_record
from s2megatron.errors import ConfigError, as_config_error

CACHE = "past_key_values"
"""What a cache is called where models take it and give it back; "cache" from transformers 5.24 on,
which takes the old name, too, until 5.40."""
if "cache" in {field.name for field in fields(CausalLMOutputWithPast)}:
    CACHE = "cache"


NAME = "s2"
"""Of the attention in transformers, and of its key in config.json."""


def head_size(config) -> int:
    """Of keys and values, as transformers' attention layers have it."""
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def recorded_patterns(config) -> tuple[LayerPattern, ...]:
    """The pattern of every layer under config.json's `s2`.

    Raises:
        ConfigError: it cannot be read, or is not of this model's layers and heads.
    """
    with as_config_error("config.json"):
        patterns = read_record(getattr(config, NAME))
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for number, pattern in enumerate(patterns, 1):
        if (pattern.heads, pattern.kv_heads) != heads:
            raise ConfigError(
                f"config.json: the pattern of layer {number} is for {pattern.heads} heads and "
                f"{pattern.kv_heads} KV heads, the model has {heads[0]} and {heads[1]}"
            )
    if len(patterns) != config.num_hidden_layers:
        raise ConfigError(
            f"config.json: 's2' has patterns of {len(patterns)} layers, the model has "
            f"{config.num_hidden_layers}"
        )
    return patterns


def model_patterns(model: PreTrainedModel) -> tuple[LayerPattern, ...]:
    """The pattern of every layer. Raises ConfigError where model and record do not fit."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, NAME, None) is None:
        raise ConfigError(
            "config.json has no 's2' key: the model is dense and keeps everything; use the default "
            "cache"
        )
    if config._attn_implementation != NAME:
        raise ConfigError(
            f"the model computes attention {config._attn_implementation!r}: load it with "
            "s2megatron.hf.load, which takes 's2'"
        )
    patterns = recorded_patterns(config)
    for number, pattern in enumerate(patterns, 1):
        if pattern.block_size != patterns[0].block_size:
            raise ConfigError(
                f"config.json: layer {number} has blocks of {pattern.block_size} tokens, layer 1 "
                f"of {patterns[0].block_size}: pages of one pool have one size; use a DynamicCache"
            )
    return patterns
