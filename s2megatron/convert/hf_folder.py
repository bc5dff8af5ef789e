"""A Hugging Face checkpoint folder: read tensor by tensor, written shard by shard."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2megatron.convert.hf_config import read_config, read_json, write_json
from s2megatron.convert.weight_files import (
    INDEX,
    SINGLE,
    StoredTensor,
    choose_weights,
    hub_tensors,
    read_index,
)
from s2megatron.errors import ConfigError

GENERATION_CONFIG = "generation_config.json"


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HuggingFaceFolder:
    """Reads config.json and safetensors of a local folder.

    Attributes:
        shapes: of all tensors, under the names that they have on the hub; experts that
            transformers 5 fused are one tensor each.
        notes: what a user should know about the files that were read.

    Raises:
        ConfigError: files are missing, cut short, ambiguous, or do not fit the index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder (a local one is needed)")
        self.raw_config = read_json(self.folder / "config.json")
        self.notes: list[str] = []
        self._files: dict[str, object] = {}
        self._tensors = self._find_tensors()
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}

    @property
    def config(self):
        """The transformers configuration. Raises ConfigError, see `read_config`."""
        return read_config(self.folder)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        stored = self._tensors[name]
        try:
            if stored.expert is None:
                return self._open(stored.file).get_tensor(stored.name)
            whole = self._open(stored.file).get_slice(stored.name)
            return whole[stored.expert, slice(*stored.rows)]
        except (SafetensorError, OSError) as error:
            file = self.folder / stored.file
            raise ConfigError(f"{file}: {stored.name} cannot be read ({error})") from None

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without reading it."""
        stored = self._tensors[name]
        dtype = self._open(stored.file).get_slice(stored.name).get_dtype()
        if dtype not in _DTYPES:
            raise ConfigError(
                f"{self.folder / stored.file}: {stored.name} is {dtype}; only "
                f"{', '.join(_DTYPES)} can be trained"
            )
        return _DTYPES[dtype]

    def _find_tensors(self) -> dict[str, StoredTensor]:
        """Where every tensor lies; opens every file once, which checks its length."""
        weights = choose_weights(self.folder, self.raw_config, self.notes)
        if weights.endswith(".json"):
            index = read_index(self.folder, weights)
        else:
            index = dict.fromkeys(self._open(weights).keys(), weights)
        found: dict[str, StoredTensor] = {}
        seen = set()
        for file in sorted(set(index.values())):
            opened = self._open(file, named_by=weights)
            for name in opened.keys():  # noqa: SIM118 - safe_open is no dict
                if index.get(name) != file:
                    raise ConfigError(
                        f"{self.folder / weights}: has no entry for {name}, which {file} holds"
                    )
                seen.add(name)
                shape = tuple(opened.get_slice(name).get_shape())
                self._add(found, StoredTensor(file, name, shape))
        for name, file in index.items():
            if name not in seen:
                raise ConfigError(f"{self.folder / file}: {name} is missing, which {weights} names")
        return found

    def _add(self, found: dict[str, StoredTensor], stored: StoredTensor) -> None:
        """Adds what a stored tensor stands for; nothing may be there twice."""
        for name, part in hub_tensors(stored, self.raw_config.get("model_type")).items():
            if name in found:
                raise ConfigError(
                    f"{self.folder / stored.file}: {stored.name} and {found[name].name} (in "
                    f"{found[name].file}) are both {name}; keep one of them"
                )
            found[name] = part

    def _open(self, name: str, named_by: str = ""):
        if name not in self._files:
            try:
                # pread, because every page of a mapped file that was ever read counts as memory
                self._files[name] = safe_open(self.folder / name, framework="pt", backend="pread")
            except FileNotFoundError:
                raise ConfigError(
                    f"{self.folder / name}: is missing, which {named_by} names"
                ) from None
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{self.folder / name}: cannot be read, it may be cut short ({error})"
                ) from None
        return self._files[name]


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


def dtype_named(name: str) -> torch.dtype:
    """'bf16', 'bfloat16', ... -> torch dtype. Raises ConfigError."""
    known = {
        "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
        "float16": torch.float16, "fp32": torch.float32, "float32": torch.float32,
    }  # fmt: skip
    if name not in known:
        raise ConfigError(f"--dtype {name!r}: must be one of {', '.join(known)}")
    return known[name]
