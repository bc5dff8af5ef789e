"""The layouts that compare_layouts.py trains, and the models they are trained on.

A *variant* is a model; every layout of a variant starts from the same weights (a checkpoint of the
variant) and is compared with the variant's run on one GPU.
"""

import copy
from dataclasses import dataclass, field

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CORE_ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VIRTUAL_PP2 = PP2 | {"num_virtual_stages_per_pipeline_rank": 2}
OVERLAPPED_DP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}

# What a variant changes in the model.
VARIANTS = {
    "base": {},
    "GQA, 1 KV head": {"group_query_attention": True, "num_query_groups": 1},
    "GQA, 2 KV heads": {"group_query_attention": True, "num_query_groups": 2},
    "qk_layernorm": {"qk_layernorm": True},
    "tied embeddings": {"untie_embeddings_and_output_weights": False},
    "MoE, 8 experts": {"num_experts": 8, "moe_router_topk": 2},
    # delayed scaling keeps pickles in its checkpoints, which Transformer Engine refuses to load
    "FP8 linears": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "packed": {"dataloader_inter_document_masking": True},
}


@dataclass(frozen=True)
class TrainedLayout:
    """One layout of one variant."""

    name: str
    gpus: int
    options: dict = field(hash=False)
    variant: str = "base"
    te_only: bool = False


ONE_GPU = "1 GPU"
LAYOUTS = (
    TrainedLayout("TP=2 + SP", 2, TP2),
    TrainedLayout("TP=4 + SP", 4, TP4),
    TrainedLayout("PP=2", 2, PP2),
    TrainedLayout("PP=2, 2 virtual stages", 2, VIRTUAL_PP2),
    TrainedLayout("DP=2, distributed optimizer, overlapped", 2, OVERLAPPED_DP),
    TrainedLayout("TP=2 + SP, PP=2", 4, TP2 | PP2),
    TrainedLayout("full recompute", 1, FULL),
    TrainedLayout("core_attn recompute", 1, CORE_ATTENTION),
    TrainedLayout("TP=2 + SP, full recompute", 2, TP2 | FULL),
    TrainedLayout("TP=2 + SP", 2, TP2, "GQA, 1 KV head"),
    TrainedLayout("TP=4 + SP", 4, TP4, "GQA, 2 KV heads"),
    TrainedLayout("TP=2 + SP", 2, TP2, "qk_layernorm"),
    TrainedLayout("TP=2 + SP", 2, TP2, "tied embeddings"),
    TrainedLayout("PP=2", 2, PP2, "tied embeddings"),
    TrainedLayout("EP=2", 2, {"expert_model_parallel_size": 2}, "MoE, 8 experts"),
    TrainedLayout("TP=2 + SP", 2, TP2, "FP8 linears", te_only=True),
    TrainedLayout("TP=2 + SP", 2, TP2, "packed"),
)


def layouts(gpus: int) -> list[TrainedLayout]:
    """Those that fit, each variant's single-GPU run first."""
    fitting = [layout for layout in LAYOUTS if layout.gpus <= gpus]
    variants = dict.fromkeys(["base", *(layout.variant for layout in fitting)])
    chosen = []
    for variant in variants:
        of_variant = [layout for layout in fitting if layout.variant == variant]
        te_only = all(layout.te_only for layout in of_variant) and bool(of_variant)
        chosen += [TrainedLayout(ONE_GPU, 1, {}, variant, te_only), *of_variant]
    return chosen


def base_run_file(*, small: bool, corpus: str, steps: int) -> dict:
    """The run file that every layout changes: 4 layers, the first dense.

    Args:
        small: hidden 64 and 128 tokens in float32, for the CPU; else hidden 512, 8 heads of 64 and
            2,048 tokens in bf16.
        corpus: prefix of the dataset.
    """
    sizes = {"num_layers": 4, "num_attention_heads": 8, "hidden_size": 512, "seq_length": 2048,
             "ffn_hidden_size": 1376, "moe_ffn_hidden_size": 512, "bf16": True,
             "moe_token_dispatcher_type": "alltoall"}  # fmt: skip
    sparsity = {"block_size": 64, "default": {"local_blocks": 4, "stride": 8}}
    if small:
        sizes |= {"num_attention_heads": 4, "hidden_size": 64, "seq_length": 128,
                  "ffn_hidden_size": 96, "moe_ffn_hidden_size": 32, "bf16": False,
                  "moe_token_dispatcher_type": "allgather"}  # fmt: skip
        # (Megatron's all-to-all takes its split sizes off the GPU, and fails where there is none.)
        sparsity = {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}}
    return {
        "sparsity": sparsity
        | {"layers": [{"layers": [1], "kind": "dense"}], "on_resume": "replace"},
        "megatron": sizes
        | {
            "swiglu": True,
            "normalization": "RMSNorm",
            "disable_bias_linear": True,
            "position_embedding_type": "rope",
            "untie_embeddings_and_output_weights": True,
            "max_position_embeddings": sizes["seq_length"],
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "train_iters": steps,
            "lr": 0.001,
            "min_lr": 0.0001,
            "lr_decay_style": "cosine",
            "lr_warmup_iters": 2,
            "clip_grad": 1.0,
            "log_interval": 1,
            "eval_iters": 0,
            "ckpt_format": "torch_dist",
            "tensorboard_log_interval": 1,
        },
        "data": {"train": [corpus], "tokenizer": "bytes"},
    }


def run_file(base: dict, layout: TrainedLayout, *, modules: str, dense: bool) -> dict:
    """The run file of a layout, without where it loads from and writes to.

    Args:
        modules: Megatron's transformer_impl.
        dense: dense attention in every layer.
    """
    tree = copy.deepcopy(base)
    if dense:
        tree["sparsity"] = {"default": {"kind": "dense"}, "on_resume": "replace"}
    variant = VARIANTS[layout.variant]
    tree["megatron"] |= variant | layout.options | {"transformer_impl": modules}
    if "num_experts" not in variant:
        del tree["megatron"]["moe_ffn_hidden_size"], tree["megatron"]["moe_token_dispatcher_type"]
    if not tree["megatron"]["bf16"]:
        del tree["megatron"]["bf16"]
    return tree
