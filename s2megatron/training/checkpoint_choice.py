"""Which checkpoint a run resumes from: the newest whose files hold what was written.

Rank 0 decides; all ranks read, each a share of the bytes. This comes before Megatron has made a
process group, since its options name the checkpoint: the ranks talk through the store where they
will meet for it.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from s2megatron.cluster.environment import cores
from s2megatron.errors import ConfigError
from s2megatron.training.checkpoint_content import damaged_parts, share, stored_parts
from s2megatron.training.checkpoint_folder import (
    damage,
    iteration_dir,
    iterations,
    missing_parts,
    resume_point,
)

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the slowest reader. The end of a rank ends the job at once."""


@dataclass
class Ranks:
    """This process among those of the job, and what they say to each other."""

    rank: int = 0
    ranks: int = 1
    threads: int = 1
    """With which this one reads."""
    store: torch.distributed.Store | None = None
    """Where they meet; one rank needs none."""
    said: int = 0

    @classmethod
    def of_launch(cls) -> "Ranks":
        """As torchrun's environment says; one rank where nothing launched this process.

        Keep it until the process group is made: rank 0 may serve the store.
        """
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if ranks == 1:
            return cls(threads=threads)
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, ranks, timeout=PATIENCE))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)  # the store outlives a start
        prefix = f"s2megatron/checkpoint/{start}"
        return cls(rank, ranks, threads, torch.distributed.PrefixStore(prefix, store))

    def tell(self, message: dict) -> None:
        """Rank 0, to all others."""
        self.said += 1
        if self.store is not None:
            self.store.set(f"{self.said}", json.dumps(message))

    def hear(self) -> dict:
        """What rank 0 tells next."""
        self.said += 1
        return json.loads(self.store.get(f"{self.said}"))

    def gather(self, lines: list[str]) -> list[str]:
        """The lines of all ranks, on rank 0; its own on another."""
        if self.rank:
            self.store.set(f"{self.said}/{self.rank}", json.dumps(lines))
        else:
            for other in range(1, self.ranks):
                lines = lines + json.loads(self.store.get(f"{self.said}/{other}"))
        return lines


def choose_checkpoint(folder: Path, read_all: bool, ranks: Ranks) -> tuple[int | None, list[str]]:
    """The iteration to resume from, the same on all ranks, and on rank 0 what to say of it.

    That is `resume_point`'s, or the newest one before it that is not damaged.

    Args:
        read_all: compare the checksums of all that the files hold, and not their sizes alone.

    Raises:
        ConfigError: on all ranks, where no complete checkpoint is undamaged.
    """
    if ranks.rank:
        while "read" in (told := ranks.hear()):
            _read(Path(told["read"]), ranks)
        if "refused" in told:
            raise ConfigError(told["refused"])
        return told["iteration"], []
    try:
        iteration, notes = _newest_undamaged(folder, read_all, ranks)
    except ConfigError as error:
        ranks.tell({"refused": str(error)})
        raise
    ranks.tell({"iteration": iteration})
    return iteration, notes


def _newest_undamaged(folder: Path, read_all: bool, ranks: Ranks) -> tuple[int | None, list[str]]:
    iteration, notes = resume_point(folder)
    passed_over = []
    while iteration is not None:
        checkpoint = iteration_dir(folder, iteration)
        if not (found := damage(checkpoint)) and read_all:
            ranks.tell({"read": str(checkpoint)})
            start = time.monotonic()
            found = "; ".join(_read(checkpoint, ranks))
            notes += [] if found else [_as_written(checkpoint, time.monotonic() - start)]
        if not found:
            break
        passed_over.append(f"{checkpoint} is damaged: {found}")
        older = [n for n in iterations(folder) if n < iteration]
        whole = [n for n in older if not missing_parts(iteration_dir(folder, n))]
        if not whole:
            raise ConfigError(
                f"output.folder: no complete checkpoint is undamaged: {'; '.join(passed_over)}; "
                "restore one, name another output.folder, or move these folders and the tracker "
                "away to start from nothing"
            )
        iteration = whole[-1]
    if passed_over:
        notes += [*passed_over, "the newest undamaged checkpoint before it is taken"]
    return iteration, notes


def _read(checkpoint: Path, ranks: Ranks) -> list[str]:
    """What is damaged, by all ranks on rank 0, by this one on another."""
    try:
        parts = share(stored_parts(checkpoint), ranks.rank, ranks.ranks)
        found = damaged_parts(checkpoint, parts, ranks.threads)
    except ValueError as error:
        found = [str(error)]
    reader = f" (as rank {ranks.rank} on {socket.gethostname()} reads it)"
    return ranks.gather([f"{line}{reader}" for line in found])


def _as_written(checkpoint: Path, seconds: float) -> str:
    size = sum(part.length for part in stored_parts(checkpoint)) / 1e9
    return (
        f"{checkpoint}: all {size:.3g} GB are as they were written ({seconds:.1f} s, "
        f"{size / max(seconds, 1e-6):.2g} GB/s; output.verify=false leaves that out)"
    )
