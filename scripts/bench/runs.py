"""One training run of a benchmark: how it is started, and what its log says went wrong."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXCEPTION = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b(?::.*)?")
REPORT = re.compile(
    r"^s2megatron: (?:this run cannot start:\n|the job failed on node .*?\): )(.*)", re.M
)
"""What the launcher refuses with, and what its agent says of the rank that failed first."""
LAST_WORDS = re.compile(r"^(\[rank\d+\]:) ?(.*)", re.M)
"""How torch marks the traceback that ended a rank."""

OWN_LINE = re.compile(r"s2megatron iteration +(\d+) \| ([\d.]+) ms")
"""What the launcher prints of an iteration, each of them under `log_interval: 1`."""


def logged_steps(folder: Path) -> dict[int, float]:
    """Iteration -> seconds, out of the logs of a run's ranks, however far it has come."""
    texts = (
        log.read_text(errors="replace") for log in [*folder.glob("*.log"), *folder.glob("log.txt")]
    )
    return {int(n): float(ms) / 1e3 for text in texts for n, ms in OWN_LINE.findall(text)}


def train(config: str | Path, overrides: list[str], *, gpus: int, log: Path) -> tuple[str, int]:
    """One run of scripts/train.sh, waited for, with its output in `log` under its command.

    Args:
        gpus: ranks, each on a GPU of its own (CPU processes where there is no GPU).

    Returns:
        The command as one would type it, and its exit status.
    """
    command = [str(ROOT / "scripts/train.sh"), str(config), *overrides]
    typed = f"GPUS_PER_NODE={gpus} {shlex.join(command)}"
    env = {"PYTHON": sys.executable, **os.environ, "GPUS_PER_NODE": str(gpus)}
    with log.open("w") as stream:
        stream.write(f"{typed}\n")
        stream.flush()
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
    return typed, done.returncode


def what_went_wrong(log: Path, status: int | None) -> str:
    """The error that a log shows, in one line of at most 500 characters.

    This is the launcher's or the agent's own word where there is one; else the exception that ended
    the rank which failed first; else the log's last exception; else the exit status and how the log
    ends.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    if report := REPORT.search(text):
        return report[1][:500]
    lines = text.splitlines()
    if marked := LAST_WORDS.findall(text):
        lines = [line for rank, line in marked if rank == marked[0][0]]
    for i in range(len(lines) - 1, -1, -1):
        if EXCEPTION.fullmatch(lines[i]) and "ChildFailedError" not in lines[i]:
            return " ".join(lines[i : i + 3])[:500]
    return f"status {status}; {last_line(log)}"


def last_line(log: Path) -> str:
    """How a log ends, in words."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return "its log ends: " + next((line for line in reversed(lines) if line.strip()), "(empty)")
