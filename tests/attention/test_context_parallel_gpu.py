"""Context parallelism over NCCL: the kernels' errors are those of one GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from context_cases import GPU_CASES
from launches import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_errors_are_those_of_one_gpu(ranks):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA GPUs")
    paths = [ROOT, ROOT / "kernels", ROOT / "tests/support", os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
               "tests/support/context_cases.py", "--gpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    # An exit status of 0 says, too, that no pass but the first ones waited for the GPU.
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == ranks * len(GPU_CASES)
    for rank in found:
        for tensor, ratio in rank["ratios"].items():
            assert ratio < 2, (rank, tensor)  # a NaN is not less either
