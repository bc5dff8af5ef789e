"""Layer specs: Megatron's own, with our core attention in place of theirs.

Stock route, in a Megatron-LM checkout (tag core_v0.19.0):

    S2MEGATRON_CONFIG=run.yaml torchrun ... pretrain_gpt.py --spec s2megatron.layer_spec \\
        s2_layer_spec --attention-dropout 0 --no-create-attention-mask-in-dataloader ...

Megatron's --spec swallows an ImportError and then trains *dense*. So what goes wrong while this
module is imported is raised as a RuntimeError, which stops the run.
"""

try:
    import os
    from functools import partial

    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from s2_kernels import LayerPattern
    from s2megatron.checkpoint.record import check_resume, record
    from s2megatron.config import load_config
    from s2megatron.core_attention import TorchDenseAttention, build_core_attention
    from s2megatron.errors import ConfigError
    from s2megatron.megatron_fixes import keep_rope_scaling_factor
    from s2megatron.model_checks import add_model_check, check_model_options
    from s2megatron.norms import TorchNorm
except ImportError as error:
    raise RuntimeError(
        f"s2megatron.layer_spec cannot be imported ({error}); Megatron would go on with dense "
        "attention, so this run stops here"
    ) from error


def build_layer_spec(
    config,
    patterns: tuple[LayerPattern, ...],
    vp_stage: int | None = None,
    *,
    keep_attention_output: bool = True,
) -> TransformerBlockSubmodules:
    """Megatron's spec of this pipeline stage's layers, dense MLPs or experts, with our attention.

    Args:
        config: Megatron's GPTModelConfig.
        patterns: one per layer, for global head counts.
        vp_stage: virtual pipeline stage.
        keep_attention_output: as in the run file's `sparsity:` section.

    Raises:
        ConfigError: an option that S2 attention does not work with.
    """
    transformer = config.transformer
    check_model_options(transformer, patterns, on_gpu=torch.cuda.is_available())
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
    dense = TEDotProductAttention if use_te else TorchDenseAttention
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = partial(
            build_core_attention,
            patterns=patterns,
            dense=dense,
            keep_output=keep_attention_output,
        )
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


def s2_layer_spec(config, vp_stage: int | None = None):
    """What `--spec s2megatron.layer_spec s2_layer_spec` calls: an entry point.

    Reads the run file named by S2MEGATRON_CONFIG. Its `sparsity:` section decides the layers; the
    model, the data and the schedule are the command line's.

    Raises:
        ConfigError: no run file, a bad one, or one that does not fit the model.
    """
    from megatron.training import get_args, print_rank_0

    path = os.environ.get("S2MEGATRON_CONFIG")
    if not path:
        raise ConfigError(
            "S2MEGATRON_CONFIG is not set: name the run file whose `sparsity:` section decides "
            "the layers"
        )
    run = load_config(path)
    args = get_args()
    transformer = config.transformer
    patterns = run.sparsity.resolve(
        num_layers=transformer.num_layers,
        heads=transformer.num_attention_heads,
        kv_heads=transformer.num_query_groups,
    )
    keep = run.sparsity.keep_attention_output
    spec = build_layer_spec(config, patterns, vp_stage, keep_attention_output=keep)
    keep_rope_scaling_factor(config, args)
    if not vp_stage:
        print_rank_0(
            f"s2megatron: sparsity from {path}; its megatron: and data: sections are not used "
            "under --spec, the command line decides"
        )
        check_resume(args, patterns, run.sparsity.on_resume)
        args.s2_sparsity = record(patterns)
        add_model_check(config, patterns, seq_len=args.seq_length)
    return spec
