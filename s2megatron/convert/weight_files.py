"""Which weights a Hugging Face folder holds: the same files that transformers loads, in its order.

transformers takes the first of these that is there, and looks at no other file:

1. the file that `transformers_weights` in config.json names, weights or an index;
2. model.safetensors;
3. the shards that model.safetensors.index.json names;
4. pytorch_model.bin or its shards, which are pickles and are not read here.

A folder that holds whole weights twice over, or weights that an adapter goes with, is refused:
transformers would choose, and the user may have meant the other.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from s2megatron.convert.hf_config import read_json
from s2megatron.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"


def choose_weights(folder: Path, config: dict, notes: list[str]) -> str:
    """The name of the safetensors file, or of the index, that holds the folder's weights.

    Args:
        config: the fields of config.json.
        notes: gets a line about a file that is passed over.

    Raises:
        ConfigError: no weights that can be read, or two sets of them; the files are named.
    """
    if (folder / ADAPTER).is_file():
        raise ConfigError(
            f"{folder / ADAPTER}: transformers would load the model that this adapter belongs to, "
            "and not the folder's own weights; merge the adapter (merge_and_unload) and save that, "
            "or delete the file"
        )
    named = config.get("transformers_weights")
    if named is not None:
        return _named_weights(folder, named)
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        _refuse_two_sets(folder)
        notes.append(
            f"{folder / INDEX}: left over, it names shards that are not there; {SINGLE} was read, "
            "as transformers does"
        )
    if single or index:
        return SINGLE if single else INDEX
    others = sorted(file.name for file in folder.glob("*.bin*")) + sorted(
        file.name for file in folder.glob("*.safetensors")
    )
    there = f" (there is {', '.join(others[:4])})" if others else ""
    raise ConfigError(
        f"{folder}: has neither {SINGLE} nor {INDEX}{there}; only safetensors are read, under the "
        "names that transformers looks for (load it in transformers and call save_pretrained)"
    )


def _named_weights(folder: Path, named) -> str:
    if not isinstance(named, str) or not named.endswith(
        (".safetensors", ".safetensors.index.json")
    ):
        raise ConfigError(
            f"{folder / 'config.json'}: transformers_weights={named!r}: must name a .safetensors "
            "file or its .safetensors.index.json"
        )
    if not (folder / named).is_file():
        raise ConfigError(f"{folder / named}: is missing, which transformers_weights names")
    return named


def _refuse_two_sets(folder: Path) -> None:
    shards = set(read_index(folder, INDEX).values()) - {SINGLE}
    there = sorted(name for name in shards if (folder / name).is_file())
    if there:
        raise ConfigError(
            f"{folder}: two sets of weights: {SINGLE}, which transformers would load, and "
            f"{len(there)} of the {len(shards)} shards that {INDEX} names ({there[0]}, ...); "
            f"delete {SINGLE}, or the index and its shards"
        )


def read_index(folder: Path, name: str) -> dict[str, str]:
    """Tensor -> file, of an index. Raises ConfigError when it is damaged."""
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ConfigError(f"{folder / name}: has no weight_map of tensors and files; it is damaged")
    return index


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: a whole tensor of a file, or one expert's rows of a fused one."""

    file: str
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None


_FUSED = re.compile(r"(model\.layers\.\d+\.\w+\.experts\.)(gate_up_proj|down_proj)")
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def hub_tensors(stored: StoredTensor, model_type: str) -> dict[str, StoredTensor]:
    """The tensors that a stored one stands for, under the names that the hub's models have.

    transformers 5 keeps the experts of a layer in two tensors, gate_up_proj [e, 2f, h] and
    down_proj [e, h, f], and its `save_pretrained(save_original_format=False)` writes them so. It
    also calls Mixtral's block_sparse_moe mlp. What it reads under both names is read here too.
    """
    name = stored.name
    mixtral = model_type == "mixtral"
    fused = _FUSED.fullmatch(name)
    if mixtral:
        name = re.sub(r"(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name)
    if not fused or len(stored.shape) != 3:
        return {name: stored}
    prefix = name.removesuffix(fused[2])
    experts, rows, columns = stored.shape
    half = rows // 2
    parts = {"down_proj": (0, rows)}
    if fused[2] == "gate_up_proj":
        parts = {"gate_proj": (0, half), "up_proj": (half, rows)}
    return {
        f"{prefix}{expert}.{_MIXTRAL_NAMES[part] if mixtral else part}.weight": StoredTensor(
            stored.file, stored.name, (end - start, columns), expert, (start, end)
        )
        for expert in range(experts)
        for part, (start, end) in parts.items()
    }
