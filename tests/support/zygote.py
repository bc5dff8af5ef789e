"""Interpreters that have imported Megatron already: a process that imports once, then forks.

Importing torch and Megatron takes a core 8 s or more, and most tests of real runs need a process of
their own. `run` has them forked from one that has imported everything, on the CPU runtime, and has
done nothing else: no thread, no process group, no argument parsed. What a child starts with is what
a fresh interpreter would have after its imports. Tests of the imports themselves, of torchrun and
of the agent start real ones.

    python zygote.py SOCKET    (the process that forks; started by `run`, ended with its stdin)
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AHEAD = ("s2megatron.layer_spec", "s2megatron.training.gpt_loop", "s2megatron.training.train",
         "s2megatron.cli", "torch.utils.tensorboard",
         "megatron.core.tokenizers.text", "in_process")  # fmt: skip
"""Tokenizers, which a run imports late, whatever its own: with transformers, a second's work.
in_process brings matplotlib, by way of launches: a third of a second."""
GRACE = 10
"""Seconds that the other ranks of a run have when one has failed."""


def run(
    target: str,
    argv: list[str],
    *,
    ranks: int | None = None,
    env: dict[str, str],
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """`target` ("module:function", whose result is the exit status) in forked processes.

    Args:
        argv: what the function finds in sys.argv, after its own name.
        ranks: so many processes, with what torchrun would set in their environments; without it
            one that nobody launched.
        timeout: seconds.

    Returns:
        Standard output and errors of all ranks, and the first status that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = dict(target=target, argv=argv, ranks=ranks, env=env, out=str(out), err=str(err))
        connection.settimeout(timeout + 30)
        connection.connect(_zygote())
        connection.sendall(json.dumps(job | {"timeout": timeout}).encode() + b"\n")
        with connection.makefile() as answer:
            line = answer.readline()
        read = [path.read_text() if path.exists() else "" for path in (out, err)]
        if not line:
            raise RuntimeError(f"the process that forks has ended: {read[1][-2000:]}")
        status = json.loads(line)
        if status == "timeout":
            raise subprocess.TimeoutExpired([target, *argv], timeout, *read)
        return subprocess.CompletedProcess([target, *argv], status, *read)


@functools.cache
def _zygote() -> str:
    """The path of the socket of this pytest worker's zygote, which is started here."""
    folder = tempfile.mkdtemp(prefix="zygote-")
    path = os.path.join(folder, "socket")
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests/support")]
    paths += [str(room) for room in sorted((ROOT / "tests").iterdir()) if room.is_dir()]
    process = subprocess.Popen(
        [sys.executable, __file__, path],
        stdin=subprocess.PIPE,
        cwd=ROOT,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # no pool of threads, which a fork would lose
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        },
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # runs first: the end of its input ends it
    while not os.path.exists(path):
        if process.poll() is not None:
            raise RuntimeError(f"zygote.py ended with status {process.returncode} while importing")
        time.sleep(0.05)
    return path


def main(path: str) -> None:
    gc.disable()  # while importing: a fifth of the time
    from s2megatron.errors import hide_import_warnings
    from s2megatron.training import cpu_runtime

    hide_import_warnings()
    cpu_runtime.prepare_environment()
    cpu_runtime.install()  # before our modules, as the launcher does
    for name in AHEAD:
        importlib.import_module(name)
    _read_sources_of_options_once()
    _share_one_gloo_device()
    gc.enable()
    gc.freeze()  # collections in the children need not look at what came with the imports
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished runs need no burial
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen()
        os.rename(path + ".new", path)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _be_launcher(connection)
                os._exit(0)
            connection.close()


def _read_sources_of_options_once() -> None:
    """Megatron parses the source of its dataclasses for every parser that it makes, five a run."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, found = ArgumentGroupFactory._get_field_docstrings, {}

    def read_once(self, owner: type) -> dict[str, str]:
        if owner not in found:
            found[owner] = read(self, owner)
        return dict(found[owner])

    ArgumentGroupFactory._get_field_docstrings = read_once
    importlib.import_module("s2megatron.training.megatron_options").megatron_parser()


def _share_one_gloo_device() -> None:
    """A process's groups get one transport thread, where each has one of its own otherwise.

    Such a thread wakes 100 times a second. A process that builds model after model had 700 of them
    at its end, which took more of its time than the models.
    """
    from torch.distributed import ProcessGroupGloo

    make = ProcessGroupGloo.__init__
    device = functools.cache(ProcessGroupGloo.create_default_device)  # made after the fork

    def make_on_the_device(self, store, rank, size, timeout):
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device()], 2, timeout
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_on_the_device


def _be_launcher(connection: socket.socket) -> None:
    """Forks the ranks of one run, waits for them, and answers with a status."""
    with connection.makefile() as lines:
        job = json.loads(lines.readline())
    told, telling = os.pipe()
    ranks = set()
    for rank in range(job["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.close(telling)
            _be_rank(job, rank, told)
        ranks.add(pid)
    store = _rendezvous()  # after the forks, which would not have its thread
    os.write(telling, f"{store.port:5}".encode() * len(ranks))
    status = _wait(ranks, time.monotonic() + job["timeout"])
    connection.sendall(json.dumps(status).encode() + b"\n")


def _rendezvous():
    """The store where the ranks meet, served here, as torchrun's agent does, on a port of its own.

    A port looked up first and listened on by rank 0 later could be taken by another test between.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _wait(left: set[int], deadline: float) -> int | str:
    status = 0
    while left:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            left.remove(pid)
            code = os.waitstatus_to_exitcode(ended)
            if code and not status:
                status, deadline = code, min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            for rank in left:
                os.kill(rank, signal.SIGKILL)
                os.waitpid(rank, 0)
            return status or "timeout"
        else:
            time.sleep(0.02)
    return status


def _be_rank(job: dict, rank: int, told: int) -> None:
    import torch

    for number, file in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.clear()
    os.environ.update(job["env"])
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if job["ranks"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                          LOCAL_WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=os.read(told, 5).decode().strip(),
                          TORCHELASTIC_USE_AGENT_STORE="True",
                          TORCHELASTIC_RESTART_COUNT="0")  # fmt: skip
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.argv = [job["target"], *job["argv"]]
    module, _, function = job["target"].partition(":")
    status = 1
    try:
        status = getattr(importlib.import_module(module), function)() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
