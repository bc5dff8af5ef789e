"""Releases of torch and Triton that were not tried: told at import, never a CompilationError."""

import os
import subprocess
import sys
import tomllib
import warnings

import pytest
from launches import ROOT

from s2_kernels import versions


def test_the_bounds_are_those_of_the_package():
    project = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
    needs = [need.partition(";")[0] for need in project["dependencies"]]
    for package, ((a, b), (c, d)) in (("torch", versions.TORCH), ("triton", versions.TRITON)):
        assert f"{package}>={a}.{b},<{c}.{d}" in needs


@pytest.mark.parametrize(
    "torch_version", ["2.10.0", "2.11.0+cu130", "2.12.0a0+5b3c1ce.nv26.5", "2.14.1"]
)
@pytest.mark.parametrize("triton_version", ["3.6.0", "3.6.0+git2f8a1c", "3.9.0", None])
def test_what_was_tried_is_not_mentioned(torch_version, triton_version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions(torch_version, triton_version)


def test_others_are_told_with_the_way_out():
    with pytest.warns(UserWarning, match=r"triton 3\.5\.1 is installed.*>=3\.6,<3\.10.*'blocked'"):
        versions.check_versions("2.11.0", "3.5.1")
    with pytest.warns(UserWarning, match=r"triton 3\.10\.0 is installed"):
        versions.check_versions("2.11.0", "3.10.0")
    with pytest.warns(UserWarning, match=r"torch 2\.15\.0 is installed.*torch>=2\.10,<2\.15"):
        versions.check_versions("2.15.0", "3.9.0")
    with pytest.raises(ImportError, match=r"torch 2\.9\.1 is installed"):
        versions.check_versions("2.9.1", "3.5.1")


OLD_TRITON = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from s2_kernels import block_sparse_attention, local_stride, s2_attention
import torch
pattern = local_stride(heads=2, block_size=16, local_blocks=1, stride=2)
x = torch.randn(1, 40, 2, 32)
for backend in ("auto", "blocked", "reference"):
    assert s2_attention(x, x, x, pattern, backend=backend).isfinite().all()
print([str(w.message) for w in told if "Triton" in str(w.message) or "triton" in str(w.message)])
calls = [lambda: s2_attention(x, x, x, pattern, backend="triton"),
         lambda: s2_attention(x, x, x, pattern, backend="hopper"),
         lambda: block_sparse_attention(x, x, x, pattern.block_mask(3), block_size=16)]
for call in calls:
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_triton_that_is_too_old_stops_its_own_backends_only(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("__version__ = '3.4.0'\n")
    path = f"{tmp_path}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", OLD_TRITON],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    told, *errors = done.stdout.splitlines()
    assert told.count("triton 3.4.0 is installed") == 1 and len(errors) == 3
    assert all("triton 3.4.0 is installed" in error and ">=3.6,<3.10" in error for error in errors)
