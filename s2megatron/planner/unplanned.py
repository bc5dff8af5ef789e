"""What a run file asks for that the planner's model does not know, and what is planned instead."""

import argparse

WITH_ANY_VALUE = {
    "decoder_first_pipeline_num_layers": "stages of equally many layers",
    "decoder_last_pipeline_num_layers": "stages of equally many layers",
    "pipeline_model_parallel_layout": "stages of equally many layers",
    "account_for_embedding_in_pipeline_split": "stages of equally many layers",
    "account_for_loss_in_pipeline_split": "stages of equally many layers",
    "use_torch_fsdp2": "weights and gradients whole on every data-parallel rank",
    "distribute_saved_activations": "layer inputs whole on every tensor-parallel rank",
    "moe_layer_recompute": "nothing of the experts is computed again",
    "use_precision_aware_optimizer": "float32 gradients, and 12 bytes of Adam's states per "
    "parameter",
    "grad_reduce_in_bf16": "float32 gradients, reduced as such",
    "optimizer_cpu_offload": "the optimizer's states and its step on the GPU",
    "cpu_offloading_num_layers": "all activations on the GPU",
    "fine_grained_activation_offloading": "all activations on the GPU",
    "fp8": "rates and memory of bf16",
    "fp4": "rates and memory of bf16",
    "fp32_residual_connection": "residuals of 2 bytes",
    "hidden_dropout": "no dropout",
    "cross_entropy_loss_fusion": "the loss's operations one by one, in float32",
    "tp_comm_overlap": "overlap of TP communication without user buffers",
    "overlap_moe_expert_parallel_comm": "all-to-alls that nothing hides",
    "moe_shared_expert_overlap": "all-to-alls that nothing hides",
    "delay_wgrad_compute": "gradients of weights beside those of inputs",
    "defer_embedding_wgrad_compute": "gradients of weights beside those of inputs",
}
"""Options that are planned as if they were off: 0, False or left out."""


def unplanned(args: argparse.Namespace) -> list[str]:
    """One line for each of Megatron's arguments that would change the plan, but is not in it."""
    given = vars(args)
    found = {
        f"{name}={given[name]}": instead
        for name, instead in WITH_ANY_VALUE.items()
        if given.get(name)
    }
    found |= {said: instead for said, applies, instead in _by_value(args) if applies}
    return [f"not in this plan: megatron.{said}; planned: {how}" for said, how in found.items()]


def _by_value(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """(an option and its value, whether it is another than is planned, what is planned)."""
    half = args.bf16 or args.fp16
    tp, expert_tp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    dispatcher = args.moe_token_dispatcher_type
    apart = bool(args.num_experts) and args.expert_model_parallel_size > 1
    return [
        ("bf16=False", not half, "the rates of bf16, which a float32 run does not reach"),
        ("accumulate_allreduce_grads_in_fp32=False",
         half and not args.accumulate_allreduce_grads_in_fp32 and not args.grad_reduce_in_bf16,
         "float32 gradients, reduced as such"),
        (f"optimizer={args.optimizer}", args.optimizer != "adam",
         "Adam, two float32 moments per parameter"),
        (f"use_megatron_fsdp=True (data_parallel_sharding_strategy="
         f"{args.data_parallel_sharding_strategy})", args.use_megatron_fsdp,
         "weights and gradients whole on every data-parallel rank"),
        (f"num_distributed_optimizer_instances={args.num_distributed_optimizer_instances}",
         args.num_distributed_optimizer_instances > 1,
         "the optimizer's states over all data-parallel ranks"),
        (f"expert_tensor_parallel_size={expert_tp}",
         bool(args.num_experts) and expert_tp not in (None, tp),
         f"experts over TP {tp}, as the other layers"),
        (f"moe_token_dispatcher_type={dispatcher}", apart and dispatcher == "allgather",
         "all-to-alls of each token's own experts"),
    ]  # fmt: skip
