"""One arm of the quality study: its phases, and how many steps it has in a given time."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/quality"))
import results
import train_arm
from recipe import load_recipe


def test_a_phase_is_asked_to_leave_at_its_last_second(monkeypatch):
    text = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", text])
    time.sleep(0.5)
    monkeypatch.setattr(train_arm, "LOOK", 0.1)
    began = time.time()
    assert not train_arm.ended(process, began, 60.0)  # a look at the log comes next
    assert train_arm.ended(process, began, 0.0) and process.returncode == 7


def an_arm(folder, monkeypatch, program):
    """An arm whose phases run `program` in place of the training."""
    recipe = load_recipe(ROOT / "configs/quality/recipes/tiny.yaml")
    monkeypatch.setattr(train_arm, "launcher", lambda kernel: [sys.executable, "-c", program])
    config = ROOT / "configs/quality/dense.yaml"
    (folder / "before").mkdir(exist_ok=True)
    (folder / "before" / results.TRAINED).write_text("checkpoints")
    return train_arm.Arm(config, recipe, folder / "data", folder / "out", before=folder / "before")


def test_blocks_of_another_size_replace_the_pattern(tmp_path, monkeypatch):
    """The trunk has the arm's pattern in blocks of 16; the recipe goes on in the arm's blocks."""
    arm = an_arm(tmp_path, monkeypatch, "")
    later = train_arm.options(arm, 0, 4)
    assert "sparsity.on_resume=replace" in later
    assert not any(option.startswith("sparsity.block_size") for option in later)
    trunk = load_recipe(ROOT / "configs/quality/recipes/tiny-trunk.yaml")
    first = train_arm.options(replace(arm, recipe=trunk, before=None), 0, 8)
    assert "sparsity.block_size=16" in first and "sparsity.on_resume=replace" not in first
    same = arm.recipe.model_copy(update={"phases": [p.model_copy(update={"block_size": 16})
                                                    for p in arm.recipe.phases]})  # fmt: skip
    assert "sparsity.on_resume=replace" not in train_arm.options(replace(arm, recipe=same), 0, 4)


def test_a_phase_that_was_broken_off_is_trained_again(tmp_path, monkeypatch):
    left = tmp_path / "out/phase-0/checkpoints/latest_checkpointed_iteration.txt"
    program = f"from pathlib import Path; p = Path({str(left)!r}); p.parent.mkdir(parents=True)"
    arm = an_arm(tmp_path, monkeypatch, program + "; p.write_text('3')")
    with pytest.raises(RuntimeError, match="checkpoint of step 3 of 4"):
        train_arm.train(arm, 0)
    arm = an_arm(tmp_path, monkeypatch, program + "; p.write_text('4')")
    train_arm.train(arm, 0)  # the folder of the first try is gone, or mkdir would fail
    assert [row["steps"] for row in arm.result["phases"]] == [4]
    again = an_arm(tmp_path, monkeypatch, "1 / 0")
    train_arm.train(again, 0)
    assert again.result["phases"] == arm.result["phases"]


def test_an_arm_that_is_only_asked_keeps_the_weights_before_it(tmp_path, monkeypatch):
    arm = an_arm(tmp_path, monkeypatch, "1 / 0")
    before = {"phases": [{"length": 128}], "origin": "then", "shared": False}
    results.write_result(before, arm.before, None)
    arm.recipe = load_recipe(ROOT / "configs/quality/recipes/needles.yaml")
    train_arm.run(arm)
    assert (arm.out / results.TRAINED).read_text() == "checkpoints"
    found = results.read_result(arm.out)
    assert (found["status"], found["origin"], len(found["phases"])) == ("trained", "then", 1)
    assert not found["shared"]
    arm.recipe = arm.recipe.model_copy(update={"after_arm": "dense"})
    train_arm.run(arm)
    assert results.read_result(arm.out)["shared"]


@pytest.mark.parametrize("arm, steps, kernel, timed", [
    ("every-6", 375, "flash", {"cudnn": 500.0, "flash": 400.0}),
    ("no-dense", 300, "cudnn", {"cudnn": 500.0}),  # has no dense layer to choose for
])  # fmt: skip
def test_equal_time_is_spent_with_the_faster_kernel(
    tmp_path, monkeypatch, arm, steps, kernel, timed
):
    recipe = load_recipe(ROOT / "configs/quality/recipes/equal-time-32k.yaml")
    out = tmp_path / "out"
    phase = recipe.phases[0]
    line = "print(' s2megatron iteration {} | {} ms/iteration | 5 tokens/s')"

    def launcher(kernel):
        ms = {"cudnn": 500.0, "flash": 400.0}[kernel]
        return [sys.executable, "-c", "; ".join(line.format(i, ms) for i in (2, 4))]

    monkeypatch.setattr(train_arm, "launcher", launcher)
    (tmp_path / results.TRAINED).write_text("checkpoints")
    timing = train_arm.Arm(
        ROOT / f"configs/quality/{arm}.yaml", recipe, tmp_path, out, before=tmp_path
    )
    assert phase.train_seconds == 150
    assert train_arm.plan_steps(timing, 0) == (steps, kernel, timed)
    monkeypatch.setattr(train_arm, "launcher", None)
    assert train_arm.plan_steps(timing, 0) == (steps, kernel, timed)  # once is enough


def test_an_arm_that_cannot_be_timed_says_why(tmp_path, monkeypatch):
    recipe = load_recipe(ROOT / "configs/quality/recipes/equal-time-32k.yaml")
    monkeypatch.setattr(
        train_arm, "launcher", lambda kernel: [sys.executable, "-c", "raise SystemExit('no room')"]
    )
    (tmp_path / results.TRAINED).write_text("checkpoints")
    config = ROOT / "configs/quality/dense.yaml"
    arm = train_arm.Arm(config, recipe, tmp_path, tmp_path / "out", before=tmp_path)
    with pytest.raises(RuntimeError, match="could not be timed with cudnn:\nno room"):
        train_arm.plan_steps(arm, 0)
