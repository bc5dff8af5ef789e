"""Folders of several forms through `convert` and back: which tensors came back with other bits."""

import json
from pathlib import Path

import torch
from convert_models import S2, make_model, run_tree
from launches import write_run_file
from safetensors.torch import load_file, save_file

# Bits that arithmetic would change: NaNs with a payload, minus zero, infinities, subnormals.
ODD_BITS = {
    torch.float32: [0x7FC12345, 0x7F812345, -0x80000000, 0x7F800000, -0x800000, 1],
    torch.bfloat16: [0x7FC5, 0x7F85, -0x8000, 0x7F80, -0x80, 1],
    torch.float16: [0x7E05, 0x7C05, -0x8000, 0x7C00, -0x400, 1],
}
INTEGER = {4: torch.int32, 2: torch.int16}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGER[tensor.element_size()])


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms and routers in float32, the head in float16, all else bfloat16, with odd bits."""
    result = {}
    for name, tensor in tensors.items():
        wide = "norm" in name or name.endswith(".gate.weight")
        dtype = torch.float32 if wide else torch.bfloat16
        tensor = tensor.to(torch.float16 if name == "lm_head.weight" else dtype)
        odd = ODD_BITS[tensor.dtype]
        bits(tensor).view(-1)[: len(odd)] = torch.tensor(odd, dtype=torch.int64).to(
            INTEGER[tensor.element_size()]
        )
        result[name] = tensor
    return result


def make_source(kind: str, folder: Path, form: str) -> dict[str, torch.Tensor]:
    """A model folder; the tensors that it holds, by the names that they have on the hub."""
    model = make_model(kind, folder)
    tensors = mixed(all_tensors(folder))
    index = folder / "model.safetensors.index.json"
    if form == "sharded":
        for file in folder.glob("*.safetensors"):
            names = load_file(file)
            save_file({n: tensors[n] for n in names}, file, metadata={"format": "pt"})
        return tensors
    for file in folder.glob("*.safetensors"):
        file.unlink()
    if form == "fused":
        index.unlink()
        model.save_pretrained(folder, save_original_format=False, max_shard_size="150KB")
        assert any(name.endswith(".mlp.experts.gate_up_proj") for name in all_tensors(folder))
        make_model(kind, folder.with_name(f"{folder.name}-hub"))
        return all_tensors(folder.with_name(f"{folder.name}-hub"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if form == "named":
        (folder / "model.safetensors").rename(folder / "mine.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["transformers_weights"] = "mine.safetensors"
        (folder / "config.json").write_text(json.dumps(config))
    if form != "left-over-index":
        index.unlink()
    return tensors


CASES = [
    ("llama", "single"), ("llama", "sharded"), ("llama", "left-over-index"), ("llama", "named"),
    ("mixtral", "single"), ("qwen3_moe", "sharded"), ("mixtral", "fused"), ("qwen3_moe", "fused"),
]  # fmt: skip


def round_trips(bench) -> dict:
    """Case -> which tensors differ, is it a single file, does its config name files; or errors.

    Back into a single file, or into shards where the source had some.
    """
    results = {}
    for kind, form in CASES:
        name = f"{kind}-{form}"
        expected = make_source(kind, bench.home / name, form)
        config = write_run_file(bench.home / f"{kind}.yaml", run_tree(kind, S2))
        argv = ["to-megatron", bench.home / name, "--config", config]
        there = bench.run(argv, f"{name}-megatron")
        options = ["--max-shard-size", "100KB"] if form in ("sharded", "fused") else []
        back = bench.run(["to-hf", bench.home / f"{name}-megatron", *options], f"{name}-back")
        if there[0] or back[0]:
            results[name] = [there[1], back[1]]
            continue
        got = all_tensors(bench.home / f"{name}-back")
        config = json.loads((bench.home / f"{name}-back" / "config.json").read_text())
        files = sorted(file.suffix for file in (bench.home / f"{name}-back").glob("model*"))
        differ = sorted(expected.keys() ^ got.keys())
        differ += [
            key
            for key in expected.keys() & got.keys()
            if expected[key].dtype != got[key].dtype
            or not torch.equal(bits(expected[key]), bits(got[key]))
        ]
        results[name] = {
            "differ": differ,
            "single": files == [".safetensors"],
            "named": "transformers_weights" in config,
        }
    return results
