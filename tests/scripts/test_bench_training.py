"""bench_training.py and profile_kinds.py on recorded text and a hand-made trace."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/bench"))
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
