"""Runs a Megatron-LM script with S2 attention, so that no misspelt --spec can make it dense.

    S2MEGATRON_CONFIG=run.yaml torchrun ... -m s2megatron.stock pretrain_gpt.py ...

This is `torchrun ... pretrain_gpt.py ... --spec s2megatron.layer_spec s2_layer_spec`, but it reads
the run file before anything starts, and a package that cannot be imported stops it. Under a
misspelt --spec Megatron loads nothing of this package and trains dense.
"""

import os
import runpy
import sys
from functools import partial
from pathlib import Path

import torch

from s2megatron.cluster.ending import leave, run_as_rank
from s2megatron.config import load_config
from s2megatron.errors import ConfigError

SPEC = ("s2megatron.layer_spec", "s2_layer_spec")


def main(argv: list[str]) -> int:
    """Runs argv[0] with the other arguments; 2 for what cannot start."""
    try:
        if not argv or not Path(argv[0]).is_file():
            raise ConfigError(
                f"{argv[0] if argv else 'no script'}: name Megatron-LM's pretrain_gpt.py, and its "
                "options after it"
            )
        if "--spec" in argv:
            raise ConfigError("--spec: is given by s2megatron.stock; leave it out")
        load_config(os.environ.get("S2MEGATRON_CONFIG") or "(S2MEGATRON_CONFIG is not set)")
    except ConfigError as error:
        print(f"s2megatron: this run cannot start:\n{error}", file=sys.stderr, flush=True)
        return 2
    sys.argv = [*argv, "--spec", *SPEC]
    sys.path[0] = str(Path(argv[0]).resolve().parent)  # as if Python had been given the script
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:  # 0: Megatron's own end after a signal, a duration, exit_interval
        if stop.code is None:
            print("s2megatron: Megatron gave up; its reason is the last that it printed")
            return 1
        if stop.code:
            raise
    # A rank that leaves first resets connections that another one may still read from.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return 0


if __name__ == "__main__":
    leave(run_as_rank(partial(main, sys.argv[1:])))
