"""Megatron's own pretraining loop on a GPT with S2 attention, from one run file.

    torchrun --nproc-per-node 2 -m s2megatron.pretrain --config run.yaml [key.path=value ...]
    python -m s2megatron.pretrain --config run.yaml --dry-run

--dry-run parses, checks, and prints the layer table, the parameter count and the FLOPs per step; it
starts no process group and touches no GPU. On a machine with no GPU the same command runs on the
CPU over gloo.
"""

import argparse
import os
import sys

import torch

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
    hide_import_warnings()
    # One hardware queue: on GPUs before Blackwell, TP and SP overlap needs kernels in launch order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        from s2megatron import cpu_runtime

        cpu_runtime.prepare_environment()
    try:
        if options.dry_run:
            from s2megatron.launch import dry_run

            print(dry_run(options.config, options.overrides))
        else:
            from s2megatron.launch import train

            train(options.config, options.overrides)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"s2megatron: this run cannot start:\n{error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
