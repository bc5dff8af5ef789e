"""Without a GPU the Triton kernels run under the interpreter, which must be chosen at import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONG = ["scripts", "launch", "training", "convert", "convert_runs", "scaling", "layouts"]
LONG += ["aot", "aot_newest"]
"""Test files that take a minute or more: they start first, so that no worker ends with one."""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
