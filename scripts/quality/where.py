"""What a result was made with: commit, machine, versions. And the repository's root."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers")


def describe() -> dict:
    """GPU, versions, date and commit of this process; COMMIT names it where git does not."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        found = ""
    return found or os.environ.get("COMMIT", "unknown")
