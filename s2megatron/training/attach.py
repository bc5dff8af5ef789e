"""The one way in which S2 attention enters a Megatron model: for the launcher and for --spec."""

from collections.abc import Callable

from s2_kernels import LayerPattern
from s2_kernels.record import record
from s2megatron.attention.checks import (
    add_model_check,
    check_any_run,
    check_model_options,
    check_spec_options,
)
from s2megatron.attention.megatron_fixes import keep_rope_scaling_factor
from s2megatron.attention.spec import build_layer_spec
from s2megatron.config import SparsityConfig
from s2megatron.context_split import ContextSplit, check_context_options
from s2megatron.training.finite_steps import refuse_steps_that_are_not_finite
from s2megatron.training.optimizer_fixes import mend_distributed_optimizer, mend_sgd
from s2megatron.training.resume import check_resume
from s2megatron.training.save_helpers import tie_save_helpers


def attach(
    model_config, args, sparsity: SparsityConfig, *, on_gpu: bool
) -> tuple[LayerPattern, ...]:
    """Gives a model its patterns, checks and records them. Once a process, before it is built.

    Args:
        model_config: Megatron's GPTModelConfig; gets our layer spec and a check of what is built.
        args: Megatron's arguments; get the record that is saved with every checkpoint.
        on_gpu: the run uses the Triton kernels.

    Returns:
        One pattern per layer, for global heads.

    Raises:
        ConfigError: a sparsity that does not fit the model, an option that S2 attention does not
            work with, a checkpoint of another sparsity.
    """
    patterns = resolve(model_config, sparsity)
    check_model_options(model_config.transformer, patterns, on_gpu=on_gpu)
    check_spec_options(model_config)
    check_any_run(args)
    check_context_options(vars(args))
    ContextSplit.from_options(vars(args)).check(patterns)
    check_resume(args, patterns, sparsity.on_resume)
    args.s2_sparsity = record(patterns)
    model_config.transformer_layer_spec = layer_spec(sparsity)
    keep_rope_scaling_factor(model_config, args)
    mend_distributed_optimizer()
    mend_sgd()
    refuse_steps_that_are_not_finite()
    tie_save_helpers()
    add_model_check(model_config, patterns, args)
    return patterns


def resolve(model_config, sparsity: SparsityConfig) -> tuple[LayerPattern, ...]:
    """One pattern per layer of the model. Raises ConfigError where they do not fit."""
    transformer = model_config.transformer
    return sparsity.resolve(
        num_layers=transformer.num_layers,
        heads=transformer.num_attention_heads,
        kv_heads=transformer.num_query_groups,
    )


def layer_spec(sparsity: SparsityConfig) -> Callable:
    """What Megatron calls for the spec of a pipeline stage: `f(model_config, vp_stage=None)`."""

    def spec_of_stage(config, vp_stage: int | None = None):
        return build_layer_spec(
            config,
            resolve(config, sparsity),
            vp_stage,
            keep_attention_output=sparsity.keep_attention_output,
            exchange_groups=sparsity.exchange_groups,
        )

    return spec_of_stage
