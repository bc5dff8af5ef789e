"""What goes wrong before and between launches: nodes, ports, locks, half-written checkpoints."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from fake_checkpoints import checkpoint
from launches import ROOT, TINY, write_run_file
from ports import free_port

from s2megatron.agent import STOP_SIGNALS, _read_run
from s2megatron.agent import main as agent_main
from s2megatron.cluster import environment, rollcall
from s2megatron.cluster.rollcall import Nodes, Watch, call_roll, open_store
from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training import output, run_lock
from s2megatron.training.checkpoint_folder import CheckpointPruner, resume_point
from s2megatron.training.run_lock import RunLock


def report(count: int, ranks: list[int], same: list[dict], wait: float = 10.0) -> list[str]:
    """'' or the error of each of the nodes that come."""
    port, stores = free_port(), []  # kept to the end, as an agent keeps its own

    def node(place: int) -> str:
        nodes = Nodes(count=count, rank=ranks[place], addr="127.0.0.1", port=port)
        try:
            store = open_store(nodes, wait, print)
            stores.append(store)
            call_roll(store, nodes, wait, same=same[place], say=print)
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(node, range(len(ranks))))


def test_nodes_that_do_not_come_are_named_to_all_that_did():
    for said in report(4, [0, 2], [{}, {}], wait=1.0):
        assert "2 of 4 nodes came within 1 s" in said and "missing: node 1, 3" in said


def test_nodes_that_differ_are_told_in_what():
    assert report(2, [0, 1], [{"torch": "2.11"}] * 2) == ["", ""]
    for said in report(2, [0, 1], [{"torch": "2.11"}, {"torch": "2.10"}]):
        assert "nodes differ in torch" in said and "2.11" in said and "2.10" in said


def test_one_rank_claimed_twice():
    said = "".join(report(3, [0, 1, 1], [{}] * 3, wait=1.0))
    assert "NODE_RANK=1 is claimed by" in said and "from 0 to 2" in said


def test_port_in_use_and_foreign_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        nodes = Nodes(count=2, rank=0, addr="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="another process listens there; set MASTER_PORT"):
            open_store(nodes, 1.0, print)
    with pytest.raises(ConfigError, match="must be node 0's own"):
        open_store(Nodes(count=2, rank=0, addr="192.0.2.1", port=29500), 1.0, print)


def test_node_zero_that_does_not_answer():
    """It says whom it waits for, and not longer than it was told to."""
    said, began = [], time.monotonic()
    nodes = Nodes(count=2, rank=1, addr="127.0.0.1", port=free_port())
    with pytest.raises(ConfigError, match=r"could not reach node 0 at 127.0.0.1:\d+ within 1 s"):
        open_store(nodes, 1.0, said.append)
    assert time.monotonic() - began < 3
    assert "node 1 waits for node 0 at 127.0.0.1" in said[0] and "Connection refused" in said[0]


def test_node_zero_that_goes_away_is_named(monkeypatch):
    monkeypatch.setattr(rollcall, "REPORT_S", 0.2)
    nodes = Nodes(count=2, rank=1, addr="127.0.0.1", port=free_port())
    store = open_store(Nodes(count=2, rank=0, addr="127.0.0.1", port=nodes.port), 1.0, print)
    with pytest.raises(ConfigError, match=r"node 0 \(127.0.0.1\) went away .*no verdict"):
        call_roll(store, nodes, 0.3, same={}, say=print)


@pytest.fixture
def watched(monkeypatch):
    """Two nodes' watches, and what each was told."""
    monkeypatch.setattr(rollcall, "SIGN_OF_LIFE_S", 0.05)
    port, told, watches = free_port(), [[], []], []
    places = [Nodes(count=2, rank=r, addr="127.0.0.1", port=port) for r in (0, 1)]
    store = open_store(places[0], 5.0, print)
    for place in places:
        store.set(f"hello/{place.rank}", json.dumps({"host": f"host{place.rank}"}))
        heard = threading.Event()
        said = told[place.rank]

        def hear(reason, heard=heard, said=said):
            said.append(reason)
            heard.set()

        watches.append((Watch(place, hear, silent_s=0.5), heard, said))
    yield watches
    for watch, _, _ in reversed(watches):
        watch.leave()


def test_failure_of_one_node_is_told_to_the_other(watched):
    (_, heard, said), (other, _, _) = watched
    other.leave("node 1 (host1): rank 3 failed: out of memory")
    assert heard.wait(5) and said == ["node 1 (host1): rank 3 failed: out of memory"]


def test_silent_node_is_named(watched):
    (_, heard, said), (other, _, _) = watched
    other._leaving.set()  # as if its machine lost power: no farewell
    assert heard.wait(5) and "node 1 (host1) has given no sign of life" in said[0]


def test_lost_node_is_named_before_a_minute_is_over(watched, monkeypatch):
    """A rank's connection closed: which node went away is asked for, not waited out."""
    monkeypatch.setattr(rollcall, "LOST_S", 1.0)
    (first, _, _), (other, _, _) = watched
    assert first.who_is_lost() == "" and other.who_is_lost() == ""
    other._leaving.set()  # its agent was killed
    other._thread.join()
    assert "node 1 (host1) has given no sign of life" in first.who_is_lost()


def test_reason_of_the_node_that_failed_comes_before_a_guess(watched):
    (first, _, _), (other, _, _) = watched
    other._store.compare_set("ended", "", "node 1 (host1): rank 3 failed: out of memory")
    assert "out of memory" in first.who_is_lost()


def test_agent_reads_a_run_file_below_the_home_folder(tmp_path, monkeypatch):
    write_run_file(tmp_path / "run.yaml", TINY)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--config", "~/run.yaml"]
    assert _read_run(arguments)[1] == (tmp_path / "run.yaml").read_bytes()


@pytest.fixture
def agent(tmp_path, monkeypatch, capsys):
    """An agent in the test's own process, whose handlers and environment are put back."""
    run = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield lambda *arguments: (
        agent_main([*arguments, "--", "--config", str(run)]),
        capsys.readouterr().err,
    )
    for number, handler in before.items():
        signal.signal(number, handler)


def test_agent_refuses_with_status_2(agent):
    code, said = agent("--nnodes", "2", "--node-rank", "2")
    assert code == 2 and "NODE_RANK=2: with NNODES=2" in said
    code, said = agent("--nnodes", "2", "--master-port", str(free_port()), "--wait", "0.5")
    assert code == 2 and "missing: node 1 (NODE_RANK)" in said and "WAIT=SECONDS" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--nnodes", "0"], "NNODES=0: must be 1 or more"),
        (["--nproc-per-node", "-1"], "GPUS_PER_NODE=-1: must be 1 or more"),
        (["--wait", "0"], "WAIT=0: must be more than 0 seconds"),
    ],
)
def test_number_that_makes_no_sense(arguments, said, agent):
    code, error = agent(*arguments)
    assert code == 2 and said in error


def start_and_signal(command: list[str], number: int, when: str, **env) -> tuple[int, str]:
    """Status and output of a command that gets a signal once `when` is in its output."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **env}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           cwd=ROOT, env=env)  # fmt: skip
    said = ""
    while when not in said and (line := job.stdout.readline()):
        said += line
    job.send_signal(number)
    said += job.communicate(timeout=60)[0]
    return job.returncode, said


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_while_the_agent_is_imported(number):
    """-v prints what is imported: torch comes seconds before the first line of `main`."""
    command = [sys.executable, "-v", "-m", "s2megatron.agent", "--", "--config", "x.yaml"]
    code, said = start_and_signal(command, number, "torch/__init")
    assert code == 75 and f"{number.name} before training began" in said[-3000:]


def test_signal_while_a_node_waits_for_the_others(tmp_path):
    run = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    command = [sys.executable, "-u", "-m", "s2megatron.agent", "--nnodes", "2", "--node-rank", "1",
               "--master-port", str(free_port()), "--", "--config", str(run)]  # fmt: skip
    code, said = start_and_signal(command, signal.SIGTERM, "waits for node 0")
    assert code == 75 and "SIGTERM before training began" in said


def test_signal_while_the_script_looks_for_python(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/bash\necho looking\nsleep 1\n")
    slow.chmod(0o755)
    command = ["bash", "scripts/train.sh", "x.yaml"]
    code, said = start_and_signal(command, signal.SIGTERM, "looking", PYTHON=str(slow))
    assert code == 75 and "before training began" in said


def test_scripts_name_what_is_missing(tmp_path):
    def script(name, *arguments, **env):
        command = ["bash", f"scripts/{name}", *arguments]
        env = {"PATH": os.environ["PATH"]} | env
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        return done.returncode, done.stderr

    assert script("train.sh") == (2, script("train.sh")[1])
    assert "scripts/train.sh CONFIG" in script("train.sh")[1]
    code, said = script("train_multinode.sh", "x.yaml", NNODES="2", NODE_RANK="0")
    assert code == 2 and "MASTER_ADDR is not set" in said
    code, said = script("slurm/train.sbatch", "x.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2 and "submit from the repository" in said
    code, said = script("slurm/train.sbatch", "x.yaml", SLURM_SUBMIT_DIR=str(ROOT))
    assert code == 2 and "SLURM_JOB_ID is not set: this script runs under SLURM" in said
    code, said = script("train.sh", "x.yaml", PYTHON="/nowhere/python")
    assert code == 1 and "/nowhere/python cannot import s2megatron" in said


# --- the lock of an output folder


def test_second_run_in_a_folder_is_refused_and_told_by_whom(tmp_path):
    held = RunLock(tmp_path)
    with pytest.raises(ConfigError) as refused:
        RunLock(tmp_path)
    said = str(refused.value)
    assert f"process {os.getpid()} on {socket.gethostname()}" in said
    assert "folder of its own" in said and str(tmp_path / "run.lock") in said
    held.release()
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def leave_lock(folder, **fields) -> None:
    holder = {"host": "elsewhere", "pid": 1, "job": "", "restart": "0", "since": "yesterday"}
    (folder / "run.lock").write_text(json.dumps(holder | fields))


def test_lock_of_a_run_that_is_gone_is_taken_over(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)  # fmt: skip
    leave_lock(tmp_path, host=socket.gethostname(), pid=int(ended.stdout))
    lock = RunLock(tmp_path, {})
    assert "of this host is gone" in lock.note
    lock.release()

    leave_lock(tmp_path, job="7")
    with pytest.raises(ConfigError, match="SLURM job 7"):
        RunLock(tmp_path, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"})
    lock = RunLock(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    assert "requeued" in lock.note
    lock.release()

    leave_lock(tmp_path)
    with pytest.raises(ConfigError, match="on elsewhere"):
        RunLock(tmp_path, {})
    old = os.stat(tmp_path / "run.lock").st_mtime - run_lock.SILENT_S - 10
    os.utime(tmp_path / "run.lock", (old, old))
    lock = RunLock(tmp_path, {})
    assert "no sign of life from elsewhere" in lock.note
    lock.release()


def test_lock_whose_number_is_another_process_now(tmp_path):
    me = psutil.Process()
    leave_lock(tmp_path, host=socket.gethostname(), pid=me.pid, started=me.create_time() - 3600)
    lock = RunLock(tmp_path, {})
    assert "the number is another process's now" in lock.note
    with pytest.raises(ConfigError, match="is in use by another run"):
        RunLock(tmp_path, {})
    lock.release()


def test_empty_lock_is_taken_over_and_never_left(tmp_path, monkeypatch):
    (tmp_path / "run.lock").touch()
    with pytest.raises(ConfigError, match="is being written by another run"):
        RunLock(tmp_path, {})
    old = time.time() - run_lock.SIGN_OF_LIFE_S - 10
    os.utime(tmp_path / "run.lock", (old, old))
    lock = RunLock(tmp_path, {})
    assert "it is empty" in lock.note
    lock.release()

    def full(value, stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock.json, "dump", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        RunLock(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        RunLock(tmp_path / "file" / "run", {})


# --- checkpoints


def track(folder, text: str) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(text)


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert resume_point(tmp_path) == (None, [])
    checkpoint(tmp_path, 5, complete=False)  # the first save was cut off
    assert resume_point(tmp_path) == (None, [])
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 30, complete=False)
    track(tmp_path, "20")
    assert resume_point(tmp_path) == (20, [])
    track(tmp_path, "")  # the machine stopped while it was written
    number, notes = resume_point(tmp_path)
    assert number == 20 and "is damaged" in notes[0] and "iter_0000030 is incomplete" in notes[1]
    track(tmp_path, "30")
    assert resume_point(tmp_path)[0] == 20
    track(tmp_path, "4")
    number, notes = resume_point(tmp_path)
    assert number == 20 and "iter_0000004, which is not complete: it is not there" in notes[0]


def test_tracker_without_a_complete_checkpoint_is_refused(tmp_path):
    checkpoint(tmp_path, 30, complete=False)
    track(tmp_path, "30")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resume_point(tmp_path)


def test_keeper_keeps_the_newest_complete_ones(tmp_path):
    for number in (10, 20, 30, 40):
        checkpoint(tmp_path, number)
    checkpoint(tmp_path, 50, complete=False)  # being written
    (tmp_path / ".deleting-iter_0000001").mkdir()  # a deletion that was cut off
    track(tmp_path, "40")
    pruner = CheckpointPruner(tmp_path, 2, save_interval=10)
    pruner.after(9)
    assert (tmp_path / "iter_0000010").exists()
    pruner.after(51)
    pruner.close()
    left = sorted(path.name for path in tmp_path.glob("*iter_*"))
    assert left == ["iter_0000030", "iter_0000040", "iter_0000050"]


def test_output_folder_resumes_and_drops_what_is_for_the_first_start(tmp_path):
    section = OutputConfig(folder=str(tmp_path))
    begin = {"load": "elsewhere", "finetune": True, "no_load_optim": True, "lr": 1e-4}
    first = output.resolve(section, begin)
    assert first.options["load"] == "elsewhere" and first.options["finetune"] is True
    assert first.options["async_save"] and first.options["exit_signal_handler"]
    checkpoint(tmp_path / "checkpoints", 20)
    checkpoint(tmp_path / "checkpoints", 30, complete=False)
    track(tmp_path / "checkpoints", "20")
    again = output.resolve(section, begin)
    assert again.options["load"] == str(tmp_path / "checkpoints") and again.options["lr"] == 1e-4
    assert "finetune" not in again.options and again.options["ckpt_step"] == 20
    assert any("megatron.finetune" in note and "left out now" in note for note in again.notes)
    track(tmp_path / "checkpoints", "30")
    assert output.resolve(section, begin).options["ckpt_step"] == 20
    with pytest.raises(ConfigError, match="which decides where"):
        output.resolve(section, {"save": "x"})
    assert output.resolve(OutputConfig(), begin) is None


def test_environment_leaves_what_is_set():
    environ = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    added = environment.apply(environ)
    assert environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environ and "TORCH_NCCL_DUMP_ON_TIMEOUT" in added
    assert all(reason for _, reason in environment.DEFAULTS.values())
