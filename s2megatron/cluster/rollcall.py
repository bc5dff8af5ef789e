"""Nodes find each other, keep an eye on each other, and say why a job ended.

One TCPStore on node 0 (MASTER_ADDR:MASTER_PORT), which torchrun's static rendezvous then shares.
Before the start every node reports; node 0 waits until all are there, or names those that are not.
While the job runs, each node shows a sign of life; node 0 names the one that falls silent, and a
node that fails says so to all, so that nobody waits out a collective's timeout for a peer that is
gone.
"""

import contextlib
import datetime
import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import DistError, TCPStore

from s2megatron.errors import ConfigError

REPORT_S = 15.0
"""Between two lines that say who is still awaited."""
SIGN_OF_LIFE_S = 2.0
SILENT_S = 60.0
"""A node without a sign of life for so long is taken for dead."""
LOST_S = 8.0
"""A node that another one lost its connection to, and that is silent for so long, is gone."""
FAREWELL_S = 10.0
"""Node 0, which holds the store, waits so long for the others to read why the job ended."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """This node's place among the nodes of a job."""

    count: int
    rank: int
    addr: str
    """Node 0's, as the other nodes reach it."""
    port: int
    """Node 0's; 0 picks a free one (one node only)."""


def open_store(nodes: Nodes, wait_s: float, say: Callable[[str], None]) -> TCPStore:
    """Node 0 starts the store, the others connect to it.

    Args:
        say: told every REPORT_S whom this node waits for.

    Raises:
        ConfigError: the port is taken, the address is not this node's, or node 0 does not answer
            within wait_s.
    """
    if nodes.rank == 0:
        return _serve(nodes)
    began = time.monotonic()
    reason = _wait_for_node_0(nodes, wait_s, say)
    if not reason:
        try:
            return _connect(nodes, max(5.0, wait_s - (time.monotonic() - began)))
        except (DistError, RuntimeError) as error:
            reason = _first_line(error)
    raise ConfigError(
        f"node {nodes.rank} ({socket.gethostname()}) could not reach node 0 at "
        f"{nodes.addr}:{nodes.port} within {wait_s:.0f} s ({reason}). Check that "
        "node 0 was started (NODE_RANK=0), that MASTER_ADDR and MASTER_PORT are the same on "
        "all nodes, and that no firewall stands between (nc -vz MASTER_ADDR MASTER_PORT)"
    )


def _wait_for_node_0(nodes: Nodes, wait_s: float, say: Callable[[str], None]) -> str:
    """'' as soon as its port answers, else the last error.

    In Python and in short steps: torch's client says nothing while it waits, goes on for longer
    than it was told to, and lets no signal through.
    """
    began = said = time.monotonic()
    while True:
        left = wait_s - (time.monotonic() - began)
        try:
            socket.create_connection((nodes.addr, nodes.port), max(0.1, min(2.0, left))).close()
            return ""
        except OSError as error:  # a name that cannot be resolved is one too
            reason = error.strerror or str(error)
        now = time.monotonic()
        if now - began >= wait_s:
            return reason
        if now - said > REPORT_S or said == began:
            said = now
            say(
                f"node {nodes.rank} waits for node 0 at {nodes.addr}:{nodes.port}: {reason} "
                f"({now - began:.0f} s of {wait_s:.0f})"
            )
        time.sleep(min(0.5, max(0.0, wait_s - (now - began))))


def _serve(nodes: Nodes) -> TCPStore:
    where = f"{nodes.addr}:{nodes.port}"
    family, address = _resolve(nodes.addr, nodes.port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = (
                    f"another process listens there; set MASTER_PORT to a free port on all nodes "
                    f"(see who it is: ss -ltnp 'sport = :{nodes.port}')"
                    if nodes.port
                    else "this machine has no free port left (see ss -s)"
                )
            elif error.errno == errno.EADDRNOTAVAIL:
                what = "that address is not this machine's; MASTER_ADDR must be node 0's own"
            else:
                what = f"{error}; set MASTER_PORT to a port above 1023"
            raise ConfigError(f"node 0 cannot listen on {where}: {what}") from None
    try:
        return TCPStore(
            nodes.addr, nodes.port, None, True, wait_for_workers=False, multi_tenant=True
        )
    except (DistError, RuntimeError) as error:
        raise ConfigError(f"node 0 cannot listen on {where}: {_first_line(error)}") from None


def _connect(nodes: Nodes, wait_s: float) -> TCPStore:
    timeout = datetime.timedelta(seconds=wait_s)
    return TCPStore(nodes.addr, nodes.port, None, False, timeout, wait_for_workers=False)


def _resolve(addr: str, port: int):
    try:
        found = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"MASTER_ADDR={addr}: cannot be resolved on {socket.gethostname()} ({error}); give "
            "node 0's IP address"
        ) from None
    return found[0], found[4]


def call_roll(
    store: TCPStore,
    nodes: Nodes,
    wait_s: float,
    *,
    same: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Returns when all nodes have reported.

    Args:
        same: what must be equal on all nodes (versions, the run), by name.

    Raises:
        ConfigError: a node did not come within wait_s (named), two nodes claim one rank, or nodes
            differ in what must be equal.
    """
    host = socket.gethostname()
    if store.add(f"claimed/{nodes.rank}", 1) > 1:
        first = json.loads(store.get(f"hello/{nodes.rank}"))["host"]
        raise ConfigError(
            f"NODE_RANK={nodes.rank} is claimed by {host} and by {first}: every node needs its "
            f"own, from 0 to {nodes.count - 1}"
        )
    store.set(f"hello/{nodes.rank}", json.dumps({"host": host, "same": same}))
    if nodes.rank == 0:
        verdict = _verdict(store, nodes, wait_s, say)
        store.set("verdict", verdict)
    else:
        say(f"node {nodes.rank} of {nodes.count} ({host}) has reported to {nodes.addr}")
        verdict = _hear_verdict(store, nodes, wait_s)
    if verdict:
        _say_farewell(store, nodes)
        raise ConfigError(verdict)


def _hear_verdict(store: TCPStore, nodes: Nodes, wait_s: float) -> str:
    """Node 0's verdict, on another node. Node 0 may have come last, and then waits wait_s itself.

    Raises:
        ConfigError: node 0 is gone, or says nothing for REPORT_S longer than that.
    """
    deadline = time.monotonic() + wait_s + REPORT_S
    reason = "no verdict"
    try:
        while time.monotonic() < deadline:
            if store.check(["verdict"]):
                return store.get("verdict").decode()
            time.sleep(0.1)  # here signals are heard
    except (DistError, RuntimeError) as error:
        reason = _first_line(error)
    raise ConfigError(
        f"node 0 ({nodes.addr}) went away before all nodes had come ({reason}); its log says why"
    )


def _verdict(store: TCPStore, nodes: Nodes, wait_s: float, say: Callable[[str], None]) -> str:
    """'' when all nodes came and agree, else what is wrong. On node 0."""
    began = said = time.monotonic()
    missing = list(range(1, nodes.count))
    while missing:
        missing = [rank for rank in missing if not store.check([f"hello/{rank}"])]
        now = time.monotonic()
        if missing and now - began > wait_s:
            return (
                f"{nodes.count - len(missing)} of {nodes.count} nodes came within {wait_s:.0f} s; "
                f"missing: node {_list(missing)} (NODE_RANK). Look at their logs: is the job "
                f"running there, and can they reach {nodes.addr}:{nodes.port}? Waiting time: "
                "WAIT=SECONDS"
            )
        if missing and now - said > REPORT_S:
            said = now
            say(f"waiting for node {_list(missing)} of {nodes.count} ({now - began:.0f} s)")
        if missing:
            time.sleep(0.1)
    hellos = [json.loads(store.get(f"hello/{rank}")) for rank in range(nodes.count)]
    for rank, hello in enumerate(hellos):
        for name, value in hello["same"].items():
            if value != hellos[0]["same"].get(name):
                return (
                    f"nodes differ in {name}: node 0 ({hellos[0]['host']}) has "
                    f"{hellos[0]['same'].get(name)}, node {rank} ({hello['host']}) {value}; all "
                    "nodes must run the same"
                )
    if nodes.count > 1:
        hosts = ", ".join(dict.fromkeys(hello["host"] for hello in hellos))
        say(f"all {nodes.count} nodes have come: {hosts}")
    return ""


def _say_farewell(store: TCPStore, nodes: Nodes) -> None:
    """Node 0 stays until the others have read the store, at most FAREWELL_S; the others tell it."""
    with contextlib.suppress(DistError, RuntimeError):  # the store is gone: nobody to tell
        store.set(f"left/{nodes.rank}", "")
        if nodes.rank == 0:
            deadline = time.monotonic() + FAREWELL_S
            others = [r for r in range(1, nodes.count) if store.check([f"hello/{r}"])]
            while time.monotonic() < deadline:
                if all(store.check([f"left/{rank}"]) for rank in others):
                    return
                time.sleep(0.05)


class Watch:
    """Tells the other nodes that this one is alive, and learns from them why a job ends.

    Args:
        ended: called once, from another thread, with the reason, when another node has failed or
            fallen silent.
        silent_s: see SILENT_S.
    """

    def __init__(self, nodes: Nodes, ended: Callable[[str], None], *, silent_s: float = SILENT_S):
        self.nodes, self.ended, self.silent_s = nodes, ended, silent_s
        self._store = _connect(nodes, 30.0)  # of its own: a store serves one caller at a time
        self._leaving = threading.Event()
        self._last: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        if nodes.count > 1:
            self._thread.start()

    def leave(self, failure: str = "") -> None:
        """This node's part is over; a failure is told to all others."""
        self._leaving.set()
        if self.nodes.count == 1:
            return
        self._thread.join()
        with contextlib.suppress(DistError, RuntimeError):  # node 0 may be gone: nobody to tell
            if failure:
                self._store.compare_set("ended", "", failure)
                _say_farewell(self._store, self.nodes)
            else:
                self._store.set(f"left/{self.nodes.rank}", "")

    def who_is_lost(self) -> str:
        """Which node a rank of this one lost its connection to; '' where all others are there.

        Asks for the others' signs of life until each has given a new one, at most LOST_S. Call it
        before `leave`.
        """
        others = [rank for rank in range(self.nodes.count) if rank != self.nodes.rank]
        first: dict[int, bytes] = {}
        deadline = time.monotonic() + LOST_S
        try:
            store = _connect(self.nodes, 5.0)  # the thread's own serves one caller at a time
            while others and time.monotonic() < deadline:
                if store.check(["ended"]) and (reason := store.get("ended").decode()):
                    return reason
                for rank in list(others):
                    key = f"alive/{rank}"
                    value = store.get(key) if store.check([key]) else b""
                    if first.setdefault(rank, value) != value or store.check([f"left/{rank}"]):
                        others.remove(rank)
                time.sleep(0.1)
            if not others:
                return ""
            named = [f"node {rank} ({_host(store, rank)})" for rank in others]
        except (DistError, RuntimeError) as error:
            return f"node 0 ({self.nodes.addr}) is gone ({_first_line(error)})"
        return f"{', '.join(named[:16])} has given no sign of life for {LOST_S:.0f} s: it is gone"

    def _run(self) -> None:
        beats = 0
        while not self._leaving.wait(SIGN_OF_LIFE_S):
            beats += 1
            try:
                self._store.set(f"alive/{self.nodes.rank}", str(beats))
                reason = self._store.get("ended").decode() if self._store.check(["ended"]) else ""
                if not reason and self.nodes.rank == 0:
                    reason = self._who_is_silent()
                    if reason:
                        self._store.compare_set("ended", "", reason)
            except (DistError, RuntimeError) as error:
                reason = f"node 0 ({self.nodes.addr}) is gone ({_first_line(error)})"
            if reason and not self._leaving.is_set():
                self.ended(reason)
                return

    def _who_is_silent(self) -> str:
        now = time.monotonic()
        for rank in range(1, self.nodes.count):
            if self._store.check([f"left/{rank}"]):
                continue
            key = f"alive/{rank}"
            value = self._store.get(key) if self._store.check([key]) else b""
            if rank not in self._last or self._last[rank][0] != value:
                self._last[rank] = (value, now)
            elif now - self._last[rank][1] > self.silent_s:
                return (
                    f"node {rank} ({_host(self._store, rank)}) has given no sign of life for "
                    f"{self.silent_s:.0f} s: it, its network or its process is gone"
                )
        return ""


def _host(store: TCPStore, rank: int) -> str:
    return json.loads(store.get(f"hello/{rank}"))["host"]


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
