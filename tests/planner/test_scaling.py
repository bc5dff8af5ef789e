"""The scaling tool: its arithmetic on recorded timings, and the whole of it on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launches import ON_CPU, ROOT, TINY, write_run_file
from planner_cases import make_model

from s2megatron.errors import ConfigError
from s2megatron.machine import load_machine
from s2megatron.planner.layout import Layout
from s2megatron.planner.measured import (
    MeasuredRun,
    as_json,
    efficiency,
    exposed_share,
    markdown,
    speedup,
)
from s2megatron.plot import read_scalars

sys.path.insert(0, str(ROOT / "scripts/bench"))
import replan
import scaling_test

SAME = {"sequence": 1000, "peak_gib": 10.0, "exposed": 0.125}
ONE = MeasuredRun(attention="s2", layout="dp", gpus=1, global_batch=1,
          step_seconds=(2.0, 2.0, 2.0, 2.1, 9.0), **SAME)  # fmt: skip
FOUR = MeasuredRun(attention="s2", layout="dp", gpus=4, global_batch=4, predicted_seconds=2.2,
           predicted_gib=9.0, step_seconds=(2.5,) * 20 + (0.1, 90.0), **SAME)  # fmt: skip
TP = MeasuredRun(attention="s2", layout="tp4", gpus=4, global_batch=4, step_seconds=(4.0,), **SAME)
DENSE = MeasuredRun(
    attention="dense", layout="dp", gpus=4, global_batch=4, step_seconds=(10.0,), **SAME
)
RUNS = [ONE, FOUR, TP, DENSE]


def test_rates_and_efficiency_of_recorded_steps():
    assert ONE.seconds == 2.0 and ONE.tokens_per_second == ONE.per_gpu == 500
    assert ONE.spread == pytest.approx(3.5)  # five steps: none is cut
    assert FOUR.seconds == 2.5 and FOUR.tokens_per_second == 1600 and FOUR.per_gpu == 400
    assert FOUR.spread == 0  # of 22 steps the two furthest out on each side are cut
    assert [efficiency(run, RUNS) for run in RUNS] == [1.0, 0.8, 0.5, 1.0]
    assert speedup(FOUR, RUNS) == 4.0 and speedup(ONE, RUNS) is None
    assert FOUR.step_error == pytest.approx(-0.12) and FOUR.memory_error == pytest.approx(-0.1)
    assert ONE.step_error is None and ONE.memory_error is None


def kernel(name: str, start: float, duration: float) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration}


def test_exposed_share_of_a_trace():
    """Communication 10-30 and 50-60 (twice over), products 0-20 and 55-100: 10 + 5 of 100 alone."""
    events = [
        kernel("gemm", 0, 20),
        kernel("ncclDevKernel_AllGather", 10, 20),
        kernel("ncclDevKernel_ReduceScatter", 50, 10),
        kernel("ncclDevKernel_SendRecv", 52, 4),
        kernel("gemm", 55, 45),
        {"ph": "X", "cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 1000},
        {"ph": "M", "name": "process_name"},
    ]
    assert exposed_share(events) == pytest.approx(0.15)
    assert exposed_share(events[5:]) is None


ABOUT = {"mode": "weak", "gpu": "a GPU", "date": "2026-01-01", "versions": {"torch": "2"},
         "commit": "abc", "steps": 5, "warmup": 2, "constants": "h200", "notes": ["Left out: tp3."],
         "command": "python scripts/bench/scaling_test.py x.yaml"}  # fmt: skip


def test_tables_say_what_was_measured():
    text = markdown(ABOUT, RUNS)
    row = next(line for line in text.splitlines() if line.startswith("| s2 | 1,000 | dp | 4 |"))
    assert row == ("| s2 | 1,000 | dp | 4 | 4 | 2500.0 | 0.0% | 1,600 | 400 | 80.0% | 12.5% | "
                   "10.00 | 4.00 | 2200 (-12.0%) | 9.00 (-10.0%) |")  # fmt: skip
    assert "python scripts/bench/scaling_test.py x.yaml" in text and "Left out: tp3." in text
    rows = json.loads(as_json(ABOUT, RUNS))["runs"]
    assert [row["efficiency"] for row in rows] == [1.0, 0.8, 0.5, 1.0]


def chosen(*arguments: str):
    options = scaling_test.parse(["x.yaml", "--sequence", "1024", *arguments])
    found, left_out = scaling_test.cases(options)
    return [(c.layout, c.gpus, c.tp, c.pp, c.global_batch) for c in found], left_out


def test_cases_of_weak_and_strong_scaling():
    weak, left_out = chosen("--gpus", "1,2,4", "--mode", "weak", "--layouts", "dp,tp2pp2",
                            "--attention", "s2")  # fmt: skip
    assert weak == [("dp", 1, 1, 1, 1), ("dp", 2, 1, 1, 2), ("dp", 4, 1, 1, 4),
                    ("tp2pp2", 4, 2, 2, 4)]  # fmt: skip
    assert len(left_out) == 2
    strong, _ = chosen("--gpus", "2,4", "--mode", "strong", "--layouts", "dp2", "--attention", "s2")
    assert strong == [("dp2", 2, 1, 1, 4)]
    with pytest.raises(ConfigError, match="tp3 on 4 GPUs with a batch of 4 do not divide"):
        chosen("--gpus", "4", "--mode", "weak", "--layouts", "tp3")
    with pytest.raises(ConfigError, match="--layouts tp2ep2: must be"):
        chosen("--gpus", "4", "--mode", "weak", "--layouts", "tp2ep2")
    with pytest.raises(ConfigError, match="cp4 on 2 GPUs with a batch of 2 do not divide"):
        chosen("--gpus", "2", "--mode", "weak", "--layouts", "cp4")


def test_cases_over_context_parallel_ranks():
    options = scaling_test.parse(["x.yaml", "--sequence", "1024", "--gpus", "4", "--mode", "strong",
                                  "--layouts", "cp4,tp2cp2,cp2", "--batch", "2"])  # fmt: skip
    found, _ = scaling_test.cases(options)
    assert [(c.layout, c.tp, c.cp) for c in found if c.attention == "s2"] == [
        ("cp4", 1, 4), ("tp2cp2", 2, 2), ("cp2", 1, 2)]  # fmt: skip
    words = scaling_test.overrides_of(found[0], options, ROOT)
    assert "megatron.context_parallel_size=4" in words
    assert "megatron.tensor_model_parallel_size=1" in words

    class Read(scaling_test.Planner):
        def __init__(self):  # without Megatron
            self.machine, self.model = load_machine("h100"), make_model(seq_len=1024)
            self.layout = Layout(gpus=1)

    assert Read().predict(found[0]).layout == Layout(gpus=4, cp=4, global_batch=2)


def test_recompute_is_an_axis_of_its_own():
    options = scaling_test.parse(["x.yaml", "--sequence", "1024", "--gpus", "1", "--mode", "weak",
                                  "--recompute", "none,full"])  # fmt: skip
    found, _ = scaling_test.cases(options)
    assert [(c.name, c.attention, c.folder) for c in found] == [
        ("dp, recompute none", "s2", "s2-1024-dp-none-1"),
        ("dp, recompute none", "dense", "dense-1024-dp-none-1"),
        ("dp, recompute full", "s2", "s2-1024-dp-full-1"),
        ("dp, recompute full", "dense", "dense-1024-dp-full-1"),
    ]
    words = scaling_test.overrides_of(found[2], options, ROOT)
    assert "megatron.recompute_granularity=full" in words
    assert "megatron.train_iters=16" in words and "megatron.profile=true" not in words
    with pytest.raises(SystemExit):
        scaling_test.parse(["x.yaml", "--sequence", "1024", "--gpus", "1", "--mode", "weak",
                            "--recompute", "some"])  # fmt: skip


def test_what_does_not_fit_is_left_out():
    options = scaling_test.parse(
        [str(ROOT / "configs" / "llama_1.3b_32k.yaml"), "--sequence", "131072", "--gpus", "1",
         "--mode", "weak", "--recompute", "none,full", "--attention", "s2", "--gpu", "h100"]
    )  # fmt: skip
    found, _ = scaling_test.cases(options)
    fits, over = scaling_test.fitting(found, scaling_test.Planner(options))
    assert [case.recompute for case in fits] == ["full"]
    assert len(over) == 1 and "recompute none on 1 GPUs" in over[0]


def test_recorded_runs_are_predicted_again(tmp_path):
    """replan.py, as a user would after calibrating: other constants, other predictions."""
    name = "scaling-h200x2-2026-11-24-tp2-32k.json"
    recorded = tmp_path / name
    recorded.write_text((ROOT / "docs/benchmarks/raw" / name).read_text())
    constants = yaml.safe_load((ROOT / "s2megatron/gpus/h200.yaml").read_text())
    (tmp_path / "slower.yaml").write_text(yaml.safe_dump(constants | {"step_ms": 140}))
    before = json.loads(recorded.read_text())["runs"]

    def replan(gpu):
        command = [
            sys.executable,
            "scripts/bench/replan.py",
            str(recorded),
            "--gpu",
            gpu,
            "--write",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, **ON_CPU})  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "2 runs; largest error of a step" in done.stdout
        return json.loads(recorded.read_text())["runs"]

    for run, old in zip(replan("h200"), before, strict=True):
        assert run["predicted_seconds"] == pytest.approx(old["predicted_seconds"])
        assert run["step_seconds"] == old["step_seconds"]
    for run, old in zip(replan(str(tmp_path / "slower.yaml")), before, strict=True):
        assert run["predicted_seconds"] == pytest.approx(old["predicted_seconds"] + 0.1)
    assert recorded.with_suffix(".md").exists() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("text", ["{", "[]", '{"about": {}}', None])
def test_what_is_no_recording_is_refused(tmp_path, text):
    path = tmp_path / "runs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no JSON of scaling_test.py"):
        replan.predicted(path, "h200")


def test_traced_names_attentions(capsys):
    with pytest.raises(SystemExit):
        scaling_test.parse(["x.yaml", "--gpus", "2", "--mode", "weak", "--sequence", "1024",
                            "--traced", "s3"])  # fmt: skip
    assert "--traced s3: must be s2, dense, both or none" in capsys.readouterr().err


def test_the_tool_itself_on_two_cpu_ranks(tmp_path):
    run = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    command = [
        sys.executable, "scripts/bench/scaling_test.py", str(run), "--gpus", "2",
        "--mode", "strong", "--layouts", "tp2", "--sequence", "128", "--attention", "s2",
        "--warmup", "1", "--steps", "3", "--vocab", "257", "--out", str(tmp_path), "--name", "cpu",
        "--logs", str(tmp_path / "logs"), "megatron.lr=0.001",
    ]  # fmt: skip
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    measured = json.loads((tmp_path / "cpu.json").read_text())
    assert "gloo" in measured["about"]["gpu"] and "--mode strong" in measured["about"]["command"]
    assert [run["layout"] for run in measured["runs"]] == ["tp2"]
    for run in measured["runs"]:
        assert len(run["step_seconds"]) == 3 and min(run["step_seconds"]) > 0
        # The steps' own times: the second is no mean with the first, which compiles.
        scalars = read_scalars(Path(run["log"]) / "tensorboard")["s2/seconds-per-iteration"]
        assert run["step_seconds"] == [dict(scalars)[n] for n in (2, 3, 4)]
        assert run["tokens_per_second"] == pytest.approx(2 * 128 / run["seconds"])
        assert run["peak_gib"] is None and run["exposed"] is None  # no GPU: not made up
        assert run["predicted_seconds"] > 0
    assert (tmp_path / "cpu.png").stat().st_size > 5000 and (tmp_path / "cpu.md").exists()


@pytest.mark.parametrize("steps", [4, 3])
def test_steps_that_were_timed_before_the_run_failed_count(tmp_path, monkeypatch, steps):
    """Seen: all steps done, a run that did not end, and its figures lost to --timeout."""
    options = scaling_test.parse(["x.yaml", "--gpus", "2", "--mode", "strong", "--batch", "1",
                                  "--layouts", "tp2", "--sequence", "1024", "--warmup", "1",
                                  "--steps", "3"])  # fmt: skip
    (case, *_), _ = scaling_test.cases(options)

    def train(case, options, folder, pool):
        lines = (
            f"s2megatron iteration {n:8d} | {100 * n + 0.5} ms | x\n" for n in range(1, steps + 1)
        )
        (folder / "rank0.log").write_text("".join(lines))
        raise RuntimeError("not done after 80 s (--timeout); its log ends: summary\nmore")

    monkeypatch.setattr(scaling_test, "train_warm", train)
    notes = []
    if steps == 3:
        with pytest.raises(RuntimeError, match="not done after 80 s"):
            scaling_test.measure(case, options, tmp_path / "run", object(), notes)
        assert notes == []
    else:
        run = scaling_test.measure(case, options, tmp_path / "run", object(), notes)
        assert run.step_seconds == pytest.approx((0.2005, 0.3005, 0.4005))
        assert run.peak_gib is None and "then: not done after 80 s" in notes[0]
        assert "more" not in notes[0]
