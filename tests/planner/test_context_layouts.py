"""Which context-parallel layouts the planner takes, finds and reports, and what it refuses."""

import re
from dataclasses import replace

import pytest
from planner_cases import SIMPLE, eight_groups, make_model, run_arguments

from s2megatron.context_split import ContextSplit
from s2megatron.errors import ConfigError
from s2megatron.machine import load_machine
from s2megatron.planner import context, memory
from s2megatron.planner.layout import GATHER, RING, ULYSSES, Layout, Model, candidates, layout_of
from s2megatron.planner.report import lines
from s2megatron.planner.search import search
from s2megatron.planner.step import plan

K, M = 2**10, 2**20


@pytest.mark.parametrize(
    ("layout", "sizes", "said"),
    [
        (Layout(gpus=6, tp=2, cp=2), {}, "TP 2 x CP 2 x PP 1 does not divide 6 GPUs"),
        (Layout(gpus=5, cp=5), {}, "CP 5 cuts 131072 tokens into 10 chunks, unevenly"),
        (Layout(gpus=2048, cp=2048), {}, "chunks of 32 tokens, not of whole blocks (64)"),
        (
            Layout(gpus=3, cp=3),
            {"seq_len": 6 * 96},
            "chunks of 96 tokens, not of whole blocks (64)",
        ),
        (Layout(gpus=256, tp=16, cp=16, sequence_parallel=True), {"seq_len": 2 * K}, ""),
        (
            Layout(gpus=48, tp=16, cp=3, sequence_parallel=True),
            {"seq_len": 6 * 64, "heads": 16},
            "",
        ),
        (
            Layout(gpus=36, tp=12, cp=3, sequence_parallel=True),
            {"seq_len": 6 * 64, "heads": 12, "kv_heads": 12, "ffn": 1200, "vocab": 1200},
            "TP 12 does not divide 384 tokens over CP 3",
        ),
        (Layout(gpus=8, cp=8, ep=16), {"experts": 16}, "EP 16 does not divide 16 experts and DP 1"),
        (Layout(gpus=8, cp=8, ep=8), {"experts": 16}, ""),
    ],
    ids=str,
)
def test_what_does_not_divide_is_said(layout, sizes, said):
    model = make_model(**{"seq_len": 128 * K} | sizes)
    misfit = layout.misfit(model)
    assert said in misfit and bool(said) == bool(misfit), misfit


def test_ulysses_is_only_asked_for_heads_where_a_dense_layer_needs_it():
    dense_one = eight_groups(16, 128 * K)
    sparse = Model(dense_one.shape, dense_one.patterns[:1] * 2)
    layout = Layout(gpus=32, tp=2, cp=16, cp_comm=ULYSSES)
    assert "does not divide the 16 heads and 4 KV heads of a TP rank" in layout.misfit(dense_one)
    assert layout.misfit(sparse) == ""
    assert replace(layout, fused=False).misfit(dense_one) == ""  # blocks are exchanged
    assert replace(layout, cp=4, gpus=8).misfit(dense_one) == ""
    assert replace(layout, cp=8, gpus=16).misfit(dense_one)  # the heads divide, the KV heads not


@pytest.mark.parametrize(
    "tp,cp,tokens",
    [(1, 1, 640), (1, 2, 640), (2, 2, 640), (1, 4, 512), (4, 3, 768), (12, 3, 384), (12, 3, 1152),
     (8, 2, 100)],
)  # fmt: skip
def test_the_run_and_the_planner_agree_on_what_divides(tp, cp, tokens):
    """`context_split` refuses at the start of a run; the planner's search passes over."""
    sizes = {"heads": 24, "kv_heads": 24, "ffn": 1200, "vocab": 1200, "layers": 2}
    model = make_model(seq_len=tokens, dense_layers=1, **sizes)
    layout = Layout(gpus=tp * cp, tp=tp, cp=cp, sequence_parallel=tp > 1)
    split = ContextSplit(
        ranks=cp, tensor_ranks=tp, sequence_parallel=tp > 1, seq_len=tokens, batch=1,
        head_sizes=256, element_bytes=2, comm_types=("p2p",),
    )  # fmt: skip
    try:
        split.check(model.patterns)
    except ConfigError:
        assert layout.misfit(model)
    else:
        assert not layout.misfit(model)
        received, _ = split.received(model.patterns[1])
        assert received == context.received_bytes(model, layout, 1)  # the layer table's


def test_the_layout_of_a_run():
    layout = layout_of(run_arguments(), 16)
    assert (layout.tp, layout.cp, layout.dp, layout.cp_comm) == (2, 4, 2, RING)
    assert str(layout) == "TP 2 + SP, CP 4, PP 1, DP 2, recompute none"
    assert layout_of(run_arguments(cp_comm_type="a2a"), 16).cp_comm == ULYSSES
    assert layout_of(run_arguments(cp_comm_type=["all_gather"] * 2), 16).cp_comm == GATHER
    for kinds in (["p2p", "a2a"], ["a2a+p2p"]):
        with pytest.raises(ConfigError, match=re.escape(f"megatron.cp_comm_type={kinds}")):
            layout_of(run_arguments(cp_comm_type=kinds), 16)


def test_a_search_takes_cp_where_it_helps():
    """One sequence of 1M tokens on 32 GPUs: without CP only TP and PP could share it."""
    model, machine = make_model(seq_len=M), load_machine("h100")
    base = Layout(gpus=32, global_batch=1)
    layouts = candidates(base, model, most_tp=8)
    assert {layout.cp for layout in layouts} == {1, 2, 4, 8, 16, 32}
    assert all(layout.misfit(model) == "" for layout in layouts)
    best = search(machine, model, base, 3)
    assert len(best) == 3 and best[0].layout.cp > 1 and best[0].layout.dp == 1
    few = candidates(base, model, most_tp=8, most_cp=2)
    assert few == [layout for layout in layouts if layout.cp <= 2]
    assert {p.layout.cp for p in search(machine, model, base, most_cp=2)} == {1, 2}
    without = [plan(machine, model, x) for x in layouts if x.cp == 1]
    assert best[0].seconds < min((p.seconds for p in without if p.fits), default=float("inf"))


def test_the_report_says_what_each_kind_of_layer_exchanges():
    model, layout = eight_groups(16, 128 * K), Layout(gpus=4, cp=4)
    machine = load_machine("h100")
    text = "\n".join(lines(machine, model, plan(machine, model, layout), 1e12))
    mib = context.received_bytes(model, layout, 0) / 2**20
    assert f"CP 4: 1 layers, 1/1 to 16 + 1/16, block 64, 8 KV heads: {mib:.1f} MiB forward" in text
    assert "(blocks by lifetimes, waited for)" in text
    assert "CP 4: 1 layers, dense, block 64: 384.0 MiB forward (cp_comm_type p2p)" in text
    assert re.search(r"^CP 4 +[\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    groups = machine.assumptions.model_copy(update={"exchange_groups": 4})
    hidden = machine.model_copy(update={"assumptions": groups})
    text = "\n".join(lines(hidden, model, plan(hidden, model, layout), 1e12))
    assert "in 4 groups of heads, the first waited for" in text
    alone = Layout(gpus=1)
    assert "CP" not in "\n".join(lines(machine, model, plan(machine, model, alone), 1e12))


def test_the_report_says_what_layers_keep_under_the_planned_recompute():
    """The table had what no recompute keeps, whatever was planned."""
    model = eight_groups(16, 128 * K)
    tokens = 128 * K / 2**20
    full, output = tokens * 2048 * 2, tokens * 32 * (2 * 128 + 4)
    for sizes, kept in (
        ({"recompute": "full"}, [full + output, full]),
        ({"recompute": "full", "keep_attention_output": False}, [full, full]),
        ({}, [memory.saved_per_layer(model.shape, Layout(gpus=1), n) / 2**20 for n in (0, 1)]),
    ):
        layout = Layout(gpus=1, **sizes)
        text = lines(load_machine("h100"), model, plan(SIMPLE, model, layout), 1e12)
        (head,) = [n for n, line in enumerate(text) if line.startswith("layers ")]
        assert text[head].endswith(f"keeps MiB (recompute {layout.recompute})")
        assert [line.split()[-1] for line in text[head + 1 : head + 3]] == [
            f"{x:.0f}" for x in kept
        ]


def test_bytes_of_a_token_on_one_tp_rank():
    """With more TP ranks than KV heads every rank still holds one."""
    model = eight_groups(16, 128 * K)
    for tp, groups in ((1, 8), (4, 2), (8, 1), (16, 1)):
        layout = Layout(gpus=tp, tp=tp)
        assert context.kv_token_bytes(model, layout) == 2 * 128 * groups * 2
        assert context.query_token_bytes(model, layout) == 128 * 32 / tp * 2


def test_what_fits_nowhere_says_how_far_it_is_off():
    with pytest.raises(ConfigError, match=r"comes nearest with \d{2,4}\.\d GiB"):
        search(load_machine("h100"), make_model(seq_len=4 * M), Layout(gpus=2, global_batch=1))
