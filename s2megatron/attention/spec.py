"""Megatron's own layer spec, with our core attention in place of Megatron's."""

from functools import partial

from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from s2_kernels import LayerPattern
from s2megatron.attention.core_attention import build_core_attention
from s2megatron.attention.graph_layer import without_mask
from s2megatron.attention.norms import TorchNorm
from s2megatron.errors import ConfigError


def build_layer_spec(
    config,
    patterns: tuple[LayerPattern, ...],
    vp_stage: int | None = None,
    *,
    keep_attention_output: bool = True,
    exchange_groups: int | None = None,
) -> TransformerBlockSubmodules:
    """Megatron's spec of this pipeline stage's layers, dense MLPs or experts, with our attention.

    Args:
        config: Megatron's GPTModelConfig.
        patterns: one per layer, for global head counts.
        vp_stage: virtual pipeline stage.
        keep_attention_output, exchange_groups: as in the run file's `sparsity:` section.

    Raises:
        ConfigError: Transformer Engine is asked for and not installed.
    """
    transformer = config.transformer
    use_te = transformer.transformer_impl == "transformer_engine"
    if use_te and not HAVE_TE:
        raise ConfigError(
            "transformer_impl: 'transformer_engine' is not installed here; choose 'local'"
        )
    spec = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=use_te,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = partial(
            build_core_attention,
            patterns=patterns,
            dense=TEDotProductAttention if use_te else None,
            keep_output=keep_attention_output,
            exchange_groups=exchange_groups,
        )
        if transformer.cuda_graph_impl == "transformer_engine":
            layer.module = without_mask(layer.module)
        if not use_te:
            _use_torch_norms(layer, transformer)
    if not use_te:
        spec.layer_norm = TorchNorm
    return spec


def _use_torch_norms(layer: ModuleSpec, transformer) -> None:
    """Norms that take part in sequence parallelism, wherever the spec has a norm."""
    block, attention = layer.submodules, layer.submodules.self_attention.submodules
    block.input_layernorm = TorchNorm
    if block.pre_mlp_layernorm is not IdentityOp:
        block.pre_mlp_layernorm = TorchNorm
    if transformer.qk_layernorm and not transformer.qk_l2_norm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
