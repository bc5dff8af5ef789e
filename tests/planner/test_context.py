"""The planner's context parallelism: bytes by s2_kernels.exchange's plan, the rest by hand."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from planner_cases import SIMPLE, eight_groups, make_model

from s2_kernels import dense, local_stride
from s2_kernels.exchange import (
    plan_rank,
    received_blocks,
    zigzag,
)
from s2_kernels.pattern import ranges, sliding_window
from s2megatron.context_split import Blocks, _of_rank, busiest
from s2megatron.machine import Attention, Link, load_machine
from s2megatron.planner import context, memory
from s2megatron.planner.costs import attention_seconds, layer_seconds
from s2megatron.planner.layout import GATHER, RING, ULYSSES, Layout, Model
from s2megatron.planner.step import plan

K, M = 2**10, 2**20


# The design's table: tokens, c, MiB per layer and forward pass on the busiest rank of dense layers
# by ring and all-gather and by Ulysses (None: heads do not divide), and of S2 with strides 16 and
# 32; stride 16's ms over 250 and 45 GB/s.
TABLE = [
    (128 * K, 2, 256, 640, 19.5, 11.6, 0.08, 0.46),
    (128 * K, 8, 448, 280, 33, 20, 0.14, 0.77),
    (M, 8, 3584, 2240, 228, 116, 0.95, 5.3),
    (M, 32, 3968, None, 252, 129, 1.1, 5.9),
    (4 * M, 32, 15872, None, 996, 500, 4.2, 23),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-c{row[1]}")
def test_the_designs_table_of_bytes(row):
    tokens, c, ring, ulysses, stride16, stride32, nvlink, infiniband = row
    layout = Layout(gpus=c, cp=c)
    found = {}
    for stride in (16, 32):
        model = eight_groups(stride, tokens)
        found[stride] = context.received_bytes(model, layout, 0)
        for way in (RING, GATHER):
            sent = context.received_bytes(model, replace(layout, cp_comm=way), 1)
            assert sent == ring * 2**20
    assert found[16] / 2**20 == pytest.approx(stride16, rel=0.02)
    assert found[32] / 2**20 == pytest.approx(stride32, rel=0.02)
    by_heads = replace(layout, cp_comm=ULYSSES)
    if ulysses is None:
        assert "cp_comm_type a2a does not divide the 32 heads" in by_heads.misfit(model)
    else:
        assert by_heads.misfit(model) == ""
        assert context.received_bytes(model, by_heads, 1) == ulysses * 2**20
    for gb_s, ms in ((250, nvlink), (45, infiniband)):
        machine = SIMPLE.model_copy(update=dict.fromkeys(
            ("node", "cluster"), Link(gb_s=gb_s, latency_us=0)))  # fmt: skip
        forward, backward = context.context_traffic(machine, eight_groups(16, tokens), layout, 0,
                                                    (1, 1))  # fmt: skip
        assert forward.seconds * 1e3 == pytest.approx(ms, rel=0.07)  # two digits
        assert backward.seconds == 2 * forward.seconds


HEADS = {"heads": 8, "kv_heads": 4, "block_size": 16}
PATTERNS = {
    "stride": local_stride(**HEADS, local_blocks=4, stride=8, head_step=2),
    "stride does not divide a chunk": local_stride(**HEADS, local_blocks=3, stride=8, head_step=3),
    "window over chunks": local_stride(**HEADS, local_blocks=40, stride=4),
    "ranges": ranges(**HEADS, bands=[(3, 1), (12, 2), (None, 8)]),
    "window alone": sliding_window(**HEADS, local_blocks=37),
    "mixed": local_stride(**HEADS, local_blocks=4, stride=[2, 4, 8, 8], dense_heads=1),
    "dense without Transformer Engine": dense(**HEADS),
}


@pytest.mark.parametrize("tp,c,blocks", [(1, 2, 64), (2, 3, 60), (4, 4, 64), (8, 8, 128)])
@pytest.mark.parametrize("name", PATTERNS)
def test_bytes_are_those_of_the_exchanges_plan(name, tp, c, blocks):
    """The busiest TP and CP rank's blocks, K and V in bf16; all axes' sums of a step."""
    pattern, micro_batch = PATTERNS[name], 3
    sizes = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 32}
    shape = make_model(seq_len=16 * blocks, **sizes).shape
    model = Model(shape, (pattern, pattern))
    layout = Layout(gpus=tp * c, tp=tp, cp=c, micro_batch=micro_batch, global_batch=2 * micro_batch,
                    fused=False)  # fmt: skip
    chunks = zigzag(c, blocks)
    planned = max(
        plan_rank(pattern.shard(t, tp), chunks, r).received_blocks
        for t in range(tp) for r in range(c)
    )  # fmt: skip
    assert planned == max(
        received_blocks(pattern.shard(t, tp), chunks, r) for t in range(tp) for r in range(c)
    )
    block = 16 * micro_batch * 2 * 32 * 2
    assert context.received_bytes(model, layout, 0) == planned * block > 0
    for recompute, keep, times in (
        ("none", True, 3), ("core_attn", True, 4), ("full", True, 3), ("full", False, 4)
    ):  # fmt: skip
        if name.startswith("dense") and recompute == "full":
            times = 4  # only sparse layers keep attention's output
        run = replace(layout, recompute=recompute, keep_attention_output=keep)
        axis = plan(SIMPLE, model, run).axes["CP"]
        assert axis.size == c
        assert axis.bytes == 2 * 2 * times * planned * block  # two micro-batches, two layers


@pytest.mark.parametrize("name", PATTERNS)
def test_buffers_are_those_of_the_exchanges_plan(name):
    pattern, chunks = PATTERNS[name], zigzag(4, 64)
    counted = []
    for rank in range(4):
        plan_of_rank = plan_rank(pattern, chunks, rank)
        views = plan_of_rank.chunks
        before, filled = [4 * x.before for x in views], [len(x.came.rows) for x in views]
        received = plan_of_rank.received_blocks
        itself = sum(plan_of_rank.receive_counts) - received
        asked = len(plan_of_rank.home.slots)
        lead = max(0, *(4 * (x.before - x.local.start) for x in views))
        rest = (sum(before), sum(filled), before[-1], lead)
        counted.append((received, itself, asked, *rest))
        sent = sum(plan_of_rank.send_counts) - itself
        assert sent <= 1.2 * busiest(pattern, 64, 4).received
    assert busiest(pattern, 64, 4) == Blocks(*map(max, *counted))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_first_of_many_ranks_receives_most(name):
    """`busiest` looks at the first and the last 16 ranks, or at as many as a window spans."""
    pattern, chunks = PATTERNS[name], zigzag(40, 640)
    found = max(received_blocks(pattern, chunks, rank) for rank in range(40))
    assert busiest(pattern, 640, 40).received == found


@pytest.mark.parametrize(
    ("cp", "n_blocks", "local_blocks", "stride", "name", "most"),
    [(32, 4096, 16, 64, "lead", 752), (32, 2048, 100, 8, "itself", 256),
     (80, 3200, 41, 8, "itself", 20), (96, 960, 3, 64, "lead", 568)],
    ids=["stride as wide as a chunk", "window over 3 chunks", "80 ranks", "a long period"],
)  # fmt: skip
def test_no_rank_holds_more_than_the_busiest(cp, n_blocks, local_blocks, stride, name, most):
    """Only the first 16 ranks were looked at: `lead` was 624, `itself` 32."""
    pattern = local_stride(heads=8, block_size=64, local_blocks=local_blocks, stride=stride)
    counted = [_of_rank(pattern, n_blocks, chunks) for chunks in zigzag(cp, n_blocks)]
    found = busiest(pattern, n_blocks, cp)
    for field in fields(Blocks):
        assert getattr(found, field.name) == max(getattr(x, field.name) for x in counted), field
    assert getattr(found, name) == most


def test_a_window_over_many_chunks_is_needed_most_by_a_late_rank():
    pattern, chunks = sliding_window(**HEADS, local_blocks=201), zigzag(40, 640)
    received = [received_blocks(pattern, chunks, rank) for rank in range(40)]
    assert max(received) > max(received[:16])
    assert busiest(pattern, 640, 40).received == max(received)


@pytest.mark.parametrize("name", PATTERNS)
def test_zigzag_spreads_attention_evenly(name):
    """The model takes a rank's pairs to be the mean; windows alone are shorter at the start."""
    pattern, blocks, c = PATTERNS[name], 512, 4

    def until(block):
        return pattern.kept_pairs(16 * block)

    pairs = [
        sum(until(chunk.stop) - until(chunk.start) for chunk in held) for held in zigzag(c, blocks)
    ]
    assert sum(pairs) == until(blocks)
    assert max(pairs) <= 1.06 * sum(pairs) / c


def test_a_single_rank_exchanges_nothing():
    model, layout = eight_groups(16, 128 * K), Layout(gpus=1)
    assert context.received_bytes(model, layout, 0) == 0
    assert busiest(model.patterns[0], 2048, 1) == Blocks(*[0] * len(fields(Blocks)))
    result = plan(SIMPLE, model, layout)
    assert result.context == 0 and "CP" not in result.axes
    assert context.copied_bytes(model, layout, 0) == (0, 0)
    assert context.buffer_bytes(model, layout, 0) == 0


def test_an_exchange_is_waited_for_or_hides_in_groups():
    model, layout = eight_groups(16, M), Layout(gpus=8, cp=8)
    size = context.received_bytes(model, layout, 0)
    once = size / 1e9 + 3 * 7e-6  # 8 ranks: three doublings
    for groups, attention, forward, backward in (
        (1, 10.0, once, 2 * once),
        (4, 10.0, once / 4, once / 2),
        (4, once / 2, once / 4 + once / 2 * 3 / 4, once / 2 + 1.5 * once * 3 / 4),
    ):
        assumptions = SIMPLE.assumptions.model_copy(update={"exchange_groups": groups})
        link = Link(gb_s=1, latency_us=7)
        machine = SIMPLE.model_copy(update={"node": link, "assumptions": assumptions})
        sent = context.context_traffic(machine, model, layout, 0, (attention, attention))
        assert [t.exposed for t in sent] == pytest.approx([forward, backward])
        assert [t.seconds for t in sent] == pytest.approx([once, 2 * once])
        assert [t.bytes for t in sent] == [size, 2 * size]


def test_dense_ways_by_hand():
    """128k tokens on 4 ranks in two nodes of two: T = 2 * 128 * 8 * 2 bytes a token."""
    model, layout = eight_groups(16, 128 * K), Layout(gpus=4, cp=4)
    machine = SIMPLE.model_copy(update={
        "gpus_per_node": 2, "node": Link(gb_s=100, latency_us=1),
        "cluster": Link(gb_s=10, latency_us=5)})  # fmt: skip
    held = 4096 * 128 * K / 4
    hop = held / 10e9 + 5e-6  # the ring's neighbours across nodes decide
    attention = (4 * (hop - 0.002), 4 * (2 * hop + 1))
    sent = context.context_traffic(machine, model, layout, 1, attention)
    assert [t.bytes for t in sent] == [3 * held, 6 * held]
    assert [t.seconds for t in sent] == pytest.approx([3 * hop, 3 * (2 * hop - 5e-6)])
    assert [t.exposed for t in sent] == pytest.approx([3 * 0.002, 0])
    gather = context.context_traffic(machine, model, replace(layout, cp_comm=GATHER), 1, attention)
    once = 3 * held / 20e9 + 2 * 5e-6  # two adapters of a node
    assert [t.exposed for t in gather] == pytest.approx([once, 2 * once])
    assert [t.bytes for t in gather] == [3 * held, 6 * held]
    heads = context.context_traffic(machine, model, replace(layout, cp_comm=ULYSSES), 1, attention)
    size = (2 * 8192 + 4096) * 128 * K / 4 * 3 / 4
    assert [t.bytes for t in heads] == [size, size]
    assert [t.exposed for t in heads] == pytest.approx([size / 10e9 + 4 * 5e-6] * 2)
    one_node = machine.model_copy(update={"gpus_per_node": 8})
    near = context.context_traffic(one_node, model, layout, 1, (0, 0))
    assert near[0].exposed == pytest.approx(3 * (held / 100e9 + 1e-6))


def test_attention_is_a_ranks_share_at_the_rate_of_its_tokens():
    rates = Attention(forward={32 * K: 100, 128 * K: 200}, backward={32 * K: 125, 128 * K: 250})
    machine = SIMPLE.model_copy(update={"s2_attention": rates, "dense_attention": rates})
    model = eight_groups(16, 128 * K)
    one = [attention_seconds(machine, model, Layout(gpus=1), n) for n in (0, 1)]
    for layer, way, slower in ((0, RING, 2), (0, ULYSSES, 2), (1, RING, 2), (1, GATHER, 1),
                               (1, ULYSSES, 1)):  # fmt: skip
        layout = Layout(gpus=4, cp=4, cp_comm=way)
        times = attention_seconds(machine, model, layout, layer)
        assert times == pytest.approx([slower * t / 4 for t in one[layer]]), (layer, way)


def test_attention_over_four_gpus_is_predicted_as_measured():
    """docs/benchmarks/context-parallel.md, all heads at once: none of it set a constant.

    The measured commit copied more than today's (`context.copied_bytes`).
    """
    raw = Path(__file__).parents[2] / "docs/benchmarks/raw/context-parallel-h100x4-2026-11-27.json"
    rows = [x for x in json.loads(raw.read_text())["rows"] if x["way"] == "one launch"]
    machine = load_machine("h100")
    for row in rows:
        model, layout = eight_groups(16, row["tokens"]), Layout(gpus=4, cp=4)
        alone = sum(attention_seconds(machine, model, Layout(gpus=1), 0))
        attention = attention_seconds(machine, model, layout, 0)
        exchange = context.context_traffic(machine, model, layout, 0, attention)
        copied = _copied_when_measured(row["tokens"])
        together = sum(attention) + sum(x.exposed for x in exchange)
        together += machine.memory_seconds(copied)
        assert 1e3 * alone == pytest.approx(row["one_ms"], rel=0.02)
        assert 1e3 * together == pytest.approx(row["together_ms"], rel=0.05)
    assert [row["tokens"] for row in rows] == [128 * K, 512 * K]


def _copied_when_measured(tokens: int) -> float:
    """Of both passes over four ranks: rows and buffers were copied twice, each chunk's results
    once, and gradients were added up by operations in float32."""
    model = eight_groups(16, tokens)
    blocks, row = busiest(model.patterns[0], tokens // 64, 4), 64 * 2 * 128 * 2
    queries, own = tokens // 4 * 32 * 128 * 2, tokens // 4 * 4096
    sent = blocks.received + blocks.itself
    keys = row * (4 * sent + 2 * blocks.itself + blocks.before + 4 * blocks.filled) + 2 * own
    gradients = row * (17 * blocks.filled + 18 * sent + 2 * blocks.itself)
    return 2 * (keys + 2 * queries) + gradients + 8 * own


def test_a_layer_shrinks_with_its_tokens_and_pays_for_copies():
    machine = SIMPLE.model_copy(update={"memory_tb_s": 1})
    model = eight_groups(16, 128 * K)
    alone = layer_seconds(machine, model, Layout(gpus=1), 0, {})
    shared = layer_seconds(machine, model, Layout(gpus=4, cp=4), 0, {})
    copies = [size / 1e12 for size in context.copied_bytes(model, Layout(gpus=4, cp=4), 0)]
    assert copies[1] > copies[0] > 0
    accumulated = alone[1].memory - 2 * alone[0].memory
    assert accumulated > 0
    for way, extra in enumerate((0, accumulated)):  # of the weights: on every rank
        assert shared[way].matmul == pytest.approx(alone[way].matmul / 4)
        expected = (alone[way].memory - extra) / 4 + extra + copies[way]
        assert shared[way].memory == pytest.approx(expected)


def test_a_recomputed_attention_exchanges_and_copies_again():
    machine = SIMPLE.model_copy(update={"memory_tb_s": 1, "node": Link(gb_s=1, latency_us=0)})
    model, layout = eight_groups(16, 128 * K), Layout(gpus=4, cp=4)
    forward, backward = layer_seconds(machine, model, layout, 0, {})
    again = replace(layout, recompute="core_attn")
    more = layer_seconds(machine, model, again, 0, {})[1]
    copies = context.copied_bytes(model, layout, 0)[0] / 1e12
    assert more.memory - backward.memory == pytest.approx(copies)
    assert more.context - backward.context == pytest.approx(forward.context) and copies > 0


def test_every_micro_batch_exchanges():
    machine = SIMPLE.model_copy(update={"node": Link(gb_s=1, latency_us=0)})
    one, five = (
        plan(machine, eight_groups(16, 128 * K), Layout(gpus=4, cp=4, global_batch=batch))
        for batch in (1, 5)
    )
    assert one.context == pytest.approx(one.axes["CP"].exposed) and one.context > 0
    assert five.context == pytest.approx(5 * one.context)
    assert one.parts()["CP"] == one.context and one.seconds > one.context


def test_copies_by_hand():
    model, layout = eight_groups(16, 128 * K), Layout(gpus=4, cp=4)
    row = 64 * 2 * 128 * 2
    own = 32 * K * 4096
    window = Model(model.shape, (sliding_window(heads=32, kv_heads=8, local_blocks=16),) * 2)
    for model_of, far in ((model, True), (window, False)):
        blocks = busiest(model_of.patterns[0], 2048, 4)
        assert (blocks.itself > 0) == far and blocks.asked > 0
        sent = blocks.received + blocks.itself
        buffers = 2 * blocks.filled + (blocks.before - blocks.filled)
        keys = row * (2 * sent + 2 * blocks.itself + buffers) + 2 * own
        gradients = sent + 3 * blocks.filled + 2 * blocks.itself + sent + 2 * blocks.asked
        forward, backward = context.copied_bytes(model_of, layout, 0)
        assert (forward, backward) == (keys, keys + row * gradients)
    assert context.copied_bytes(model, layout, 1) == (0, 0)  # Transformer Engine's own
    assert context.copied_bytes(model, replace(layout, fused=False), 1) > (0, 0)


def test_buffers_by_hand():
    model, layout = eight_groups(16, 128 * K), Layout(gpus=4, cp=4)
    blocks, row = busiest(model.patterns[0], 2048, 4), 64 * 2 * 128 * 2
    queries, own = 32 * K * 32 * 128 * 2, 32 * K * 4096
    rows = 3 * (blocks.received + blocks.itself) + blocks.last_before + blocks.lead
    held = row * rows + 1.5 * own + 2 * queries
    assert context.buffer_bytes(model, layout, 0) == held
    every = replace(layout, fused=False)  # the dense layer, whose rows are many
    blocks = busiest(model.patterns[1], 2048, 4)
    rows = 3 * (blocks.received + blocks.itself) + blocks.last_before + blocks.lead
    held = row * rows + 1.5 * own + 2 * queries
    assert context.buffer_bytes(model, every, 1) == held
    for way, expected in (
        (RING, 4 * own + 2 * queries),
        (GATHER, 2 * 4 * own + 2 * queries),
        (ULYSSES, 2 * own + 4 * queries),
    ):
        assert context.buffer_bytes(model, replace(layout, cp_comm=way), 1) == expected


def test_memory_holds_local_tokens_and_shards_the_optimizer_over_cp():
    model = make_model(seq_len=128 * K)
    alone = memory.peak(model, Layout(gpus=4, tp=4, sequence_parallel=True))
    shared = memory.peak(model, Layout(gpus=16, tp=4, cp=4, sequence_parallel=True))
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)
    assert shared.optimizer == alone.optimizer / 4
    assert shared.logits == alone.logits / 4
    layout = Layout(gpus=4, cp=4, recompute="full")
    held = memory.peak(model, layout)
    tokens = 32 * K
    inputs = 24 * tokens * (2048 * 2 + 16 * (2 * 128 + 4))
    layer = memory.saved_per_layer(model.shape, layout, 0)
    mlp = 2 * tokens * (3 * 5504 + 2 * 2048)
    assert memory.saved_by_mlp(model.shape, layout, 0) == 2 * tokens * 3 * 5504
    assert context.buffer_bytes(model, layout, 0) < mlp  # the MLP's gradients are more
    assert held.activations == pytest.approx(inputs + max(0, layer + mlp - held.logits))


def test_a_gathered_context_can_be_the_peak():
    """All of K and V of 4M tokens outweigh what else a layer holds."""
    model = make_model(seq_len=4 * M, dense_layers=24)
    held = {
        way: memory.peak(model, Layout(gpus=32, cp=32, recompute="full", cp_comm=way)).total
        for way in (RING, GATHER)
    }
    assert held[GATHER] - held[RING] > 20 * 2**30
    shape, layout = model.shape, Layout(gpus=32, cp=32, recompute="full", cp_comm=GATHER)
    layer, buffers = (
        memory.saved_per_layer(shape, layout, 0),
        context.buffer_bytes(model, layout, 0),
    )
    found = memory.peak(model, layout)
    freed = memory.saved_by_mlp(shape, layout, 0)
    kept = 24 * 4 * M / 32 * 2048 * 2  # each layer's input
    assert found.activations == kept + layer + buffers - freed - found.logits


def test_gradients_are_reduced_over_cp_too():
    model = make_model(seq_len=128 * K)
    axes = plan(SIMPLE, model, Layout(gpus=16, tp=2, cp=4, global_batch=2)).axes
    parameters = memory.stage_parameters(model.shape, Layout(gpus=2, tp=2), 0)
    assert axes["DP x CP"].size == 8 and "DP" not in axes
    assert axes["DP x CP"].bytes == pytest.approx((4 + 2) * parameters * 7 / 8)
    assert plan(SIMPLE, model, Layout(gpus=2, cp=2)).data > 0
    updates = [plan(SIMPLE, model, Layout(gpus=2 * c, tp=2, cp=c)).optimizer for c in (1, 4)]
    assert updates[0] == pytest.approx(4 * updates[1])  # a rank updates its share
    moved = plan(SIMPLE, model, Layout(gpus=16, tp=2, cp=4, global_batch=2)).axes["TP"].bytes
    whole = plan(SIMPLE, model, Layout(gpus=4, tp=2, global_batch=2)).axes["TP"].bytes
    assert moved == whole / 4  # of a rank: a quarter of the tokens
