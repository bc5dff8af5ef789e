"""Which layers to leave dense: the one that reads what is far, in a model where we know it."""

import json
import sys

import pytest
import torch
import yaml
from evaluation_cases import by_byte
from launches import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from s2_kernels import local_stride
from s2megatron import hf
from s2megatron.config import parse_config
from s2megatron.data import write_dataset
from s2megatron.errors import ConfigError
from s2megatron.evaluation.windows import Documents

sys.path.insert(0, str(ROOT / "scripts/quality"))
import arms
import choose_dense

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
    samples = {"text": choose_dense.text(documents, 256, 4)}
    found = choose_dense.choose(choose_dense.Judge(model, samples, 2), sparse(), 2, lambda _: None)
    assert found["layers"][0] == READER and len(found["layers"]) == 2
    first, last = found["rounds"]
    assert [len(first), len(last)] == [5, 1]  # of the better half, one was chosen before
    assert all(first[n]["gap"] == pytest.approx(float(n != READER), abs=0.01) for n in first)
    assert next(iter(last.values()))["gap"] == pytest.approx(0, abs=0.01)


def test_losses_are_those_of_the_patterns_in_force(model, documents):
    samples = {"text": choose_dense.text(documents, 256, 2)}
    hf.use_patterns(model, sparse())
    judge = choose_dense.Judge(model, samples, 2)
    dense = tuple(choose_dense.as_dense(pattern) for pattern in sparse())
    first, other, again = (judge.losses(p)["text"] for p in (sparse(), dense, sparse()))
    assert first == again != other
    model.set_attn_implementation("sdpa")
    nats = judge.network.token_losses(samples["text"].tokens)[samples["text"].counted]
    assert other == pytest.approx(nats.mean().item(), rel=1e-5)


def test_only_answers_of_questions_count(documents):
    found = choose_dense.questions(documents, by_byte, 2048, 4)
    answers = [
        bytes(row[1:][counted].tolist())
        for row, counted in zip(found.tokens, found.counted, strict=True)
    ]
    # One fact or eight, in sentences (a blank and 7 digits) and in records (4 digits).
    assert [len(answer) for answer in answers] == [8, 8 * 8, 4, 8 * 4]
    assert all(answer.replace(b" ", b"").isdigit() for answer in answers)


def test_patterns_of_another_model_change_nothing(model):
    hf.use_patterns(model, sparse())
    for wrong in (sparse(4), (local_stride(heads=8, local_blocks=2, stride=4),) * 5):
        with pytest.raises(ConfigError, match=r"layers|heads"):
            hf.use_patterns(model, wrong)
    assert hf.layer_pattern(model.model.layers[0].self_attn) == sparse()[0]


def test_the_command_writes_a_run_file_with_its_choice(tmp_path, monkeypatch, model, documents):
    model.save_pretrained(tmp_path / "hf")
    section = {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}, "layers": []}
    shape = {"num_layers": 5, "num_attention_heads": 4, "group_query_attention": True,
             "num_query_groups": 2}  # fmt: skip
    monkeypatch.setitem(arms.ARMS, "small", section)
    monkeypatch.setattr(arms, "MODEL", arms.MODEL | shape)
    monkeypatch.setattr(choose_dense, "make_tokenizer", lambda _: (by_byte, None))
    choose_dense.main([
        str(tmp_path / "hf"), str(tmp_path), "--arm", "small", "--layers", "1", "--length", "1536",
        "--samples", "2", "--out", str(tmp_path / "chosen.json"),
        "--write", str(tmp_path / "run.yaml"),
    ])  # fmt: skip
    (layer,) = json.loads((tmp_path / "chosen.json").read_text())["layers"]
    assert layer == READER
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["sparsity"]["layers"] == [{"layers": [layer], "kind": "dense"}]
    parse_config(written)
