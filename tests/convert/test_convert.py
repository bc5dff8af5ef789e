"""Checkpoints through Megatron and transformers: two implementations compute the same logits.

Random Hugging Face models become Megatron checkpoints, Megatron loads each at several layouts,
computes logits and saves; what it saved becomes Hugging Face folders again, which must hold the
very bits that went in.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import zygote
from convert_models import DENSE, LLAMA3, MODELS, S2, SMALL, make_model, run_tree, tokens
from launches import ON_CPU, write_run_file
from safetensors.torch import load_file

from s2megatron import hf
from s2megatron.config import parse_config
from s2megatron.convert.inspect import inspect
from s2megatron.convert.reader import CheckpointReader
from s2megatron.convert.to_hf import to_hugging_face
from s2megatron.errors import ConfigError
from s2megatron.training.resume import check_resume

# On one rank the dense model is stock Megatron's ("stock"), elsewhere the run file's.
CASES = {"s2-tp1": "tp1", "s2-tp2": "tp2", "s2-pp2": "pp2", "dense-tp2": "tp2", "dense-pp2": "pp2"}
EXTRA = [("llama", "vpp2"), ("mixtral", "ep2"), ("qwen3_moe", "ep2")]
BF16 = "llama_bf16"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """HOME/MODEL/hf, /megatron, and /{s2,dense}-LAYOUT with logits.pt and a saved checkpoint."""
    home = tmp_path_factory.mktemp("convert")
    plan = {"convert": {}, "cases": []}
    for name in [*MODELS, BF16]:
        kind = name.removesuffix("_bf16")
        folder = home / name
        make_model(kind, folder / "hf", torch.bfloat16 if name == BF16 else torch.float32)
        runs = {
            sparsity: str(write_run_file(folder / f"{sparsity}.yaml", run_tree(kind, tree)))
            for sparsity, tree in (("s2", S2), ("dense", DENSE))
        }
        plan["convert"][name] = ["--config", runs["s2"]]
        case = {"model": name, "config": runs["s2"]}
        if name == BF16:
            options = ["megatron.bf16=true"]
            plan["cases"].append(case | {"name": "s2-tp2", "layout": "tp2", "overrides": options})
            continue
        replace = ["sparsity.on_resume=replace"]
        for run, layout in CASES.items():
            case |= {"name": run, "layout": layout, "config": runs[run.split("-")[0]]}
            plan["cases"].append(case | ({"overrides": replace} if "dense" in run else {}))
        stock = {"name": "stock", "layout": "tp1", "config": runs["s2"], "stock": True}
        plan["cases"].append(case | stock)
    for name, layout in EXTRA:
        config = str(home / name / "s2.yaml")
        case = {"model": name, "name": f"s2-{layout}", "layout": layout, "config": config}
        plan["cases"].append(case)
    (home / "plan.json").write_text(json.dumps(plan))
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    done = zygote.run("convert_worker:main", [str(home)], ranks=2, env=env, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return home


def saved_cases():
    cases = [(name, case) for name in MODELS for case in [*CASES, "stock"]]
    cases += [(name, f"s2-{layout}") for name, layout in EXTRA] + [(BF16, "s2-tp2")]
    return [pytest.param(*case, id="-".join(case)) for case in cases]


@pytest.fixture(scope="module")
def converted(home):
    """Folder of a case, converted back once."""

    def convert(name: str, case: str) -> Path:
        out = home / name / f"{case}-hf"
        if not out.exists():
            to_hugging_face(home / name / case, out, like=home / name / "hf")
        return out

    return convert


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize(("name", "case"), saved_cases())
def test_round_trip_is_exact(home, converted, name, case):
    """Names, shapes, dtypes and bits; the config field by field, but for the sparsity."""
    source, result = home / name / "hf", converted(name, case)
    expected, got = all_tensors(source), all_tensors(result)
    assert sorted(got) == sorted(expected)
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key
    config = json.loads((result / "config.json").read_text())
    sparsity = config.pop("s2", None)
    assert (sparsity is not None) == case.startswith("s2")
    if sparsity is not None:  # a server without S2 attention must not know the name
        assert all(n.startswith("S2") for n in config["architectures"])
        config["architectures"] = [n.removeprefix("S2") for n in config["architectures"]]
    assert config == json.loads((source / "config.json").read_text())


@pytest.fixture(scope="module")
def logits(converted):
    """Of a converted model by transformers, with an attention."""
    known = {}

    @torch.no_grad()
    def compute(name: str, attention: str) -> torch.Tensor:
        if (name, attention) not in known:
            folder = converted(name, "s2-tp1")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation=attention
            )
            known[name, attention] = model(tokens()).logits
        return known[name, attention]

    return compute


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", [*CASES, "stock"])
def test_logits_agree_with_megatron(home, logits, name, case):
    expected = logits(name, hf.NAME if case.startswith("s2") else "sdpa")
    vocab = expected.shape[-1]  # Megatron's has padding
    got = torch.load(home / name / case / "logits.pt")[..., :vocab]
    print(f"{name} {case}: largest difference {(got - expected).abs().max():.1e}")
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_dense_attention_gives_other_logits(logits, name):
    """A plain load of a model trained with S2: the first window is the same, the rest is not."""
    sparse, dense = logits(name, hf.NAME), logits(name, "sdpa")
    assert (sparse - dense)[:, :32].abs().max() < 1e-4
    assert (sparse - dense)[:, 64:].abs().max() > 1


def test_llama3_scaling_counts(home, logits):
    """The tiny model's rope reaches the wavelengths that Llama 3's scaling changes."""
    folder = home / "llama" / "hf"
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = config.rope_parameters | {"factor": 8.0}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        other = model(tokens()).logits
    assert LLAMA3["factor"] == 32.0
    assert (other - logits("llama", "sdpa")).abs().max() > 1e-2


def test_stock_megatron_saves_the_same_keys(home):
    """Dense stock Megatron loads an S2 checkpoint and saves it under unchanged keys."""
    ours, stock = (CheckpointReader(home / "llama" / case) for case in ("s2-tp1", "stock"))
    assert {k: v.size for k, v in ours.tensors.items()} == {
        k: v.size for k, v in stock.tensors.items()
    }
    assert hasattr(ours.args, "s2_sparsity") and not hasattr(stock.args, "s2_sparsity")


def test_stock_checkpoint_is_told_apart(home, capsys):
    """What stock Megatron saved records no sparsity: resuming it with S2 asks."""
    from argparse import Namespace

    patterns = parse_config(run_tree("llama", S2)).sparsity.resolve(
        num_layers=4, heads=4, kv_heads=2
    )
    args = {"ckpt_step": None, "pretrained_checkpoint": None, "rank": 0}
    check_resume(Namespace(load=home / "llama" / "s2-tp1", **args), patterns, "error")
    with pytest.raises(ConfigError, match="it records no sparsity: a dense checkpoint"):
        check_resume(Namespace(load=home / "llama" / "stock", **args), patterns, "error")
    check_resume(Namespace(load=home / "llama" / "stock", **args), patterns, "replace")
    assert "4 of 8 KV heads (all layers together) drop the first block" in capsys.readouterr().out
    check_resume(Namespace(load=home / "llama" / "s2-tp1", **args), patterns[::-1], "replace")
    assert "drop the first block" not in capsys.readouterr().out  # it never leaned on it


def test_other_spellings_of_a_checkpoint(home, tmp_path):
    """Transformer Engine's name of the norm before experts; common.pt, as before Megatron 0.19."""
    folder = shutil.copytree(home / "mixtral" / "megatron", tmp_path / "checkpoint")
    common = CheckpointReader(folder).common | {"iteration": 12}
    torch.save(common, folder / "release" / "common.pt")
    file = folder / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for name in ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "common_state/shard_0_1"):
        metadata.state_dict_metadata.pop(name)
    file.write_bytes(pickle.dumps(metadata))
    report = to_hugging_face(folder, tmp_path / "hf")
    assert report.iteration == 12 and report.architecture == "mixtral"
    expected, got = all_tensors(home / "mixtral" / "hf"), all_tensors(tmp_path / "hf")
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_tokenizer_and_config_of_a_run_from_scratch(home, tmp_path, monkeypatch):
    """No source folder is known: all there is to know comes from the run's own tokenizer."""
    from tokenizers import Tokenizer, models

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 101)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    args = CheckpointReader(home / "llama" / "s2-tp1").args
    args.vocab_size, args.tokenizer_type = None, "HuggingFaceTokenizer"
    args.tokenizer_model = str(tmp_path / "tokenizer")
    monkeypatch.setattr(CheckpointReader, "args", args)
    to_hugging_face(home / "llama" / "s2-tp1", tmp_path / "hf", dtype="bf16")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (101, 0, 1)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) == 101
    model = hf.load(tmp_path / "hf")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 1

    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")  # damaged since: weights are not
    report = to_hugging_face(home / "llama" / "s2-tp1", tmp_path / "damaged", vocab_size=101)
    assert any("tokenizer, which cannot be loaded: " in note for note in report.notes)

    args.tokenizer_model = "somewhere/else"
    report = to_hugging_face(home / "llama" / "s2-tp1", tmp_path / "padded")
    assert any("nothing says how many of the 128 embedding rows" in note for note in report.notes)
    report = to_hugging_face(home / "llama" / "s2-tp1", tmp_path / "asked", vocab_size=99)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "asked").vocab_size == 99


def test_no_token_loses_its_row(home, tmp_path, monkeypatch):
    """The args' vocab_size, which their tokenizer does not read or which a run file left small."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "own")
    args = CheckpointReader(home / "llama" / "s2-tp1").args
    args.vocab_size, args.tokenizer_type = 32, "HuggingFaceTokenizer"
    monkeypatch.setattr(CheckpointReader, "args", args)
    own, kept = str(tmp_path / "own"), home / "llama" / "hf"  # 101 and 128 tokens
    cases = {
        "tokenizer": (own, {}, 101, "in its args, 32, is not read by a HuggingFaceTokenizer"),
        "unknown": ("elsewhere", {}, 128, "in its args, 32, is not read by a HuggingFaceTokenizer"),
        "source": (own, {"like": kept}, 128, "in its args, 32, is not read by"),
        "asked": (own, {"vocab_size": 90}, 90, None),
        "null": (None, {"like": kept}, 128, "in its args is 32, vocab_size in config.json is 128"),
    }
    for name, (model, options, rows, told) in cases.items():
        args.tokenizer_type = "HuggingFaceTokenizer" if model else "NullTokenizer"
        args.tokenizer_model = model
        report = to_hugging_face(home / "llama" / "s2-tp1", tmp_path / name, **options)
        weights = all_tensors(tmp_path / name)
        embedding, head = (weights[x] for x in ("model.embed_tokens.weight", "lm_head.weight"))
        assert len(embedding) == len(head) == rows, name
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).vocab_size == rows
        notes = [note for note in report.notes if note.startswith("vocabulary")]
        assert told in notes[0] if told else not notes, notes
    assert "128 rows, 32 tokens" in inspect(home / "llama" / "s2-tp1")
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", own
    assert "128 rows, tokens not recorded" in inspect(home / "llama" / "s2-tp1")


def test_what_differs_from_the_source_is_told(home, converted, tmp_path):
    """A source whose config says something else: the checkpoint's word is written."""
    other = shutil.copytree(home / "llama" / "hf", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    rope = config["rope_parameters"] | {"factor": 8.0}
    changed = config | {"rope_parameters": rope, "max_position_embeddings": 99, "mine": [1]}
    (other / "config.json").write_text(json.dumps(changed))
    report = to_hugging_face(home / "llama" / "s2-tp1", tmp_path / "hf", like=other)
    told = "\n".join(report.notes)
    assert "rope_scaling.factor is 32.0" in told and "max_position_embeddings is 16384" in told
    got = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert got.rope_parameters["factor"] == 32.0 and got.max_position_embeddings == 16384
    assert got.mine == [1] and got.eos_token_id == SMALL["eos_token_id"]


def test_inspect(home):
    text = inspect(home / "llama" / "s2-vpp2")
    for line in (
        "iteration      3, weights only",
        "parameters     188,992, float32",
        "saved at       TP 1, PP 2, VPP 2, DP 1; local modules",
        "128 rows, 128 tokens; NullTokenizer",
        "converts to llama",
        "S2 attention: 3 of 4 layers sparse",
    ):
        assert line in text
    assert "EP 2" in inspect(home / "mixtral" / "s2-ep2")
    assert "sparsity       none recorded: a dense checkpoint" in inspect(home / "qwen2" / "stock")


def test_padding_and_sparsity_are_told(home):
    said = (home / "mistral" / "said.txt").read_text()
    assert "257 tokens, padded with 127 rows of zeros to 384" in said
    assert "trained dense; the checkpoint records the run file's sparsity" in said
    assert "KV heads (all layers together) drop the first block" in said
