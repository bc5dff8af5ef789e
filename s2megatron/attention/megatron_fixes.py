"""Faults of Megatron that are corrected here on every machine, each with its reason."""

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


def keep_rope_scaling_factor(model_config, args) -> None:
    """Megatron's model gets the run's `rope_scaling_factor`; Megatron itself drops it.

    With megatron-core 0.19.2 `gpt_config_from_args` (megatron/training/argument_utils.py) copies
    `use_rope_scaling` and not the factor, so every model is built with 8.0, Llama 3.1's, and a
    Llama 3.2 (32.0) is silently another model.
    """
    model_config.rope_scaling_factor = args.rope_scaling_factor
