"""The environment variables that a run depends on, in one place, each with its reason.

The agent (`s2megatron.agent`) and the training processes (`s2megatron.pretrain`) apply them before
CUDA or NCCL start. A value that is already set wins.
"""

import os
from collections.abc import MutableMapping

DEFAULTS: dict[str, tuple[str, str]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "1",
        "one hardware queue: on GPUs before Blackwell, the overlap of TP and SP communication with "
        "computation needs kernels to start in the order in which they were launched",
    ),
    "PYTORCH_CUDA_ALLOC_CONF": (
        "expandable_segments:True",
        "activations of a long sequence come in few, very large sizes; fixed segments fragment, "
        "and a run that fits runs out of memory hours later",
    ),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": (
        "1",
        "a collective that times out leaves each rank's last operations in a file "
        "(TORCH_NCCL_DEBUG_INFO_TEMP_FILE, default /tmp/nccl_trace_rank_*): who was late is in it",
    ),
    "TORCH_NCCL_TRACE_BUFFER_SIZE": ("2000", "operations per rank that such a file goes back"),
}

LEFT_TO_THE_SITE = {
    "NCCL_SOCKET_IFNAME": "the interface that bootstraps NCCL; needed where a node has several",
    "NCCL_IB_HCA": "which InfiniBand or RoCE adapters carry data",
    "NCCL_NVLS_ENABLE": "NVLink multicast is faster where it works, and hangs or fails in virtual "
    "machines without it: set 0 there",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "on by default: a collective that fails ends the process",
}
"""Not set here, because the right value is the site's (or the default is right)."""

_OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}


def apply(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Sets what is not set; returns the names that it set."""
    added = []
    for name, (value, _) in DEFAULTS.items():
        if name not in environ and _OTHER_NAMES.get(name, name) not in environ:
            environ[name] = value
            added.append(name)
    return added


def apply_threads(ranks: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """OpenMP threads of each of this node's `ranks`, unless set.

    torchrun would say 1, which makes the CPU part of the optimizer and the checkpoints slow; the
    default of every process, all cores, makes the ranks of a node fight for them.
    """
    environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, cores() // ranks))))


def cores() -> int:
    """CPU cores that this process may use: what SLURM or a container left of the machine's."""
    return len(os.sched_getaffinity(0))
