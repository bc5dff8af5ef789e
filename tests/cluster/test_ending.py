"""A process that has done its work ends with the status it says, whatever its threads do."""

import subprocess
import sys

from launches import ROOT

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
