"""The 1.3B and 7B models and a machine of round numbers, for the planner's arithmetic by hand."""

from types import SimpleNamespace

from s2_kernels import dense, local_stride
from s2megatron.accounting import ModelShape
from s2megatron.machine import Attention, Link, Machine
from s2megatron.planner.layout import Model
from s2megatron.planner.unplanned import WITH_ANY_VALUE

LLAMA_1_3B = {
    "layers": 24,
    "hidden": 2048,
    "ffn": 5504,
    "heads": 16,
    "kv_heads": 16,
    "head_dim": 128,
    "vocab": 32000,
}
LLAMA_7B = LLAMA_1_3B | {
    "layers": 32,
    "hidden": 4096,
    "ffn": 11008,
    "heads": 32,
    "kv_heads": 32,
}
PLAIN = {
    "gated": True,
    "bias": False,
    "qkv_bias": False,
    "norm_bias": False,
    "qk_norm": False,
    "output_gate": False,
    "tied_embeddings": False,
    "position_embeddings": 0,
    "experts": 0,
    "experts_per_token": 0,
    "expert_ffn": 0,
    "shared_expert_ffn": 0,
    "shared_expert_gate": False,
}


def make_model(seq_len: int = 32768, dense_layers: int = 0, **sizes) -> Model:
    """Sparse layers after so many dense ones."""
    sizes = LLAMA_1_3B | sizes
    moe = (sizes.get("experts", 0) > 0,) * sizes["layers"]
    shape = ModelShape(**(PLAIN | sizes), seq_len=seq_len, moe_layers=moe)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "block_size": 64}
    sparse = local_stride(**heads, local_blocks=16, stride=shape.kv_heads)
    patterns = (dense(**heads),) * dense_layers + (sparse,) * (shape.layers - dense_layers)
    return Model(shape, patterns)


SIMPLE = Machine(
    gpu="simple",
    source="round numbers",
    memory_gib=80,
    gpus_per_node=8,
    matmul_tflops={1024: 100},
    memory_tb_s=1e6,  # so fast that only the products count
    # Backward kernels do 10 operations where the model has 8 (scores again): 8 at a rate of 100.
    dense_attention=Attention(forward={1024: 100}, backward={1024: 125}),
    s2_attention=Attention(forward={1024: 100}, backward={1024: 125}),
    node=Link(gb_s=1e9, latency_us=0),
    cluster=Link(gb_s=1e9, latency_us=0),
    host_layer_us=0,
    step_ms=0,
)


def eight_groups(stride: int, seq_len: int) -> Model:
    """One sparse layer and a dense one, 32 heads on 8 KV heads, window 16 blocks of 64."""
    model = make_model(seq_len=seq_len, layers=2, heads=32, kv_heads=8)
    heads = {"heads": 32, "kv_heads": 8, "block_size": 64}
    sparse = local_stride(**heads, local_blocks=16, stride=stride, head_step=stride // 8)
    return Model(model.shape, (sparse, dense(**heads)))


def run_arguments(**changed) -> SimpleNamespace:
    """What `layout_of` reads of Megatron's arguments."""
    given = {
        "recompute_granularity": None, "tensor_model_parallel_size": 2,
        "context_parallel_size": 4, "cp_comm_type": ["p2p"], "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "expert_model_parallel_size": 1,
        "sequence_parallel": True, "micro_batch_size": 1, "global_batch_size": 8,
        "use_distributed_optimizer": True, "overlap_grad_reduce": True,
        "overlap_param_gather": True, "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": False, "bf16": True, "fp16": False,
    }  # fmt: skip
    return SimpleNamespace(**given | changed)


def all_arguments(**changed) -> SimpleNamespace:
    """`run_arguments`, and what a plan would leave out, off."""
    off = dict.fromkeys(WITH_ANY_VALUE) | {
        "optimizer": "adam", "accumulate_allreduce_grads_in_fp32": True,
        "use_megatron_fsdp": False, "data_parallel_sharding_strategy": "optim_grads_params",
        "num_distributed_optimizer_instances": 1, "expert_tensor_parallel_size": 2,
        "num_experts": None, "moe_token_dispatcher_type": "allgather",
    }  # fmt: skip
    return SimpleNamespace(**vars(run_arguments()) | off | changed)
