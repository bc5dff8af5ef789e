"""Megatron's own pretraining loop on a GPT with S2 attention, from one run file.

    torchrun --nproc-per-node 2 -m s2megatron.pretrain --config run.yaml [key.path=value ...]
    python -m s2megatron.pretrain --config run.yaml --dry-run

--dry-run parses, checks, and prints the layer table, the parameter count and the FLOPs per step; it
starts no process group and touches no GPU. On a machine with no GPU the same command runs on the
CPU over gloo.
"""

import argparse
import gc
import os
import sys

import torch

from s2megatron.cluster import environment
from s2megatron.cluster.ending import leave, run_as_rank
from s2megatron.cluster.orphans import die_with_parent
from s2megatron.errors import ConfigError, hide_import_warnings


def main(argv: list[str] | None = None) -> int:
    """Runs, and returns the exit status: 2 for a run that cannot start as configured."""
    parser = argparse.ArgumentParser(
        prog="s2megatron.pretrain", description="Pretrain a GPT with S2 attention."
    )
    parser.add_argument("--config", required=True, help="run file (YAML)")
    parser.add_argument("--dry-run", action="store_true", help="check and print, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(argv)
    gc.disable()  # until training begins: collections are a fifth of what importing Megatron takes
    hide_import_warnings()
    if "LOCAL_RANK" in os.environ:  # started by an agent
        die_with_parent()
    environment.apply()
    if not torch.cuda.is_available():
        from s2megatron.training import cpu_runtime

        cpu_runtime.prepare_environment()
    try:
        if options.dry_run:
            from s2megatron.training.prepare import dry_run

            print(dry_run(options.config, options.overrides))
        else:
            from s2megatron.training.train import train

            environment.be_the_only_rank()
            train(options.config, options.overrides)
    except SystemExit as stop:  # of all ranks: Megatron's 16 and 17; no interpreter is taken down
        return stop.code
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: it may be this node's files
            print(f"s2megatron: this run cannot start:\n{error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    leave(run_as_rank(main))
