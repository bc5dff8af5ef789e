"""Bad input to `s2megatron convert`, through the command line; runs in an interpreter of its own.

Each case returns [status, stderr, is anything left under --out, has the source changed].
"""

import copy
import hashlib
import json
import pickle
import shutil
import tempfile
from pathlib import Path

from convert_models import S2, make_model, run_tree
from in_process import forget_megatron, run_command_line
from launches import write_run_file


def digest(folder: Path) -> str:
    """Of all names and bytes in a folder."""
    state = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return state.hexdigest()


class Bench:
    """A sound model in both formats, and room to spoil copies of it."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp())
        make_model("llama", self.home / "hf")
        tree = run_tree("llama", S2)
        del tree["megatron"]["micro_batch_size"]  # a conversion does not need it
        self.config = str(write_run_file(self.home / "run.yaml", tree))
        self.count = 0
        result = self.run(["to-megatron", self.home / "hf", "--config", self.config], "megatron")
        assert result[0] == 0, result

    def run(self, argv: list, out: str | None = None) -> list:
        """argv[1] is the source."""
        from s2megatron import cli

        self.count += 1
        target = self.home / (out or f"out{self.count}")
        before = digest(Path(argv[1]))
        command = ["convert", *map(str, argv), "--out", str(target)]
        status, _, err = run_command_line(cli.main, command)
        forget_megatron()
        return [status, err, target.exists(), digest(Path(argv[1])) != before]

    def copy(self, name: str) -> Path:
        self.count += 1
        return Path(shutil.copytree(self.home / name, self.home / f"{name}{self.count}"))

    def to_megatron(self, folder: Path | None = None, *overrides: str) -> list:
        argv = ["to-megatron", folder or self.home / "hf", "--config", self.config, *overrides]
        return self.run(argv)

    def to_hf(self, folder: Path | None = None, *options: str) -> list:
        return self.run(["to-hf", folder or self.home / "megatron", *options])


def edit_json(file: Path, **changes) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v != "REMOVE"}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bad_input() -> dict:
    """All cases that need no disk or process of their own, the good ones of `round_trips` too."""
    bench = Bench()
    from convert_round_trips import round_trips

    kinds = (wrong_run_files, bad_sources, bad_checkpoints, round_trips)
    return {kind.__name__: kind(bench) for kind in kinds}


def wrong_run_files(bench: Bench) -> dict:
    """A run file that describes another model, one field at a time."""
    fields = {
        "layers": ["megatron.num_layers=5", "sparsity.layers=[]"],
        "hidden": ["megatron.hidden_size=128"],
        "heads": ["megatron.num_attention_heads=2"],
        "kv_heads": ["megatron.num_query_groups=1", "sparsity.layers=[]"],
        "vocab": ["megatron.vocab_size=64", "megatron.make_vocab_size_divisible_by=64"],
        "theta": ["megatron.rotary_base=500000"],
        "scaling": ["megatron.use_rope_scaling=false", "megatron.rope_scaling_factor=null"],
        "factor": ["megatron.rope_scaling_factor=8"],
        "eps": ["megatron.norm_epsilon=1e-5"],
        "tied": ["megatron.untie_embeddings_and_output_weights=false"],
        "bias": ["megatron.disable_bias_linear=false"],
        "experts": ["megatron.num_experts=4"],
        "activation": ["megatron.swiglu=false"],
        "unknown_option": ["megatron.hiden_size=64"],
    }
    fields["elsewhere"] = ["megatron.data-path=[elsewhere/text]", "data.cache=elsewhere"]
    return {name: bench.to_megatron(None, *overrides) for name, overrides in fields.items()}


def bad_sources(bench: Bench) -> dict:
    """Hugging Face folders that are damaged, or of a model that Megatron here cannot hold."""
    results = {}
    configs = {
        "architecture": {"model_type": "gpt_neox"},
        "no_such_type": {"model_type": "nothing_known"},
        "attention_bias": {"attention_bias": True},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "shape": {"intermediate_size": 128},
        "code": {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        "sparsity": {"s2": _other_sparsity()},
    }
    overrides = {"shape": ["megatron.ffn_hidden_size=128"]}
    for name, changes in configs.items():
        folder = bench.copy("hf")
        edit_json(folder / "config.json", **changes)
        results[name] = bench.to_megatron(folder, *overrides.get(name, []))

    folder = bench.copy("hf")
    shard = sorted(folder.glob("*.safetensors"))[1]
    cut(shard)
    results["truncated"] = bench.to_megatron(folder)

    folder = bench.copy("hf")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    names.pop("model.layers.2.mlp.up_proj.weight")
    edit_json(index, weight_map=names)
    results["index_entry"] = bench.to_megatron(folder)

    folder = bench.copy("hf")
    sorted(folder.glob("*.safetensors"))[0].unlink()
    results["shard_missing"] = bench.to_megatron(folder)

    for name, dtypes in MIXED.items():
        results[name] = bench.to_megatron(_with_dtypes(bench, dtypes))

    folder = bench.copy("hf")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copyfile(folder / names["model.norm.weight"], folder / "model.safetensors")
    results["two_sets"] = bench.to_megatron(folder)

    results["left_over"] = bench.to_megatron(_with_extra_tensor(bench))
    folder = bench.copy("hf")
    shutil.rmtree(folder)
    folder.mkdir()
    results["empty"] = bench.to_megatron(folder)
    return results


def _other_sparsity() -> dict:
    from s2_kernels.record import record
    from s2megatron.config import parse_config

    tree = run_tree("llama", {"block_size": 32, "default": {"local_blocks": 1, "stride": 2}})
    return record(parse_config(tree).sparsity.resolve(num_layers=4, heads=4, kv_heads=2))


# One tensor in another dtype than the rest of its Megatron tensor: the first part, a later part, a
# whole layer of the stack, which is the first one or not.
MIXED = {
    "query_dtype": {"model.layers.1.self_attn.q_proj.weight": "bfloat16"},
    "value_dtype": {"model.layers.1.self_attn.v_proj.weight": "bfloat16"},
    "up_dtype": {"model.layers.0.mlp.up_proj.weight": "float16"},
    "first_layer_dtype": {"model.layers.0.mlp.down_proj.weight": "bfloat16"},
    "last_layer_dtype": {"model.layers.3.input_layernorm.weight": "bfloat16"},
}


def _with_dtypes(bench: Bench, dtypes: dict[str, str]) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    folder = bench.copy("hf")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in dtypes.keys() & tensors.keys():
            tensors[name] = tensors[name].to(getattr(torch, dtypes[name]))
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _with_extra_tensor(bench: Bench) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = bench.copy("hf")
    save_file({"model.layers.0.extra": torch.ones(2)}, folder / "extra.safetensors")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {"model.layers.0.extra": "extra.safetensors"})
    return folder


def bad_checkpoints(bench: Bench) -> dict:
    """Megatron checkpoints that are damaged, or of a model that Hugging Face's cannot hold."""
    results = {}
    folder = bench.copy("megatron")
    cut(folder / "release" / "__0_0.distcp")
    results["truncated"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    (folder / "release" / "__0_0.distcp").unlink()
    results["file_missing"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    _edit_metadata(folder, lambda m: _drop(m.storage_data, "decoder.layers.mlp.linear_fc2.weight"))
    results["piece"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    _edit_metadata(folder, lambda m: m.state_dict_metadata.pop("decoder.final_layernorm.weight"))
    results["tensor"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    _edit_metadata(folder, lambda m: m.state_dict_metadata.pop("embedding.word_embeddings.weight"))
    results["embedding"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    (folder / "release" / ".metadata").write_bytes(b"nothing")
    results["metadata"] = bench.to_hf(folder)

    folder = bench.copy("megatron")
    (folder / "release" / ".metadata").unlink()
    results["format"] = bench.to_hf(folder)

    results["left_over"] = bench.to_hf(_with_args(bench, {}, extra="decoder.layers.mlp.gate.bias"))
    changes = {
        "layers": {"num_layers": 3},
        "ffn": {"ffn_hidden_size": 64},
        "layernorm": {"normalization": "LayerNorm"},
        "shared_experts": {"moe_shared_expert_intermediate_size": 32},
        "positions": {"position_embedding_type": "yarn"},
        "both": {"add_qkv_bias": True, "qk_layernorm": True},
        "vocab": {"vocab_size": 4096},
    }
    for name, change in changes.items():
        results[name] = bench.to_hf(_with_args(bench, change))
    results["misfit"] = bench.to_hf(None, "--architecture", "qwen3")
    results["unknown"] = bench.to_hf(None, "--architecture", "gpt2")
    results["dtype"] = bench.to_hf(None, "--dtype", "int8")
    results["size"] = bench.to_hf(None, "--max-shard-size", "lots")
    results["step"] = bench.to_hf(None, "--step", "7")
    results["like"] = bench.to_hf(None, "--like", str(bench.home))
    (bench.home / "taken").mkdir()
    (bench.home / "taken" / "mine.txt").write_text("keep")
    results["not_empty"] = bench.run(["to-hf", bench.home / "megatron"], "taken")
    assert (bench.home / "taken" / "mine.txt").read_text() == "keep"
    argv = ["to-megatron", bench.home / "hf", "--config", bench.config]
    results["not_empty_back"] = bench.run(argv, "taken")
    return results


def _edit_metadata(folder: Path, change) -> None:
    file = folder / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def _drop(stored: dict, name: str) -> None:
    stored.pop(next(index for index in stored if index.fqn == name))


def _with_args(bench: Bench, changes: dict, extra: str | None = None) -> Path:
    """The checkpoint written anew with other args, and perhaps one more tensor."""
    import torch

    from s2megatron.convert.reader import CheckpointReader
    from s2megatron.convert.torch_dist import Chunk, write_release

    reader = CheckpointReader(bench.home / "megatron")
    args = copy.copy(reader.args)
    for name, value in changes.items():
        setattr(args, name, value)
    bench.count += 1
    folder = bench.home / f"args{bench.count}"
    folder.mkdir()
    tensors = {key: tuple(entry.size) for key, entry in reader.tensors.items()}
    if extra:
        tensors[extra] = (4, 8)
    chunks = [
        Chunk(key, (0,) * len(size), size, size, torch.float32, lambda s=size: torch.zeros(s))
        for key, size in tensors.items()
    ]
    write_release(
        folder, chunks, {"common_state/shard_0_1": {"args": args, "iteration": 0}}, lambda n: None
    )
    return folder


def disk_full(small: str) -> dict:
    """Both directions onto a disk that is too small: before the start, and once half is written."""
    from s2megatron.convert import to_hf, to_megatron

    bench, results = Bench(), {}
    ways = {
        "to_hf": ["to-hf", bench.home / "megatron", "--max-shard-size", "100KB"],
        "to_megatron": ["to-megatron", bench.home / "hf", "--config", bench.config],
    }
    for when in ("before", "half_way"):
        for name, argv in ways.items():
            result = bench.run(argv, f"{small}/out")
            results[f"{name}_{when}"] = [*result, [p.name for p in Path(small).iterdir()]]
        to_hf.check_space = to_megatron.check_space = lambda *_: None
    return results


def kill_half_way(way: str, source: str, out: str, config: str) -> None:
    """Converts and is killed (SIGKILL) when the second half is about to be written."""
    import os
    import signal

    from s2megatron import cli
    from s2megatron.convert import hf_folder, tensors

    def kill_at(function, call: int):
        calls = []

        def stand_in(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return stand_in

    hf_folder.save_file = kill_at(hf_folder.save_file, 3)
    tensors.TensorRule.merge = kill_at(tensors.TensorRule.merge, 12)
    extra = ["--max-shard-size", "150KB"] if way == "to-hf" else ["--config", config]
    cli.main(["convert", way, source, "--out", out, *extra])


def make_bench() -> list[str]:
    """A sound model in both formats: [Hugging Face folder, Megatron folder, run file]."""
    bench = Bench()
    return [str(bench.home / "hf"), str(bench.home / "megatron"), bench.config]
