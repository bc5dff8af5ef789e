"""`s2megatron generate` and the byte-level tokenizer that convert writes for it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from convert_models import S2, make_model, run_tree
from safetensors.torch import load_file, save_file
from vllm_cases import change_config

import s2megatron.hf as s2hf
from s2_kernels.record import record
from s2megatron.cli import main
from s2megatron.config import parse_config
from s2megatron.convert.tokenizer import run_tokenizer, write_byte_tokenizer
from s2megatron.data.tokenizers import END_OF_TEXT, make_tokenizer
from s2megatron.errors import ConfigError
from s2megatron.evaluation.network import load_network
from s2megatron.generate import GenerationReport


def record_of(name, **sizes) -> dict:
    sizes = dict(num_layers=4, heads=4, kv_heads=2) | sizes
    return record(parse_config(run_tree(name, S2)).sparsity.resolve(**sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level model, as convert leaves one."""
    folder = tmp_path_factory.mktemp("bytes")
    make_model("llama", folder, vocab_size=257, eos_token_id=256)
    change_config(folder, s2=record_of("llama"))
    write_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn 'é' + \"日本\"\r\n\n  # \x00\x7f\xad", "", " a"]
)
def test_the_byte_tokenizer_is_the_datasets(folder, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encode, end, size = make_tokenizer("bytes")
    ids = tokenizer(text).input_ids
    assert ids == list(encode(text)) == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (size, end)


def test_only_bytes_get_the_byte_tokenizer():
    """A NullTokenizer of 257 numbers is not text."""
    args = SimpleNamespace(tokenizer_type="NullTokenizer", vocab_size=257)
    assert not run_tokenizer(args).is_bytes
    args.s2_tokenizer = "bytes"
    assert run_tokenizer(args).is_bytes
    args.s2_tokenizer = "megatron"
    assert not run_tokenizer(args).is_bytes


def test_text_streams_and_the_bytes_are_told(folder, tmp_path, capsys):
    prompt = "import os\n\nprint(os.path)\n" * 4
    (tmp_path / "prompt.txt").write_text(prompt)
    command = ["generate", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]
    assert main([*command, "--max-new-tokens", "40", "--device", "cpu"]) == 0
    out, report = capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = s2hf.load(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40,
                              do_sample=False, eos_token_id=256, pad_token_id=256)  # fmt: skip
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert out.rstrip("\n") == text.rstrip("\n")
    assert f"prompt of {ids.shape[1]} tokens" in report and "tokens/s" in report
    assert "KV kept" in report and "dense would have kept" in report
    sampled = [*command, "--max-new-tokens", "5", "--temperature", "0.8", "--top-p", "0.9"]
    assert main([*sampled, "--device", "cpu"]) == 0


def test_the_report_of_one_token():
    report = GenerationReport(10, 1, 0.5, 0.0, 2048, 4096, 3 << 20)
    assert "no token after the first" in str(report)
    assert "KV kept: 2.0 KiB (memory taken 4.0 KiB); dense would have kept 3.0 MiB, 1536.0" in str(
        report
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompt-file", "none.txt"], "none.txt: cannot be read"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--temperature", "-1"], "must be at least 0"),
        (["--temperature", "nan"], "must be at least 0, and finite"),
        (["--top-p", "1.5"], "above 0 and at most 1"),
        (["--dtype", "int8"], "must be one of"),
        (["--graph", "--device", "cpu"], "leave it out off a GPU"),
    ],
)
def test_what_cannot_be_generated_says_why(folder, tmp_path, capsys, change, message):
    (tmp_path / "prompt.txt").write_text("a")
    command = ["generate", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]
    assert main([*command, *change]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_hold_no_model_or_no_tokenizer(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    prompt = ["--prompt-file", str(tmp_path / "empty.txt"), "--device", "cpu"]
    assert main(["generate", str(tmp_path), *prompt]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert main(["generate", str(folder), *prompt]) == 2
    assert "holds no text" in capsys.readouterr().err
    make_model("llama", tmp_path / "bare")
    change_config(tmp_path / "bare", s2=record_of("llama"))
    assert main(["generate", str(tmp_path / "bare"), *prompt]) == 2
    assert "tokenizer cannot be loaded" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("text")
    # of some models transformers makes a tokenizer out of config.json, and it knows no token
    make_model("qwen2", tmp_path / "qwen2")
    change_config(tmp_path / "qwen2", s2=record_of("qwen2"))
    assert main(["generate", str(tmp_path / "qwen2"), *prompt]) == 2
    assert "no file of one" in capsys.readouterr().err


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def generate(folder, tmp_path, capsys, *options, text="a prompt\n") -> tuple[int, str, str]:
    (tmp_path / "prompt.txt").write_text(text)
    command = ["generate", str(folder), "--prompt-file", str(tmp_path / "prompt.txt")]
    status = main([*command, "--device", "cpu", "--max-new-tokens", "5", *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_dense_model_is_told_before_its_weights_are_read(copied, tmp_path, capsys):
    change_config(copied, s2=None)
    for file in copied.glob("*.safetensors"):
        file.unlink()
    status, _, err = generate(copied, tmp_path, capsys)
    assert status == 2 and "config.json has no 's2' key" in err


def weights_of(folder) -> dict[str, Path]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {name: folder / file for name, file in index["weight_map"].items()}


def without_a_tensor(folder):
    """transformers makes it of random numbers, and goes on."""
    name = "model.layers.1.self_attn.q_proj.weight"
    file = weights_of(folder)[name]
    kept = {k: v for k, v in load_file(file).items() if k != name}
    save_file(kept, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"{name}: no file holds it"


def without_a_shard(folder):
    file = weights_of(folder)["model.norm.weight"]
    file.unlink()
    return file.name


def with_a_shard_cut_short(folder):
    file = weights_of(folder)["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-64])
    return "its weights cannot be loaded"


def without_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()
    return "its weights cannot be loaded"


def with_a_sparsity_of_other_heads(folder):
    change_config(folder, s2=record_of("llama", heads=8, kv_heads=2))
    return "for 8 heads and 2 KV heads, the model has 4 and 2"


def with_a_sparsity_of_other_layers(folder):
    change_config(folder, s2=record_of("llama", num_layers=5))
    return "patterns of 5 layers, the model has 4"


@pytest.mark.parametrize(
    "damage",
    [without_a_tensor, without_a_shard, with_a_shard_cut_short, without_weights,
     with_a_sparsity_of_other_heads, with_a_sparsity_of_other_layers],
)  # fmt: skip
def test_folders_that_are_not_whole(copied, tmp_path, capsys, damage):
    told = damage(copied)
    status, _, err = generate(copied, tmp_path, capsys)
    assert status == 2 and told in err and err.count("\n") <= 2
    with pytest.raises(ConfigError, match=told):
        s2hf.load(copied)
    with pytest.raises(ConfigError, match=told):
        load_network(copied, "s2", device="cpu")


def test_a_tokenizer_of_a_larger_vocabulary(copied, tmp_path, capsys):
    file = copied / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["p"] = 300
    file.write_text(json.dumps(tokenizer))
    status, _, err = generate(copied, tmp_path, capsys)
    assert status == 2 and "makes token 300 of it" in err


def test_more_tokens_than_positions_are_told(copied, tmp_path, capsys):
    change_config(copied, max_position_embeddings=8)
    status, _, err = generate(copied, tmp_path, capsys)
    assert status == 0 and "more than the model's 8 positions" in err


def test_a_generation_config_says_what_ends_a_text_and_nothing_else(
    folder, copied, tmp_path, capsys
):
    text = generate(folder, tmp_path, capsys)[1]
    config = dict(num_beams=3, do_sample=True, temperature=0.6, repetition_penalty=9.0)
    (copied / "generation_config.json").write_text(json.dumps(config))
    assert generate(copied, tmp_path, capsys)[1] == text
    ends = dict(eos_token_id=list(range(256)))  # as chat models have more than one
    (copied / "generation_config.json").write_text(json.dumps(ends))
    assert "; 1 new ones" in generate(copied, tmp_path, capsys)[2]


def test_an_end_of_text_that_a_tokenizer_adds_is_left_out(folder, copied, tmp_path, capsys):
    file = copied / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    end = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [256], "tokens": [END_OF_TEXT]}},
    }
    file.write_text(json.dumps(tokenizer))
    status, out, err = generate(copied, tmp_path, capsys)
    assert status == 0, err
    assert "prompt of 9 tokens" in err and out == generate(folder, tmp_path, capsys)[1]
