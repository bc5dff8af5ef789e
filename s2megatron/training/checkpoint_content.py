"""Whether a torch_dist checkpoint still holds the bytes that were written.

torch saves every tensor and object of a checkpoint as a small ZIP archive, with a CRC-32 of each of
its records, and does not compare them when it reads: a damaged weight would be trained on. Here
they are compared. So nothing is hashed while saving, the sums are of what was in memory and not of
what a disk gave back, and checkpoints of every age have them. The two files that are no such
archives, `.metadata` and `metadata.json`, get theirs in `checksums.json` at the end of their save.
"""

import functools
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch._C import PyTorchFileReader

CHECKSUMS = "checksums.json"
_COVERED = (".metadata", "metadata.json")
_UNPICKLED = (
    pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError,
    AttributeError, ImportError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip
"""What `pickle` raises on random bytes, by which it may call anything."""
_FLAGS = 0x0808
"""Those of a record's flags that torch sets: its sum comes behind it, its name is UTF-8."""
_NOT_AS_WRITTEN = "does not hold what was written"
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError,
    OverflowError, MemoryError,
)  # fmt: skip
"""What `zipfile` raises on random bytes (NotImplementedError and UnicodeDecodeError included)."""


@dataclass(frozen=True)
class Part:
    """A tensor's shard, or an object: an archive within a file."""

    file: str
    offset: int
    length: int
    """Both in bytes."""


def stored_parts(checkpoint: Path) -> list[Part]:
    """What `.metadata` says is stored, file by file and in order.

    Raises:
        ValueError: `.metadata` cannot be read.
    """
    try:
        with (checkpoint / ".metadata").open("rb") as stream:
            stored = pickle.load(stream).storage_data.values()
            parts = [Part(part.relative_path, part.offset, part.length) for part in stored]
    except _UNPICKLED as error:
        raise ValueError(f".metadata cannot be read ({error})") from None
    return sorted(parts, key=lambda part: (part.file, part.offset))


def share(parts: Sequence[Part], rank: int, ranks: int) -> list[Part]:
    """The parts that one of `ranks` looks at: neighbours, about as many bytes as any other rank."""
    total, before, mine = sum(part.length for part in parts) or 1, 0, []
    for part in parts:
        if (before + part.length / 2) * ranks // total == rank:
            mine.append(part)
        before += part.length
    return mine


def damaged_parts(checkpoint: Path, parts: Sequence[Part], threads: int) -> list[str]:
    """Reads these parts whole; a line for each file that is not as it was written.

    A core compares 2 to 3 GB a second; the threads run at the same time.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(pool.map(functools.partial(_damage_of, checkpoint), parts))
    first: dict[str, str] = {}
    for part, reason in zip(parts, found, strict=True):
        if reason:
            first.setdefault(part.file, reason)
    return [f"{file} {reason}" for file, reason in first.items()]


def _damage_of(checkpoint: Path, part: Part) -> str:
    place = f"{_NOT_AS_WRITTEN} in bytes {part.offset} to {part.offset + part.length}"
    try:
        with (checkpoint / part.file).open("rb", buffering=0) as file:
            bad = _bad_record(_Window(file, part.offset, part.length))
    except _UNREADABLE as error:
        return f"{place} ({error})"
    return f"{place} ({bad})" if bad else ""


def _bad_record(window: "_Window") -> str:
    """The record of an archive that is not what torch wrote.

    `zipfile` overlooks some damage to the list of records by which torch would read other bytes, or
    none: torch's own reader goes through the list too, and what torch leaves empty must be empty.
    """
    PyTorchFileReader(window)
    with zipfile.ZipFile(window) as archive:
        for record in archive.infolist():
            whole = record.compress_size == record.file_size and not record.flag_bits & ~_FLAGS
            empty = (record.compress_type, record.internal_attr, record.external_attr)
            if not whole or empty != (zipfile.ZIP_STORED, 0, 0):
                return record.filename
        return archive.testzip() or ""


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: io.RawIOBase, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError(f"byte {origin + offset} of an archive")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.start + self.position)
        wanted = memoryview(buffer)[: max(0, self.length - self.position)]
        read = self.file.readinto(wanted)
        self.position += read
        return read


def write_checksums(checkpoint: Path) -> None:
    """Of the files that say what the others hold. Beside, then renamed."""
    beside = checkpoint / f".{CHECKSUMS}.new"
    beside.write_text(json.dumps({name: _crc32(checkpoint / name) for name in _COVERED}))
    beside.rename(checkpoint / CHECKSUMS)


def damaged_metadata(checkpoint: Path) -> str:
    """'' where `checksums.json` agrees, or is not there: older checkpoints have none."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return ""
    except ValueError:
        return f"{CHECKSUMS} cannot be read"
    for name in _COVERED:
        if not isinstance(sums, dict) or sums.get(name) != _crc32(checkpoint / name):
            return f"{name} {_NOT_AS_WRITTEN}"
    return ""


def _crc32(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


def checksums_at_the_end_of_a_save() -> None:
    """Lets Megatron's last step of a save on rank 0, background or not, write the sums too.

    Megatron's own `verify_integrity` reads the whole checkpoint on one rank instead, at 0.9 GB/s,
    while training waits.
    """
    from megatron.core.dist_checkpointing import serialization

    save_config = serialization.save_config
    if getattr(save_config, "_writes_checksums", False):
        return

    @functools.wraps(save_config)
    def then_checksums(config, checkpoint_dir: str, *args, **kwargs):
        save_config(config, checkpoint_dir, *args, **kwargs)
        if all(os.path.isfile(os.path.join(checkpoint_dir, name)) for name in _COVERED):
            write_checksums(Path(checkpoint_dir))

    then_checksums._writes_checksums = True
    serialization.save_config = then_checksums
