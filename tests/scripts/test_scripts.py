"""The shell scripts' own part, and the shipped run files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import call
from launches import ON_CPU, ROOT

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def find_python(**env):
    return subprocess.run(
        [shutil.which("bash"), "-c", ". scripts/common.sh; find_python"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )


def fake_python(folder: Path, name: str, version: tuple[int, int]) -> None:
    """An executable that answers the scripts' version check as a Python of this version would."""
    file = folder / name
    file.write_text(f"#!/bin/sh\nexit {int(version < (3, 12))}\n")
    file.chmod(0o755)


def test_no_python_312_is_said_plainly(tmp_path):
    fake_python(tmp_path, "python3", (3, 11))
    fake_python(tmp_path, "python3.12", (3, 11))  # a shim that does not run
    done = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert "No Python 3.12 or later found" in done.stderr
    assert "python3.12 python3" in done.stderr and "PYTHON=" in done.stderr


def test_python_is_found_on_the_path_then_in_pyenv(tmp_path):
    versions = tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin"
    versions.mkdir(parents=True)
    fake_python(versions, "python", (3, 12))
    fake_python(tmp_path, "python3", (3, 11))
    found = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    assert found.stdout.strip() == str(versions / "python")
    fake_python(tmp_path, "python3.12", (3, 12))
    found = find_python(PATH=str(tmp_path), HOME=str(tmp_path))
    assert found.stdout.strip() == "python3.12"


def test_named_python_that_is_too_old_is_refused(tmp_path):
    fake_python(tmp_path, "old", (3, 9))
    done = find_python(PATH=os.environ["PATH"], HOME="/", PYTHON=str(tmp_path / "old"))
    assert done.returncode == 1 and "is not a Python 3.12 or later" in done.stderr


@pytest.mark.parametrize("uv_ends_with, said", [(0, ""), (2, "pip tries"), (None, "")])
def test_uv_installs_and_pip_where_it_does_not(tmp_path, uv_ends_with, said):
    """Also from the index that pip was told of."""
    stand_ins = {".venv/bin/python": 0, ".venv/uv/bin/uv": uv_ends_with}
    for name, status in stand_ins.items():
        if status is not None:
            file = tmp_path / name
            file.parent.mkdir(parents=True)
            line = f'"{file.name} $UV_DEFAULT_INDEX $*" >>called'
            file.write_text(f"#!/bin/sh\necho {line}\nexit {status}\n")
            file.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f". {ROOT}/scripts/common.sh; install_packages --no-deps torch"],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PIP_INDEX_URL": "https://mirror/simple"},
    )  # fmt: skip
    assert done.returncode == 0 and said in done.stdout
    uv = "uv https://mirror/simple pip install --quiet --python .venv/bin/python --no-deps torch"
    pip = "python  -m pip install --quiet --disable-pip-version-check --no-compile --no-deps torch"
    expected = {0: [uv], 2: [uv, pip], None: [pip]}[uv_ends_with]
    assert (tmp_path / "called").read_text().splitlines() == expected


def test_quickstart_learns_and_resumes(tmp_path):
    """The whole script, at 80 steps: well below the unigram entropy, and all that it promises."""
    run = tmp_path / "quickstart"
    command = ["bash", "scripts/quickstart.sh", "80", str(run)]
    env = {**os.environ, **ON_CPU}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, env=env)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    print(done.stdout[-1800:])
    held_out = float(re.search(r"held out .* ([\d.]+) at step 100", done.stdout)[1])
    entropy = float(re.search(r"compare +([\d.]+): byte unigram entropy", done.stdout)[1])
    assert held_out < entropy - 0.4
    assert "100 steps, the last 20 of them resumed" in done.stdout
    for name in ("train.log", "loss.png", "masks.png", "checkpoints/iter_0000100"):
        assert (run / name).exists()
    written = done.stdout.split("def main():", 1)[1]
    assert len(written) > 200 and "\n" in written
    assert "tokens/s" in done.stderr and "dense would have kept" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert again.returncode == 0 and "== 2 rank(s)" not in again.stdout  # nothing left to do


@pytest.fixture(scope="module")
def dry_runs():
    return call("model_cases", "dry_run_configs")


PARAMETERS = {
    "llama_1.3b_32k.yaml": 1_345_423_360,
    "llama_1.3b_128k.yaml": 1_345_423_360,
    "llama_7b_32k.yaml": 6_738_415_616,  # Llama 2 7B
    "llama_7b_128k.yaml": 6_738_415_616,
    "llama_8b_from_dense_32k.yaml": 8_030_261_248,  # Llama 3.1 8B
    "llama_1.3b_1m.yaml": 1_345_423_360,
    "llama_7b_1m.yaml": 6_738_415_616,
    "llama_70b_32k.yaml": 70_553_706_496,  # Llama 3 70B
    "llama_70b_128k.yaml": 70_553_706_496,
    "llama_1.3b_1m_cp.yaml": 1_345_423_360,
    "llama_7b_1m_cp.yaml": 6_738_415_616,
    "llama_70b_1m_cp.yaml": 70_553_706_496,
    "llama_70b_4m_cp.yaml": 70_553_706_496,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_passes_dry_run(dry_runs, name):
    status, out, err = dry_runs[name]
    assert status == 0, err
    assert "uncovered" in out
    covers = "from_dense" not in name  # there every head keeps the first block instead
    assert ("note:" not in out) == covers  # else shipped patterns cover the context
    if name in PARAMETERS:
        assert f"{PARAMETERS[name]:,}" in out


def show(*arguments):
    command = [sys.executable, "-m", "s2megatron.cli", "show", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_show_prints_and_draws(tmp_path):
    picture = tmp_path / "masks.png"
    done = show(
        "configs/llama_70b_32k.yaml", "--plot", picture, "--layers", "1,3", "--heads", "0,7"
    )
    assert done.returncode == 0, done.stderr
    assert "42-79   local + stride" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_refuses_layers_that_are_not_there(tmp_path):
    done = show("configs/quickstart.yaml", "--plot", tmp_path / "x.png", "--layers", "9")
    assert done.returncode == 2 and "--layers: 9 is not in 1..4" in done.stderr


def test_the_checks_pass_after_the_quickstart(tmp_path):
    """Its folder runs/ has the name of a module that scripts/bench and its tests import."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("scripts/bench", "tests/scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
