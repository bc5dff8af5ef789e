"""Which layers to leave dense: the one that reads what is far, in a model where we know it."""

import json
import re

import pytest
import torch
import yaml
from evaluation_cases import by_byte
from transformers import LlamaConfig, LlamaForCausalLM

from s2_kernels import local_stride
from s2megatron import cli, hf
from s2megatron.config import parse_config
from s2megatron.data import write_dataset
from s2megatron.errors import ConfigError
from s2megatron.evaluation import choose as choosing
from s2megatron.evaluation.windows import Documents

READER = 4
"""Of the model's layers, from 1, the one whose attention counts: the others' is made zero."""


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            initializer_range=0.2,
        )
    )  # fmt: skip
    for number, layer in enumerate(model.model.layers, 1):
        if number != READER:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


@pytest.fixture
def documents(tmp_path):
    draw = torch.Generator().manual_seed(1)
    texts = ["".join(map(chr, torch.randint(97, 123, (3000,), generator=draw))) for _ in range(2)]
    write_dataset(texts, str(tmp_path / "text"))
    return Documents(str(tmp_path / "text"), 257)


def sparse(layers: int = 5):
    rule = dict(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4, head_step=2)
    return (local_stride(**rule),) * layers


def test_the_layer_that_reads_is_chosen_first(model, documents):
    hf.use_patterns(model, sparse())
    samples = {"text": choosing.text(documents, 256, 4)}
    found = choosing.choose(choosing.Judge(model, samples, 2), sparse(), 2, lambda _: None)
    assert found["layers"][0] == READER and len(found["layers"]) == 2
    first, last = found["rounds"]
    assert [len(first), len(last)] == [5, 1]  # of the better half, one was chosen before
    assert all(first[n]["gap"] == pytest.approx(float(n != READER), abs=0.01) for n in first)
    assert next(iter(last.values()))["gap"] == pytest.approx(0, abs=0.01)


def test_what_the_pattern_loses_nothing_on_does_not_count():
    class Known:
        def losses(self, patterns):
            dense = [n for n, p in enumerate(patterns, 1) if p.is_dense]
            return {"text": 2.0 + 0.1 * (len(dense) > 3), "answers": 5.0 - (3 in dense)}

    said = []
    found = choosing.choose(Known(), sparse(4), 1, said.append)
    assert found["layers"] == [3] and found["rounds"][0][3]["gap"] == 0
    assert "loses nothing on text: judged by answers alone" in said[1]


def test_losses_are_those_of_the_patterns_in_force(model, documents):
    samples = {"text": choosing.text(documents, 256, 2)}
    hf.use_patterns(model, sparse())
    judge = choosing.Judge(model, samples, 2)
    dense = tuple(choosing.as_dense(pattern) for pattern in sparse())
    first, other, again = (judge.losses(p)["text"] for p in (sparse(), dense, sparse()))
    assert first == again != other
    model.set_attn_implementation("sdpa")
    nats = judge.network.token_losses(samples["text"].tokens)[samples["text"].counted]
    assert other == pytest.approx(nats.mean().item(), rel=1e-5)


def test_only_answers_of_questions_count(documents):
    found = choosing.questions(documents, by_byte, 2048, 4)
    answers = [
        bytes(row[1:][counted].tolist())
        for row, counted in zip(found.tokens, found.counted, strict=True)
    ]
    # One fact or eight, in sentences (a blank and 7 digits) and in records (4 digits).
    assert [len(answer) for answer in answers] == [8, 8 * 8, 4, 8 * 4]
    assert all(answer.replace(b" ", b"").isdigit() for answer in answers)


def test_short_samples_have_fewer_questions(documents):
    found = choosing.questions(documents, by_byte, 512, 4)
    assert found.counted.sum(1).tolist() == [8, 2 * 8, 4, 8 * 4]


def test_patterns_of_another_model_change_nothing(model):
    hf.use_patterns(model, sparse())
    for wrong in (sparse(4), (local_stride(heads=8, local_blocks=2, stride=4),) * 5):
        with pytest.raises(ConfigError, match=r"layers|heads"):
            hf.use_patterns(model, wrong)
    assert hf.layer_pattern(model.model.layers[0].self_attn) == sparse()[0]


RUN = {
    "sparsity": {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}, "layers": []},
    "megatron": {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4},
}


@pytest.fixture
def files(tmp_path, model, documents):
    """What the command takes, and FILE.json where it writes."""
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    return [str(tmp_path / "hf"), "--config", str(tmp_path / "run.yaml"), "--tokenizer", "bytes",
            "--data", str(tmp_path / "text"), "--length", "1536", "--samples", "2",
            "--out", str(tmp_path / "new" / "chosen.json")]  # fmt: skip


def test_the_command_says_what_to_write_into_the_run_file(files, tmp_path, capsys):
    assert cli.main(["choose-dense", *files, "--dense-layers", "1"]) == 0
    found = json.loads((tmp_path / "new" / "chosen.json").read_text())
    assert found["layers"] == [READER] and found["machine"] == "CPU"
    assert found["samples"] == {"text": 2, "answers": 2}
    said = capsys.readouterr().out
    # Three quarters of each window; one fact of 8 characters in one document, eight in the other.
    assert found["counted_tokens"] == {"text": 2 * (1535 - 384), "answers": 8 + 8 * 8}
    assert "answers: 2 samples of 1,536 tokens, of which 72 count" in said
    entry = yaml.safe_load(said.partition("sparsity.layers:\n")[2])
    assert entry == [{"layers": [READER], "kind": "dense"}]
    parse_config(RUN | {"sparsity": RUN["sparsity"] | {"layers": entry}})


def test_layers_that_the_run_file_makes_dense_stay_so(files, tmp_path):
    more = ["--dense-layers", "1", "sparsity.layers=[{layers: [1, 2], kind: dense}]"]
    assert cli.main(["choose-dense", *files, *more]) == 0
    (tried,) = json.loads((tmp_path / "new" / "chosen.json").read_text())["rounds"]
    assert sorted(tried) == ["3", "4", "5"]


@pytest.mark.parametrize("change, message", [
    ({"s2": {"version": 1, "groups": []}}, "was trained sparse"),
    ({"model_type": "gpt2", "num_key_value_heads": None},
     "config.json of a gpt2 has no num_key_value_heads"),
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
     "does not compute sliding_window|plain causal mask"),
])  # fmt: skip
def test_models_that_it_cannot_ask(files, tmp_path, capsys, change, message):
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert cli.main(["choose-dense", *files, "--dense-layers", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("more, message", [
    (["--dense-layers", "5"], "--dense-layers 5: .* makes 5 of 5 layers sparse"),
    (["--dense-layers", "0"], "--dense-layers 0: must be at least 1"),
    (["--dense-layers", "1", "--length", "4096"], "--length 4096: the model has 2048 positions"),
    (["--dense-layers", "1", "--length", "256"],
     "--length 256: holds no two questions: length=256: 4 facts"),
    (["--dense-layers", "1", "--config", "no.yaml"], "--config no.yaml: there is no such file"),
    (["--dense-layers", "1", "--data", "no"], "--data: no.bin does not exist"),
    (["--dense-layers", "1", "sparsity.default.local_blocks=96"], "the pattern loses nothing on"),
])  # fmt: skip
def test_what_does_not_fit_is_named(files, tmp_path, capsys, more, message):
    assert cli.main(["choose-dense", *files, *more]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert ("Loading weights" in said) == ("loses nothing" in message)  # all else is told before
    assert not (tmp_path / "new" / "chosen.json").exists()
