"""Options and fields that nothing would read are refused, and the plan reads what is written."""

import pytest
from in_process import call
from launches import TINY, write_run_file

from s2megatron import cli
from s2megatron.config import parse_config
from s2megatron.errors import ConfigError
from s2megatron.training.output import resolve

CASES = {
    "show RUN --layers 1": "--layers: is for a picture (--plot)",
    "show RUN --heads 0": "--heads: is for a picture (--plot)",
    "show RUN --blocks 8": "--blocks: is for a picture (--plot)",
    "generate HF --prompt-file x --top-p 0.9": "--top-p: is for sampling",
    "generate HF --prompt-file x --seed 1": "--seed: is for sampling",
    "data x --out y --hold-out-depth 2": "--hold-out-depth: is for what is held out (--hold-out)",
    "data x --out y --tokenizer-mb 9": "--tokenizer-mb: is for a tokenizer that is trained",
    "data x --out y --format text --field body": "--field: is for JSONL (--format jsonl)",
    "plan RUN --gpus 8 --search --tokens 1e9": "--tokens: is for the run file's own layout",
    "plan RUN --gpus 8 --search 0": "--search 0: must be at least 1",
    "evaluate HF --out x --packed": "--packed: is for the loss (--data)",
    "evaluate HF --out x --windows 9": "--windows: is for the loss (--data)",
    "evaluate HF --out x --data d --tasks none --filler f": "--filler: is for retrieval (--tasks)",
    "evaluate HF --out x --data d --tasks none --grid 64:16": "--grid: is for retrieval (--tasks)",
    "evaluate HF --out x --data d --tasks none --records 9": "--records: is for retrieval",
    "evaluate HF --out x --data d --tasks none --tokenizer bytes": "--tokenizer: is for retrieval",
    "evaluate HF --out x --data d --tasks none --seed 7": "--seed: is for retrieval (--tasks)",
    "evaluate HF --out x --tasks single --queries 8": "--queries: is for tasks of several facts",
    "evaluate HF --out x --tasks single --records 30": "--records: is for tasks of several facts",
}


@pytest.mark.parametrize("command", CASES)
def test_option_that_would_not_be_read(command, tmp_path, capsys):
    run = str(write_run_file(tmp_path / "run.yaml", TINY))
    words = command.split()
    assert cli.main([run if word == "RUN" else word for word in words]) == 2
    assert capsys.readouterr().err.startswith(f"s2megatron {words[0]}: {CASES[command]}")


@pytest.mark.parametrize(("field", "value"), [("keep", 5), ("verify", False)])
def test_output_fields_need_a_folder(field, value):
    """They were passed over where megatron.save named the checkpoints' folder."""
    tree = {"sparsity": {"default": {"kind": "dense"}}}
    words = rf"^output\.{field}: {value} without output\.folder"
    with pytest.raises(ConfigError, match=words):
        resolve(parse_config(tree | {"output": {field: value}}).output, {"save": "x"})
    for output in ({}, {"folder": None}):
        assert resolve(parse_config(tree | {"output": output}).output, {"save": "x"}) is None


def test_the_plan_is_of_the_modules_that_the_run_file_names():
    """Also those that are not installed here: it may be another machine's run."""
    fused = call("model_cases", "modules_of_plans")
    assert fused == {"": True, "local": False, "transformer_engine": True}


def test_the_plan_is_of_one_batch():
    """It was of one sequence a rank, whatever the schedule says."""
    status, out, err = call("model_cases", "plan_of_a_batch_schedule")
    assert status == 2 and "megatron.step_batch_size_schedule: '0:2 1280:8': a plan is of" in err
