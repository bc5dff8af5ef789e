"""Which documents a run reads: a digest of each dataset's index.

Megatron keeps the order of documents and samples in a cache, and finds it by the dataset's path.
With other documents under the same prefix it would take the old order: new documents are never
read, or an index is out of range. So the digest goes into the cache's name and the checkpoint.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split

WHOLE = 2**26
"""Bytes: a larger index is read at as many evenly spaced places; with its size that tells two
datasets apart as surely as anyone needs."""
_PIECES = 1024


def index_digest(prefix: str) -> str:
    """A digest of PREFIX.idx (all lengths of all documents) and of the size of PREFIX.bin."""
    index = Path(f"{prefix}.idx")
    size = index.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{size} {Path(f'{prefix}.bin').stat().st_size}".encode())
    with index.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for piece in range(_PIECES):
                stream.seek((size - WHOLE // _PIECES) * piece // (_PIECES - 1))
                digest.update(stream.read(WHOLE // _PIECES))
    return digest.hexdigest()


def data_identity(args) -> dict[str, str]:
    """Prefix -> digest of every dataset that Megatron's arguments name; none for mock data."""
    blend, per_split = get_blend_and_blend_per_split(args)
    named = [blend, *(per_split or [])]
    prefixes = sorted({prefix for entry in named if entry for prefix in entry[0] or ()})
    return {prefix: index_digest(prefix) for prefix in prefixes if Path(f"{prefix}.idx").is_file()}


@dataclass
class KnownDataConfig(GPTDatasetConfig):
    """Megatron's dataset configuration, and which documents it is for."""

    documents: dict[str, str] | None = None
    """What `data_identity` says."""
    rows: int | None = None
    """The padded vocabulary's: a token at or above it has no embedding."""


class KnownGPTDataset(GPTDataset):
    """Megatron's, with a cache for these documents alone, and tokens that the model has rows for.

    Under tensor parallelism Megatron would train on another token in silence: no rank has the row,
    and all of them hold it for one of another rank's. On one rank an index is out of range, which
    a GPU reports from somewhere else.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """A sample. Raises ValueError for a token outside the vocabulary."""
        sample = super().__getitem__(idx)
        largest = max(int(sample["tokens"].max()), int(sample["labels"].max()))
        if self.config.rows is not None and largest >= self.config.rows:
            raise ValueError(
                f"dataset {self.dataset_path}: has the token {largest}, and the model a vocabulary "
                f"of {self.config.rows} (padded): name the tokenizer that the dataset was made "
                "with (data.tokenizer), or make it again with this one"
            )
        return sample

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "documents"]
