"""Reads a Megatron torch_dist checkpoint tensor by tensor: no GPU, no process group, no model.

torch_dist is torch.distributed.checkpoint's format. Its metadata knows every stored chunk of every
global tensor, so any region can be read whatever layout it was saved with. Files are checked
against the metadata before anything is read.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from s2megatron.convert.tensors import LAYERS, TensorRule
from s2megatron.errors import ConfigError
from s2megatron.training.resume import latest_iteration_dir, load_common


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a key, and indices into its leading axes (layer, expert)."""

    key: str
    index: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor itself, without the leading axes."""
        return self.stored_shape[len(self.index) :]


def find_checkpoint(folder: str | Path, step: int | None = None) -> Path:
    """The folder of one iteration: `folder` itself, or the latest (or `step`) inside it.

    Raises:
        ConfigError: there is none, or it is not in torch_dist format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"checkpoint {folder}: there is no such folder")
    found = folder
    if not (folder / ".metadata").is_file():
        found = latest_iteration_dir(folder, step)
        if found is None:
            raise ConfigError(
                f"checkpoint {folder}: holds neither latest_checkpointed_iteration.txt nor a "
                ".metadata file; name Megatron's checkpoint folder or one iteration in it"
            )
    elif step is not None:
        raise ConfigError(f"--step {step}: {folder} is one iteration; name the folder above it")
    if not (found / ".metadata").is_file():
        raise ConfigError(
            f"checkpoint {found}: has no .metadata file; it is incomplete, or not in torch_dist "
            "format (load it in Megatron and save it with ckpt_format: torch_dist)"
        )
    return found


class CheckpointReader:
    """One iteration of a torch_dist checkpoint.

    Attributes:
        folder: of the iteration.
        tensors: metadata by key, without optimizer state.
        common: Megatron's common state ("args", "iteration", ...).

    Raises:
        ConfigError: the checkpoint is incomplete or damaged.
    """

    def __init__(self, folder: str | Path, step: int | None = None):
        self.folder = find_checkpoint(folder, step)
        self._files = FileSystemReader(self.folder)
        try:
            self.metadata = self._files.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise ConfigError(
                f"checkpoint {self.folder}: .metadata cannot be read "
                f"({type(error).__name__}: {error})"
            ) from None
        self._files.set_up_storage_reader(self.metadata, is_coordinator=True)
        entries = self.metadata.state_dict_metadata
        self.tensors = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and "optimizer" not in key.split(".")[:2]
        }
        self.has_optimizer = any("optimizer" in key.split(".")[:2] for key in entries)
        self._check_files()
        self.common = load_common(self.folder)
        if self.common.get("args") is None:
            raise ConfigError(
                f"checkpoint {self.folder}: its common state holds no args, so nothing is known "
                "about the model; save it from Megatron's training loop"
            )

    @property
    def args(self):
        """Megatron's arguments, as saved."""
        return self.common["args"]

    def _check_files(self) -> None:
        """Every chunk of the weights lies inside a file that is there."""
        needed: dict[str, int] = {}
        found = dict.fromkeys(self.tensors, 0)
        for index, info in self.metadata.storage_data.items():
            if index.fqn in found:
                found[index.fqn] += 1
                end = info.offset + info.length
                needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        for key, count in found.items():
            if count != len(self.tensors[key].chunks):
                raise ConfigError(
                    f"checkpoint {self.folder}: .metadata places {count} of the "
                    f"{len(self.tensors[key].chunks)} pieces of {key}; it is damaged"
                )
        for name, size in needed.items():
            file = self.folder / name
            if not file.is_file():
                raise ConfigError(f"checkpoint {self.folder}: {name} is missing; it is incomplete")
            if file.stat().st_size < size:
                raise ConfigError(
                    f"checkpoint {self.folder}: {name} has {file.stat().st_size:,} bytes of "
                    f"{size:,}; it is cut short"
                )

    def place(self, rule: TensorRule) -> Place:
        """Where a tensor of the model lies. Raises ConfigError when it is not there."""
        for name in rule.megatron:
            for key, index in _addresses(rule, name):
                if entry := self.tensors.get(key):
                    return Place(key, index, tuple(entry.size), entry.properties.dtype)
        where = "" if rule.layer is None else f" of layer {rule.layer + 1}"
        raise ConfigError(f"checkpoint {self.folder}: {rule.megatron[0]}{where} is missing")

    def read(self, place: Place) -> Tensor:
        """The tensor at a place, alone in memory. Raises ConfigError when it cannot be read."""
        lead = len(place.index)
        region = ChunkStorageMetadata(
            torch.Size((*place.index, *(0 for _ in place.shape))),
            torch.Size((*(1,) * lead, *place.shape)),
        )
        out = torch.empty(region.sizes, dtype=place.dtype)
        items = create_read_items_for_chunk_list(place.key, self.tensors[place.key], [region])
        covered = sum(item.lengths.numel() for item in items)
        if covered != out.numel():
            raise ConfigError(
                f"checkpoint {self.folder}: {place.key} has {covered:,} of {out.numel():,} "
                "elements stored; it is damaged"
            )
        try:
            self._files.read_data(LoadPlan(items), _IntoOneTensor(out))
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"checkpoint {self.folder}: {place.key} cannot be read "
                f"({type(error).__name__}: {error}); the files are damaged"
            ) from None
        return out.view(place.shape)


def _addresses(rule: TensorRule, name: str):
    """(key, leading indices) under which a layer's tensor may be stored."""
    expert = () if rule.expert is None else (rule.expert,)
    if rule.layer is None:
        yield name, ()
    else:
        yield f"{LAYERS}.{name}", (rule.layer, *expert)
        yield f"{LAYERS}.{rule.layer}.{name}", expert


class _IntoOneTensor(LoadPlanner):
    """Copies what is read into one region-sized tensor."""

    def __init__(self, out: Tensor):
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.out
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """`resolve_tensor` gave a view: nothing is left to do."""

    # The interface wants these; only a distributed load calls them, and this reader makes none.
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        raise NotImplementedError("reads single tensors; plans are made by CheckpointReader")

    create_local_plan = create_global_plan = finish_plan = set_up_planner

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are read")
