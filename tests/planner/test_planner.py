"""The planner: exact counts, its arithmetic by hand, and runs that did not set its constants."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from in_process import run_command_line
from launches import ROOT
from planner_cases import LLAMA_1_3B, LLAMA_7B, SIMPLE, make_model

from s2megatron.cli import main
from s2megatron.errors import ConfigError
from s2megatron.machine import Attention, Link, interpolate, load_machine
from s2megatron.planner import memory
from s2megatron.planner.costs import layer_matmuls
from s2megatron.planner.layout import Layout, candidates
from s2megatron.planner.links import gather_seconds
from s2megatron.planner.report import check_fits_gpus
from s2megatron.planner.search import search
from s2megatron.planner.step import plan
from s2megatron.provenance import MISSING


def test_layers_add_up_to_the_model():
    model = make_model(dense_layers=2)
    shape, numbers = model.shape, range(24)
    layers = sum(shape.layer_parameters(n) for n in numbers)
    assert layers + 2 * 32000 * 2048 + 2048 == shape.parameters() == 1_345_423_360
    flops = sum(shape.layer_flops(n, model.patterns[n]) for n in numbers) + shape.output_flops()
    assert flops == shape.flops_per_sequence(model.patterns)


@pytest.mark.parametrize("gate", [False, True], ids=["", "output_gate"])
@pytest.mark.parametrize("tp,pp,vpp", [(1, 1, 1), (4, 1, 1), (2, 4, 1), (2, 4, 3), (16, 2, 1)])
def test_ranks_hold_the_model_once_and_norms_on_every_tp_rank(tp, pp, vpp, gate):
    shape = make_model(output_gate=gate).shape
    layout = Layout(gpus=tp * pp, tp=tp, pp=pp, vpp=vpp)
    held = tp * sum(memory.stage_parameters(shape, layout, s) for s in range(pp))
    assert held == shape.parameters() + (tp - 1) * 2048 * (2 * 24 + 1)


@pytest.mark.parametrize("gate", [False, True], ids=["", "output_gate"])
def test_products_are_the_forward_flops(gate):
    """One third of the layer's true FLOPs without attention, whatever the layout."""
    shape = make_model(output_gate=gate).shape
    for tp in (1, 2, 8):
        layout = Layout(gpus=tp, tp=tp, sequence_parallel=tp > 1)
        rank = sum(2 * m * n * k for m, n, k in layer_matmuls(shape, layout, 0))
        weights = shape.attention_weights + shape.mlp_weights(0, per_token=True)
        assert tp * rank == pytest.approx(2 * weights * shape.seq_len, rel=1e-12)


def test_a_step_of_products_takes_their_flops_over_the_rate():
    model = make_model()
    true = model.shape.flops_per_sequence(model.patterns)
    once = plan(SIMPLE, model, Layout(gpus=1))
    assert once.seconds == pytest.approx(true / 100e12, rel=1e-3)
    assert once.mfu(100) == pytest.approx(1.0, rel=1e-3)
    forward = true - model.shape.output_flops()  # the logits are not computed again
    kept = model.shape.attention_flops(model.patterns)  # nor sparse attention, unless asked to
    for keep in (True, False):
        again = plan(SIMPLE, model, Layout(gpus=1, recompute="full", keep_attention_output=keep))
        more = (forward - kept if keep else forward) / 3 / 100e12
        assert again.seconds - once.seconds == pytest.approx(more, rel=1e-3)
    half = plan(SIMPLE, model, Layout(gpus=2, tp=2, sequence_parallel=True))
    assert half.seconds == pytest.approx(once.seconds / 2, rel=1e-3)


def test_bubble_is_that_of_1f1b_and_interleaving():
    model = make_model(vocab=128)  # logits of no weight: equal stages
    for pp, vpp, batch in ((4, 1, 8), (4, 3, 8), (8, 1, 32)):
        layout = Layout(gpus=pp, pp=pp, vpp=vpp, global_batch=batch)
        result = plan(SIMPLE, model, layout)
        ideal = result.matmul + result.attention
        assert result.bubble / ideal == pytest.approx((pp - 1) / vpp / batch, rel=0.01)


def test_dense_layers_in_one_stage_decide_the_pipeline():
    """Two dense layers of 24 at 1M tokens: all other stages wait for theirs."""
    model = make_model(seq_len=2**20, dense_layers=2)
    again = dict(recompute="full", keep_attention_output=False)
    result = plan(SIMPLE, model, Layout(gpus=4, pp=4, global_batch=64, **again))
    first = sum(model.shape.layer_flops(n, model.patterns[n]) for n in range(6)) * 4 / 3
    assert result.matmul + result.attention == pytest.approx(64 * first / 100e12, rel=0.01)
    sparse = make_model(seq_len=2**20)
    even = plan(SIMPLE, sparse, Layout(gpus=4, pp=4, global_batch=64, **again))
    assert result.seconds > 2 * even.seconds


def test_bytes_of_each_axis_by_hand():
    model = make_model(seq_len=4096)
    h, size = 2048, 4096 * 2048 * 2
    layout = Layout(gpus=16, tp=2, pp=2, sequence_parallel=True, global_batch=8)
    axes = plan(SIMPLE, model, layout).axes
    assert axes["SP"].bytes == 2 * 12 * 10 * size / 2  # micro-batches, layers, gathers and scatters
    assert axes["PP"].bytes == 2 * 2 * size / 2
    parameters = max(memory.stage_parameters(model.shape, layout, s) for s in (0, 1))
    assert axes["DP"].bytes == pytest.approx((4 + 2) * parameters * 3 / 4)
    moe = make_model(seq_len=4096, layers=1, experts=8, experts_per_token=2, expert_ffn=1024)
    axes = plan(SIMPLE, moe, Layout(gpus=4, ep=4, global_batch=4)).axes
    assert axes["EP"].bytes == 4 * 4096 * 2 * h * 2 * 3 / 4


def test_rings_use_all_adapters_of_a_node():
    machine = SIMPLE.model_copy(
        update={"node": Link(gb_s=400, latency_us=0), "cluster": Link(gb_s=50, latency_us=0)}
    )
    seconds = {(ranks, stride): gather_seconds(machine, 1e9, ranks, stride=stride)[0]
               for ranks, stride in ((8, 1), (16, 1), (16, 8), (32, 2))}  # fmt: skip
    assert seconds[8, 1] == pytest.approx(7 / 8 / 400)
    assert seconds[16, 1] == pytest.approx(15 / 16 / 400)  # 8 adapters of 50
    assert seconds[16, 8] == pytest.approx(15 / 16 / 50)
    assert seconds[32, 2] == pytest.approx(31 / 32 / 200)


def test_memory_by_hand():
    model = make_model(seq_len=4096)
    shape, layout = model.shape, Layout(gpus=4, tp=1, global_batch=4, recompute="full")
    held = memory.peak(model, layout)
    p = shape.parameters()
    assert (held.weights, held.gradients, held.optimizer) == (2 * p, 4 * p, 12 * p / 4)
    assert held.logits == 4096 * 32000 * 6
    none = memory.peak(model, Layout(gpus=1))
    # Inputs and outputs of two norms, q, k, v, the attention's output, SwiGLU's three; row sums.
    token = 2 * (4 * 2048 + 4 * 2048 + 3 * 5504) + 4 * 16
    assert none.activations == 24 * 4096 * token
    stage = Layout(gpus=4, pp=4, global_batch=8)
    first = memory.peak(make_model(seq_len=32768), stage)
    assert first.activations > 4 * 6 * 32768 * token  # four micro-batches in flight


MEASURED = [
    # tokens, recompute, ms: Megatron + TE + DKernel, 1.3B, TP=2 + SP on two H200s (design notes).
    # The dense runs beside them set `elementwise_fused` and `step_ms`; these nothing.
    (32768, "none", 403),
    (131072, "full", 2550),
]


@pytest.mark.parametrize("tokens,recompute,ms", MEASURED)
def test_measured_runs_that_set_no_constant(tokens, recompute, ms):
    dkernel = Attention(forward={32768: 374, 131072: 416}, backward={32768: 230, 131072: 268})
    machine = load_machine("h200").model_copy(update={"s2_attention": dkernel})
    layout = Layout(gpus=2, tp=2, sequence_parallel=True, recompute=recompute,
                    keep_attention_output=False)  # fmt: skip
    predicted = plan(machine, make_model(seq_len=tokens), layout).seconds * 1e3
    print(f"{tokens}: predicted {predicted:.0f} ms, measured {ms} ms")
    assert abs(predicted / ms - 1) < 0.15


# Layers dense, ms, GiB: the same model with this plugin at 131,072 tokens, full recompute
# (docs/benchmarks/raw/megatron-h200x2-2026-11-22.md: kernels of that day). Set no constant either.
OURS = [(0, 2163, 36.3), (24, 8664, 30.2)]


@pytest.mark.parametrize("dense_layers,ms,gib", OURS)
def test_our_own_runs_set_no_constant(dense_layers, ms, gib):
    layout = Layout(gpus=2, tp=2, sequence_parallel=True, recompute="full")
    model = make_model(seq_len=131072, dense_layers=dense_layers)
    result = plan(load_machine("h200"), model, layout)
    held = memory.peak(model, layout).total / 2**30
    print(f"predicted {result.seconds * 1e3:.0f} ms, {held:.1f} GiB; measured {ms} ms, {gib} GiB")
    assert abs(result.seconds * 1e3 / ms - 1) < 0.15
    assert abs(held / gib - 1) < 0.1


# Tokens, layers dense, ms, GiB: on four H100s without Transformer Engine, TP=4 + SP, full recompute
# (docs/scaling.md). The machine was not calibrated.
FOUR = [
    (2**18, 0, 3058, 31.2),
    (2**18, 24, 16910, None),
    (2**19, 0, 7525, 56.6),
    (2**19, 24, 65745, None),
]


@pytest.mark.parametrize("tokens,dense_layers,ms,gib", FOUR)
def test_four_gpus_set_no_constant(tokens, dense_layers, ms, gib):
    layout = Layout(gpus=4, tp=4, sequence_parallel=True, recompute="full", fused=False)
    result = plan(
        load_machine("h100"), make_model(seq_len=tokens, dense_layers=dense_layers), layout
    )
    held = result.memory.total / 2**30
    print(f"predicted {result.seconds * 1e3:.0f} ms, {held:.1f} GiB; measured {ms} ms, {gib} GiB")
    assert abs(result.seconds * 1e3 / ms - 1) < 0.15
    assert gib is None or abs(held / gib - 1) < 0.1


RECORDED = sorted((ROOT / "docs/benchmarks/raw").glob("scaling-h200x[24]-*.json"))


def recorded_runs():
    files = [json.loads(path.read_text()) for path in RECORDED]
    engine = "transformer-engine"
    runs = [dict(run, fused=file["about"]["versions"][engine] != MISSING)
            for file in files for run in file["runs"]]  # fmt: skip
    assert len(runs) >= 40
    return runs


@pytest.mark.parametrize(
    "run",
    recorded_runs(),
    ids=lambda run: f"{run['attention']} {run['layout']} {run['gpus']}x{run['sequence']}",
)
def test_recorded_runs_on_h200s_set_no_constant(run):
    """1.3B and 7B through scripts/bench/scaling_test.py: step within 15%, memory within 10%."""
    layout, recompute = re.fullmatch(r"(\w+), recompute (\w+)", run["layout"]).groups()
    sizes = dict.fromkeys(("tp", "cp", "pp"), 1)
    if layout != "dp":
        sizes[layout[:2]] = int(layout[2:])
    layout = Layout(gpus=run["gpus"], **sizes, sequence_parallel=sizes["tp"] > 1,
                    fused=run["fused"], recompute=recompute,
                    global_batch=run["global_batch"], distributed_optimizer=True,
                    overlap_grad_reduce=True, overlap_param_gather=True)  # fmt: skip
    shape = LLAMA_7B if "llama_7b" in run.get("command", "") else LLAMA_1_3B
    dense_layers = shape["layers"] if run["attention"] == "dense" else 0
    model = make_model(seq_len=run["sequence"], dense_layers=dense_layers, **shape)
    result = plan(load_machine("h200"), model, layout)
    assert result.seconds == pytest.approx(run["predicted_seconds"], rel=1e-3)  # the table's
    assert abs(result.seconds / run["seconds"] - 1) < 0.15
    assert abs(result.memory.total / 2**30 / run["peak_gib"] - 1) < 0.1


def test_search_lists_what_divides_and_fits_best_first():
    model, machine = make_model(seq_len=131072, dense_layers=2), load_machine("h100")
    base = Layout(gpus=64, global_batch=64)
    plans = search(machine, model, base)
    assert plans == sorted(plans, key=lambda p: p.seconds)
    for result in plans:
        layout = result.layout
        assert layout.misfit(model) == "" and layout.tp * layout.cp * layout.pp * layout.dp == 64
        assert result.memory.total < 79 * 2**30
    layouts = candidates(base, model, most_tp=8)
    assert len(layouts) > len(plans) > 10
    with pytest.raises(ConfigError, match=r"nothing fits in 79 GiB: .* comes nearest"):
        search(machine, make_model(seq_len=2**22), Layout(gpus=2, global_batch=1))
    with pytest.raises(ConfigError, match="no TP x CP x PP x DP divides"):
        search(machine, model, Layout(gpus=7, global_batch=3))


def test_tables_are_read_between_their_points():
    table = {1024: 100.0, 4096: 300.0}
    assert [interpolate(table, x) for x in (10, 1024, 2048, 4096, 10**6)] == [
        100, 100, 200, 300, 300]  # fmt: skip


def test_machines_by_name_by_file_and_wrong(tmp_path):
    for name in ("h100", "H200", "b200"):
        assert load_machine(name).source
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        load_machine("h20")
    tree = SIMPLE.model_dump() | {"memory_tb_s": -1}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="memory_tb_s"):
        load_machine(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("table", [{}, {1024: 0}, {1024: -1}, {0: 100}], ids=str)
def test_a_table_of_rates_that_cannot_be_is_refused(tmp_path, table):
    """An empty one was an IndexError once a plan was made."""
    good = SIMPLE.model_dump()
    attention = good["s2_attention"] | {"backward": table}
    for name, part in (("matmul_tflops", table), ("s2_attention", attention)):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(good | {name: part}))
        with pytest.raises(ConfigError, match=rf"bad\.yaml: {name}.*s2megatron calibrate"):
            load_machine(str(tmp_path / "bad.yaml"))


def test_a_run_file_for_a_machine_is_told_in_one_line(tmp_path):
    """Megatron-free: the machine is read before the run file."""
    (tmp_path / "some.yaml").write_text("gpu: x\nmemory: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, said in (
        (f"{ROOT}/configs/quickstart.yaml", "is a run file"),
        (f"{tmp_path}/some.yaml", "source is missing; memory_gib is missing"),
        (f"{tmp_path}/list.yaml", "holds no machine"),
        (str(tmp_path), "is neither a file nor one of"),
    ):
        status, _, error = run_command_line(main, ["plan", "x.yaml", "--gpus", "1", "--gpu", name])
        assert status == 2 and said in error and error.count("\n") == 1, error


def test_calibrate_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "mine.yaml"
    status, _, error = run_command_line(main, ["calibrate", "--out", str(out)])
    assert status == 2 and "there is no GPU here" in error and "--small" in error
    assert not out.exists()


def command_line(*arguments):
    command = [sys.executable, *arguments]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=env)


def test_calibrate_writes_what_plan_reads(tmp_path):
    out = str(tmp_path / "mine.yaml")
    done = command_line("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                        "-m", "s2megatron.cli", "calibrate", "--out", out, "--small")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    machine, base = load_machine(out), load_machine("h200")
    assert set(machine.matmul_tflops) == {64, 128} and machine.memory_tb_s > 0
    assert machine.s2_attention.backward[512] > 0
    assert machine.gpus_per_node == 2 and machine.node != base.node
    assert machine.cluster == base.cluster  # one node measures none
    assert "2 rank(s)" in machine.source and "--small" in machine.source
    assert "from h200: assumptions, cluster" in machine.source


def test_plan_command_prints_the_whole_plan():
    config = "configs/llama_1.3b_32k.yaml"
    done = command_line("-m", "s2megatron.cli", "plan", config, "--gpus", "8",
                        "megatron.global_batch_size=8")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("1,345,423,360", "TP 2 + SP, PP 1, DP 4", "memory per rank", "SP 2", "DP 4",
                 "matrix products", "tokens/s", "MFU", "days for 1e+12 tokens"):  # fmt: skip
        assert text in done.stdout, done.stdout


def test_reading_a_run_file_sets_what_megatron_asks_for_on_gpus():
    code = """
import os
from s2megatron.training import cpu_runtime
cpu_runtime.prepare_environment()
cpu_runtime.install()
os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
from s2megatron.planner.report import read_run
read_run("configs/llama_1.3b_32k.yaml", [], 2, local=True)
print("connections", os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
print("ranks", os.environ.get("WORLD_SIZE"))
"""
    done = command_line("-c", code)
    assert "connections 1" in done.stdout, done.stderr[-2000:]
    assert "ranks None" in done.stdout  # or the next run file would be read for as many


def test_layouts_that_do_not_fit_are_refused_with_the_reason():
    model = make_model()
    for layout, said in (
        (Layout(gpus=3, tp=2), "TP 2 x PP 1 does not divide 3 GPUs"),
        (Layout(gpus=4, pp=3), "TP 1 x PP 3 does not divide 4 GPUs"),
        (Layout(gpus=5, pp=5, global_batch=5), "PP 5 x VPP 1 does not divide 24 layers"),
        (
            Layout(gpus=4, global_batch=6),
            "global batch 6 is not a multiple",
        ),
        (Layout(gpus=2, ep=2, global_batch=2), "EP 2 does not divide 0 experts"),
    ):
        with pytest.raises(ConfigError, match=f"--gpus {layout.gpus}: {said}.*; change the layout"):
            check_fits_gpus(layout, model)
