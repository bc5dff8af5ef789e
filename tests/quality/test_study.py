"""The quality study: its table of arms, its documents, and a tiny version of all of it."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from launches import ON_CPU, ROOT

sys.path.insert(0, str(ROOT / "scripts/quality"))
import arms
import documents
import examine
import pieces
import report
import study
import tokenizer
import train_arm
from recipe import load_recipe

from s2megatron.errors import ConfigError

RECIPES = [ROOT / "configs/quality/recipe.yaml",
           *sorted((ROOT / "configs/quality/recipes").glob("*.yaml"))]  # fmt: skip
FILES = {
    "drivers/a/main.c": "int main(void)\n{\n\treturn probe(1);\n}\n" * 40,
    "drivers/a/probe.h": "int probe(int channel);\n" * 30,
    "drivers/b/queue.c": "static struct queue *head;\nvoid push(struct item *item);\n" * 40,
    "drivers/gpu/asic_reg/table.h": "#define REGISTER 0x1234\n" * 2000,
    "sound/core.c": "void play(struct stream *stream, unsigned long samples);\n" * 50,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tree/, a small source tree, and tokenizer/, trained on it."""
    folder = tmp_path_factory.mktemp("study")
    for name, text in FILES.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tokenizer.main([str(folder / "tree"), str(folder / "tokenizer"), "--vocabulary", "1800",
                    "--records", "100000"])  # fmt: skip
    return folder


def test_run_files_are_what_the_table_makes():
    files = {path.stem: path.read_text() for path in (ROOT / "configs/quality").glob("*.yaml")}
    files.pop("recipe", None)
    assert files == {arm: arms.run_file(arm) for arm in arms.ARMS}, "run scripts/quality/arms.py"


@pytest.mark.parametrize("plain, shards, tokens", [
    ("plain-8k", "no-dense", 8192), ("plain-32k", "no-dense", 32768),
    ("plain-8k-every-4", "every-4", 8192), ("pilot-plain-8k", "pilot", 8192),
    ("homogeneous", "no-dense", 8192), ("pilot-homogeneous", "pilot", 32768),
])  # fmt: skip
def test_controls_have_as_many_keys(plain, shards, tokens):
    ratio = arms.density(plain, tokens) / arms.density(shards, tokens)
    assert 0.97 < ratio < 1.07


def test_turned_shards_cover_in_two_layers_what_one_leaves_out():
    first, second = (p.rules for p in arms.patterns("turned")[:2])
    long_lived = [
        {k for rule in rules for k in range(16) if rule.lifetimes(64)[k] > 64}
        for rules in (first, second)
    ]
    assert len(long_lived[0]) == 8 and long_lived[0] | long_lived[1] == set(range(16))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path):
    for phase in load_recipe(path).phases:
        for sequences in (phase.sequences, phase.sequences // 2):  # on one GPU, on two
            assert phase.micro_batch(sequences) * phase.length <= phase.micro_batch_tokens
            assert sequences % phase.micro_batch(sequences) == 0


def test_a_wrong_recipe_is_refused_by_field(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("phases: [{length: 100, tokens: 1, batch_tokens: 250, lr: 1, final_lr: 1, "
                    "retrieval: 0}]\nexamination: {lengths: [1], loss_lengths: [1]}")  # fmt: skip
    with pytest.raises(ConfigError, match=r"phases\.0.*250 is not a multiple of length=100"):
        load_recipe(path)


def test_a_key_is_one_token_and_a_value_two(folder):
    maker = documents.Maker(str(folder / "tokenizer"), None, 128, 1, documents.DocumentMix())
    assert maker.record == 4
    assert len(maker.encode("@ab")) == 1 and len(maker.encode("2345")) == 2


def test_pieces_come_back_as_they_were(tmp_path):
    rng = numpy.random.default_rng(0)
    texts = [numpy.append(rng.integers(1, 500, n), 0).astype(numpy.uint16) for n in range(50, 90)]
    pieces.write_dataset(tmp_path / "text", numpy.concatenate(texts))
    packed = pieces.pack(str(tmp_path / "text"), tmp_path / "packed", 1000, 2)
    assert [path.name for path in packed] == ["text-0.xz", "text-1.xz"]
    pieces.unpack(tmp_path / "packed", tmp_path / "data")
    found = pieces.IndexedDataset(str(tmp_path / "data/text"))
    known = {text.tobytes() for text in texts}
    assert {text.tobytes() for text in (found[i] for i in range(len(found)))} < known
    assert 2000 <= sum(len(found[i]) for i in range(len(found))) < 2200


@pytest.mark.parametrize("length", [128, 512])
def test_retrieval_documents_fill_sequences(folder, length):
    recipe = documents.DocumentMix(repeats=0.5, records=0.5)
    makers = [documents.Maker(str(folder / "tokenizer"), None, length, 1, recipe) for _ in range(2)]
    first, second = (maker.sequences(3, 8) for maker in makers)
    assert first.shape == (8, length) and (first[:, -1] == 0).all()
    numpy.testing.assert_array_equal(first, second)


def test_repeated_keys_keep_their_values(folder):
    maker = documents.Maker(str(folder / "tokenizer"), None, 512, 1, documents.DocumentMix())
    text = maker.tokenizer.decode(maker.repeats(random.Random(5), 500))
    records = [line for line in text.split("\n")[:-1] if line]
    keys = {line[:3] for line in records}
    assert len(set(records)) == len(keys) < len(records)


def test_a_log_gives_curves_and_speed(tmp_path):
    line = (
        " [2026-11-27 12:00:00] iteration {i:8d}/     100 | consumed samples: 1 | learning rate: "
        "1.0E-03 | global batch size: 4 | lm loss: {loss:.6E} | loss scale: 1.0 |\n"
        " s2megatron iteration {i:8d} | {ms} ms/iteration | 5 tokens/s | 5 tokens/s/rank |\n"
    )
    text = line.format(i=20, loss=9.5, ms=900.0) + line.format(i=40, loss=8.25, ms=100.0)
    text += " validation-retrieval loss at iteration 40 | lm loss value: 3.5E+00 |\n"
    (tmp_path / "log.txt").write_text(text)
    assert train_arm.read_log(tmp_path / "log.txt") == {
        "steps": 40,
        "loss": [(20, 9.5), (40, 8.25)],
        "validation": {"retrieval": [(40, 3.5)]},
        "ms_per_step": 900.0,
    }


PHASE = {"length": 4096, "tokens": 5_000_000, "batch_tokens": 4096, "seconds": None, "lr": 1e-3,
         "final_lr": 1e-4, "retrieval": 0.5, "repeats": 0.5, "records": 0.5}  # fmt: skip


def arm_result(arm, nats):
    """A result as train_arm.py leaves it, with two windows and three documents."""
    plan = {"lengths": [4096], "loss_lengths": [4096],
            "probes": [{"name": "records", "tasks": ["single"]}]}  # fmt: skip
    return {
        "arm": arm, "file": arm, "status": "done", "gpu": "none", "commit": "0", "date": "today",
        "versions": {}, "command": "none", "arms_per_gpu": 1,
        "recipe": {"phases": [PHASE], "seed": 1, "examination": plan},
        "phases": [{"tokens": 5_000_000, "us_per_token": 2.0, "validation": {}}],
        "examination": {
            "loss-4096": {"samples": {"loss": {"4096": [[n, 10, n / 5, 2] for n in nats]}}},
            "records": {"samples": {"right": {"single": {"4096": [[1, 1, 1, 1], [0, 1, 0, 0],
                                                                  [1, 1, 0, 0]]}}}},
        },
    }  # fmt: skip


def test_arms_are_held_against_dense_window_by_window():
    results = [arm_result("dense", [20.0, 30.0]), arm_result("paper", [21.0, 32.0])]
    dense, paper = report.loss_table(results)[2:]
    assert "| 2.5000 |  | 2.5000 |  |" in dense and "| 5M |" in dense and "| 2.00 | done |" in dense
    # 0.1 and 0.2 nats a token more: 0.15 of 2.5, and half of their distance is the error
    assert "| 2.6500 | +6.00% (se 2.00%) |" in paper
    right = report.retrieval_table(results, results[0]["recipe"]["examination"]["probes"][0])
    assert right[0] == "| arm | single 4096 | single 4096 far |"
    assert right[2] == "| dense | 67% | 100% |"


def test_an_arm_that_is_not_done_leaves_its_cells_empty(tmp_path):
    result = arm_result("paper", [1.0])
    del result["examination"]
    result |= {"phases": [], "status": "started"}
    (tmp_path / "paper.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert "| paper | 39.7% | 26.5% | 0M |  |  |  |  |  | started |" in text


def test_samples_are_counted_by_window_and_document():
    answers = [["single", 4096, True, 0, 100, 3000, 2, True, 0.1],
               ["single", 4096, True, 1, 2900, 3000, 2, False, 9.0],
               ["single", 4096, False, 0, 100, 3000, 2, False, 9.0]]  # fmt: skip
    table = {"by_position": [[1.0, 2.0]], "position_counts": [[3, 4]],
             "by_repeat": [[0.0, 0.5, 0.25, 0.25, 0.0, 2.0]],
             "repeat_counts": [[0, 1, 2, 3, 0, 1]]}  # fmt: skip
    assert examine.samples({"loss": {"7": table}, "answers": answers}) == {
        "loss": {"7": [[3.0, 7, 0.5, 5]]},
        "right": {"single": {"4096": [[1, 1, 1, 1], [0, 1, 0, 0]]}},
    }


def test_from_a_source_tree_to_the_report(folder):
    """scripts/quality/run.sh with one arm of two phases."""
    arm = "turned-dense-head"
    env = os.environ | ON_CPU | {
        "STUDY": str(folder / "study"), "TREE": str(folder / "tree"), "HOLD_OUT": "0.4 2",
        "VOCABULARY": "600", "PYTHON": sys.executable,
        "RECIPE": "configs/quality/recipes/tiny.yaml", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/quality/run.sh"), arm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((folder / f"study/results/{arm}--tiny.json").read_text())
    assert result["status"] == "done"
    assert [phase["steps"] for phase in result["phases"]] == [8, 4]
    losses = [dict(phase["loss"]) for phase in result["phases"]]
    assert losses[1][1] < losses[0][1] - 0.3  # the second phase goes on from the first
    assert result["examination"]["loss-256"]["loss"]["256"]["all"]["count"] == 1024
    assert set(result["examination"]["records"]["retrieval"]) == {"single", "multi_key"}
    results = report.read_results(folder / "study/results")
    assert len(results[0]["examination"]["loss-256"]["samples"]["loss"]["256"]) == 4
    assert f"| {arm} |" in (folder / "study/report/report.md").read_text()


def test_a_job_names_its_recipe_and_seed():
    job = study.Job.parse("paper@configs/quality/recipe.yaml#2", Path("other.yaml"))
    assert (job.arm, job.recipe.stem, job.seed) == ("paper", "recipe", 2)
    assert job.name == "paper--recipe--seed-2" and job.trunk.name == "trunk--recipe--seed-2"
    assert study.Job.parse("dense", Path("a/other.yaml")).name == "dense--other"


def test_arms_of_a_failed_trunk_are_not_started(tmp_path, monkeypatch, capsys):
    recipe = str(ROOT / "configs/quality/recipe.yaml")
    monkeypatch.setattr(study.Job, "command", lambda self, a: [sys.executable, "-c", "1 / 0"])
    assert study.main(["paper", "--recipe", recipe, "--data", "x", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "trunk--recipe: FAILED" in out and "ZeroDivisionError" in out
    assert "paper--recipe" not in out


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
    monkeypatch.setattr(train_arm, "launcher", lambda: [sys.executable, "-c", program])
    config = ROOT / "configs/quality/dense.yaml"
    return train_arm.Arm(config, recipe, folder / "data", folder / "out", None, 1, [])


def test_a_phase_that_was_broken_off_is_trained_again(tmp_path, monkeypatch):
    left = tmp_path / "out/phase-0/checkpoints/latest_checkpointed_iteration.txt"
    program = f"from pathlib import Path; p = Path({str(left)!r}); p.parent.mkdir(parents=True)"
    arm = an_arm(tmp_path, monkeypatch, program + "; p.write_text('5')")
    with pytest.raises(RuntimeError, match="checkpoint of step 5 of 8"):
        train_arm.train(arm, 0)
    arm = an_arm(tmp_path, monkeypatch, program + "; p.write_text('8')")
    train_arm.train(arm, 0)  # the folder of the first try is gone, or mkdir would fail
    assert [row["steps"] for row in arm.result["phases"]] == [8]
    again = an_arm(tmp_path, monkeypatch, "1 / 0")
    train_arm.train(again, 0)
    assert again.result["phases"] == arm.result["phases"]
