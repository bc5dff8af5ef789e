"""Launch scripts end to end on the CPU: two agents, a killed one, SLURM's signal and requeue."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from agents import Job, losses, make_corpus, train, train_multinode, two_nodes
from launches import ROOT, TINY, write_run_file
from ports import free_port

from s2megatron.training.run_lock import RunLock

STEPS = 20
TP2 = ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"]
PP2 = ["megatron.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    corpus = make_corpus(folder)
    tree = TINY | {"data": {"train": [corpus], "tokenizer": "bytes"}}
    tree["megatron"] = tree["megatron"] | {"train_iters": STEPS, "save_interval": 5}
    write_run_file(folder / "run.yaml", tree)
    return folder


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as pair:
        yield pair


@pytest.fixture(scope="module")
def one_agent(home):
    """Losses of uninterrupted runs with two ranks under one agent, by layout."""
    found = {}
    for name, layout in (("tp2", TP2), ("pp2", PP2)):
        job = train(home / "run.yaml", f"output.folder={home / name}", *layout,
                    log=home / f"{name}.log", ranks=2)  # fmt: skip
        assert job.end() == 0, job.text[-3000:]
        found[name] = losses(job.text)
        assert sorted(found[name]) == list(range(1, STEPS + 1))
    return found


def assert_equal(got: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(got) == list(range(1, STEPS + 1))
    worst = max(abs(got[step] - expected[step]) for step in got)
    print(f"largest loss difference over {STEPS} steps: {worst:.1e}")
    assert worst <= 1e-6 * max(expected.values()), (got, expected)  # seven digits are printed


def test_tp_across_two_agents_equals_one_agent(home, nodes, one_agent):
    start = [f"output.folder={home / 'wire'}", "output.keep=2", *TP2]
    jobs = train_multinode(
        nodes, home / "run.yaml", *start, log=home / "wire.log", port=free_port()
    )
    assert [job.end() for job in jobs] == [0, 0], jobs[0].text[-3000:] + jobs[1].text[-3000:]
    assert_equal(losses(*(job.text for job in jobs)), one_agent["tp2"])
    assert "all 2 nodes have come" in jobs[0].text
    kept = sorted(path.name for path in (home / "wire" / "checkpoints").iterdir())
    assert kept == ["iter_0000015", "iter_0000020", "latest_checkpointed_iteration.txt"]
    assert not (home / "wire" / "run.lock").exists()


def test_killed_agent_ends_the_job_and_it_resumes(home, nodes, one_agent):
    """PP across the wire; node 1's agent is killed at iteration 12, both are started again."""
    folder = home / "killed"
    start = [f"output.folder={folder}", *PP2]
    first = train_multinode(nodes, home / "run.yaml", *start, log=home / "k1.log", port=free_port())
    first[1].wait_for(r"iteration +12/")  # the last rank prints the losses
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 60  # the save of step 10 ends in the background
    while tracker.read_text().strip() != "10" and time.monotonic() < deadline:
        time.sleep(0.02)
    first[1].process.send_signal(signal.SIGKILL)
    assert first[0].end() == 1 and first[1].end() == -signal.SIGKILL
    said = first[0].text[-1500:]
    assert "s2megatron: the job failed on node 0" in said
    assert "node 1 (" in said and "no sign of life" in said, said
    assert "resumes from iteration 10" in said
    # What a save leaves that was cut off: files, no .metadata, and the tracker still at 10.
    half = folder / "checkpoints" / "iter_0000015"
    shutil.copytree(half.with_name("iter_0000010"), half, dirs_exist_ok=True)
    (half / ".metadata").unlink()
    before = losses(first[1].text)
    again = train_multinode(nodes, home / "run.yaml", *start, log=home / "k2.log", port=free_port())
    assert [job.end() for job in again] == [0, 0], again[0].text[-3000:]
    assert "resuming from" in again[0].text and "iter_0000010" in again[0].text
    after = losses(again[1].text)
    assert sorted(after) == list(range(11, STEPS + 1))
    assert_equal(before | after, one_agent["pp2"])


STAND_IN_SRUN = """#!/bin/bash
# As srun: one task per node; a signal to the step reaches every task, the status is the highest.
while [ "${1#-}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node SLURM_PROCID=$node taskset --cpu-list $((node % $(nproc))) "$@" & tasks+=($!)
done
echo "${tasks[@]}" >"$STAND_IN/tasks"
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    [ "$status" -gt "$highest" ] && highest=$status
done
exit "$highest"
"""
STAND_IN_SCONTROL = """#!/bin/bash
case $1 in
show) printf '127.0.0.1\\n127.0.0.1\\n' ;;
requeue) echo "$2" >>"$STAND_IN/requeued" ;;
esac
"""


@pytest.mark.parametrize(
    "status, requeued, says",
    [
        (75, True, "stopped with a checkpoint; back to the queue"),
        (143, True, "stopped before it began; back to the queue"),  # SIGTERM
        (138, True, "stopped before it began; back to the queue"),  # SIGUSR1
        (0, False, ""),
        (1, False, ""),
        (2, False, ""),
        (137, False, ""),  # SIGKILL
    ],
)
def test_which_statuses_go_back_to_the_queue(tmp_path, status, requeued, says):
    """train.sbatch under an srun that ends at once."""
    (tmp_path / "run.yaml").write_text("")
    job, stand_in = sbatch(tmp_path, tmp_path / "log", 0, srun=f"#!/bin/bash\nexit {status}\n")
    assert job.end() == status
    assert (stand_in / "requeued").exists() == requeued
    assert says in job.text and ("back to the queue" in job.text) == requeued


def sbatch(home, log, restart: int, *overrides, srun: str = STAND_IN_SRUN):
    """Starts train.sbatch as SLURM would on two nodes, with stand-ins for its commands."""
    bin_ = home / "slurm"
    bin_.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", STAND_IN_SCONTROL)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    env = {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "STAND_IN": str(bin_),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_RESTART_COUNT": str(restart),
        "MASTER_PORT": str(free_port()),
        "GPUS_PER_NODE": "1",
    }
    command = ["bash", "scripts/slurm/train.sbatch", str(home / "run.yaml"), *overrides]
    return Job(command, log, env), bin_


def test_slurm_signal_saves_requeues_and_goes_on(home, one_agent):
    overrides = [f"output.folder={home / 'slurm-run'}", *TP2]
    job, stand_in = sbatch(home, home / "s1.log", 0, *overrides)
    job.wait_for(r"iteration +7/")
    for task in (stand_in / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert job.end() == 75, job.text[-3000:]
    assert "SIGUSR1: 1 training processes are to save and leave" in job.text
    assert "back to the queue" in job.text
    assert (stand_in / "requeued").read_text() == "4711\n"
    before = losses(job.text)
    assert 7 <= max(before) < STEPS

    job, _ = sbatch(home, home / "s2.log", 1, *overrides)
    assert job.end() == 0, job.text[-3000:]
    after = losses(job.text)
    assert min(after) == max(before) + 1  # nothing lost, nothing done twice
    assert_equal(before | after, one_agent["tp2"])
    assert (stand_in / "requeued").read_text() == "4711\n"


def test_second_run_in_the_same_folder_is_refused(home, tmp_path):
    held = RunLock(tmp_path / "run")
    try:
        job = train(home / "run.yaml", f"output.folder={tmp_path / 'run'}", log=tmp_path / "log",
                    ranks=1)  # fmt: skip
        assert job.end() == 2, job.text[-3000:]
        assert "is in use by another run" in job.text and f"process {os.getpid()} on" in job.text
        assert "cannot start as configured" in job.text[-800:]
    finally:
        held.release()


def test_full_disk_leaves_the_last_good_checkpoint(home, tmp_path):
    """A disk that holds one checkpoint and half of the next."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root, to mount a small tmpfs")
    try:
        job = train(
            home / "run.yaml", f"output.folder={disk / 'run'}", log=tmp_path / "log", ranks=1
        )
        assert job.end() == 1, job.text[-3000:]
        assert "could not be written" in job.text[-1500:], job.text[-3000:]
        assert "the disk is full" in job.text[-1500:]
        assert "resumes from iteration 5" in job.text[-500:]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
