"""Every option that S2 attention or the launcher refuses: alone, by name, with its value."""

from argparse import Namespace

import pytest
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule

from s2_kernels import dense, local_stride
from s2megatron.attention import checks
from s2megatron.errors import ConfigError

SPARSE = (local_stride(heads=4, local_blocks=2, stride=4),)
DENSE = (dense(heads=4),)

MODEL = dict(
    kv_channels=64, mtp_num_layers=None, multi_latent_attention=False,
    attention_backend=AttnBackend.auto, flash_decode=False, attention_dropout=0.0,
    softmax_type="vanilla", window_size=None, apply_query_key_layer_scaling=False,
    experimental_attention_variant=None, use_kitchen_attention=False,
    heterogeneous_block_specs=False, transformer_impl="local", cuda_graph_impl="none",
    cuda_graph_modules=[], context_parallel_size=1, fp8_dot_product_attention=False,
    fp8_multi_head_attention=False,
)  # fmt: skip
REFUSED_OF_MODEL = [
    {"kv_channels": 24}, {"kv_channels": 272},
    {"mtp_num_layers": 0}, {"multi_latent_attention": True},
    {"attention_backend": AttnBackend.local}, {"flash_decode": True}, {"attention_dropout": 0.1},
    {"softmax_type": "learnable"}, {"window_size": (8, 0)}, {"qk_clip": True},
    {"log_max_attention_logit": True}, {"apply_query_key_layer_scaling": True},
    {"experimental_attention_variant": "dsa"}, {"use_kitchen_attention": True},
    {"heterogeneous_block_specs": True}, {"transformer_impl": "inference_optimized"},
    {"cuda_graph_impl": "full_iteration"}, {"fp8_dot_product_attention": True},
    {"fp8_multi_head_attention": True},
]  # fmt: skip


def check_model(patterns=SPARSE, on_gpu=True, **changes):
    checks.check_model_options(Namespace(**MODEL | changes), patterns, on_gpu=on_gpu)


def test_a_plain_model_passes():
    check_model()
    check_model(transformer_impl="transformer_engine", kv_channels=256)
    check_model(kv_channels=24, on_gpu=False)  # the PyTorch backend takes any head size
    graphs = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.mlp]}
    check_model(**graphs)
    check_model(cuda_graph_modules=[CudaGraphModule.attn])  # of no implementation


@pytest.mark.parametrize("changes", REFUSED_OF_MODEL, ids=str)
def test_option_of_a_model(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError) as error:
        check_model(**changes)
    assert str(error.value).startswith(f"megatron.{name}={value!s}: ")
    check_model(patterns=DENSE, **changes)  # nothing is refused of a dense model
    with pytest.raises(ConfigError):
        check_model(patterns=DENSE + SPARSE, **changes)


@pytest.mark.parametrize("impl, modules", [
    ("local", []), ("transformer_engine", []),
    ("transformer_engine", [CudaGraphModule.mlp, CudaGraphModule.attn]),
])  # fmt: skip
def test_graphs_that_capture_attention(impl, modules):
    """What tests/training/test_cuda_graphs_gpu.py compares on one GPU; not over several ranks."""
    options = dict(cuda_graph_impl=impl, cuda_graph_modules=modules)
    check_model(**options)
    words = rf"megatron\.cuda_graph_impl={impl}: captures attention, whose exchange .* as \[mlp\]"
    with pytest.raises(ConfigError, match=words):
        check_model(context_parallel_size=2, **options)
    mlp = dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=[CudaGraphModule.mlp])
    check_model(context_parallel_size=2, **mlp)


RUN = dict(
    tensor_model_parallel_size=1, num_attention_heads=4, num_query_groups=2,
    group_query_attention=True, dataloader_inter_document_masking=False, context_parallel_size=1,
    pipeline_model_parallel_size=1, micro_batch_size=1, eval_micro_batch_size=None,
    mtp_num_layers=None, multi_latent_attention=False, qk_clip=False, log_max_attention_logit=False,
    attention_backend=AttnBackend.auto, sft=False, reset_attention_mask=False,
    create_attention_mask_in_dataloader=False, fp8=None, fp8_recipe="delayed", save=None,
    fp4=None, transformer_impl="transformer_engine", te_precision_config_file=None,
    spec=None, perform_rl_step=False, fim_data=False, logits_load_dir=None,
    hybrid_layer_pattern=None, heterogeneous_layers_config_path=None,
    overlap_moe_expert_parallel_comm=False, sequence_parallel=False, seq_length=128,
)  # fmt: skip
REFUSED_OF_RUN = {
    "hybrid_context_parallel": [{"context_parallel_size": 2, "hybrid_context_parallel": True}],
    "hierarchical_context_parallel_sizes": [
        {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]}
    ],
    "cp_comm_type": [{"context_parallel_size": 2, "cp_comm_type": ["p2p", "a2a+p2p"]}],
    "dataloader_inter_document_masking": [
        {"dataloader_inter_document_masking": True, "context_parallel_size": 2},
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2,
         "micro_batch_size": 2},
    ],
    "eval_micro_batch_size": [
        {"dataloader_inter_document_masking": True, "pipeline_model_parallel_size": 2,
         "eval_micro_batch_size": 2},
    ],
    "mtp_num_layers": [{"mtp_num_layers": 1}],
    "multi_latent_attention": [{"multi_latent_attention": True}],
    "qk_clip": [{"qk_clip": True}],
    "log_max_attention_logit": [{"log_max_attention_logit": True}],
    "attention_backend": [{"attention_backend": AttnBackend.local}],
    "sft": [{"sft": True}],
    "reset_attention_mask": [{"reset_attention_mask": True}],
    "create_attention_mask_in_dataloader": [{"create_attention_mask_in_dataloader": True}],
    "fp8_recipe": [{"fp8": "hybrid", "save": "runs/x"}],
    "fp8": [{"fp8": "hybrid", "transformer_impl": "local"}],
    "fp4": [{"fp4": "e2m1", "transformer_impl": "local"}],
    "te_precision_config_file": [{"te_precision_config_file": "x", "transformer_impl": "local"}],
    "spec": [{"spec": ["module", "function"]}],
    "perform_rl_step": [{"perform_rl_step": True}],
    "fim_data": [{"fim_data": True}],
    "logits_load_dir": [{"logits_load_dir": "x"}],
    "hybrid_layer_pattern": [{"hybrid_layer_pattern": "M*"}],
    "heterogeneous_layers_config_path": [{"heterogeneous_layers_config_path": "x"}],
    "overlap_moe_expert_parallel_comm": [{"overlap_moe_expert_parallel_comm": True}],
    "seq_length": [
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 129},
        {"context_parallel_size": 4, "seq_length": 132},
        {"context_parallel_size": 2, "seq_length": 132, "sequence_parallel": True,
         "tensor_model_parallel_size": 4},
    ],
    "tensor_model_parallel_size": [
        {"tensor_model_parallel_size": 0},
        {"tensor_model_parallel_size": 3},
        {"tensor_model_parallel_size": 2, "num_query_groups": 3, "num_attention_heads": 12},
    ],
}  # fmt: skip
CASES = [(name, changes) for name, group in REFUSED_OF_RUN.items() for changes in group]


def check_run(**changes):
    checks.check_run_options(Namespace(**RUN | changes))


def test_a_plain_run_passes(monkeypatch):
    check_run()
    packed = {"dataloader_inter_document_masking": True}
    check_run(**packed, micro_batch_size=4)
    check_run(**packed, pipeline_model_parallel_size=2)
    check_run(**packed, pipeline_model_parallel_size=2, eval_micro_batch_size=1)
    check_run(**packed, eval_micro_batch_size=2)
    check_run(sequence_parallel=True, tensor_model_parallel_size=2)
    check_run(tensor_model_parallel_size=4)  # ranks share KV heads
    check_run(tensor_model_parallel_size=4, group_query_attention=False, num_query_groups=3)
    check_run(seq_length=129)
    check_run(num_attention_heads=None, tensor_model_parallel_size=3)  # missing is told elsewhere
    check_run(context_parallel_size=4, seq_length=136)
    check_run(hierarchical_context_parallel_sizes=[1], cp_comm_type="a2a+p2p")  # of one rank
    check_run(fp8="hybrid")
    check_run(fp8="hybrid", fp8_recipe="tensorwise", save="runs/x")
    monkeypatch.setenv(checks.LOADS_PICKLES, "1")
    check_run(fp8="hybrid", save="runs/x")


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_option_of_a_run(name, changes, monkeypatch):
    monkeypatch.delenv(checks.LOADS_PICKLES, raising=False)
    with pytest.raises(ConfigError) as error:
        check_run(**changes)
    assert str(error.value).startswith(f"megatron.{name}={(RUN | changes)[name]!s}: ")


@pytest.mark.parametrize("name", ["inference_context", "inference_params"])
def test_inference_contexts_stop_at_the_first_call(name):
    layer = Namespace(layer_number=3)
    checks._refuse_inference(layer, (), {name: None})
    with pytest.raises(RuntimeError, match="layer 3: Megatron's inference contexts"):
        checks._refuse_inference(layer, (), {name: object()})
