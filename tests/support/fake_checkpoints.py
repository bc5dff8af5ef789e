"""Folders that look like a checkpoint that Megatron saved, for tests that load none."""

from pathlib import Path


def checkpoint(folder: Path, number: int, *, complete: bool = True) -> Path:
    """`iter_N` with one file of a rank; without its metadata a save that was cut off."""
    path = folder / f"iter_{number:07d}"
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", *((".metadata", "metadata.json") if complete else ())):
        (path / name).write_text("x")
    return path
