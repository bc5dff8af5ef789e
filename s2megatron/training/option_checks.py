"""Megatron options that nothing reads as a run file has them, or that fail in the first step.

Megatron 0.19 takes them without a word: another run would be trained than the file describes.
"""

from typing import Any

from s2megatron.errors import ConfigError

ROTARY = ("rope", "yarn", "mrope")
"""Values of position_embedding_type that rotate queries and keys."""


def check_read_options(args, default) -> None:
    """Refuses options that nothing reads beside the run's other ones.

    Args:
        args: Megatron's arguments, parsed and not yet validated.
        default: gives an option's default by its name (a parser's `get_default`).

    Raises:
        ConfigError: the first option refused, with the way out.
    """
    _refuse(args, _read_by_nobody(args))
    kind = "rope" if args.use_rotary_position_embeddings else args.position_embedding_type
    rotary = (
        "rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor "
        "use_rope_scaling no_rope_freq"
    )
    yarn = (
        "rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings "
        "yarn_beta_fast yarn_beta_slow"
    )
    grouped = args.group_query_attention or args.num_query_groups == args.num_attention_heads
    needs = [
        ("num_query_groups", grouped, "group_query_attention is off; set it to true"),
        (rotary, kind in ROTARY, f"position_embedding_type is {kind!r}; set it to 'rope'"),
        (yarn, kind == "yarn", f"position_embedding_type is {kind!r}; set it to 'yarn'"),
        ("rope_scaling_factor", args.use_rope_scaling, "use_rope_scaling is off; set it to true"),
        ("calc_ft_timeouts", args.enable_ft_package, "enable_ft_package is off; set it to true"),
    ]
    for names, is_read, why in needs:
        for name in () if is_read else names.split():
            if getattr(args, name) != default(name):
                raise ConfigError(
                    f"megatron.{name}: {getattr(args, name)!r} would not be read: {why}, or leave "
                    f"{name} out"
                )


def _read_by_nobody(args) -> list[tuple[str, Any, str]]:
    unread = "Megatron 0.19 does not read it"
    return [
        ("yaml_cfg", args.yaml_cfg is not None,
         "is another file of Megatron's options; write them under megatron: in the run file"),
        ("rampup_batch_size", args.rampup_batch_size,
         f"{unread}; write step_batch_size_schedule ('0:256 2B:512': from so many tokens on, that "
         "batch) in place of it and of global_batch_size, and train_samples and lr_*_samples in "
         "place of train_iters and lr_*_iters"),
        ("use_flash_attn", args.use_flash_attn,
         f"{unread}; attention_backend chooses the kernel of dense layers"),
        ("apply_residual_connection_post_layernorm", args.apply_residual_connection_post_layernorm,
         f"{unread}; leave it out"),
        ("openai_gelu", args.openai_gelu,
         f"{unread}; leave it out: the activation is GELU where swiglu and squared_relu are off"),
        ("head_lr_mult", args.head_lr_mult != 1.0,
         f"{unread}; leave it out (decoupled_lr is another rate for embeddings and output layer)"),
        ("window_attn_skip_freq", args.window_attn_skip_freq is not None,
         "give the windows of layers in the run file (kind: sliding_window)"),
        ("inprocess_restart", args.inprocess_restart,
         "this launcher does not restart ranks within their processes; leave it out, and start the "
         "same command again"),
        ("rerun_mode", args.rerun_mode == "report_stats",
         "Megatron 0.19 offers this value and does not know it; choose validate_results or "
         "disabled"),
    ]  # fmt: skip


SIZES = (
    "num_layers hidden_size num_attention_heads seq_length ffn_hidden_size kv_channels "
    "num_query_groups max_position_embeddings micro_batch_size global_batch_size"
)
"""Options of which each has to be 1 or more; Megatron divides by most of them."""


def check_sizes(args) -> None:
    """Raises ConfigError for the first size below 1; `args` are not validated yet."""
    for name in SIZES.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"megatron.{name}: {value}: must be at least 1")


def check_first_step(args) -> None:
    """Refuses what Megatron would answer with an error in its first step, or with wrong numbers.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        ConfigError: the first option refused, with the way out.
    """
    sharded = args.use_torch_fsdp2 or args.use_megatron_fsdp
    local = args.transformer_impl == "local"
    phases = args.phase_transition_iterations
    frequency, layers = args.moe_layer_freq, args.num_layers
    listed = isinstance(frequency, list) and layers and len(frequency) != layers
    _refuse(args, [
        ("seed", args.seed < 1, "must be at least 1"),
        ("num_experts",
         args.num_experts and args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
         "experts under tensor parallelism need sequence_parallel: true"),
        ("moe_router_topk", args.num_experts and args.moe_router_topk > args.num_experts,
         f"is more than num_experts, {args.num_experts}"),
        ("moe_layer_freq", args.num_experts and listed,
         f"a list has one number, 0 or 1, for each of num_layers, {layers}"),
        ("init_model_with_meta_device", args.init_model_with_meta_device and not sharded,
         "without FSDP the weights would be whatever the memory held; leave it out"),
        ("layernorm_zero_centered_gamma", args.layernorm_zero_centered_gamma and local,
         "needs Transformer Engine's norms; leave it out (apply_layernorm_1p is its other name)"),
        ("phase_transition_iterations", phases and not args.train_samples,
         "Megatron counts phases in samples; give train_samples in place of train_iters"),
    ])  # fmt: skip


def _refuse(args, refused: list[tuple[str, Any, str]]) -> None:
    for name, asked_for, way_out in refused:
        if asked_for:
            raise ConfigError(f"megatron.{name}: {getattr(args, name)!r}: {way_out}")
