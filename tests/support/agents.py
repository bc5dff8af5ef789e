"""Starts agents as a user would on several nodes, and reads what they printed.

A node is a network namespace with one end of a veth pair where that can be made (root on Linux),
else this machine's loopback.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launches import ON_CPU, ROOT

from s2megatron.data import documents, find_files, write_dataset

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass
class Node:
    """Where an agent of a two-node job runs."""

    addr: str
    prefix: list[str] = field(default_factory=list)
    """The command that enters the node."""
    env: dict[str, str] = field(default_factory=dict)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces joined by a veth pair; two times loopback where the machine refuses that."""
    tag = f"s2{os.getpid()}"
    names = [f"{tag}a", f"{tag}b"]
    try:
        try:
            _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("netns", "add", name)
                _ip("link", "set", name, "netns", name)
                _ip("-n", name, "address", "add", f"{address}/24", "dev", name)
                _ip("-n", name, "link", "set", name, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:  # no root, or no `ip`
            print(f"two agents on loopback, not in namespaces: {error}")
            yield [Node("127.0.0.1"), Node("127.0.0.1")]
        else:
            yield [
                Node(address, ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": name})
                for name, address in zip(names, ADDRESSES, strict=True)
            ]
    finally:
        if shutil.which("ip"):
            for name in names:  # a namespace takes its end of the pair with it
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            subprocess.run(["ip", "link", "delete", names[0]], capture_output=True)


def own_core(rank: int) -> list[str]:
    """The command that gives a node a core of its own, as a machine of its own would have."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(cores[rank % len(cores)])]


class Job:
    """A command started in the background, its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]):
        self.log = log
        self._stream = log.open("w")
        self.process = subprocess.Popen(
            command,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | env,
            start_new_session=True,
        )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self, timeout: float = 120) -> int:
        """Its exit status; the whole session is killed when it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._kill()
            raise AssertionError(f"still running:\n{self.text[-3000:]}") from None
        finally:
            self._stream.close()

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for(self, pattern: str, timeout: float = 90) -> re.Match:
        """Returns when the output matches; fails when the job ends or the time is over."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.text):
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self._kill()
        raise AssertionError(f"no {pattern!r} in:\n{self.text[-3000:]}")


def train(config: Path, *overrides: str, log: Path, ranks: int) -> Job:
    """scripts/train.sh."""
    return Job(["scripts/train.sh", str(config), *overrides], log, {"GPUS_PER_NODE": str(ranks)})


def train_multinode(
    nodes: list[Node], config: Path, *overrides: str, log: Path, port: int
) -> list[Job]:
    """scripts/train_multinode.sh, one rank on each node; LOG.0, LOG.1."""
    jobs = []
    for rank, node in enumerate(nodes):
        env = node.env | {
            "NNODES": str(len(nodes)),
            "NODE_RANK": str(rank),
            "MASTER_ADDR": nodes[0].addr,
            "MASTER_PORT": str(port),
            "GPUS_PER_NODE": "1",
        }
        command = [
            *node.prefix,
            *own_core(rank),
            "scripts/train_multinode.sh",
            str(config),
            *overrides,
        ]
        jobs.append(Job(command, log.with_suffix(f".{rank}"), env))
    return jobs


def losses(*texts: str) -> dict[int, float]:
    """Training loss per iteration, as Megatron printed it; a later text wins.

    At the second iteration after a start Megatron prints the mean of the first two.
    """
    found = {}
    for text in texts:
        lines = re.findall(r"iteration +(\d+)/ +\d+ .*? lm loss: ([\d.E+-]+)", text)
        values = {int(iteration): float(loss) for iteration, loss in lines}
        if len(values) > 1:
            first, second = sorted(values)[:2]
            values[second] = 2 * values[second] - values[first]
        found |= values
    return found


def make_corpus(folder: Path) -> str:
    """A small real dataset; its prefix."""
    import json

    files = find_files([os.path.dirname(json.__file__)], (".py",))
    write_dataset(documents(files), str(folder / "corpus"))
    return str(folder / "corpus")
