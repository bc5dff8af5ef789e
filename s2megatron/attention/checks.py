"""Nothing runs dense in silence: options are checked before the model is built, layers after.

Ways a Megatron 0.19 run turns dense without a word, and what happens to each here:
an import that fails under --spec (layer_spec.py raises RuntimeError, and so does this package for
a module that it does not have; docs/install.md on a misspelt package), MTP layers, which ignore the
spec (refused), attention_backend=local, which overwrites the core attention (refused, and found
again after the build), flash_decode and dynamic-batching inference, which never call the core
attention (refused, and stopped at the first call). Whatever else might put another attention in
place is found by looking at every layer of the built model.
"""

import functools
import os
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig

from s2_kernels import LayerPattern
from s2_kernels.api import TRITON_HEAD_SIZES
from s2megatron.attention.core_attention import S2CoreAttention
from s2megatron.attention.positions import check_cut, watch_first_batch
from s2megatron.context_split import ContextSplit, check_context_options, check_length
from s2megatron.errors import ConfigError
from s2megatron.layer_table import layer_table

LOADS_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
NO_MTP = "multi-token prediction layers ignore the layer spec and would run dense; leave it out"
GRAPHS = (
    "captures attention, whose exchange between context-parallel ranks was not run in a graph yet; "
    "choose cuda_graph_impl 'transformer_engine' and cuda_graph_modules without "
    "'attn', as [mlp] (docs/configuration.md)"
)
NO_FULL_ITERATION = (
    "runs the forward step once and replays it: the throughput meter and the pruning of old "
    "checkpoints would see one iteration only; choose cuda_graph_impl 'transformer_engine' and "
    "cuda_graph_modules without 'attn', as [mlp] (docs/configuration.md)"
)
NO_LOGITS = "needs the attention logits, which S2 attention never holds; leave it out"
NO_LATENT = "S2 attention has no latent form; leave it out"
NO_LOW_PRECISION = (
    "needs Transformer Engine's linear layers; Megatron's local modules, which this run has, would "
    "train in full precision and not say so; set transformer_impl to 'transformer_engine', or "
    "leave it out"
)
NO_FP8_ATTENTION = (
    "S2 attention computes in the precision of q, k and v, and sparse layers would ignore it; "
    "leave it out"
)
ONE_ROW = "Megatron's pipeline hands on [seq, batch] and packed batches have one row"
NO_LOCAL_BACKEND = "'local' would replace S2 attention with dense attention; leave it out"


def check_model_options(
    config: TransformerConfig, patterns: tuple[LayerPattern, ...], *, on_gpu: bool
) -> None:
    """Refuses the options that S2 attention does not work with, by name and with the way out.

    Args:
        on_gpu: the run uses the Triton kernels, and with them their head sizes.

    Raises:
        ConfigError: the first option refused. Nothing is refused when all layers are dense.
    """
    if all(pattern.is_dense for pattern in patterns):
        return
    refused = [
        ("kv_channels", on_gpu and config.kv_channels not in TRITON_HEAD_SIZES,
         "the Triton kernels take head sizes from 32 to 256 in multiples of 16; choose another "
         "head size (kv_channels, or hidden_size over num_attention_heads)"),
        ("mtp_num_layers", config.mtp_num_layers is not None,
         NO_MTP),
        ("multi_latent_attention", config.multi_latent_attention,
         NO_LATENT),
        ("attention_backend", config.attention_backend == AttnBackend.local,
         NO_LOCAL_BACKEND),
        ("flash_decode", config.flash_decode,
         "never calls the core attention; leave it out"),
        ("attention_dropout", config.attention_dropout != 0,
         "S2 attention has no dropout; set it to 0"),
        ("softmax_type", config.softmax_type != "vanilla",
         "only 'vanilla' is supported"),
        ("window_size", config.window_size is not None,
         "give the window in the run file (kind: sliding_window, local_blocks)"),
        ("qk_clip", getattr(config, "qk_clip", False),
         NO_LOGITS),
        ("log_max_attention_logit", getattr(config, "log_max_attention_logit", False),
         NO_LOGITS),
        ("fp8_dot_product_attention", config.fp8_dot_product_attention, NO_FP8_ATTENTION),
        ("fp8_multi_head_attention", config.fp8_multi_head_attention, NO_FP8_ATTENTION),
        ("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling,
         "not supported; leave it out"),
        ("experimental_attention_variant", config.experimental_attention_variant is not None,
         "is another attention; leave it out"),
        ("use_kitchen_attention", config.use_kitchen_attention,
         "is another attention; leave it out"),
        ("heterogeneous_block_specs", config.heterogeneous_block_specs,
         "the layers must be alike but for their attention; leave it out"),
        ("transformer_impl", config.transformer_impl == "inference_optimized",
         "'inference_optimized' is not supported; use 'transformer_engine' or 'local'"),
        ("cuda_graph_impl", config.cuda_graph_impl == "full_iteration",
         NO_FULL_ITERATION),
        ("cuda_graph_impl", config.context_parallel_size > 1 and _captures_attention(config),
         GRAPHS),
    ]  # fmt: skip
    _refuse(config, refused)


def _refuse(options, refused: list[tuple[str, Any, str]]) -> None:
    """Raises ConfigError for the first of (name, whether it is asked for, way out)."""
    for name, asked_for, way_out in refused:
        if asked_for:
            raise ConfigError(f"megatron.{name}={getattr(options, name)!s}: {way_out}")


def _captures_attention(config: TransformerConfig) -> bool:
    """Whether a CUDA graph of Megatron's has attention in it; an empty list is whole layers."""
    modules = config.cuda_graph_modules
    return config.cuda_graph_impl == "local" or (
        config.cuda_graph_impl == "transformer_engine"
        and (not modules or CudaGraphModule.attn in modules)
    )


def check_any_run(args) -> None:
    """Options that would be ignored without a word, in the launcher and in Megatron's own script.

    Args:
        args: Megatron's arguments, validated or not.

    Raises:
        ConfigError: the first option refused.
    """
    pipelined = args.dataloader_inter_document_masking and args.pipeline_model_parallel_size > 1
    local = args.transformer_impl != "transformer_engine"
    _refuse(args, [
        ("dataloader_inter_document_masking", pipelined and args.micro_batch_size != 1,
         f"{ONE_ROW}; set micro_batch_size to 1"),
        ("eval_micro_batch_size", pipelined and args.eval_micro_batch_size not in (None, 1),
         f"{ONE_ROW} (dataloader_inter_document_masking); set eval_micro_batch_size to 1"),
        ("reset_attention_mask", args.reset_attention_mask,
         "no mask but the causal one is applied; dataloader_inter_document_masking keeps documents "
         "apart"),
        ("fp8_recipe", args.fp8 and args.fp8_recipe == "delayed" and args.save
         and os.environ.get(LOADS_PICKLES) != "1",
         "Transformer Engine saves its scaling state as pickles and refuses to load them, so the "
         f"run's checkpoints could not be resumed; choose 'tensorwise', or set {LOADS_PICKLES}=1"),
        ("fp8", args.fp8 and local, NO_LOW_PRECISION),
        ("fp4", args.fp4 and local, NO_LOW_PRECISION),
        ("te_precision_config_file", args.te_precision_config_file and local, NO_LOW_PRECISION),
        ("hybrid_layer_pattern", args.hybrid_layer_pattern is not None,
         "this builds GPTs and no Mamba layers; leave it out"),
        ("heterogeneous_layers_config_path", args.heterogeneous_layers_config_path is not None,
         "the layers must be alike but for their attention; leave it out"),
    ])  # fmt: skip


def check_spec_options(model_config) -> None:
    """What Megatron's own choice of a layer spec reads, and the spec given in its place does not.

    Args:
        model_config: Megatron's GPTModelConfig.

    Raises:
        ConfigError: the first option refused.
    """
    transformer = model_config.transformer
    _refuse(model_config, [
        ("use_transformer_engine_op_fuser",
         transformer.use_transformer_engine_op_fuser and transformer.num_moe_experts is None,
         "fuses experts alone in this layer spec, and this model has none; leave it out"),
        ("use_grouped_gemm_for_dense_mlp", transformer.use_grouped_gemm_for_dense_mlp,
         "is not read by this layer spec; leave it out"),
        ("restore_modelopt_state", model_config.restore_modelopt_state,
         "ModelOpt has a layer spec of its own, without S2 attention; leave it out"),
    ])  # fmt: skip


def check_run_options(args) -> None:
    """The launcher's: before Megatron's own validation words things differently.

    Args:
        args: Megatron's arguments, parsed and not yet validated.

    Raises:
        ConfigError: the first option refused.
    """
    tp = args.tensor_model_parallel_size
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    if tp < 1 or (heads and (heads % tp or (groups % tp and tp % groups))):
        raise ConfigError(
            f"megatron.tensor_model_parallel_size={tp}: num_attention_heads={heads} must be a "
            f"multiple of it, and num_query_groups={groups} a multiple or a divisor"
        )
    check_context_options(vars(args))
    if args.seq_length is not None:
        inner = tp if args.sequence_parallel else 1
        check_length(args.seq_length, args.context_parallel_size, inner=inner)
    check_any_run(args)
    _refuse(args, [
        ("mtp_num_layers", args.mtp_num_layers is not None,
         NO_MTP),
        ("multi_latent_attention", args.multi_latent_attention, NO_LATENT),
        ("qk_clip", args.qk_clip, NO_LOGITS),
        ("log_max_attention_logit", args.log_max_attention_logit, NO_LOGITS),
        ("attention_backend", args.attention_backend == AttnBackend.local,
         NO_LOCAL_BACKEND),
        ("sft", args.sft,
         "this launcher has no SFT dataset; for documents packed in pretraining set "
         "dataloader_inter_document_masking"),
        ("create_attention_mask_in_dataloader", args.create_attention_mask_in_dataloader,
         "the causal mask is built in; set it to false"),
        ("spec", args.spec is not None, "the launcher brings its own; leave it out"),
        ("perform_rl_step", args.perform_rl_step, "only pretraining is supported"),
        ("fim_data", args.fim_data, "not supported by this launcher"),
        ("logits_load_dir", args.logits_load_dir is not None,
         "distillation is not supported by this launcher"),
        ("overlap_moe_expert_parallel_comm", args.overlap_moe_expert_parallel_comm,
         "needs a schedule plan, which this launcher's forward step does not make; leave it out"),
        ("seq_length", args.sequence_parallel and args.seq_length % tp != 0,
         f"not divisible by tensor_model_parallel_size={tp}, which sequence_parallel needs"),
    ])  # fmt: skip


def add_model_check(config, patterns: tuple[LayerPattern, ...], args) -> None:
    """Has Megatron's model builder check every layer once the model is built, and print the table.

    Args:
        config: Megatron's GPTModelConfig; its post-wrap hooks are what the builder calls.
        args: Megatron's arguments.
    """
    split = ContextSplit.from_options(vars(args))

    def check(models):
        check_built_model(models, patterns, split)
        if split.ranks > 1:
            group = mpu.get_context_parallel_group()
            check_cut(group, split.seq_len, torch.cuda.current_device())
            for model in models if not args.reset_position_ids else []:
                watch_first_batch(model, group, split.seq_len)
        return models

    config.post_wrap_hooks.append(check)


def check_built_model(
    models: list, patterns: tuple[LayerPattern, ...], split: ContextSplit
) -> None:
    """Every layer that the configuration calls sparse holds S2 attention with its own pattern.

    Args:
        models: this rank's (wrapped) model chunks.
        split: of the sequences, for the table's densities and what is exchanged.

    Raises:
        RuntimeError: a layer does not hold what the configuration says, or none holds it at all.
    """
    found: dict[int, str] = {}
    for model in models:
        for module in model.modules():
            if isinstance(module, SelfAttention):
                found[module.layer_number] = _check_layer(module, patterns)
    gathered = [found]
    if torch.distributed.is_initialized():
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, found)
    everywhere = {number: name for part in gathered for number, name in part.items()}
    missing = sorted(set(range(1, len(patterns) + 1)) - set(everywhere))
    if missing or len(everywhere) != len(patterns):
        raise RuntimeError(
            f"the built model has layers {sorted(everywhere)}, the configuration 1 to "
            f"{len(patterns)}: some layers do not hold the attention that was configured"
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(layer_table(patterns, split.seq_len, everywhere, split), flush=True)


def _check_layer(attention: SelfAttention, patterns: tuple[LayerPattern, ...]) -> str:
    """The name of this layer's attention; raises when it is not what the configuration says."""
    number, core = attention.layer_number, attention.core_attention
    if not 1 <= number <= len(patterns):
        raise RuntimeError(f"layer {number} is built, the configuration has {len(patterns)}")
    pattern = patterns[number - 1]
    if pattern.is_dense:
        if isinstance(core, DotProductAttention | S2CoreAttention):
            raise RuntimeError(
                f"layer {number} is configured dense and holds {type(core).__name__}, which "
                "is not the dense attention of this plugin"
            )
    elif not isinstance(core, S2CoreAttention):
        raise RuntimeError(
            f"layer {number} is configured sparse and holds {type(core).__name__}: it would run "
            "dense, so the run stops"
        )
    elif core.pattern != pattern.shard(core.tp_group.rank(), core.tp_group.size()):
        raise RuntimeError(f"layer {number} holds another pattern than the configuration")
    else:
        _stop_at_inference(attention)
    return type(core).__name__


def _stop_at_inference(attention: SelfAttention) -> None:
    """No hook does this: Megatron's local CUDA graphs take none of a user's on what they capture,
    and say so once they replay."""
    forward = attention.forward
    if getattr(forward, "stops_at_inference", False):  # the model was checked before
        return

    @functools.wraps(forward)
    def checked(*args, **kwargs):
        _refuse_inference(attention, args, kwargs)
        return forward(*args, **kwargs)

    checked.stops_at_inference = True
    attention.forward = checked


def _refuse_inference(attention, args, kwargs):
    """Dynamic-batching inference calls flash kernels and never the core attention."""
    if kwargs.get("inference_context") is not None or kwargs.get("inference_params") is not None:
        raise RuntimeError(
            f"layer {attention.layer_number}: Megatron's inference contexts do not run S2 "
            "attention; convert the checkpoint (s2megatron convert to-hf) and generate in "
            "transformers (docs/inference.md)"
        )
