"""bench_training.py and profile_kinds.py on recorded text and a hand-made trace."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/bench"))
import runs
import training as bench_training
from profile_kinds import add_up
from runs import what_went_wrong

STEP = (
    " iteration {i:8d}/       4 | consumed samples: 1 | elapsed time per iteration (ms): {ms} |\n"
    "[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.0 | max allocated: 2048.0 |\n"
    " s2megatron iteration {i:8d} | {ms} ms/iteration | 5 tokens/s | 5 tokens/s/rank | "
    "true model TFLOP/s/rank: {tf} (kept pairs; ...)\n"
)


def test_steps_after_the_warm_up_count():
    times = [(1, 9000.0, 1.0), (2, 100.0, 300.0), (3, 120.0, 250.0), (4, 700.0, 43.0)]
    text = "".join(STEP.format(i=i, ms=ms, tf=tf) for i, ms, tf in times)
    row = bench_training.read_log(text + " lm loss: 1.5E+00 |", warmup=1, last=3)
    assert (row["ms"], row["spread_ms"], row["first_ms"]) == (110.0, 20.0, 9000.0)
    assert (row["memory_gib"], row["true_TFLOPs"], row["loss"]) == (2.0, 275.0, 1.5)


def test_what_a_failed_run_said(tmp_path):
    def error_in(text):
        (tmp_path / "log.txt").write_text(text)
        return what_went_wrong(tmp_path / "log.txt", 1)

    refusal = "s2megatron: this run cannot start:\ndata.train: x.bin does not exist\nother"
    assert error_in(refusal) == "data.train: x.bin does not exist"
    raised = "a line\n[rank0]: torch.OutOfMemoryError: CUDA out of memory\nmore"
    assert error_in(raised).endswith("OutOfMemoryError: CUDA out of memory")


def test_runs():
    runs = bench_training.runs_of(Namespace(runs="s2:none@32768,dense:full@131072"))
    assert runs == [("s2", "none", 32768), ("dense", "full", 131072)]
    with pytest.raises(SystemExit, match="must be like"):
        bench_training.runs_of(Namespace(runs="sparse@32768"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "2", "--warmup", "1"], "--steps must be 3 or more"),
        (["--steps", "4", "--warmup", "-1"], "no step is left to count"),
        (["--sequences", "1k"], "must be numbers of tokens"),
        (["--runs", "sparse@1"], "must be like"),
        (["--gpus", "0"], "--gpus 0"),
    ],
)
def test_arguments_are_checked_before_the_first_run(arguments, said, capsys):
    config = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    with pytest.raises(SystemExit) as stop:
        bench_training.parse([config, "--gpus", "1", *arguments])
    assert said in f"{stop.value}{capsys.readouterr().err}"
    with pytest.raises(SystemExit):
        bench_training.parse(["nowhere.yaml", "--gpus", "1"])
    assert "there is no such file" in capsys.readouterr().err


def test_run_without_a_step_to_count_is_a_row_of_the_table(tmp_path, monkeypatch):
    """It ended well and its log is not what we read: the other rows stay."""

    def without_lines(command, stdout, stderr, env):
        stdout.write("done")
        return Namespace(returncode=0)

    monkeypatch.setattr(bench_training.provenance, "commit", lambda root: "abc1234")
    monkeypatch.setattr(runs.subprocess, "run", without_lines)
    options = Namespace(out=str(tmp_path), config="x", gpus=1, steps=4, warmup=1, profile=False,
                        overrides=[])  # fmt: skip
    row = bench_training.run(options, "s2", "none", 128)
    other = dict(row, attention="dense", ms=2.0, spread_ms=0.0, memory_gib=None, first_ms=None,
                 true_TFLOPs=1.0)  # fmt: skip
    table = bench_training.report(options, [other, row])
    assert "failed: its log has no s2megatron line of steps 2 to 3" in table and "| 2 |" in table
    assert "commit abc1234" in table


def test_kernels_by_kind_idle_and_exposed_communication():
    def kernel(name, ts, dur):
        return dict(ph="X", cat="kernel", name=name, ts=ts, dur=dur)

    found = add_up([
        kernel("s2_hopper_forward_kernel", 0, 1000),
        kernel("s2_dkdv_kernel", 1000, 2000),
        kernel("nvjet_tst_128x256", 4000, 1000),
        kernel("ncclDevKernel_AllGather", 4500, 1500),  # 500 us beside the product, then alone
        kernel("cudnn_flash_fprop_sm90", 6000, 1000),
        dict(ph="X", cat="cpu_op", name="aten::mm", ts=0, dur=10**6),
    ])  # fmt: skip
    assert found["kinds"] == {
        "S2 attention, forward": 1.0,
        "S2 attention, backward": 2.0,
        "matrix products": 1.0,
        "communication (NCCL)": 1.5,
        "dense attention, forward": 1.0,
    }
    assert found["step"] == 7.0 and found["idle"] == pytest.approx(1.0)
    assert found["exposed"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no GPU kernels"):
        add_up([dict(ph="X", cat="cpu_op", name="aten::mm", ts=0, dur=1)])
