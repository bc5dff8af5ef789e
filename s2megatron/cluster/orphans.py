"""No training process outlives its agent, no helper outlives its training process (Linux).

A rank left behind holds a GPU's memory, and goes on training into an output folder that the next
start believes free.
"""

import ctypes
import signal
import sys
import threading

import psutil

_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children, so that it can end them."""
    _prctl(_SET_SUBREAPER, 1)


def end_children() -> None:
    """Kills what is left of this process's descendants, and waits for their end.

    In the main thread, PyTorch's handler is removed first: it raises when a worker of a DataLoader
    is killed, and would hide what ended training.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    left = psutil.Process().children(recursive=True)
    for child in left:
        child.kill()
    psutil.wait_procs(left, timeout=10)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
