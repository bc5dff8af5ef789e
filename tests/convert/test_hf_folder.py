"""A Hugging Face folder is read as transformers reads it: which files, fields and names."""

import json
import shutil

import pytest
import torch
import transformers
from convert_models import make_model
from convert_round_trips import all_tensors
from safetensors.torch import save_file

import s2megatron.hf
from s2megatron.convert.architectures import from_hugging_face
from s2megatron.convert.hf_config import read_config
from s2megatron.convert.hf_folder import HuggingFaceFolder
from s2megatron.errors import ConfigError

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind -> folder, in shards."""
    home = tmp_path_factory.mktemp("sources")
    for kind in ("llama", "mixtral", "qwen3_moe", "mistral"):
        make_model(kind, home / kind, num_hidden_layers=2)
    return home


@pytest.fixture
def folder(sources, tmp_path):
    """A copy of the llama, to be spoiled."""
    return shutil.copytree(sources / "llama", tmp_path / "llama")


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def other_weights(folder, name="model.safetensors"):
    """All tensors in one file, one of them another than in the shards."""
    tensors = all_tensors(folder) | {NORM: torch.full((64,), 3.0)}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def remove_shards(folder):
    for file in folder.glob("model-*.safetensors"):
        file.unlink()


def by_transformers(folder) -> float:
    """The first element of the weight that `other_weights` changes, as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.model.norm.weight[0].item()


def by_converter(folder) -> float:
    return HuggingFaceFolder(folder).read(NORM)[0].item()


def single_file(folder):
    other_weights(folder)
    remove_shards(folder)
    (folder / INDEX).unlink()


def left_over_index(folder):
    other_weights(folder)
    remove_shards(folder)


def left_over_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def left_over_shards(folder):
    other_weights(folder)
    (folder / INDEX).unlink()


def named_file(folder):
    other_weights(folder, "mine.safetensors")
    edit(folder, transformers_weights="mine.safetensors")


def named_index(folder):
    other_weights(folder)
    edit(folder, transformers_weights=INDEX)


ORDER = [single_file, left_over_index, left_over_pickle, left_over_shards, named_file, named_index]


@pytest.mark.parametrize("change", ORDER, ids=lambda f: f.__name__)
def test_the_weights_are_those_that_transformers_loads(folder, change):
    change(folder)
    assert by_converter(folder) == pytest.approx(by_transformers(folder))
    expected = change not in (left_over_pickle, named_index)
    assert (by_converter(folder) == 3.0) == expected


def test_a_left_over_index_is_told(folder):
    left_over_index(folder)
    assert INDEX in HuggingFaceFolder(folder).notes[0]
    (folder / INDEX).unlink()
    assert HuggingFaceFolder(folder).notes == []


def refusal(folder) -> str:
    with pytest.raises(ConfigError) as error:
        HuggingFaceFolder(folder)
    return str(error.value)


def test_two_sets_of_weights_are_refused(folder):
    """All shards beside the single file, or what an interrupted download left of them."""
    other_weights(folder)
    first, *others = sorted(file.name for file in folder.glob("model-*"))
    told = refusal(folder)
    assert "two sets" in told and "model.safetensors" in told and INDEX in told and first in told
    (folder / first).unlink()
    assert others[0] in refusal(folder)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({INDEX: "[1, 2]"}, [INDEX, "not a JSON object"]),
        ({INDEX: '{"weight_map": ["a"]}'}, [INDEX, "no weight_map"]),
        ({INDEX: '{"weight_map": {"a": 5}}'}, [INDEX, "no weight_map"]),
        ({INDEX: "{"}, [INDEX, "cannot be read as JSON"]),
        ({INDEX: None, "pytorch_model.bin": "x"}, ["neither", "pytorch_model.bin"]),
        ({INDEX: None}, ["neither", "model-00001-of"]),
        ({"adapter_config.json": "{}"}, ["adapter_config.json", "merge"]),
        ({"config.json": "[]"}, ["config.json", "not a JSON object"]),
    ],
)
def test_damaged_and_other_files_are_named(folder, files, parts):
    for name, text in files.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    told = refusal(folder)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize("named", ["gone.safetensors", "pytorch_model.bin", 5])
def test_weights_named_in_the_config_must_be_there(folder, named):
    edit(folder, transformers_weights=named)
    assert "transformers_weights" in refusal(folder)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_the_same_tensors(sources, tmp_path, kind):
    """As transformers 5 keeps them, under the names and with the bits that the hub has."""
    plain, model = HuggingFaceFolder(sources / kind), tmp_path / kind
    loaded = transformers.AutoModelForCausalLM.from_pretrained(sources / kind)
    loaded.save_pretrained(model, save_original_format=False)
    fused = HuggingFaceFolder(model)
    assert fused.shapes == plain.shapes
    for name in plain.shapes:
        assert torch.equal(fused.read(name), plain.read(name)), name
        assert fused.dtype(name) == plain.dtype(name)


def test_a_tensor_under_two_names_is_refused(sources, tmp_path):
    folder = shutil.copytree(sources / "mixtral", tmp_path / "mixtral")
    tensors = all_tensors(folder)
    remove_shards(folder)
    (folder / INDEX).unlink()
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[name.replace("block_sparse_moe", "mlp")] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = refusal(folder)
    assert name in told and "keep one of them" in told


# field -> what transformers refuses, by its type checks and by what Python says of it
REFUSED = [
    {"intermediate_size": 96.0},
    {"vocab_size": "128"},
    {"bos_token_id": [1]},
    {"num_attention_heads": True},
    {"num_attention_heads": 0},
    {"hidden_size": None},
    {"hidden_size": 66},
    {"rms_norm_eps": "1e-5"},
    {"tie_word_embeddings": 1},
    {"layer_types": 5},
    {"dtype": "float17"},
    {"id2label": 5},
    {"auto_map": 5},
    {"quantization_config": 5},
    {"rope_parameters": 5},
    {"rope_parameters": {"rope_type": "llama3"}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_config_that_transformers_refuses(folder, fields):
    edit(folder, **fields)
    with pytest.raises(ConfigError, match="transformers refuses it") as error:
        read_config(folder)
    (name,) = fields
    assert f"config.json: {name}=" in str(error.value)


def test_loading_a_model_names_the_field_too(folder):
    edit(folder, intermediate_size=96.0)
    with pytest.raises(ConfigError, match=r"intermediate_size=96\.0"):
        s2megatron.hf.load(folder)


def described(folder):
    return from_hugging_face(read_config(folder), str(folder / "config.json"))


ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
# what transformers takes and no model can be built of, or Megatron cannot
TAKEN = [
    ("mistral", {"num_attention_heads": 0}, "num_attention_heads=0"),
    ("llama", {"num_attention_heads": -4}, "num_attention_heads=-4"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("llama", {"head_dim": 0}, "head_dim=0"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    ("llama", {"rope_parameters": ROPE | {"rope_theta": None}}, "rope_scaling.rope_theta=None"),
    ("llama", {"rope_parameters": ROPE | {"rope_theta": "a"}}, "rope_scaling.rope_theta='a'"),
    ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"full_attention": ROPE}}, "rope_scaling.full_attention"),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": "8"}}, "rope_scaling.factor='8'"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}},
        "original_max_position_embeddings=4096",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "told"), TAKEN, ids=lambda value: str(value)[:60])
def test_config_that_only_transformers_takes(sources, tmp_path, kind, fields, told):
    folder = shutil.copytree(sources / kind, tmp_path / kind)
    described(folder)
    edit(folder, **fields)
    with pytest.raises(ConfigError, match=r"config\.json: ") as error:
        described(folder)
    assert told in str(error.value)


def test_rope_that_both_have(folder):
    edit(folder, rope_parameters=ROPE | {"partial_rotary_factor": 1.0, "attention_factor": None})
    assert described(folder).llama3_factor is None
    edit(folder, rope_parameters=LLAMA3)
    assert described(folder).llama3_factor == 8.0
