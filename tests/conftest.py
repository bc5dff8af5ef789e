"""Without a GPU the Triton kernels run under the interpreter, which must be chosen at import."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported: a fifth of that time

import torch  # noqa: E402 - after collections are off and the threads are chosen

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import quick_interpreter

    quick_interpreter.install()

# Their assertions then say what was found, as those of test files do.
pytest.register_assert_rewrite("attention_cases", "near_cases", "shipped", "shipped_figures")

LONG = ["launch", "aot_newest", "aot", "scripts", "resume", "context_runs", "vllm", "triton"]
LONG += ["convert", "study", "vllm_models", "scaling", "training", "layouts", "vllm_server"]
LONG += ["context_parallel", "hopper_emulated", "model_checks", "bench_serving", "hopper_decode"]
"""Test files that take 20 seconds of a core or more, the longest first: so no worker ends with
one while the other is idle."""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish():
    """What was imported stays: garbage collections need not look at its objects each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def one_thread():
    """For tests whose tensors are so small that threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
