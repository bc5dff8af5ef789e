"""One run per output folder: a lock file that says who holds it.

Two runs that save into one folder destroy each other's checkpoints. The holder shows a sign of life
every minute (the file's time), so that a lock whose run is gone can be told from one that is held.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from s2megatron.errors import ConfigError

NAME = "run.lock"
SIGN_OF_LIFE_S = 60.0
SILENT_S = 900.0
"""A lock without a sign of life for so long belongs to a run that is gone."""

SAME_START_S = 2.0
"""A process's start may be read a little differently when the machine's clock was set."""


class RunLock:
    """Takes the lock of `folder`; held until `release` or the end of the process.

    A lock left behind is taken over where its run is known to be gone: the same host and a process
    that is no more (or whose number now belongs to one that started at another time), the same job
    started again (SLURM requeue), an empty lock, or 15 minutes without a sign of life.

    Raises:
        ConfigError: another run holds it; says who, since when, and the way out. Or the folder
            cannot be written; then no lock is left.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ):
        self.path = folder / NAME
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "job": environ.get("SLURM_JOB_ID", ""),
            "restart": environ.get("SLURM_RESTART_COUNT", "0"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.note = ""
        """What was taken over, for the log."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise ConfigError(
                f"output.folder: {folder} cannot be written ({error.strerror}): make room, see who "
                "may write there, or name another folder"
            ) from None
        self._released = threading.Event()
        threading.Thread(target=self._show_life, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        if not self._released.is_set():
            self._released.set()
            if self._read().get("pid") == self._me["pid"]:
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        if self._create():
            return
        judged = _identity(self.path)
        reason = self._why_stale()
        if not reason or not self._remove(judged) or not self._create():
            raise ConfigError(self._held())
        self.note = f"took over {self.path}: {reason}"

    def _remove(self, judged: tuple[int, int] | None) -> bool:
        """Whether the lock that was judged is out of the way; another start's stays where it is.

        Of two starts that judge one stale lock the slower would delete the quicker one's new lock.
        So it is renamed first, which only one of them can do, and looked at before it is deleted.
        """
        if _identity(self.path) != judged:
            return False
        aside = self.path.with_name(f"{NAME}.stale.{self._me['host']}.{self._me['pid']}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:  # another start renamed it, or it was released
            return True
        if _identity(aside) != judged:  # another start's new lock, made since the look above
            aside.rename(self.path)
            return False
        aside.unlink()
        return True

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(self._me, stream)
        except OSError:  # a full disk has room for a name, and none for what is in it
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):  # gone, or being written
            return {}

    def _why_stale(self) -> str:
        """Why the run that holds the lock is known to be gone, or ''."""
        holder = self._read()
        if not holder and self._silent_for() > SIGN_OF_LIFE_S:
            return "it is empty: its run ended before it could write its name"
        if holder.get("host") == self._me["host"]:
            pid = holder.get("pid", 0)
            if not _is_alive(pid):
                return f"process {pid} of this host is gone"
            if _started_later(pid, holder.get("started")):
                return f"process {pid} of this host is gone (the number is another process's now)"
        restarted = holder.get("restart") != self._me["restart"]
        if self._me["job"] and holder.get("job") == self._me["job"] and restarted:
            return f"SLURM job {self._me['job']} was requeued"
        silent = self._silent_for()
        if silent > SILENT_S:
            return f"no sign of life from {holder.get('host')} for {silent:.0f} s"
        return ""

    def _silent_for(self) -> float:
        """Seconds since the last sign of life, by the file system's own clock."""
        probe = self.path.with_name(f"{NAME}.{self._me['host']}.{self._me['pid']}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return SILENT_S + 1  # released just now
        finally:
            probe.unlink(missing_ok=True)

    def _held(self) -> str:
        holder = self._read()
        if not holder:
            return (
                f"output.folder: {self.path} is being written by another run; start again in a "
                "minute, or give this run a folder of its own"
            )
        job = f", SLURM job {holder['job']}" if holder.get("job") else ""
        return (
            f"output.folder: {self.path.parent} is in use by another run: process "
            f"{holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')} (last "
            f"sign of life {max(0, self._silent_for()):.0f} s ago). Give this run a folder of its "
            f"own, or, if you know that run is gone, remove {self.path}"
        )

    def _show_life(self) -> None:
        while not self._released.wait(SIGN_OF_LIFE_S):
            with contextlib.suppress(OSError):  # a full disk or a slow file server: try again
                os.utime(self.path)


def _identity(lock: Path) -> tuple[int, int] | None:
    """Its inode and its last sign of life: a number is used again, and never at the same time."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return pid > 0


def _started_later(pid: int, started: float | None) -> bool:
    """Whether a process is not the one that started at that time (seconds since the epoch)."""
    if started is None:  # a lock of an earlier version
        return False
    try:
        return abs(psutil.Process(pid).create_time() - started) > SAME_START_S
    except psutil.Error:
        return False
