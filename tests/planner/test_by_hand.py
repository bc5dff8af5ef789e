"""The planner's arithmetic by hand where pipelines, tied embeddings and overlap come in."""

from dataclasses import replace

import pytest
from planner_cases import SIMPLE, make_model

from s2megatron.machine import Link
from s2megatron.planner import memory
from s2megatron.planner.costs import (
    layer_matmuls,
    layer_rank_parameters,
    layer_traffic,
    output_seconds,
)
from s2megatron.planner.layout import Layout
from s2megatron.planner.links import gather_seconds
from s2megatron.planner.step import plan

EMBEDDING = 32000 * 2048


def slow(**networks) -> object:
    """SIMPLE with networks that take time."""
    return SIMPLE.model_copy(
        update={name: Link(gb_s=gb_s, latency_us=us) for name, (gb_s, us) in networks.items()}
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_tied_embeddings_are_held_by_both_ends_of_a_pipeline(tp):
    shape = replace(make_model().shape, tied_embeddings=True)
    alone = memory.stage_parameters(shape, Layout(gpus=tp, tp=tp), 0)
    norms = (tp - 1) * 2048 * (2 * 24 + 1) / tp
    assert alone == shape.parameters() / tp + norms
    layout = Layout(gpus=4 * tp, tp=tp, pp=4)
    first, second, _, last = (memory.stage_parameters(shape, layout, s) for s in range(4))
    assert first - second == EMBEDDING / tp
    assert last - second == EMBEDDING / tp + 2048  # a copy, and the last norm
    untied = replace(shape, tied_embeddings=False)
    assert memory.stage_parameters(untied, layout, 3) == last
    assert memory.stage_parameters(untied, Layout(gpus=tp, tp=tp), 0) == alone + EMBEDDING / tp


def test_learned_positions_and_norm_biases_lie_at_the_ends():
    plain = make_model().shape
    learned = replace(plain, position_embeddings=1000, norm_bias=True)
    layout = Layout(gpus=2, pp=2)
    more = [
        memory.stage_parameters(learned, layout, s) - memory.stage_parameters(plain, layout, s)
        for s in (0, 1)
    ]
    norms = 12 * 2 * 2048  # a bias beside each of a layer's two norms
    assert more == [norms + 1000 * 2048, norms + 2048]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(gpus=1, global_batch=8), [1]),
        (Layout(gpus=4, pp=4, global_batch=8), [4, 3, 2, 1]),
        (Layout(gpus=4, pp=4, global_batch=2), [2, 2, 2, 1]),
        # warm-up: 2 x (later stages) + (vpp - 1) x pp chunks, and one more; half a stage each
        (Layout(gpus=4, pp=4, vpp=2, global_batch=8), [5.5, 4.5, 3.5, 2.5]),
        (Layout(gpus=4, pp=4, vpp=3, global_batch=8), [5, 13 / 3, 11 / 3, 3]),
        (Layout(gpus=4, pp=4, vpp=2, global_batch=4), [4, 4, 3.5, 2.5]),
    ],
    ids=str,
)
def test_micro_batches_in_flight(layout, expected):
    assert [memory.in_flight(layout, s) for s in range(layout.pp)] == pytest.approx(expected)


def test_interleaved_activations_by_hand():
    """The first stage holds 5.5 micro-batches of its six layers, and the MLP's gradients."""
    held = memory.peak(make_model(seq_len=4096), Layout(gpus=4, pp=4, vpp=2, global_batch=8))
    token = 2 * (4 * 2048 + 4 * 2048 + 3 * 5504) + 4 * 16
    working = 2 * (3 * 5504 + 2 * 2048)
    assert held.activations == 4096 * (5.5 * 6 * token + working)


def test_memory_of_a_recomputed_layer_by_hand():
    model = make_model(seq_len=4096, dense_layers=4)
    kept = {
        keep: memory.peak(
            model, Layout(gpus=2, tp=2, sequence_parallel=True, recompute="full",
                          keep_attention_output=keep),
        ).activations
        for keep in (True, False)
    }  # fmt: skip
    assert kept[True] - kept[False] == 20 * 4096 * 8 * (2 * 128 + 4)  # the sparse layers' alone
    # inputs of 24 layers on half the tokens; one layer's own; logits are larger than the rest
    layer = 2 * (4 * 2048 * 2048 + 4096 * (1024 + 2 * 1024 + 1024 + 3 * 5504 / 2)) + 4 * 4096 * 8
    working = 2 * 4096 * (3 * 5504 / 2 + 2 * 2048) + layer - 4096 * 16000 * 6
    assert kept[False] == 24 * 2048 * 2048 * 2 + max(0, working)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_optimizer_states_by_hand(bf16, distributed):
    model = make_model(seq_len=4096)
    layout = Layout(gpus=4, global_batch=4, bf16=bf16, distributed_optimizer=distributed)
    held, p = memory.peak(model, layout), model.shape.parameters()
    assert held.weights == p * (2 if bf16 else 4) and held.gradients == 4 * p
    assert held.optimizer == p * (12 if bf16 else 8) / (4 if distributed else 1)


def test_experts_states_are_split_over_fewer_ranks():
    model = make_model(seq_len=4096, layers=2, experts=8, experts_per_token=2, expert_ffn=1024)
    layout = Layout(gpus=4, ep=2, global_batch=4)
    experts = 2 * 8 * 3 * 2048 * 1024 / 2
    assert memory.stage_expert_parameters(model.shape, layout, 0) == experts
    parameters = memory.stage_parameters(model.shape, layout, 0)
    assert memory.peak(model, layout).optimizer == 12 * (parameters - experts + 2 * experts) / 4


SIZE = 4096 * 2048 * 2  # activations of a micro-batch, bf16


@pytest.mark.parametrize(
    ("vpp", "sends", "waits"),
    # 8 micro-batches, both ways, every chunk; 1F1B waits for each, interleaving while it fills
    [(1, 2 * 8, 2 * (8 + 3)), (2, 2 * 8 * 2, 2 * 3), (3, 2 * 8 * 3, 2 * 3)],
)
def test_sends_between_stages_by_hand(vpp, sends, waits):
    machine, model = slow(node=(100, 5), cluster=(10, 50)), make_model(seq_len=4096)
    for gpus, tp, once in (
        (4, 1, SIZE / 100e9 + 5e-6),
        (8, 2, SIZE / 2 / 100e9 + 5e-6),
        (16, 4, SIZE / 4 / 10e9 + 50e-6),  # two nodes: across the wire
    ):
        layout = Layout(
            gpus=gpus, tp=tp, pp=4, vpp=vpp, global_batch=8, sequence_parallel=tp > 1
        )  # fmt: skip
        result = plan(machine, model, layout)
        axis = result.axes["PP"]
        assert (axis.size, axis.bytes) == (4, SIZE / tp * sends)
        assert axis.seconds == pytest.approx(once * sends)
        assert axis.exposed == result.pipeline == pytest.approx(once * waits)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_time_by_hand(sequence_parallel):
    """Forward waits for four; backward, with SP, for two gathers before row-parallel products."""
    model = make_model(seq_len=4096, layers=1, vocab=128)
    layout = Layout(gpus=2, tp=2, sequence_parallel=sequence_parallel)
    for gb_s, hides in ((1e3, True), (1, False)):
        machine = slow(node=(gb_s, 5))
        once = SIZE / 2 / (gb_s * 1e9) + 5e-6
        matmul = sum(machine.matmul_seconds(*s) for s in layer_matmuls(model.shape, layout, 0))
        hidden = machine.assumptions.tp_backward_overlap * 2 * matmul
        back, first = (6, 2) if sequence_parallel else (4, 0)
        late = (back - first) * once - hidden
        assert (late < 0) == hides
        axis = plan(machine, model, layout).axes["SP" if sequence_parallel else "TP"]
        assert axis.bytes == (4 + back) * SIZE / 2
        assert axis.seconds == pytest.approx((4 + back) * once)
        assert axis.exposed == pytest.approx((4 + first) * once + max(0, late))
        again = replace(layout, recompute="full")
        more = plan(machine, model, again).axes["SP" if sequence_parallel else "TP"]
        assert more.exposed == pytest.approx(axis.exposed + 4 * once)


def test_without_a_pipeline_nothing_is_sent():
    result = plan(slow(node=(100, 5)), make_model(seq_len=4096), Layout(gpus=1))
    assert result.pipeline == 0 and "PP" not in result.axes


def data_axis(layout, node=(1, 0)):
    result = plan(slow(node=node), make_model(seq_len=4096, vocab=128), layout)
    assert result.data == result.axes["DP"].exposed
    return result, result.axes["DP"]


def test_overlapped_data_parallel_time_by_hand():
    """What backward hides of the gradients, forward of the parameters; the rest is exposed."""
    base = Layout(gpus=2, global_batch=2)
    result, axis = data_axis(base)
    machine = slow(node=(1, 0))
    parameters = memory.stage_parameters(make_model(seq_len=4096, vocab=128).shape, base, 0)
    reduce = gather_seconds(machine, 4 * parameters, 2, stride=1)[0]
    gather = gather_seconds(machine, 2 * parameters, 2, stride=1)[0]
    assert axis.seconds == axis.exposed == pytest.approx(reduce + gather)
    compute = result.matmul + result.attention + result.elementwise  # one micro-batch
    hidden = machine.assumptions.dp_overlap
    assert 0 < hidden <= 1 and reduce > gather > compute
    exposed = {}
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        exposed[name] = data_axis(replace(base, **{name: True}))[1].exposed
        assert 0 < exposed[name] < axis.exposed
    saved = [axis.exposed - exposed[name] for name in exposed]
    assert sum(saved) == pytest.approx(hidden * compute)
    assert saved[0] == pytest.approx(2 * saved[1], rel=1e-3)  # backward is twice forward
    both = replace(base, overlap_grad_reduce=True, overlap_param_gather=True)
    assert data_axis(both)[1].exposed == pytest.approx(axis.exposed - sum(saved))
    assert data_axis(both, node=(1e6, 0))[1].exposed == 0  # never less than nothing
    assert data_axis(both)[1].seconds == axis.seconds


def test_without_a_distributed_optimizer_gradients_are_all_reduced():
    base = Layout(gpus=2, global_batch=2, distributed_optimizer=False)
    _, axis = data_axis(base)
    parameters = memory.stage_parameters(make_model(seq_len=4096, vocab=128).shape, base, 0)
    once = gather_seconds(slow(node=(1, 0)), 4 * parameters, 2, stride=1)
    assert axis.seconds == pytest.approx(2 * once[0]) and axis.bytes == pytest.approx(2 * once[1])


def test_fixed_and_optimizer_time_by_hand():
    machine = SIMPLE.model_copy(update={"step_ms": 7, "memory_tb_s": 2})
    model = make_model(seq_len=4096)
    for layout, sharded in (
        (Layout(gpus=2, global_batch=2), 2),
        (Layout(gpus=2, global_batch=2, distributed_optimizer=False), 1),
    ):
        result = plan(machine, model, layout)
        assert result.fixed == 7e-3
        traffic = model.shape.parameters() / sharded * (2 * 4 + 6 * 4 + 2)
        assert result.optimizer == pytest.approx(machine.memory_seconds(traffic))
        assert result.tokens == 2 * 4096
        assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_mfu_is_a_share_of_all_gpus():
    result = plan(SIMPLE, make_model(seq_len=4096), Layout(gpus=4, global_batch=4))
    assert result.mfu(100) == pytest.approx(result.model_flops / result.seconds / 4e14)
    assert result.mfu(200) == result.mfu(100) / 2


def test_the_hosts_launches_are_the_least_time_of_a_layer():
    """Forward once, backward twice as long, and once more where the forward runs again."""
    model = make_model(seq_len=256, layers=1)
    slow_host = SIMPLE.model_copy(update={"host_layer_us": 1e6})
    for recompute, seconds in (("none", 3), ("core_attn", 3), ("full", 4)):
        layout = Layout(gpus=1, recompute=recompute)
        layer = plan(slow_host, model, layout).seconds - sum(
            part.total for part in output_seconds(SIMPLE, model, layout)
        )
        assert layer == pytest.approx(seconds, abs=1e-3)
    quick = SIMPLE.model_copy(update={"host_layer_us": 1e-3})
    assert plan(quick, model, Layout(gpus=1)).seconds == plan(SIMPLE, model, Layout(gpus=1)).seconds


def test_elementwise_time_by_hand():
    """Norms, residuals, RoPE, SwiGLU; gradients accumulated; the float32 cross entropy."""
    machine = SIMPLE.model_copy(update={"memory_tb_s": 1})
    model = make_model(seq_len=4096, layers=1)
    heads, ffn = 128 * (16 + 16), 3 * 5504
    for tp, sequence_parallel in ((1, False), (2, True), (2, False)):
        layout = Layout(gpus=tp, tp=tp, sequence_parallel=sequence_parallel)
        outer = 4096 / tp if sequence_parallel else 4096
        traffic = 2 * (outer * 2048 * 10 + 4096 * (2 * heads + ffn) / tp)
        assert layer_traffic(model.shape, layout, 0) == traffic
        weights = layer_rank_parameters(model.shape, layout, 0)
        logits = 4096 * 32000 / tp
        for fused, passes in ((True, 1.0), (False, 1.6)):
            for accumulated, size in ((False, 12), (True, 8)):
                run = replace(layout, fused=fused, fused_accumulation=accumulated)
                total = 3 * passes * traffic + size * weights + (40 + 14) * logits
                assert plan(machine, model, run).elementwise == pytest.approx(total / 1e12)


def test_what_fits_leaves_the_reserve():
    model = make_model(seq_len=4096)
    result = plan(SIMPLE, model, Layout(gpus=1))
    gib = result.memory.total / 2**30 / (1 - SIMPLE.assumptions.memory_reserve)
    for memory_gib, fit in ((gib * 1.001, True), (gib * 0.999, False)):
        machine = SIMPLE.model_copy(update={"memory_gib": memory_gib})
        assert plan(machine, model, Layout(gpus=1)).fits is fit


def test_experts_time_by_hand():
    """Two all-to-alls each way, through a rank's own adapter where they leave the node."""
    model = make_model(seq_len=4096, layers=1, experts=8, experts_per_token=2, expert_ffn=1024)
    machine = slow(node=(100, 1), cluster=(10, 5)).model_copy(update={"gpus_per_node": 2})
    sent = 4096 / 2 * 2 * 2048 * 2 * 3 / 4
    once = sent / 10e9 + 2 * 5e-6
    layout = Layout(gpus=8, tp=2, ep=4, global_batch=4, sequence_parallel=True)
    for recompute, times in (("none", 4), ("full", 6)):
        axis = plan(machine, model, replace(layout, recompute=recompute)).axes["EP"]
        assert axis.size == 4 and axis.bytes == times * sent
        assert axis.seconds == axis.exposed == pytest.approx(times * once)


def test_products_of_a_layer_with_experts():
    """The rank's own experts over the tokens that EP ranks send it; a shared one over its own."""
    model = make_model(seq_len=4096, layers=1, experts=8, experts_per_token=2, expert_ffn=1024,
                       shared_expert_ffn=512)  # fmt: skip
    layout = Layout(gpus=8, tp=2, ep=4, global_batch=4, sequence_parallel=True)
    products = layer_matmuls(model.shape, layout, 0)
    rows = 4096 * 2 / 8 * 4
    assert products[2:] == [
        *[(rows, 2 * 1024 / 2, 2048), (rows, 2048, 1024 / 2)] * 2,
        (4096, 2 * 512 / 2, 2048),
        (4096, 2048, 512 / 2),
    ]
