"""The planner's arithmetic by hand for other shapes: experts, no gate, few KV heads, tokens whole.

A machine whose links and memory take time shows what is left out of a sum.
"""

from dataclasses import replace

import pytest
from planner_cases import SIMPLE, make_model

from s2megatron.machine import Link
from s2megatron.planner import memory
from s2megatron.planner.costs import (
    attention_seconds,
    layer_matmuls,
    layer_rank_parameters,
    layer_seconds,
    layer_traffic,
    output_seconds,
)
from s2megatron.planner.layout import Layout
from s2megatron.planner.links import gather_seconds
from s2megatron.planner.step import plan

T, H = 4096, 2048
EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_ffn": 1024, "shared_expert_ffn": 512}
MOE = make_model(seq_len=T, layers=1, **EXPERTS)
SPREAD = Layout(gpus=8, tp=2, ep=4, global_batch=4, sequence_parallel=True)
SLOW = SIMPLE.model_copy(
    update={"gpus_per_node": 2, "node": Link(gb_s=100, latency_us=1),
            "cluster": Link(gb_s=10, latency_us=5)},
)  # fmt: skip


def test_parameters_of_a_layer_with_experts():
    """Routed experts over EP and TP, the shared one and the router over TP, norms whole."""
    shape = MOE.shape
    routed, shared, router = 8 * 3 * H * 1024, 3 * H * 512, H * 8
    attention = 4 * H * H
    held = attention / 2 + (routed / 4 + shared + router) / 2 + 2 * H
    assert layer_rank_parameters(shape, SPREAD, 0) == held
    assert memory.stage_expert_parameters(shape, SPREAD, 0) == routed / 8
    alone = layer_rank_parameters(shape, Layout(gpus=1), 0)
    assert alone == shape.layer_parameters(0) == attention + routed + shared + router + 2 * H


def test_memory_and_traffic_of_a_layer_with_experts():
    """A token goes to two experts and back, with their hidden states and the shared one's."""
    ffn = 3 * (2 * 1024 + 512)
    outer = T / 2
    saved = outer * H * (4 + 2 * 2) + T * (4 * 1024 + ffn / 2)
    assert memory.saved_per_layer(MOE.shape, SPREAD, 0) == 2 * saved + 4 * T * 8
    traffic = outer * H * (10 + 4 * 2) + T * (2 * 128 * (16 + 16) + ffn) / 2
    assert layer_traffic(MOE.shape, SPREAD, 0) == 2 * traffic


def test_exchanges_of_experts_are_waited_for_beside_the_tensor_ranks():
    axes = {}
    forward, backward = layer_seconds(SLOW, MOE, SPREAD, 0, axes)
    assert axes["EP"].exposed > axes["SP"].exposed > 0
    exposed = axes["EP"].exposed + axes["SP"].exposed
    assert forward.exposed + backward.exposed == pytest.approx(exposed)
    dense = make_model(seq_len=T, layers=1)
    for ep in (1, 2, 4):  # of a layer without experts nothing crosses
        axes = {}
        layer_seconds(SLOW, dense, replace(SPREAD, ep=ep), 0, axes)
        assert sorted(axes) == ["SP"]


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_with_and_without_a_gate(gated):
    model, layout = make_model(seq_len=T, layers=1, gated=gated), Layout(gpus=2, tp=2)
    shape, tensors = model.shape, 3 if gated else 2  # halves or one, and what comes of it
    assert layer_matmuls(shape, layout, 0)[2:] == [
        (T, (2 if gated else 1) * 5504 / 2, H), (T, H, 5504 / 2)]  # fmt: skip
    saved = T * 4 * H + T * (4 * 1024 + tensors * 5504 / 2)
    assert memory.saved_per_layer(shape, layout, 0) == 2 * saved + 4 * T * 8
    traffic = T * H * 10 + T * (2 * 128 * (16 + 16) + tensors * 5504) / 2
    assert layer_traffic(shape, layout, 0) == 2 * traffic
    working = 2 * T * (tensors * 5504 / 2 + 2 * H)
    two = make_model(seq_len=T, layers=2, gated=gated)
    first = memory._stage(two, Layout(gpus=4, tp=2, pp=2, global_batch=2), 0)
    assert first.activations == 2 * (2 * saved + 4 * T * 8) + working
    assert first.logits == 0  # the last stage's


def test_tensor_ranks_without_sequence_parallelism_hold_whole_tokens():
    """Between the matrix products, in what is recomputed from, and on the way to another stage."""
    model = make_model(seq_len=T, layers=2)
    layouts = [
        Layout(gpus=4, tp=2, pp=2, sequence_parallel=split, recompute="full",
               keep_attention_output=False, global_batch=2)
        for split in (False, True)
    ]  # fmt: skip
    whole, split = (memory._stage(model, layout, 0).activations for layout in layouts)
    inputs, between = 2 * 2 * T * H, 2 * 4 * T * H  # two micro-batches of inputs; one layer again
    assert whole - split == (inputs + between) / 2
    sent = [plan(SLOW, model, layout).axes["PP"].bytes for layout in layouts]
    assert sent == [2 * 2 * T * H * 2, 2 * 2 * T * H]


def test_a_tp_rank_holds_at_least_one_kv_head():
    shape = make_model(seq_len=T, layers=1, heads=32, kv_heads=2, head_dim=64).shape
    for tp, groups in ((1, 2), (2, 1), (8, 1)):
        layout, heads = Layout(gpus=tp, tp=tp), 64 * 32 / tp
        assert layer_matmuls(shape, layout, 0)[0] == (T, heads + 2 * 64 * groups, H)
        saved = 2 * (4 * T * H + T * (2 * heads + 2 * 64 * groups + 3 * 5504 / tp))
        assert memory.saved_per_layer(shape, layout, 0) == saved + 4 * T * 32 / tp


def test_a_recomputed_layer_is_held_once_beside_what_is_kept():
    model = make_model(seq_len=T, layers=4, vocab=128)
    kept = Layout(gpus=1, recompute="full", keep_attention_output=False)
    layer = memory.saved_per_layer(model.shape, kept, 0)
    working = 2 * T * (3 * 5504 + 2 * H) - T * 128 * 6
    assert memory.peak(model, kept).activations == 4 * T * H * 2 + working + layer


def test_attention_of_two_sequences_is_twice_that_of_one():
    model = make_model(seq_len=T, layers=1)
    one, two = (
        attention_seconds(SIMPLE, model, Layout(gpus=1, micro_batch=batch), 0) for batch in (1, 2)
    )
    assert two == pytest.approx([2 * seconds for seconds in one])


def test_logits_wait_for_the_tokens_of_the_tensor_ranks():
    model, layout = make_model(seq_len=T, layers=1), Layout(gpus=2, tp=2, sequence_parallel=True)
    forward, backward = output_seconds(SLOW, model, layout)
    once, _ = gather_seconds(SLOW, T * H * 2, 2, stride=1)
    assert forward.exposed == once == pytest.approx(T * H / 100e9 + 1e-6)
    assert backward.exposed == 0
    four = replace(layout, gpus=4, tp=4)  # neighbours, two on each node: both its adapters
    assert output_seconds(SLOW, model, four)[0].exposed == pytest.approx(
        T * H * 2 * 3 / 4 / 20e9 + 2 * 5e-6
    )
    matmul = sum(SLOW.matmul_seconds(*sizes) for sizes in layer_matmuls(model.shape, four, 0))
    once = T * H * 2 * 3 / 4 / 20e9 + 2 * 5e-6
    hidden = SLOW.assumptions.tp_backward_overlap * 2 * matmul
    forward, backward = layer_seconds(SLOW, model, four, 0, {})
    assert forward.exposed == pytest.approx(4 * once)
    assert backward.exposed == pytest.approx(2 * once + max(0.0, 4 * once - hidden))


def test_the_parts_of_a_step_are_named():
    parts = plan(SLOW, MOE, SPREAD).parts()
    assert list(parts) == ["matrix products", "attention", "elementwise", "TP, SP, EP", "CP",
                           "bubble", "PP sends", "DP", "optimizer", "fixed"]  # fmt: skip
