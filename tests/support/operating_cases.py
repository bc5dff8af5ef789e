"""Real torch_dist checkpoints, small ones, damaged as disks damage them. Run by in_process.py."""

import os
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from s2megatron.training.checkpoint_errors import explain
from s2megatron.training.checkpoint_folder import write_tracker
from s2megatron.training.load_fixes import name_damaged_files


def load_and_save_errors(folder: str) -> list[str]:
    """What is told of random bytes in a checkpoint's file, and of a save that failed."""
    name_damaged_files()
    for number in (2, 4):
        where = Path(folder) / f"iter_{number:07d}"
        dcp.save({"weight": torch.randn(1000)}, checkpoint_id=where, no_dist=True)
        (where / "metadata.json").write_text("{}")
    write_tracker(Path(folder), 4)
    file = where / "__0_0.distcp"
    with file.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)  # the end of the archive that holds the tensor
        stream.write(os.urandom(64))

    source = "def load_checkpoint(load):\n    load()\n"
    scope: dict = {}  # an error from Megatron's function of this name, without its model
    exec(compile(source, "megatron/training/checkpointing.py", "exec"), scope)

    def read():
        dcp.load({"weight": torch.zeros(1000)}, checkpoint_id=where, no_dist=True)

    said = []
    for act in (lambda: scope["load_checkpoint"](read), save_that_fails):
        try:
            act()
        except CheckpointException as error:
            said.append(explain(error, load=folder, step=4, save=folder))
    return said


def save_that_fails() -> None:
    raise CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})
