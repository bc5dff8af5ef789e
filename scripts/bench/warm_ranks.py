"""Ranks that have imported Megatron before there is work for them.

A rank of `torchrun -m s2megatron.pretrain` imports for 10 to 20 s before it touches its GPU. Here a
pool of processes imports ahead, on the host's cores, while GPUs are busy with other runs. Each
process then becomes one rank of one run (the environment that torchrun would set, then the
launcher's own `main`) and ends with it: nothing of one run is left for the next.

    python warm_ranks.py     (a rank: reads one line of JSON from stdin; started by `Pool`)

Ranks of one run may share a GPU (give it to `Pool.launch` more than once): the GPU takes them in
turns, which shows what a layout computes and nothing of its speed.
"""

import importlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs import ROOT, last_line, what_went_wrong

from s2megatron.cluster import environment
from s2megatron.cluster.ending import leave

IMPORTS = ("s2megatron.layer_spec", "s2megatron.training.gpt_loop", "s2megatron.training.prepare",
           "torch.utils.tensorboard")  # fmt: skip


@dataclass
class WarmRun:
    """A launch under way."""

    ranks: list[subprocess.Popen]
    logs: list[Path]
    deadline: float
    began: float = field(default_factory=time.monotonic)
    failed: int | None = None
    """The first rank that ended with an error."""

    def poll(self) -> str | None:
        """None while it runs, then '' or what went wrong. Ends ranks that wait for a dead one."""
        states = [rank.poll() for rank in self.ranks]
        if self.failed is None:
            self.failed = next((i for i, state in enumerate(states) if state), None)
            if self.failed is not None:  # the others may be about to say why, too
                self.deadline = min(self.deadline, time.monotonic() + 10)
        if None in states:
            if time.monotonic() < self.deadline:
                return None
            self.end()
        if self.failed is not None:
            return what_went_wrong(self.logs[self.failed], states[self.failed])
        if None in states:
            limit = self.deadline - self.began
            return f"not done after {limit:.0f} s (--timeout); " + last_line(self.logs[0])
        return ""

    def end(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


class Pool:
    """Processes that import ahead.

    Args:
        total: ranks that will be asked for in all; no more are started.
        ahead: processes to hold ready.
        log: where their stderr goes until they have a run.
    """

    def __init__(self, *, total: int, ahead: int, log: Path):
        self.left, self.ahead, self.log = total, ahead, log
        self.ports = _free_ports()
        self.idle: list[subprocess.Popen] = []
        self.refill()

    def refill(self) -> None:
        """Starts what is missing. A process that died while importing is replaced, not hidden."""
        for process in [p for p in self.idle if p.poll() is not None]:
            raise RuntimeError(f"a rank cannot import (status {process.returncode}): {self.log}")
        while self.left > 0 and len(self.idle) < self.ahead:
            self._start()

    def _start(self) -> None:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        environment.apply(environ)  # before anything starts CUDA
        with self.log.open("a") as log:
            self.idle.append(
                subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    cwd=ROOT,
                    env=environ,
                )
            )
        self.left -= 1

    def launch(self, argv: list[str], gpus: list[int], folder: Path, timeout: float) -> WarmRun:
        """One run of the launcher.

        Args:
            argv: what follows `torchrun -m s2megatron.pretrain`.
            gpus: a rank on each of these; a GPU named more than once is shared.
            folder: gets rank0.log, rank1.log, ...
            timeout: seconds.
        """
        while len(self.idle) < len(gpus):
            self._start()
        port = next(self.ports)
        run = WarmRun([], [], time.monotonic() + timeout)
        for rank in range(len(gpus)):
            log = folder / f"rank{rank}.log"
            log.unlink(missing_ok=True)
            process = self.idle.pop(0)
            environ = rank_environment(rank, gpus, port)
            job = {"argv": argv, "log": str(log), "environment": environ}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.close()
            run.ranks.append(process)
            run.logs.append(log)
        return run

    def close(self) -> None:
        """Idle processes end at the end of their input."""
        for process in self.idle:
            process.stdin.close()
        for process in self.idle:
            process.wait()
        self.idle = []


def open_pool(sizes: list[int], log: Path) -> Pool:
    """A pool for runs of so many ranks each, one after the other, on half of the cores."""
    ahead = max(*sizes, (os.cpu_count() or 2) // 2)
    log.parent.mkdir(parents=True, exist_ok=True)
    return Pool(total=sum(sizes), ahead=min(sum(sizes), ahead), log=log)


def rank_environment(rank: int, gpus: list[int], port: int) -> dict[str, str]:
    """What torchrun would set, and where ranks share a GPU, what lets NCCL work between them.

    NCCL refuses two ranks on one GPU of one host ("Duplicate GPU detected"). Under a host name of
    its own each is a node with one GPU, and NCCL's own kernels talk over sockets on loopback.
    """
    environ = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(gpus)),
        "LOCAL_RANK": str(gpus[rank]),
        "LOCAL_WORLD_SIZE": str(len(gpus)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if len(set(gpus)) < len(gpus):
        environ |= {
            "NCCL_HOSTID": f"rank-{rank}",
            "NCCL_NET": "Socket",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0",  # or ranks might be joined again over NVLink
            "NCCL_NVLS_ENABLE": "0",
        }
    return environ


def _free_ports():
    """Ports below those that the system gives to connections: a run binds its own seconds later."""
    for port in itertools.cycle(random.sample(range(20000, 30000), 10000)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def main() -> int:
    """One rank: imports, waits for its run, becomes it."""
    import torch

    from s2megatron.errors import hide_import_warnings

    hide_import_warnings()
    if not torch.cuda.is_available():
        from s2megatron.training import cpu_runtime

        cpu_runtime.prepare_environment()
        cpu_runtime.install()  # before our modules, as the launcher does
    for name in IMPORTS:
        importlib.import_module(name)
    from s2megatron import pretrain

    line = sys.stdin.readline()
    if not line:
        return 0
    job = json.loads(line)
    with open(job["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= job["environment"]
    return pretrain.main(job["argv"])


if __name__ == "__main__":
    leave(main())  # as a rank of the launcher does
