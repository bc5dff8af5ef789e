"""Writes a Megatron torch_dist checkpoint tensor by tensor: no GPU, no process group, no model.

The folder is what Megatron calls a release: weights and arguments, no optimizer, iteration 0. Each
layer's tensor is a chunk of its own, so every parallel layout reads only what it needs.

torch's FileSystemWriter keeps the last tensor of every key until the file ends, which for a model
with keys per layer is all of them; this writer keeps one.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

RELEASE = "release"
FILE = "__0_0.distcp"


@dataclass(frozen=True)
class Chunk:
    """One piece of a global tensor, made when it is written."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the piece, leading axes of layers and experts included."""
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write_release(
    folder: Path,
    chunks: list[Chunk],
    objects: dict[str, object],
    done: Callable[[int], None],
) -> None:
    """Writes `folder`/release and the tracker file that makes Megatron load it.

    Args:
        chunks: in the order in which they are best made.
        objects: sharded objects by their unique key ("NAME/shard_OFFSETS_SHAPE").
        done: told the bytes of each chunk once it is written.

    Raises:
        OSError: the disk is full, ...
        ConfigError: what a chunk's `make` raises.
    """
    release = folder / RELEASE
    release.mkdir()
    try:
        dcp.save(
            {},
            storage_writer=_StreamWriter(release, done),
            planner=_ChunkPlanner(chunks, objects),
            no_dist=True,
        )
    except CheckpointException as error:
        # torch collects what every rank raised; there is one.
        cause = next(iter(error.failures.values()))[0]
        raise cause from error
    (release / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    (folder / "latest_checkpointed_iteration.txt").write_text(RELEASE)


class _ChunkPlanner(DefaultSavePlanner):
    """Plans chunks by their metadata alone and makes each when the writer asks for it."""

    def __init__(self, chunks: list[Chunk], objects: dict[str, object]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.chunks = {MetadataIndex(c.key, torch.Size(c.offsets)): c for c in chunks}
        self.objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        for index, chunk in self.chunks.items():
            where = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            data = TensorWriteData(
                chunk=where,
                properties=TensorProperties(dtype=chunk.dtype),
                size=torch.Size(chunk.global_shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], buffer)  # as Megatron does: a list
            return buffer
        chunk = self.chunks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = chunk.make().reshape(chunk.sizes)
        assert tensor.dtype == chunk.dtype, (chunk.key, tensor.dtype)
        return tensor


class _StreamWriter(FileSystemWriter):
    """Writes one item after the other, holding one in memory."""

    def __init__(self, path: Path, done: Callable[[int], None]):
        super().__init__(path)
        self.done = done

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with (Path(self.path) / FILE).open("wb") as stream:
            for item in plan.items:
                data = planner.resolve_data(item)
                start = stream.tell()
                if isinstance(data, Tensor):
                    _save(data, stream)
                    self.done(data.numel() * data.element_size())
                else:
                    stream.write(data.getbuffer())
                length = stream.tell() - start
                place = _StorageInfo(FILE, start, length)
                results.append(WriteResult(item.index, length, place))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _save(tensor: Tensor, stream) -> None:
    """torch.save of the tensor alone, not of all the storage that it may look into."""
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    try:
        torch.save(tensor, stream)
    except RuntimeError as error:
        # The zip writer stumbles over a write that failed, and hides what the disk said.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
