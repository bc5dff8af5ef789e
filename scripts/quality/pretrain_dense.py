"""`s2megatron.pretrain` with dense layers on one kernel of torch's: an error where it cannot run.

    python scripts/quality/pretrain_dense.py cudnn|flash --config RUN.yaml [key.path=value ...]

torch chooses among its attention kernels by itself and does not say which it took; a comparison of
times has to.
"""

import sys

import torch

from s2megatron.cluster.ending import leave, run_as_rank
from s2megatron.pretrain import main

KERNELS = {
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "flash": torch.backends.cuda.enable_flash_sdp,
}


def choose(kernel: str) -> None:
    """Of torch's attention kernels on GPUs only this one may run."""
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    for name, enable in KERNELS.items():
        enable(name == kernel)


if __name__ == "__main__":
    if torch.cuda.is_available():  # on a CPU there is no choice
        choose(sys.argv[1])
    del sys.argv[1]
    leave(run_as_rank(main))
