"""How long the first call takes on a GPU, and that other lengths compile nothing again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
]

FIRST_CALL = """
import json, os, time
from pathlib import Path
import torch
from s2_kernels import local_stride, s2_attention

pattern = local_stride(heads=8, local_blocks=16, stride=8)
torch.ones(1, device="cuda").sum().item()


def run(n):
    q, k, v = (torch.randn(1, n, 8, 128, device="cuda").bfloat16().requires_grad_() for _ in "qkv")
    torch.cuda.synchronize()
    began = time.time()
    s2_attention(q, k, v, pattern).sum().backward()
    torch.cuda.synchronize()
    return time.time() - began


def kernels():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))


first, compiled = run(8192), kernels()
second = [run(n) for n in (8192, 5519, 16384, 100)]
print(json.dumps(dict(first=first, compiled=compiled, second=second, again=kernels() - compiled)))
"""


def test_first_call_and_no_recompilation(tmp_path):
    kernels = Path(__file__).parents[2] / "kernels"
    environment = os.environ | {"PYTHONPATH": str(kernels), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    report = json.loads(done.stdout)
    assert report["first"] < 15
    assert report["compiled"] >= 4 and report["again"] == 0
    assert max(report["second"]) < 1
