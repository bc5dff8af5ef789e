"""The quality study: its table of arms, its documents, and a tiny version of all of it."""

import json
import os
import random
import runpy
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
import examiner
import pieces
import plan
import report
import results
import study
import tokenizer
from jobs import Job, with_what_comes_before
from recipe import Phase, history, load_recipe

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
    for other in ("recipe", "plan"):
        files.pop(other)
    assert files == {arm: arms.run_file(arm) for arm in arms.ARMS}, "run scripts/quality/arms.py"


@pytest.mark.parametrize("plain, shards, tokens", [
    ("plain-8k", "no-dense", 8192), ("plain-32k", "no-dense", 32768),
    ("plain-8k-every-4", "every-4", 8192), ("pilot-plain-8k", "pilot", 8192),
    ("plain-8k-every-6", "every-6", 8192), ("homogeneous", "no-dense", 8192),
    ("pilot-homogeneous", "pilot", 32768),
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
        for sequences in (phase.sequences, max(1, phase.sequences // 2)):  # on one GPU, on two
            assert phase.micro_batch(sequences) * phase.length <= phase.micro_batch_tokens
            assert sequences % phase.micro_batch(sequences) == 0


def test_a_wrong_recipe_is_refused_by_field(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("phases: [{length: 100, tokens: 1, batch_tokens: 250, lr: 1, final_lr: 1, "
                    "retrieval: 0}]\nexamination: {lengths: [1], loss_lengths: [1]}")  # fmt: skip
    with pytest.raises(ConfigError, match=r"phases\.0.*250 is not a multiple of length=100"):
        load_recipe(path)


PHASE_LINE = ("{length: 128, tokens: 256, batch_tokens: 256, lr: 1.0e-3, final_lr: 1.0e-4, "
              "retrieval: 0")  # fmt: skip


@pytest.mark.parametrize("text, message", [
    ("phases: []", "phases: is empty, and there is no after or start"),
    ("{start: hf, after: recipe.yaml}", "start: hf cannot stand beside after"),
    ("{start: hf, after_arm: dense}", "after_arm: dense needs after"),
    (f"{{phases: [{PHASE_LINE}}}], watch_tokens: 200}}", "watch_tokens: 200 .* at least 256"),
    (f"{{phases: [{PHASE_LINE}}}], dense_kernels: [cudnn, flash]}}", "dense_kernels: only one"),
], ids=["nothing", "two-starts", "arm-of-nothing", "watch", "kernels"])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "wrong.yaml")


def test_a_run_with_a_chosen_kernel_begins(monkeypatch, capsys):
    """As far as its arguments are read."""
    monkeypatch.setattr("sys.argv", ["pretrain_dense.py", "cudnn"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/quality/pretrain_dense.py"), run_name="__main__")
    assert stop.value.code == 2 and "required: --config" in capsys.readouterr().err


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


def test_files_are_cut_and_joined(tmp_path):
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 100)
    written = pieces.cut(tmp_path / "model.bin", tmp_path / "cut", mb=0.01)
    assert [path.stat().st_size for path in written] == [10000, 10000, 5600]
    (tmp_path / "out").mkdir()
    assert pieces.join(tmp_path / "cut", tmp_path / "out") == [tmp_path / "out/model.bin"]
    assert (tmp_path / "out/model.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    folders = pieces.loads(tmp_path / "cut", mb=0.016)
    assert [sorted(p.name[-3:] for p in f.iterdir()) for f in folders] == [["000", "002"], ["001"]]
    with pytest.raises(ValueError, match=r"pieces of model\.bin are missing; there are 2"):
        pieces.join(folders[0], tmp_path / "out")


@pytest.mark.parametrize("length", [128, 512])
def test_retrieval_documents_fill_sequences(folder, length):
    recipe = documents.DocumentMix(repeats=0.5, records=0.5)
    makers = [documents.Maker(str(folder / "tokenizer"), None, length, 1, recipe) for _ in range(2)]
    first, second = (maker.sequences(3, 8) for maker in makers)
    assert first.shape == (8, length) and (first[:, -1] == 0).all()
    numpy.testing.assert_array_equal(first, second)


def test_a_phase_names_the_documents_that_it_asks_for(folder):
    """A shorter list of long documents is another dataset, and is what a maker writes."""
    options = dict(length=512, tokens=5120, batch_tokens=512, lr=1e-3, final_lr=1e-4, retrieval=1)
    plain = Phase(**options).documents_name(1)
    asked = Phase(**options, shortest=256, styles=["sentences", "records"]).documents_name(1)
    assert (plain, asked) == ("retrieval-512-0.6-0.5-seed-1-of-18",
                              "retrieval-512-0.6-0.5-from-256-sr-seed-1-of-18")  # fmt: skip
    with pytest.raises(ValueError, match="shortest"):  # lengths are doubled from there
        Phase(**options, shortest=0)
    far = dict(tasks=["single", "multi_key"], facts=128, asked=1.0)
    assert Phase(**options, **far).documents_name(1) == (
        "retrieval-512-0.6-0.5-single+multi_key-of-128-facts-asked-1-seed-1-of-18"
    )
    assert Phase(**options, **far).mix == dict(
        records=0.6, repeats=0.5, tasks=("single", "multi_key"), facts=128, asked=1.0
    )
    mix = documents.DocumentMix(shortest=256, styles=("sentences",))
    maker = documents.Maker(str(folder / "tokenizer"), None, 512, 1, mix)
    rng = random.Random(2)
    assert {maker.document_length(rng, 512) for _ in range(40)} == {256, 512}
    assert maker.document_length(rng, 100) == 100


def test_a_mix_with_more_facts_asks_more_often_from_afar(folder, monkeypatch):
    """What a mix says of tasks, facts and questions is what its documents have."""
    made, make = [], documents.make_document

    def watch(task, *arguments, **options):
        made.append((task, options["records"], make(task, *arguments, **options)))
        return made[-1][2]

    monkeypatch.setattr(documents, "make_document", watch)
    mix = dict(repeats=0, records=0, shortest=2048, styles=("records",))
    answers = []
    for more in ({}, dict(tasks=("multi_key",), facts=128, asked=1.0)):
        made.clear()
        maker = documents.Maker(
            str(folder / "tokenizer"), None, 2048, 1, documents.DocumentMix(**mix, **more)
        )
        rng = random.Random(3)
        for _ in range(20):
            maker.document(rng, 2047)
        answers.append(sum(x.distance > 1024 for _, _, one in made for x in one.answers))
    assert {task for task, _, _ in made} == {"multi_key"}
    assert 64 < max(records for _, records, _ in made) <= 128
    assert answers[1] > 3 * answers[0] > 0


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
    assert results.read_log(tmp_path / "log.txt") == {
        "steps": 40,
        "loss": [(20, 9.5), (40, 8.25)],
        "validation": {"retrieval": [(40, 3.5)]},
        "ms_per_step": 900.0,
        "seconds": [(20, 18.0), (40, 20.0)],
    }


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
    """scripts/quality/run.sh: an arm that goes on from its own short phase, in smaller blocks."""
    arm = "turned-dense-head"
    env = os.environ | ON_CPU | {
        "STUDY": str(folder / "study"), "TREE": str(folder / "tree"), "HOLD_OUT": "0.4 2",
        "VOCABULARY": "600", "PYTHON": sys.executable, "BUNDLE": str(folder / "bundle.tgz"),
        "RECIPE": "configs/quality/recipes/tiny.yaml", "OMP_NUM_THREADS": "1", "LIMIT": "600",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/quality/run.sh"), arm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((folder / f"study/results/{arm}--tiny.json").read_text())
    assert result["status"] == "done"
    assert [phase["steps"] for phase in result["phases"]] == [8, 4]
    losses = [dict(phase["loss"]) for phase in result["phases"]]
    assert losses[1][1] < losses[0][1] - 0.3  # the second phase goes on from the first
    assert result["examination"]["loss-256"]["loss"]["256"]["all"]["count"] == 1024
    records = result["examination"]["records"]["retrieval"]
    assert set(records) == {"single", "multi_key"}
    assert "blocks of 64, 2 shards" in records["single"]["by shard"]
    found = report.read_results(folder / "study/results")
    assert len(found[-1]["examination"]["loss-256"]["samples"]["loss"]["256"]) == 4
    assert f"| {arm} |" in (folder / "study/report/report.md").read_text()
    names = subprocess.run(["tar", "tzf", env["BUNDLE"]], capture_output=True, text=True).stdout
    assert f"results/{arm}--tiny.json" in names and "report/report.md" in names


TRUNK = Job("dense", Path("configs/quality/recipes/trunk.yaml"), 2)


def test_a_job_names_its_recipe_and_seed(monkeypatch):
    monkeypatch.chdir(ROOT)
    job = Job.parse("paper@configs/quality/recipe.yaml#2", Path("other.yaml"))
    assert (job.arm, job.recipe, job.seed) == ("paper", load_recipe(job.path), 2)
    assert job.name == "paper--recipe--seed-2" and job.before == TRUNK
    assert Job.parse("dense", Path("a/other.yaml")).name == "dense--other"


def test_what_comes_before_is_trained_once_and_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = [Job.parse(f"{arm}@configs/quality/recipes/needles.yaml#2", Path("-"))
            for arm in ("paper", "dense")]  # fmt: skip
    names = [job.name.removesuffix("--seed-2") for job in with_what_comes_before(jobs)]
    assert names == ["dense--trunk", "paper--recipe", "paper--long", "paper--needles",
                     "dense--recipe", "dense--long", "dense--needles"]  # fmt: skip
    assert [len(r.phases) for r in history("configs/quality/recipes/needles.yaml")] == [1, 1, 1, 0]


def test_the_plan_names_arms_and_recipes_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = plan.read_plan()
    everything = plan.expand([f"part:{part.name}" for part in parts], parts)
    for text in everything:
        job = Job.parse(text, Path("-"))
        assert job.arm in arms.ARMS and job.recipe.examination is not None
        # Half an hour on a GPU, which runs go on in from call to call, has room for two in a row.
        assert len(text.split("@")[1]) < 60 and job.seconds(1, 3) + job.examination_seconds(3) < 900
    chosen = plan.expand([], parts)
    assert set(chosen) < set(everything) and not any("smollm2" in text for text in chosen)
    with pytest.raises(ConfigError, match="part:frist: there is no such part; parts are own"):
        plan.expand(["part:frist"], parts)


def test_an_arm_that_would_not_end_in_time_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "Examiner", lambda *_: None)
    monkeypatch.setattr(Job, "command", lambda self, a: ["touch", str(tmp_path / self.name)])
    monkeypatch.setattr(Job, "trained", lambda self, arms: (arms / self.name).exists())
    command = ["paper", "dense", "--data", "x", "--out", str(tmp_path)]
    assert study.main([*command, "--seconds", "400"]) == 0  # the trunk takes 286 s on one GPU
    out = capsys.readouterr().out
    assert "dense--trunk: trained" in out and "paper--recipe: started" in out
    (tmp_path / "paper--recipe").unlink()
    assert study.main([*command, "--seconds", "100"]) == 0
    out = capsys.readouterr().out
    assert "left for another time: paper--recipe" in out and "started" not in out


def test_arms_of_a_failed_trunk_are_not_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "Examiner", lambda *_: None)
    recipe = str(ROOT / "configs/quality/recipe.yaml")
    monkeypatch.setattr(Job, "command", lambda self, a: [sys.executable, "-c", "1 / 0"])
    assert study.main(["paper", "--recipe", recipe, "--data", "x", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "dense--trunk: FAILED" in out and "ZeroDivisionError" in out
    assert "paper--recipe: started" not in out


def test_a_timed_arm_has_its_gpu_to_itself(monkeypatch):
    monkeypatch.chdir(ROOT)
    timed, other = (Job.parse(f"dense@configs/quality/{path}", Path("-"))
                    for path in ("recipes/equal-time-32k.yaml", "recipe.yaml"))  # fmt: skip
    place = study.Place("0", None)
    assert timed.alone and place.takes(timed, 3) and place.takes(other, 3)
    place.running = {other: None}
    assert not place.takes(timed, 3) and place.takes(other, 3) and not place.takes(other, 1)
    place.running = {timed: None}
    assert place.quiet and not place.takes(other, 3)


def test_an_examiner_that_dies_answers_for_all_that_wait(tmp_path, monkeypatch):
    (tmp_path / "examine.py").write_text("import sys; sys.stdin.readline(); sys.exit('no memory')")
    monkeypatch.setattr(examiner, "HERE", tmp_path)
    asked = examiner.Examiner(tmp_path, tmp_path, "")
    jobs = [Job(arm, Path("recipe.yaml")) for arm in ("dense", "paper")]
    for job in jobs:
        asked.ask(job, tmp_path / job.name, None)
    found = asked.answers(quiet=True)
    assert found == [] and asked.busy  # an arm is timed beside it
    deadline = time.time() + 30
    while len(found) < 2 and time.time() < deadline:
        found += asked.answers(quiet=False)
        time.sleep(0.05)
    assert [job for job, _ in found] == jobs and not asked.busy
    assert all(answer.startswith("failed: no memory") for _, answer in found)
    asked.close()
