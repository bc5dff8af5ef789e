"""The patch of Megatron that every machine needs, with its reason."""

import importlib


def skip_missing_makefile() -> None:
    """megatron-core's wheel runs `make` in a folder that has no Makefile and exits the process.

    The compiled helpers are already in the wheel: where they import, there is nothing to make.
    Seen with megatron-core 0.19.2 (megatron/core/datasets/utils.py, compile_helpers).
    """
    from megatron.core.datasets import utils

    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return  # a source checkout: Megatron's own make has work to do
    utils.compile_helpers = lambda: None
