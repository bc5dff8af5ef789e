"""`s2megatron generate` and the byte-level tokenizer that convert writes for it."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from convert_models import S2, make_model, run_tree

import s2megatron.hf as s2hf
from s2_kernels.record import record
from s2megatron.cli import main
from s2megatron.config import parse_config
from s2megatron.convert.tokenizer import run_tokenizer, write_byte_tokenizer
from s2megatron.data.tokenizers import make_tokenizer
from s2megatron.generate import GenerationReport


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level model, as convert leaves one."""
    folder = tmp_path_factory.mktemp("bytes")
    make_model("llama", folder, vocab_size=257, eos_token_id=256)
    patterns = parse_config(run_tree("llama", S2)).sparsity.resolve(
        num_layers=4, heads=4, kv_heads=2
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"s2": record(patterns)}))
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
    assert main(["generate", str(tmp_path / "bare"), *prompt]) == 2
    assert "tokenizer cannot be loaded" in capsys.readouterr().err
