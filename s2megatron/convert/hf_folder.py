"""A Hugging Face checkpoint folder: read tensor by tensor, written shard by shard."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2megatron.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

GENERATION_CONFIG = "generation_config.json"


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HuggingFaceFolder:
    """Reads config.json and safetensors of a local folder.

    Raises:
        ConfigError: files are missing, cut short, or do not fit the index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder (a local one is needed)")
        self.raw_config = read_json(self.folder / "config.json")
        self._files: dict[str, object] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of = self._find_tensors()

    @property
    def config(self):
        """The transformers configuration. Raises ConfigError for an unknown architecture."""
        return read_config(self.folder)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            return self._open(self._file_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            file = self.folder / self._file_of[name]
            raise ConfigError(f"{file}: {name} cannot be read ({error})") from None

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it."""
        stored = self._open(self._file_of[name]).get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ConfigError(
                f"{self.folder / self._file_of[name]}: {name} is {stored}; only "
                f"{', '.join(_DTYPES)} can be trained"
            )
        return _DTYPES[stored]

    def _find_tensors(self) -> dict[str, str]:
        """File of every tensor; opens every file once, which checks its length."""
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise ConfigError(f"{self.folder / INDEX}: has no weight_map; it is damaged")
        elif (self.folder / SINGLE).is_file():
            index = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ConfigError(
                f"{self.folder}: has neither {SINGLE} nor {INDEX}; only safetensors are read "
                "(load it in transformers and call save_pretrained)"
            )
        for file in sorted(set(index.values())):
            stored = self._open(file)
            for name in stored.keys():  # noqa: SIM118 - safe_open is no dict
                if index.get(name) != file:
                    raise ConfigError(
                        f"{self.folder / INDEX}: has no entry for {name}, which {file} holds"
                    )
                self.shapes[name] = tuple(stored.get_slice(name).get_shape())
        for name, file in index.items():
            if name not in self.shapes:
                raise ConfigError(f"{self.folder / file}: {name} is missing, which {INDEX} names")
        return index

    def _open(self, name: str):
        if name not in self._files:
            try:
                # pread, because every page of a mapped file that was ever read counts as memory
                self._files[name] = safe_open(self.folder / name, framework="pt", backend="pread")
            except FileNotFoundError:
                raise ConfigError(
                    f"{self.folder / name}: is missing, which {INDEX} names"
                ) from None
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{self.folder / name}: cannot be read, it may be cut short ({error})"
                ) from None
        return self._files[name]


def read_json(file: Path) -> dict:
    """A JSON file of a model folder. Raises ConfigError when it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: is missing; is this a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from None


def read_config(folder: Path):
    """The transformers configuration of a folder. Raises ConfigError when it is not known."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'}: transformers refuses it: {first}") from None


def parse_size(text: str) -> int:
    """'5GB', '500MB' -> bytes (decimal, as transformers counts). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip().upper())
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    if not match or not float(match[1]):
        raise ConfigError(f"--max-shard-size {text!r}: must look like 5GB or 500MB")
    return int(float(match[1]) * units[match[2]])


def plan_shards(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Names of each shard, in order; a tensor larger than `most` bytes has one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    folder: Path,
    shards: list[list[str]],
    tensors: Iterator[tuple[str, Tensor]],
    done: Callable[[int], None],
) -> None:
    """Writes tensors that come in the order of the shards, holding one shard in memory.

    Args:
        done: told the bytes of each shard once it is on disk.
    """
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        shard = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, (name, expected)
            shard[name] = tensor.contiguous()
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors wraps an OSError and keeps its number only in the text
            match = re.search(r"os error (\d+)", str(error))
            if match is None:
                raise
            raise OSError(int(match[1]), str(error)) from error
        os.chmod(folder / file, _default_mode())  # safetensors makes files for the owner only
        size = sum(t.numel() * t.element_size() for t in shard.values())
        weight_map |= dict.fromkeys(names, file)
        total += size
        done(size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def dtype_named(name: str) -> torch.dtype:
    """'bf16', 'bfloat16', ... -> torch dtype. Raises ConfigError."""
    known = {
        "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
        "float16": torch.float16, "fp32": torch.float32, "float32": torch.float32,
    }  # fmt: skip
    if name not in known:
        raise ConfigError(f"--dtype {name!r}: must be one of {', '.join(known)}")
    return known[name]
