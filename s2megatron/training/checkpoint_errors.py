"""Whether a checkpoint could not be loaded or could not be written, and why.

Megatron and torch raise the same exceptions for a failed read and for a full disk. The place that
raised one tells them apart.
"""

import errno
import re
import shutil
import traceback
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from s2megatron.training.checkpoint_folder import iteration_dir, tracked, way_back


def explain(
    error: BaseException, *, load: str | None, step: int | None, save: str | None
) -> str | None:
    """What to tell a user of an error in a checkpoint; None where it is no such error.

    Args:
        load, step, save: Megatron's arguments: the folder that checkpoints are loaded from, the
            iteration (None: the tracker's), and the folder that they are written to.
    """
    frames = {(Path(f.filename).name, f.name) for f in traceback.extract_tb(error.__traceback__)}
    if load and ("checkpointing.py", "load_checkpoint") in frames:
        return _load_failed(Path(load), step, error)
    if not save and ("checkpointing.py", "save_checkpoint") in frames:
        return (
            "an iteration's result was not a number (Megatron says which, above), and it would be "
            "saved to be repeated on other hardware; this run saves nothing (output.folder)"
        )
    full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if save and (full_disk or isinstance(error, CheckpointException)):
        return _save_failed(save, error)  # a full disk may meet TensorBoard's writer first
    return None


def _load_failed(folder: Path, step: int | None, error: BaseException) -> str:
    iteration = step or tracked(folder)
    checkpoint = iteration_dir(folder, iteration) if iteration is not None else folder
    text = str(error)
    damaged = re.search(r"DamagedFile: (.*)", text) or re.search(r"(.* cannot be read: .*)", text)
    back = f"; {way_back(folder, iteration)}" if iteration is not None else ""
    if damaged:
        return f"a checkpoint could not be loaded: it is damaged: {damaged[1]}{back}"
    if re.search(r"optimizer\.distributed\..*bucket_idx", text):
        return (
            f"a checkpoint could not be loaded: {checkpoint}: its optimizer's state was saved by "
            "bucket, and this run has other buckets: go on with the overlap_grad_reduce and "
            f"ddp_bucket_size that it was saved with (said above){back}"
        )
    return (
        f"a checkpoint could not be loaded: {checkpoint}: {type(error).__name__}: "
        f"{_last_line(error)}. Does it fit the run file? s2megatron convert inspect {folder} says "
        f"what it holds{back}"
    )


def _save_failed(folder: str, error: BaseException) -> str:
    """Megatron's background writer passes on an error's type and not its text: the free space tells
    a full disk from other troubles.
    """
    free = shutil.disk_usage(folder).free
    full = "the disk is full" if free < 2**20 else f"{free / 2**30:.1f} GiB are free there"
    return (
        f"a checkpoint or log could not be written to {folder} ({full}): {_last_line(error)}. The "
        "last complete checkpoint stays as it is; make room (output.keep says how many are kept) "
        "and start again"
    )


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
