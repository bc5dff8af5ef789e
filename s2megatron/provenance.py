"""What a result was made with: the machine, the versions, the date and the commit.

Benchmarks, the quality study and evaluations write this beside their figures. It needs torch and
the standard library only: scripts/bench/attention.py runs where no Megatron is installed.
"""

import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers")
MISSING = "not installed"
UNKNOWN = "unknown"


def describe(root: Path, packages: Iterable[str] = PACKAGES) -> dict:
    """Machine ("gpu"), versions, date and commit of this process.

    Args:
        root: the checkout whose commit is named.
        packages: distributions whose versions are named.
    """
    return {
        "gpu": machine(),
        "versions": versions(packages),
        "date": now(),
        "commit": commit(root),
    }


def machine(device: torch.device | str | None = None) -> str:
    """The name of the GPU, or "CPU".

    Args:
        device: what the result ran on; left out: the current GPU, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The version of each distribution, MISSING for one that is not there."""
    return {name: version(name) for name in packages}


def version(package: str) -> str:
    """The version of a distribution, or MISSING. torch's own says which CUDA it was built for."""
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def in_words(found: dict[str, str]) -> str:
    """'torch 2.11.0, triton 3.6.0': the versions of a report's heading."""
    return ", ".join(f"{name} {number}" for name, number in found.items())


def now() -> str:
    """'2026-11-24 09:30 UTC'; the first ten characters are the day."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def commit(root: Path) -> str:
    """The checkout's commit, abbreviated; $COMMIT where git does not say it, else "unknown".

    A machine that was sent the files alone has no git, no history, or that of other files than
    these: $COMMIT names it there. Without it, a commit whose files were changed ends in -dirty.
    """
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        found = ""
    if found and not found.endswith("-dirty"):
        return found
    return os.environ.get("COMMIT") or found or UNKNOWN
