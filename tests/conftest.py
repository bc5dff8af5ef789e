"""Without a GPU the Triton kernels run under the interpreter, which must be chosen at import."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONG = ["scripts", "launch", "training", "convert", "convert_runs", "scaling", "layouts"]
LONG += ["aot", "aot_newest", "vllm", "vllm_models"]
"""Test files that take a minute or more: they start first, so that no worker ends with one."""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def one_thread():
    """For tests whose tensors are so small that threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
