"""A layout read off a run's options, what the planner refuses of them, and how it is written."""

import pytest
from planner_cases import SIMPLE, make_model, run_arguments

from s2megatron.errors import ConfigError
from s2megatron.planner import memory
from s2megatron.planner.layout import ULYSSES, Layout, candidates, layout_of
from s2megatron.planner.links import Axis, Transfer
from s2megatron.planner.search import search

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


FEW = {"heads": 12, "kv_heads": 12, "ffn": 1200, "vocab": 1200}


@pytest.mark.parametrize(
    ("layout", "sizes", "said"),
    [
        (Layout(gpus=12, tp=12), FEW | {"kv_heads": 4}, ""),  # three ranks for each KV head
        (Layout(gpus=8, tp=8), FEW, "TP 8 does not divide 12 heads (12 KV heads)"),
        (Layout(gpus=8, tp=8), FEW | {"kv_heads": 4}, "TP 8 does not divide 12 heads"),
        (Layout(gpus=6, tp=6), FEW | {"kv_heads": 4}, "12 heads (4 KV heads)"),
        (Layout(gpus=12, tp=12), FEW | {"vocab": 1000}, "the MLP (1200) or the vocabulary"),
        (Layout(gpus=12, tp=12), FEW | {"ffn": 1000}, "the MLP (1000) or the vocabulary"),
        (Layout(gpus=6, pp=3, vpp=4, global_batch=6), {"layers": 12}, ""),
        (Layout(gpus=6, pp=3, vpp=3, global_batch=6), {"layers": 12}, "PP 3 x VPP 3 does not"),
        (Layout(gpus=4, pp=4, global_batch=4), {"layers": 6}, "PP 4 x VPP 1 does not divide 6"),
        (Layout(gpus=2, tp=2, sequence_parallel=True), {"seq_len": 4097},
         "TP 2 does not divide 4097 tokens"),
        (Layout(gpus=2, tp=2), {"seq_len": 4097}, ""),
        (Layout(gpus=1), {"seq_len": 4097}, ""),
        (Layout(gpus=4, micro_batch=2, global_batch=12), {}, "12 is not a multiple of micro-batch"),
        (Layout(gpus=4, pp=4, vpp=2, global_batch=8), {}, ""),
        (Layout(gpus=4, pp=4, vpp=2, global_batch=6), {}, "micro-batches (6) a multiple of it"),
        (Layout(gpus=4, vpp=2, global_batch=8), {}, "VPP needs PP > 1 and micro-batches (2)"),
        (Layout(gpus=4, ep=2, global_batch=4), {}, "EP 2 does not divide 0 experts and DP 4"),
        (Layout(gpus=4, ep=4, global_batch=4), {"experts": 6}, "4 does not divide 6 experts"),
        (Layout(gpus=4, ep=8, global_batch=4), {"experts": 8}, "8 does not divide 8 experts"),
        (Layout(gpus=4, cp=2, ep=8, global_batch=2), {"experts": 8}, "experts and DP 2 x CP 2"),
        (Layout(gpus=4, cp=2, ep=4, global_batch=2), {"experts": 8}, ""),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_said(layout, sizes, said):
    misfit = layout.misfit(make_model(**sizes))
    assert said in misfit and bool(said) == bool(misfit), misfit
    if layout.cp == 1:
        assert "CP" not in misfit


def test_heads_of_few_kv_heads_under_ulysses():
    """One KV head on every TP rank cannot be divided further."""
    model = make_model(seq_len=8192, dense_layers=24, heads=32, kv_heads=2, head_dim=64)
    layout = Layout(gpus=8, tp=4, cp=2, cp_comm=ULYSSES)
    assert "the 8 heads and 1 KV heads of a TP rank" in layout.misfit(model)


def test_a_search_tries_all_ways_to_cut():
    sizes = {"layers": 4, "experts": 4, "experts_per_token": 2, "expert_ffn": 512}
    base = Layout(gpus=4, global_batch=8, vpp=2, ep=2, micro_batch=4, sequence_parallel=True)
    layouts = candidates(base, make_model(**sizes), most_tp=2, most_cp=1)
    assert {layout.micro_batch for layout in layouts} == {1}
    assert all(layout.sequence_parallel == (layout.tp > 1) for layout in layouts)
    alike = {(x.tp, x.pp, x.vpp, x.ep) for x in layouts}
    assert alike == {
        (1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 4),
        (1, 2, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (1, 2, 2, 2),
        (1, 4, 1, 1), (2, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (2, 2, 2, 1),
    }  # fmt: skip
    assert len(layouts) == len(set(layouts)) == 4 * len(alike)
    ways = {(x.recompute, x.keep_attention_output) for x in layouts}
    assert ways == {("none", True), ("core_attn", True), ("full", True), ("full", False)}


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
def test_tp_leaves_the_node_only_where_nothing_else_fits(tp):
    """Nodes of two GPUs; TP is doubled until something fits, up to the 16 heads."""
    model, base = make_model(seq_len=65536, layers=8), Layout(gpus=16, global_batch=1)
    layouts = candidates(base, model, most_tp=tp, most_cp=1)
    least = min(memory.peak(model, layout).total for layout in layouts)  # less, the larger TP is
    enough = least / 2**30 / (1 - SIMPLE.assumptions.memory_reserve) * 1.001
    machine = SIMPLE.model_copy(update={"gpus_per_node": 2, "memory_gib": enough})
    assert {plan.layout.tp for plan in search(machine, model, base, most_cp=1)} == {tp}
    if tp == 16:
        none = machine.model_copy(update={"memory_gib": enough * 0.99})
        with pytest.raises(ConfigError, match=rf"nearest with {least / 2**30:.1f} GiB; take more"):
            search(none, model, base, most_cp=1)


def test_a_search_tries_the_largest_tp_that_it_may():
    layouts = candidates(Layout(gpus=8, global_batch=8), make_model(), most_tp=4)
    assert {layout.tp for layout in layouts} == {1, 2, 4}


def test_layers_of_a_stage():
    """Chunks of a stage lie as far apart as there are layers in one chunk of all stages."""
    assert Layout(gpus=2, pp=2).stages(4) == [[0, 1], [2, 3]]
    assert Layout(gpus=2, pp=2, vpp=2).stages(8) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert Layout(gpus=3, pp=3, vpp=2).stages(6) == [[0, 3], [1, 4], [2, 5]]


def test_an_axis_adds_up():
    axis = Axis(4, 1.0, 2.0, 3.0)
    axis.add(Transfer(10.0, 20.0, 30.0), 2)
    axis.add(Axis(4, 100.0, 200.0, 300.0))
    assert axis == Axis(4, 121.0, 242.0, 363.0)
