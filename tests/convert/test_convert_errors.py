"""Bad input to `s2megatron convert`: a clear error, nothing under --out, the source untouched."""

import os
import subprocess
import sys
from pathlib import Path

import convert_errors
import pytest
from convert_round_trips import CASES
from in_process import call
from launches import ON_CPU, ROOT

from s2megatron import cli
from s2megatron.convert.writing import check_output, whole_folder
from s2megatron.errors import ConfigError

# what the message must hold
RUN_FILES = {
    "layers": ["megatron.num_layers: 5", "num_hidden_layers is 4"],
    "hidden": ["megatron.hidden_size: 128"],
    "heads": ["megatron.num_attention_heads: 2"],
    "kv_heads": ["megatron.num_query_groups: 1", "num_key_value_heads is 2"],
    "vocab": ["megatron.vocab_size", "64 embedding rows", "128"],
    "theta": ["megatron.rotary_base: 500000.0", "rope_theta is 10000.0"],
    "scaling": ["use_rope_scaling and rope_scaling_factor: None", "rope_scaling.factor is 32.0"],
    "factor": ["rope_scaling_factor: 8.0", "rope_scaling.factor is 32.0"],
    "eps": ["megatron.norm_epsilon: 1e-05", "rms_norm_eps is 1e-06"],
    "tied": ["untie_embeddings_and_output_weights", "tie_word_embeddings is False"],
    "bias": ["megatron.add_bias_linear=True"],
    "experts": ["megatron.num_experts: 4", "num_experts is 0"],
    "activation": ["megatron.swiglu=False"],
    "unknown_option": ["megatron.hiden_size", "did you mean 'hidden_size'"],
}
SOURCES = {
    "architecture": ["model_type='gpt_neox'", "llama, mistral"],
    "no_such_type": ["config.json", "nothing_known"],
    "attention_bias": ["attention_bias=True"],
    "yarn": ["rope_scaling.rope_type='yarn'"],
    "quantized": ["quantization_config"],
    "code": ["auto_map"],
    "shape": ["model.layers.0.mlp.gate_proj.weight holds [96, 64]", "[128, 64]"],
    "sparsity": ["trained with another sparsity", "layer 1", "sparsity.on_resume=replace"],
    "truncated": ["safetensors", "cut short"],
    "index_entry": ["no entry for model.layers.2.mlp.up_proj.weight"],
    "shard_missing": ["safetensors: is missing"],
    "query_dtype": ["q_proj.weight is torch.bfloat16", "layers.0.", "linear_qkv.weight"],
    "value_dtype": ["layers.1.self_attn.v_proj.weight is torch.bfloat16", "one dtype"],
    "up_dtype": ["gate_proj.weight is torch.float32", "up_proj.weight is torch.float16"],
    "first_layer_dtype": ["layers.0.mlp.down_proj.weight is torch.bfloat16", "linear_fc2"],
    "last_layer_dtype": ["layers.3.input_layernorm.weight is torch.bfloat16"],
    "two_sets": ["two sets of weights", "model.safetensors", "model-00001-of"],
    "left_over": ["model.layers.0.extra has no place"],
    "empty": ["config.json: is missing"],
}
CHECKPOINTS = {
    "truncated": ["__0_0.distcp has", "cut short"],
    "file_missing": ["__0_0.distcp is missing"],
    "piece": ["3 of the 4 pieces of decoder.layers.mlp.linear_fc2.weight"],
    "tensor": ["decoder.final_layernorm.weight is missing"],
    "embedding": ["embedding.word_embeddings.weight is missing"],
    "metadata": [".metadata cannot be read"],
    "format": ["no .metadata file", "torch_dist"],
    "left_over": ["decoder.layers.mlp.gate.bias has no place"],
    "layers": ["holds [4,", "ask for [3,"],
    "ffn": ["linear_fc1.weight holds [4, 192, 64]", "[4, 128, 64]"],
    "layernorm": ["megatron.normalization='LayerNorm'"],
    "shared_experts": ["megatron.moe_shared_expert_intermediate_size=32"],
    "positions": ["megatron.position_embedding_type='yarn'"],
    "both": ["has no place", "qwen2", "qwen3", "q and k norms"],
    "vocab": ["vocab_size in its args is 4096", "128 rows"],
    "misfit": ["qwen3: qk_layernorm"],
    "unknown": ["architecture 'gpt2' is not supported"],
    "dtype": ["--dtype 'int8'"],
    "size": ["--max-shard-size 'lots'"],
    "step": ["iter_0000007", "no .metadata file"],
    "like": ["--like", "no config.json"],
}


def check(result: list, parts: list[str]) -> None:
    status, err, left, changed = result
    print(err)
    assert status == 2 and "Traceback" not in err
    for part in parts:
        assert part in err
    assert not left and not changed


@pytest.fixture(scope="module")
def bad_input():
    return call("convert_errors", "bad_input")


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_of_another_model(bad_input, name):
    check(bad_input["wrong_run_files"][name], RUN_FILES[name])


def test_datasets_of_a_run_file_may_be_elsewhere(bad_input):
    """Also where Megatron's own options name them; nothing is said of data.mock beside them."""
    status, err, written, changed = bad_input["wrong_run_files"]["elsewhere"]
    assert (status, written, changed) == (0, True, False), err


@pytest.mark.parametrize("name", SOURCES)
def test_bad_hugging_face_folder(bad_input, name):
    check(bad_input["bad_sources"][name], SOURCES[name])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoint(bad_input, name):
    check(bad_input["bad_checkpoints"][name], CHECKPOINTS[name])


@pytest.mark.parametrize("name", ["-".join(case) for case in CASES])
def test_round_trip_keeps_every_bit_and_dtype(bad_input, name):
    """Norms and routers in float32, the rest in bfloat16; NaNs, infinities; fused experts."""
    single = not name.endswith(("sharded", "fused"))
    expected = {"differ": [], "single": single, "named": False}
    assert bad_input["round_trips"][name] == expected


@pytest.mark.parametrize("name", ["not_empty", "not_empty_back"])
def test_output_folder_with_something_in_it(bad_input, name):
    status, err, _, changed = bad_input["bad_checkpoints"][name]
    assert status == 2 and "the folder is not empty" in err and not changed


def test_output_folder_that_cannot_be_made(tmp_path, monkeypatch):
    """Said before a checkpoint is read."""
    (tmp_path / "file").write_text("here already")
    for out in ("file/hf", "file/deep/hf"):
        with pytest.raises(ConfigError, match="file is a file; name a new folder elsewhere"):
            check_output(tmp_path / out)
    check_output(tmp_path / "new/deep/hf")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output(tmp_path / "new/hf")


def test_output_folder_that_somebody_else_fills_meanwhile(tmp_path):
    out = tmp_path / "hf"
    with (
        pytest.raises(ConfigError, match="somebody else wrote there meanwhile"),
        whole_folder(out) as part,
    ):
        (part / "config.json").write_text("ours")
        out.mkdir()
        (out / "config.json").write_text("theirs")
    assert (out / "config.json").read_text() == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KB, or a skip where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(small_disk):
    results = call("convert_errors", "disk_full", str(small_disk))
    for name, (*result, left) in results.items():
        said = "GB free" if name.endswith("before") else "the disk is full"
        check(result, ["--out", said])
        assert left == []


def test_killed_half_way(tmp_path):
    """Nothing under the final name, the source as it was, and the next try succeeds."""
    source, checkpoint, config = call("convert_errors", "make_bench")
    for way, path in (("to-hf", checkpoint), ("to-megatron", source)):
        before, out = convert_errors.digest(Path(path)), tmp_path / way
        arguments = ["kill_half_way", way, path, str(out), config]
        command = [
            sys.executable,
            str(ROOT / "tests/support/in_process.py"),
            "convert_errors",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **ON_CPU}, cwd=ROOT)
        assert done.returncode == -9, done.stderr
        assert not out.exists() and convert_errors.digest(Path(path)) == before
        parts = list(tmp_path.glob(f".{way}.part-*"))
        assert len(parts) == 1 and any(parts[0].rglob("*"))  # half of it, under its own name
    again = ["convert", "to-hf", checkpoint, "--out", str(tmp_path / "to-hf")]
    assert cli.main(again) == 0 and (tmp_path / "to-hf" / "config.json").exists()
