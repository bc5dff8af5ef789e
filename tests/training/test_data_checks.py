"""A run finds the data that it asks for, or says so before anything is built."""

import json

import pytest
from in_process import call
from launches import TINY, start, write_run_file

from s2megatron.data import write_dataset

DOCUMENTS = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Datasets, lists of them, and a run file."""
    folder = tmp_path_factory.mktemp("checks")
    for name, documents in (("a", DOCUMENTS), ("v", 2), ("w", 1)):
        texts = [f"{name} {n} of some words " * 20 for n in range(documents)]
        write_dataset(texts, f"{folder}/{name}")
    write_dataset(["some words"], f"{folder}/odd")
    (folder / "odd").touch()  # in the place of its cache, as a folder that cannot be written
    (folder / "none.txt").write_text(f"1 {folder}/missing")
    (folder / "short.json").write_text(json.dumps({"train": [f"{folder}/a"]}))
    write_run_file(folder / "run.yaml", TINY | {"data": {"train": [f"{folder}/a"]}})
    return folder


ONE = "data.train=[] megatron.data_path=[D/a]"
BOTH = "megatron.full_validation=true megatron.multiple_validation_sets=true"
REFUSED = {
    "megatron.eval_iters=2": "megatron.eval_iters: 2, and there is no validation data: name data.v",
    "data.test=[D/v] megatron.eval_iters=null": "megatron.eval_iters: 100, and there is no valid",
    f"{ONE} megatron.split=1,0,0 megatron.eval_iters=2": "megatron.eval_iters: 2, and there is no",
    f"{ONE} megatron.split=98,1,1": "megatron.split: '98,1,1' gives 'test' none of the 40 docu",
    ONE: "megatron.split: '969, 30, 1' gives 'test' none of the 40 documents",
    f"{ONE} megatron.split=abc": "megatron.split: 'abc': must be three shares",
    f"{ONE} megatron.split=0,0,0": "megatron.split: '0,0,0': must be three shares",
    "data.train=[] megatron.data_path=[D/no] megatron.split=1,0,0": "megatron.data_path: D/no.bin",
    "data.train=[] megatron.data_args_path=D/no": "megatron.data_args_path: D/no: cannot be read",
    "data.train=[] megatron.data_args_path=D/none.txt": "megatron.split: None: must be three",
    "data.train=[] megatron.data_args_path=D/none.txt megatron.split=1": "megatron.data_args_",
    "data.train=[] megatron.per_split_data_args_path=D/short.json": "megatron.per_split_data_args_",
    "data.train=[D/odd]": "data.cache: is missing: the order of D/odd's documents is kept",
    "data.cache=D/a.bin/x": "data.cache: D/a.bin/x: the order of D/a's documents is kept in D/a.bi",
    "megatron.split=99,1,0": "megatron.split: '99,1,0' beside datasets of each split",
    "data.train=[] data.valid=[D/v]": "data.train: names nothing to train on",
    "data.train=['0 D/a','1 D/v']": "data.train: D/a has the weight 0; leave the dataset out",
    "data.valid=['1 D/v','0 D/w'] megatron.eval_iters=1": "data.valid: D/w has the weight 0",
    "megatron.dataloader_type=external": "megatron.dataloader_type: 'external'",
    "megatron.eval_interval=0": "megatron.eval_interval: 0: must be at least 1",
    "megatron.log_interval=0": "megatron.log_interval: 0: must be at least 1",
    "megatron.eval_iters=-1": "megatron.eval_iters: -1: must be 0",
    "data.valid=[D/v] megatron.full_validation=true": "megatron.full_validation and megatron.multi",
    "data.valid=[D/v] megatron.multiple_validation_sets=true": "megatron.full_validation and megat",
    "data.valid=[D/v] megatron.validation_set_names=[v]": "megatron.validation_set_names: is for",
    f"data.valid=['1 D/v','1 D/w'] {BOTH}": "data.valid: has weights, which multiple_validation_",
    f"data.valid=[D/v,D/w] {BOTH} megatron.validation_set_names=[v]": "megatron.validation_set_nam",
    f"data.valid=[D/v] data.test=[D/w] {BOTH}": "data.test: beside megatron.full_validation",
    f"data.valid=[D/v] {BOTH} megatron.eval_micro_batch_size=2": "megatron.eval_micro_batch_size:",
    f"{BOTH}": "megatron.full_validation: true: name the validation sets in data.valid",
}


@pytest.fixture(scope="module")
def said(home):
    cases = {
        case: [f"data.train=[{home}/a]", "data.mock=false", *case.replace("D/", f"{home}/").split()]
        for case in REFUSED
    }
    spaced = {case: _joined(words) for case, words in cases.items()}
    return call("model_cases", "refusals", json.dumps(spaced))


def _joined(words: list[str]) -> list[str]:
    """Words of one override together again: '0 D/a' has a blank in it."""
    joined: list[str] = []
    for word in words:
        if "=" in word:
            joined.append(word)
        else:
            joined[-1] += f" {word}"
    return joined


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_is_not_there_is_told_before_the_start(said, home, case):
    status, _, err = said[case]
    wanted = REFUSED[case].replace("D/", f"{home}/")
    assert status == 2 and f"this run cannot start:\n{wanted}" in err


def ran(config, *overrides, ranks=1):
    """Standard output of a run that ends well."""
    words = [
        "megatron.train_iters=2",
        "megatron.lr_warmup_iters=0",
        "megatron.eval_interval=1",
        *overrides,
    ]
    done = start(config, *words, ranks=ranks)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_run_without_validation_data_evaluates_nothing_and_says_so(home):
    """Megatron's default of 100 iterations ended it in its first evaluation."""
    out = ran(home / "run.yaml", "megatron.eval_iters=null")
    assert "evaluation       none: there is no validation data (data.valid)" in out
    assert "iteration        2/" in out and "validation loss" not in out


@pytest.mark.parametrize("ranks, layout", [(1, "context"), (2, "tensor"), (2, "pipeline")])
def test_evaluation_has_a_micro_batch_size_of_its_own(home, ranks, layout):
    """Tensor-parallel ranks got training's shape, and aborted or waited for ever."""
    size = f"megatron.{layout}_{'' if layout == 'context' else 'model_'}parallel_size={ranks}"
    common = [
        f"data.valid=[{home}/v]",
        "megatron.eval_iters=2",
        "megatron.micro_batch_size=2",
        size,
    ]
    losses = {
        micro: _validation(ran(home / "run.yaml", *common, micro, ranks=ranks))
        for micro in ("megatron.eval_micro_batch_size=2", "megatron.eval_micro_batch_size=1")
    }
    two, one = losses.values()
    assert len(two) == 3 and two == pytest.approx(one, abs=1e-5)


VIRTUAL = ["megatron.num_layers_per_virtual_pipeline_stage=1", "megatron.micro_batch_size=1"]


@pytest.mark.parametrize(
    "ranks, layout, more", [(2, "tensor", []), (4, "pipeline", []), (2, "pipeline", VIRTUAL)]
)
def test_whole_validation_sets_at_a_layout(home, ranks, layout, more):
    """Its loader gives one sample at a time, to first and last stages only."""
    common = [f"data.valid=[{home}/v,{home}/w]", *BOTH.split(), "megatron.micro_batch_size=2"]
    size = f"megatron.{layout}_model_parallel_size={ranks}"
    found = _validation(ran(home / "run.yaml", *common, size, *more, ranks=ranks))
    assert len(found) == 6


def _validation(out: str) -> list[float]:
    marked = [line.split("lm loss value: ")[1] for line in out.splitlines() if "loss value" in line]
    return [float(text.split()[0]) for text in marked]


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_that_the_model_has_no_rows_for(home, ranks):
    """Two tensor-parallel ranks trained to the end: neither had the row, and none said so."""
    prefix = f"{home}/wide{ranks}"
    write_dataset(["words " * 400], prefix)
    tokens = (home / f"wide{ranks}.bin").read_bytes()
    (home / f"wide{ranks}.bin").write_bytes(tokens[:600] + b"\xe7\x03" + tokens[602:])  # 999
    done = start(
        home / "run.yaml", f"data.train=[{prefix}]", f"megatron.tensor_model_parallel_size={ranks}",
        "megatron.train_iters=30", ranks=ranks,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"dataset {prefix}: has the token 999, and the model a vocabulary of 384" in done.stderr
