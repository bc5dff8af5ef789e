"""Ports on loopback that stay free until they are used, seconds or minutes later.

A port that was bound to 0, read and closed again lies in the range from which the system serves
every outgoing connection: another test may be given it before the run that was promised it listens.
`free_port` takes ports from below that range, and reserves each for this process with a file lock,
so that no other test can be promised the same one.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

BELOW_THE_SYSTEMS = range(20000, 30000)
"""Linux gives outgoing connections ports from 32768 up (net.ipv4.ip_local_port_range)."""
_reserved = []  # open lock files; the locks end with this process


def free_port() -> int:
    """A port that nobody listens on and no other process of the tests is given."""
    folder = Path(tempfile.gettempdir(), f"test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(BELOW_THE_SYSTEMS, len(BELOW_THE_SYSTEMS)):
        lock = (folder / str(port)).open("w")
        if _locked(lock) and not _listened_on(port):
            _reserved.append(lock)
            return port
        lock.close()
    raise RuntimeError(f"no port in {BELOW_THE_SYSTEMS} is free")


def _locked(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listened_on(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
