"""The kernels install by themselves, and need nothing of Megatron."""

import os
import shutil
import subprocess
import sys
import tomllib

from launches import ROOT

IMPORT = """
import sys
sys.modules.update({name: None for name in ("megatron", "transformers", "s2megatron", "pydantic")})
import s2_kernels, s2_kernels.hopper, s2_kernels.block_sparse, s2_kernels.record
print(s2_kernels.__file__)
"""


def test_kernels_install_and_import_alone(tmp_path):
    source = shutil.copytree(ROOT / "kernels", tmp_path / "source")  # pip builds in place
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", str(tmp_path), str(source)]  # fmt: skip
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


def test_the_kernels_ask_for_torch_and_triton_only():
    project = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
    names = {need.partition(">")[0] for need in project["dependencies"]}
    assert names == {"torch", "triton"}
