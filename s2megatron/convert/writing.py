"""Output folders that are there whole or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from s2megatron.errors import ConfigError


@contextlib.contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, beside `out`, that becomes `out` when the block ends well.

    An error removes it. A killed process leaves `.NAME.part-PID`, never a folder named `out`.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or the disk is full.
    """
    out = Path(out).absolute()
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    try:
        try:
            part.mkdir()
            yield part
            if out.is_dir():
                out.rmdir()  # empty, as checked
            part.rename(out)
        except OSError as error:
            raise _as_config_error(error, out) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_output(out: Path) -> None:
    """Raises ConfigError unless `out` is free, missing or an empty folder, and can be made."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ConfigError(f"--out {out}: the folder is not empty; name a new one")
    elif out.exists():
        raise ConfigError(f"--out {out}: is a file; name a new folder")
    parent = _nearest(out.absolute().parent)
    if not parent.is_dir():
        raise ConfigError(f"--out {out}: {parent} is a file; name a new folder elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {parent} cannot be written to; name a folder elsewhere")


def _nearest(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_space(out: Path, wanted: int) -> None:
    """Raises ConfigError when `wanted` bytes do not fit on the disk that `out` will be on."""
    free = shutil.disk_usage(_nearest(out.absolute())).free
    if free < wanted:
        raise ConfigError(
            f"--out {out}: needs {wanted / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
        )


def _as_config_error(error: OSError, out: Path) -> Exception:
    """What a user can do something about; anything else stays what it is."""
    if error.errno == errno.ENOSPC:
        return ConfigError(f"--out {out}: the disk is full; nothing was left there")
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return ConfigError(f"--out {out}: somebody else wrote there meanwhile; name a new folder")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return ConfigError(f"--out {out}: cannot be written: {error.strerror}")
    return error
