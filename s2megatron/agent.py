"""One node's part of a run: torchrun's agent, with clear ends.

    python -m s2megatron.agent [--nnodes N --node-rank R --master-addr ADDR --master-port PORT]
        [--nproc-per-node K] [--wait SECONDS] -- --config run.yaml [key.path=value ...]

What it adds to plain torchrun: nodes that do not come are named; SIGTERM and SIGUSR1 reach the
training processes, which save and leave (torchrun would kill them after 30 s); a node that is lost
ends the job on the others at once, with the reason and the checkpoint to resume from; exit statuses
that a batch system can act on:

    0   trained to the end
    75  stopped by a signal, after a checkpoint: start again to go on
    2   cannot start as configured
    1   failed
"""

import os
import signal

STOPPED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def stop_before_training(number, frame) -> None:
    """Nothing has begun, so nothing is to be saved: leaves with the status of a stopped run."""
    text = (
        f"s2megatron: {signal.Signals(number).name} before training began (exit status {STOPPED})"
    )
    os.write(1, f"{text}\n".encode())
    os._exit(STOPPED)


if __name__ == "__main__":  # what is imported below takes seconds, in which a signal may come
    for number in STOP_SIGNALS:
        signal.signal(number, stop_before_training)

# ruff: noqa: E402
import argparse
import hashlib
import importlib.metadata
import socket
import sys
import threading
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from s2megatron.cluster import environment
from s2megatron.cluster.orphans import adopt_orphans, end_children
from s2megatron.cluster.rollcall import Nodes, Watch, call_roll, open_store
from s2megatron.config import RunConfig, load_config
from s2megatron.errors import ConfigError
from s2megatron.paths import user_path
from s2megatron.training.checkpoint_folder import TRACKER, resume_point

FINISHED, FAILED, REFUSED = 0, 1, 2
WORKER = "s2megatron.pretrain"
LOST_PEER = ("closed by peer", "reset by peer", "ncclRemote", "Broken pipe")
"""What a rank says when another one went away in the middle of a collective."""


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="s2megatron.agent", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--nnodes", type=int, default=1, help="machines in the job")
    parser.add_argument("--node-rank", type=int, default=0, help="this one: 0 to nnodes - 1")
    parser.add_argument("--master-addr", default="127.0.0.1", help="node 0's address")
    parser.add_argument("--master-port", type=int, default=0, help="a free port of node 0")
    parser.add_argument("--nproc-per-node", type=int, default=0,
                        help="ranks on this node (default: its GPUs, or 1 without)")  # fmt: skip
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS",
                        help="how long to wait for the other nodes")  # fmt: skip
    parser.add_argument("pretrain", nargs="+", metavar="-- --config run.yaml ...",
                        help="what s2megatron.pretrain is given")  # fmt: skip
    options = parser.parse_args(argv)
    for number in STOP_SIGNALS:
        signal.signal(number, stop_before_training)
    ranks = options.nproc_per_node or torch.cuda.device_count() or 1
    try:
        run, content = _read_run(options.pretrain)
        nodes = _nodes(options)
        environment.apply_threads(ranks)
        environment.apply()
        store = open_store(nodes, options.wait, _say)
        nodes = Nodes(count=nodes.count, rank=nodes.rank, addr=nodes.addr, port=store.port)
        call_roll(store, nodes, options.wait, same=_same(options, ranks, content), say=_say)
    except ConfigError as error:
        print(f"s2megatron: this run cannot start:\n{error}", file=sys.stderr, flush=True)
        return REFUSED
    return Agent(nodes, ranks, options.pretrain, run).run()


def _read_run(arguments: list[str]) -> tuple[RunConfig, bytes]:
    """The run file, so that a mistake in it shows before any node waits for another."""
    parser = argparse.ArgumentParser(prog="s2megatron.agent ... --")
    parser.add_argument("--config", required=True, help="run file (YAML)")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    return load_config(given.config, given.overrides), Path(user_path(given.config)).read_bytes()


def _nodes(options) -> Nodes:
    if options.nnodes < 1:
        raise ConfigError(f"NNODES={options.nnodes}: must be 1 or more, the machines in the job")
    if options.nproc_per_node < 0:
        raise ConfigError(f"GPUS_PER_NODE={options.nproc_per_node}: must be 1 or more")
    if not options.wait > 0:
        raise ConfigError(f"WAIT={options.wait:g}: must be more than 0 seconds")
    if not 0 <= options.node_rank < options.nnodes:
        raise ConfigError(
            f"NODE_RANK={options.node_rank}: with NNODES={options.nnodes} it must be from 0 to "
            f"{options.nnodes - 1}"
        )
    if options.nnodes > 1 and not options.master_port:
        raise ConfigError("MASTER_PORT: is missing; all nodes need the same one, e.g. 29500")
    return Nodes(
        count=options.nnodes,
        rank=options.node_rank,
        addr=options.master_addr,
        port=options.master_port,
    )


def _same(options, ranks: int, content: bytes) -> dict[str, str]:
    """What must be equal on all nodes."""
    return {
        "the number of nodes (NNODES)": str(options.nnodes),
        "ranks per node": str(ranks),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "the run file's content": hashlib.sha256(content).hexdigest()[:12],
        "the command line": " ".join(options.pretrain),
    }


def _say(text: str) -> None:
    print(f"s2megatron: {text}", flush=True)


class Agent:
    """Starts this node's ranks and sees them to their end."""

    def __init__(self, nodes: Nodes, ranks: int, pretrain: list[str], run: RunConfig):
        self.nodes, self.ranks, self.pretrain, self.run_config = nodes, ranks, pretrain, run
        self.stopping = self.over = False
        self.lost = ""
        """Why another node ended the job."""

    def run(self) -> int:
        """Returns the exit status."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        adopt_orphans()
        watch = Watch(self.nodes, self._end)
        failure = ""
        try:
            elastic_launch(self._config(), sys.executable)("-u", "-m", WORKER, *self.pretrain)
        except ChildFailedError as error:
            status, failure = self._why(error)
        except SignalException as error:
            status = STOPPED if self.stopping and not self.lost else FAILED
            if status == FAILED and not self.lost:
                failure = f"stopped by {signal.Signals(error.sigval).name}"
        else:
            status = STOPPED if self.stopping else FINISHED
        self.over = True
        end_children()  # writers of checkpoints whose rank is gone
        if failure and any(text in failure for text in LOST_PEER) and not self.lost:
            self.lost = watch.who_is_lost() if self.nodes.count > 1 else ""
            failure += f"; {self.lost or 'a rank of this job went away first'}"
        watch.leave(failure and f"node {self.nodes.rank} ({socket.gethostname()}): {failure}")
        self._report(status, failure)
        return status

    def _config(self) -> LaunchConfig:
        return LaunchConfig(
            min_nodes=self.nodes.count,
            max_nodes=self.nodes.count,
            nproc_per_node=self.ranks,
            run_id="s2megatron",  # the store is this job's alone
            rdzv_backend="static",
            rdzv_endpoint=f"{self.nodes.addr}:{self.nodes.port}",
            rdzv_configs={"rank": self.nodes.rank, "timeout": 900},
            max_restarts=0,
            # SIGTERM and SIGUSR1 are this class's; SIGQUIT is how it ends the workers itself.
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        )

    def _workers(self) -> list[psutil.Process]:
        return [
            child for child in psutil.Process().children()
            if child.status() != psutil.STATUS_ZOMBIE and WORKER in child.cmdline()
        ]  # fmt: skip

    def _stop(self, number, frame) -> None:
        """The training processes save and leave; one that hears it is enough, on any node."""
        if self.stopping:
            return
        self.stopping = True
        workers = self._workers()
        saves = "save and leave" if self.run_config.output.folder else "leave (no output.folder)"
        _say(f"{signal.Signals(number).name}: {len(workers)} training processes are to {saves}")
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        if not workers:
            os.kill(os.getpid(), signal.SIGQUIT)

    def _end(self, reason: str) -> None:
        """Another node is lost. Called from the watch's thread."""
        self.lost = reason
        _say(f"the job ends here too: {reason}")
        # The workers may end by themselves, with what they saw, or wait for a peer in vain.
        timer = threading.Timer(5.0, self._end_workers)
        timer.daemon = True
        timer.start()

    def _end_workers(self) -> None:
        if not self.over:
            os.kill(os.getpid(), signal.SIGQUIT)

    def _why(self, error: ChildFailedError) -> tuple[int, str]:
        rank, first = error.get_first_failure()
        if self.stopping and -first.exitcode == signal.SIGTERM:
            return STOPPED, ""  # before training began: nothing to save
        if first.exitcode == REFUSED:
            return REFUSED, f"rank {rank} cannot start as configured (its message is above)"
        what = f"exit status {first.exitcode}"
        if first.exitcode < 0:
            what = f"killed by {signal.Signals(-first.exitcode).name}"
            if first.exitcode == -signal.SIGKILL:
                what += " (out of host memory? see dmesg)"
        message = first.message.get("message", "") if isinstance(first.message, dict) else ""
        return FAILED, f"rank {rank} failed: {message or what}"

    def _report(self, status: int, failure: str) -> None:
        folder = self.run_config.output.folder
        if status == FINISHED:
            return
        if status == STOPPED:
            _say(f"stopped by a signal; {self._resume(folder)} (exit status {STOPPED})")
            return
        failure = self.lost or failure
        no_way_on = status == REFUSED or "could not be loaded" in failure  # it says what to do
        print(
            f"s2megatron: the job failed on node {self.nodes.rank} ({socket.gethostname()}): "
            f"{failure}" + ("" if no_way_on else f"\ns2megatron: {self._resume(folder)}"),
            file=sys.stderr,
            flush=True,
        )

    @staticmethod
    def _resume(folder: str | None) -> str:
        if not folder:
            return "nothing was saved by output.folder"
        checkpoints = Path(folder) / "checkpoints"
        try:
            iteration = resume_point(checkpoints)[0] if (checkpoints / TRACKER).exists() else None
        except ConfigError as error:
            return str(error)
        if iteration is None:
            return "no checkpoint is complete yet: the same command starts from the beginning"
        return f"the same command, on all nodes, resumes from iteration {iteration}"


if __name__ == "__main__":
    sys.exit(main())
