"""`s2megatron verify`: whether checkpoints hold what was written, without a run."""

import time
from collections.abc import Iterator
from pathlib import Path

from s2megatron.cluster.environment import cores
from s2megatron.errors import ConfigError
from s2megatron.training.checkpoint_content import damaged_parts, stored_parts
from s2megatron.training.checkpoint_folder import damage, iteration_dir, iterations


def verify(folder: str) -> Iterator[str]:
    """Reads all files of the checkpoints found there; a line for each as it is read.

    Args:
        folder: an output folder, its `checkpoints`, or one checkpoint.

    Raises:
        ConfigError: there is no checkpoint; or, at the end, some are damaged.
    """
    checkpoints = _checkpoints(Path(folder))
    damaged = 0
    for checkpoint in checkpoints:
        start = time.monotonic()
        found = damage(checkpoint)
        if not found:
            parts = stored_parts(checkpoint)
            found = "; ".join(damaged_parts(checkpoint, parts, cores()))
        if found:
            damaged += 1
            yield f"{checkpoint}: damaged: {found}"
            continue
        size, seconds = sum(part.length for part in parts) / 1e9, time.monotonic() - start
        yield f"{checkpoint}: as written, {size:.3g} GB in {seconds:.1f} s"
    if damaged:
        raise ConfigError(f"{folder}: {damaged} of {len(checkpoints)} checkpoints damaged")


def _checkpoints(folder: Path) -> list[Path]:
    if (folder / ".metadata").is_file():
        return [folder]
    for place in (folder / "checkpoints", folder):
        found = [iteration_dir(place, number) for number in iterations(place)]
        found += [place / "release"] if (place / "release").is_dir() else []  # a converted model
        if found:
            return found
    raise ConfigError(f"{folder}: there is no checkpoint: no iter_*, no release, no .metadata")
