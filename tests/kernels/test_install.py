"""The kernels install by themselves, and need nothing of Megatron."""

import json
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from launches import ROOT

IMPORT = """
import sys
sys.modules.update({name: None for name in ("megatron", "transformers", "s2megatron", "pydantic")})
import s2_kernels, s2_kernels.hopper, s2_kernels.block_sparse, s2_kernels.record
print(s2_kernels.__file__)
"""


PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation"]


def test_kernels_install_and_import_alone(tmp_path):
    source = shutil.copytree(ROOT / "kernels", tmp_path / "source")  # pip builds in place
    install = [*PIP, "--no-deps", "--target", str(tmp_path), str(source)]
    subprocess.run(install, check=True, env={**os.environ, "PYTHONPATH": ""})
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert (tmp_path / "s2_vllm/plugin.py").exists()
    (points,) = tmp_path.glob("s2_kernels-*.dist-info/entry_points.txt")
    assert points.read_text().split("\n")[:2] == [
        "[vllm.general_plugins]", "s2 = s2_vllm.plugin:register",
    ]  # fmt: skip


def container(path, **versions):
    """Packages as NVIDIA's containers have them: torch and Triton are builds of their own."""
    for name, version in versions.items():
        folder = path / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
    return {**os.environ, "PYTHONPATH": str(path)}


TRITON = "3.6.0+git9c288bc5.nvinternal"


@pytest.mark.parametrize(
    "torch, options",
    [("2.11.0a0+eb65b36914.nv26.2", []), ("2.9.0a0+50eac811a6.nv25.9", ["--no-deps"])],
    ids=["within_the_bounds", "any_with_no_deps"],
)
def test_the_torch_of_a_container_is_kept(tmp_path, torch, options):
    source = shutil.copytree(ROOT / "kernels", tmp_path / "source")
    environment = container(tmp_path / "site", torch=torch, triton=TRITON)
    command = [*PIP, "--dry-run", "--report", "-", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    installs = json.loads(done.stdout)["install"]
    assert [item["metadata"]["name"] for item in installs] == ["s2-kernels"]


def test_another_torch_would_be_replaced_without_no_deps(tmp_path):
    """What docs/install.md warns of. With no index pip has nothing to put in its place."""
    source = shutil.copytree(ROOT / "kernels", tmp_path / "source")
    environment = container(tmp_path / "site", torch="2.9.0a0+50eac811a6.nv25.9", triton=TRITON)
    command = [*PIP, "--dry-run", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Cannot install s2-kernels" in done.stderr


def test_the_kernels_ask_for_torch_and_triton_only():
    project = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
    names = {need.partition(">")[0] for need in project["dependencies"]}
    assert names == {"torch", "triton"}
