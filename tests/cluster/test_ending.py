"""A process that has done its work ends with the status it says, whatever its threads do."""

import os
import re
import subprocess
import sys

import pytest
import zygote
from launches import ON_CPU, ROOT, TINY, write_run_file

BUSY_THREADS = """
import atexit, sys, threading, time, torch
from s2megatron.cluster.ending import leave
torch.set_num_threads(1)
atexit.register(print, "written at the end")
def work():
    x = torch.randn(500, 500)
    while True:
        x @ x
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
print("done", end=" ")
"""


def test_threads_inside_torch_do_not_abort_a_finished_process():
    """With `sys.exit` in its place: "terminate called without an active exception", SIGABRT."""
    command = [sys.executable, "-c", f"{BUSY_THREADS}\nleave(0)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "done waited for\nwritten at the end\n"
    command[-1] = f"{BUSY_THREADS}\nleave(3)"
    assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120).returncode == 3


def test_killing_what_is_left_does_not_hide_the_error():
    """PyTorch raises in the main thread when a DataLoader's worker is killed: a rank left with that
    traceback, by Python's own end, which can block where a peer is gone."""
    program = (
        "import os, torch\n"
        "from s2megatron.cluster.orphans import end_children\n"
        "batches = iter(torch.utils.data.DataLoader(range(99), num_workers=2))\n"
        "next(batches)\n"
        "try:\n    1 / 0\n"
        "except ZeroDivisionError:\n    end_children()\n    os._exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")


ENDS = {
    "evaluates only": (["megatron.skip_train=true", "megatron.eval_iters=1"], 0, "validation loss"),
    "wrong result": (["megatron.error_injection_rate=1"], 17, "the last checkpoint stays as it is"),
    "no number": (["megatron.clip_grad=0", "megatron.lr=1e25"], 16, "megatron.rerun_mode=disabled"),
    "no number, no folder": (
        ["megatron.clip_grad=0", "megatron.lr=1e25", "output.folder=null"],
        1,
        "result was not a number .*saves nothing",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_run_that_saves_nothing_ends(tmp_path, case):
    """Its writer of checkpoints waited for work, and the rank for it, without end."""
    overrides, status, words = ENDS[case]
    config = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    arguments = ["--config", str(config), f"output.folder={tmp_path / 'run'}", *overrides]
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    target = "operating_cases:train_and_leave"
    done = zygote.run(target, [*arguments, "megatron.lr_warmup_iters=0"], env=env, timeout=60)
    assert done.returncode == status, done.stderr[-3000:]
    assert re.search(words, done.stdout + done.stderr)
