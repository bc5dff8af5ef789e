"""Evaluations that are made again, cut off, or compared across folders."""

import json
import shutil

import pytest
from convert_models import S2, make_model, run_tree
from evaluation_cases import by_byte, oracle, reader, write_repeating
from pydantic import ValidationError
from vllm_cases import change_config

from s2_kernels.record import record
from s2megatron.cli import main
from s2megatron.config import parse_config
from s2megatron.convert.tokenizer import write_byte_tokenizer
from s2megatron.errors import ConfigError
from s2megatron.evaluation import evaluate as evaluate_module
from s2megatron.evaluation.compare import differences
from s2megatron.evaluation.evaluate import LossPlan, evaluate
from s2megatron.evaluation.result import Evaluation
from s2megatron.evaluation.scoring import RetrievalPlan, evaluate_retrieval
from s2megatron.evaluation.words import digest

pytestmark = pytest.mark.usefixtures("one_thread")
RETRIEVAL = ("--tasks", "single", "--documents", "2", "--control", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "first"
    make_model("llama", folder, vocab_size=257, max_position_embeddings=1024)
    sizes = dict(num_layers=4, heads=4, kv_heads=2)
    change_config(folder, s2=record(parse_config(run_tree("llama", S2)).sparsity.resolve(**sizes)))
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_repeating(tmp_path_factory.mktemp("data"))


def command(folder, out, *options) -> int:
    given = ["--device", "cpu", "--lengths", "256", *map(str, options)]
    return main(["evaluate", str(folder), "--out", str(out), *given])


def files(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_an_evaluation_made_again_leaves_nothing_of_the_one_before(folder, dataset, tmp_path):
    loss = ("--data", dataset, "--windows", "1")
    assert command(folder, tmp_path, *loss, *RETRIEVAL) == 0
    assert "retrieval.png" in files(tmp_path)
    assert command(folder, tmp_path, *loss, "--tasks", "none") == 0
    assert files(tmp_path) == {"evaluation.json", "rows.json", "evaluation.md", "loss.png"}


def test_an_evaluation_that_is_cut_off_says_so(folder, dataset, tmp_path, monkeypatch):
    loss = ("--data", dataset, "--windows", "1")
    assert command(folder, tmp_path, *loss, *RETRIEVAL) == 0

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "evaluate_retrieval", interrupt)
    assert command(folder, tmp_path, *loss, *RETRIEVAL) == 130
    assert files(tmp_path) == {"evaluation.json", "rows.json"}  # and no report of other numbers
    about = json.loads((tmp_path / "evaluation.json").read_text())["about"]
    assert about["unfinished"] == "without retrieval"


def test_models_with_copies_of_one_tokenizer_are_compared(folder, tmp_path, capsys):
    """Each folder has its own, and by default the evaluation takes it from there."""
    second = shutil.copytree(folder, tmp_path / "second")
    for model, out in ((folder, "a"), (second, "b")):
        assert command(model, tmp_path / out, *RETRIEVAL) == 0
    lines = differences(tmp_path / "a", tmp_path / "b")
    capsys.readouterr()
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["compare", *folders, "--out", str(tmp_path / "none" / "c.md")]) == 2
    out, err = capsys.readouterr()
    assert "## Retrieval" in out and "c.md: cannot be written: No such file" in err
    assert lines and {line.change.value for line in lines} == {0.0}
    file = second / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    file.write_text(json.dumps(tokenizer))
    assert command(second, tmp_path / "c", *RETRIEVAL) == 0
    with pytest.raises(ConfigError, match="differ in tokenizer"):
        differences(tmp_path / "a", tmp_path / "c")
    capsys.readouterr()


def test_digests_tell_tokenizers_apart():
    assert digest(by_byte) == digest(lambda text: by_byte(text))
    assert digest(by_byte) != digest(lambda text: [byte ^ 1 for byte in by_byte(text)])


@pytest.mark.parametrize(
    ("plan", "fields"),
    [
        (LossPlan, {"lengths": (256, 512, 256)}),
        (RetrievalPlan, {"lengths": (256, 256)}),
        (RetrievalPlan, {"lengths": (256,), "tasks": ("single", "single")}),
    ],
)
def test_what_is_asked_for_twice_would_be_counted_twice(plan, fields):
    with pytest.raises(ValidationError, match="stands there twice"):
        plan(**fields)


@pytest.mark.parametrize("tokens", [0, -4])
def test_no_batch_has_no_tokens(folder, tmp_path, capsys, tokens):
    assert command(folder, tmp_path / "out", *RETRIEVAL, "--batch-tokens", tokens) == 2
    assert f"--batch-tokens {tokens}: must be at least 1" in capsys.readouterr().err


def test_rows_that_are_no_object_are_refused(tmp_path):
    plan = RetrievalPlan(lengths=(800,), tasks=("single",), documents=1, control=0)
    result = evaluate_retrieval(
        oracle(reader()), by_byte, plan, batch_tokens=1600, say=lambda line: None
    )
    Evaluation({"model": "reader", "attention": "none"}, [], result).write(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ConfigError, match="version None"):
        differences(tmp_path, tmp_path)


def test_programs_are_told_what_is_missing(dataset):
    """`keep` gets what there is after each length."""
    from s2megatron.evaluation.windows import Documents

    kept = []
    network = oracle(reader())
    plan = LossPlan(lengths=(64, 128), windows=1)
    evaluate(
        network, {"model": "oracle"}, loss=plan, documents=Documents(dataset, network.vocab_size),
        keep=kept.append, say=lambda line: None,
    )  # fmt: skip
    told = [part.about.get("unfinished") for part in kept]
    assert told == ["without loss at 128", None]
