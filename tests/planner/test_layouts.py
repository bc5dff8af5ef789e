"""A layout read off a run's options, what the planner refuses of them, and how it is written."""

import pytest
from planner_cases import make_model, run_arguments

from s2megatron.errors import ConfigError
from s2megatron.planner.layout import Layout, candidates, layout_of

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_every_field_of_a_run():
    """No field keeps its default here, so that none can be left out."""
    options = run_arguments(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3,
        expert_model_parallel_size=2, micro_batch_size=2, global_batch_size=64,
        use_distributed_optimizer=False, transformer_impl="local",
        gradient_accumulation_fusion=True, bf16=False, **FULL,
    )  # fmt: skip
    assert layout_of(options, 32) == Layout(
        gpus=32, tp=2, cp=4, pp=2, vpp=3, ep=2, sequence_parallel=True, micro_batch=2,
        global_batch=64, recompute="full", distributed_optimizer=False, overlap_grad_reduce=True,
        overlap_param_gather=True, fused=False, fused_accumulation=True, bf16=False,
    )  # fmt: skip
    usual = layout_of(run_arguments(), 32)
    assert (usual.vpp, usual.recompute, usual.distributed_optimizer) == (1, "none", True)
    assert usual.fused and usual.bf16 and layout_of(run_arguments(bf16=False, fp16=True), 32).bf16
    overlapped = run_arguments(overlap_grad_reduce=False, overlap_param_gather=False)
    apart = layout_of(overlapped, 32)
    assert not apart.overlap_grad_reduce and not apart.overlap_param_gather


@pytest.mark.parametrize("modules", [None, [], ["core_attn"]])
def test_selective_recompute_is_attentions(modules):
    options = run_arguments(recompute_granularity="selective", recompute_modules=modules)
    assert layout_of(options, 8).recompute == "core_attn"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (FULL | {"recompute_method": "block"}, "recompute_method=block, recompute_num_layers=1"),
        (FULL | {"recompute_num_layers": 2}, "recompute_method=uniform, recompute_num_layers=2"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
         "recompute_modules=['mlp']: the planner knows 'core_attn' only"),
    ],
)  # fmt: skip
def test_other_recompute_is_refused(changed, said):
    with pytest.raises(ConfigError) as refused:
        layout_of(run_arguments(**changed), 8)
    assert f"megatron.{said}" in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "written"),
    [
        (Layout(gpus=4, recompute="core_attn"), "TP 1, PP 1, DP 4, recompute core_attn"),
        (Layout(gpus=2, tp=2), "TP 2, PP 1, DP 1, recompute none"),
        (
            Layout(gpus=64, tp=2, cp=2, pp=4, vpp=2, ep=2, sequence_parallel=True),
            "TP 2 + SP, CP 2, PP 4 x2, DP 4, EP 2, recompute none",
        ),
        (Layout(gpus=1, recompute="full"), "TP 1, PP 1, DP 1, recompute full"),
        (
            Layout(gpus=1, recompute="full", keep_attention_output=False),
            "TP 1, PP 1, DP 1, recompute full + attention",
        ),
        (Layout(gpus=1, keep_attention_output=False), "TP 1, PP 1, DP 1, recompute none"),
    ],
)
def test_how_a_layout_is_written(layout, written):
    assert str(layout) == written


def test_a_search_tries_the_largest_tp_that_it_may():
    layouts = candidates(Layout(gpus=8, global_batch=8), make_model(), most_tp=4)
    assert {layout.tp for layout in layouts} == {1, 2, 4}
