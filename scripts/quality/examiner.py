"""The other end of `examine.py --serve`: a process beside the training that examines arms."""

import os
import queue
import shlex
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from jobs import HERE, Job

READY = "ready"
"""What the process says when it has imported everything."""


class Examiner:
    """Examines one arm after the other on a group of GPUs; its log is OUT/examiner-GPUS.txt.

    Args:
        data: the study's data folder.
        out: the folder of all arms.
        gpus: as CUDA_VISIBLE_DEVICES has them; "" is the CPU.
    """

    def __init__(self, data: Path, out: Path, gpus: str):
        log = out / f"examiner-{gpus.replace(',', '-') or 'cpu'}.txt"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "examine.py"), str(data), "--serve"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus},
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._waiting: deque[tuple[Job, str]] = deque()
        self._current: Job | None = None
        self._log = log
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    @property
    def busy(self) -> bool:
        """Something is examined, or waits for it."""
        return self._current is not None or bool(self._waiting)

    def ask(self, job: Job, folder: Path, copy: Path | None) -> None:
        """Puts an arm into the queue."""
        self._waiting.append((job, shlex.join(str(path) for path in (folder, copy) if path)))

    def answers(self, *, quiet: bool) -> list[tuple[Job, str]]:
        """What has come of arms since the last call: "done", or why not.

        Args:
            quiet: an arm is timed on these GPUs; no examination starts now.
        """
        found = []
        while not self._lines.empty():
            line = self._lines.get()
            if line is None:  # it has ended: so have all that wait
                tail = self._log.read_text(errors="replace")[-1500:]
                lost = [self._current, *(job for job, _ in self._waiting)]
                self._current, self._waiting = None, deque()
                return found + [(job, f"failed: {tail}") for job in lost if job]
            if line != READY:
                found.append((self._current, line))
                self._current = None
        if self._waiting and self._current is None and not quiet:
            self._current, line = self._waiting.popleft()
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:  # the reader tells why
                self._waiting.appendleft((self._current, line))
                self._current = None
        return found

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
