"""The environment variables that a run depends on, in one place, each with its reason.

The agent (`s2megatron.agent`) and the training processes (`s2megatron.pretrain`) apply them before
CUDA or NCCL start. A value that is already set wins. Some of Megatron's options ask for values of
their own (`apply_for_options`), once the run file is read and before NCCL starts.
"""

import os
import re
from collections.abc import Mapping, MutableMapping

import torch

from s2_kernels.versions import release
from s2megatron.errors import ConfigError

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

ALONE = {
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
}  # fmt: skip
"""What torch.distributed asks of a run's only rank."""
_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes were started, by those who start them and do not set RANK."""

_OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
_VARIABLE = re.compile(r"\b(?:CUBLAS|CUDA|MAMBA|NCCL|NVTE|PYTORCH|TORCH)_[A-Z0-9_]+\b")

_NOT_ONE_QUEUE = (
    "needs CUDA_DEVICE_MAX_CONNECTIONS above 1, and it is 1, as s2megatron sets it where nothing "
    "is set; set CUDA_DEVICE_MAX_CONNECTIONS=8 before the start"
)
_NO_EXPANDABLE_POOLS = (
    "before torch 2.11 its memory pools do not go with expandable segments, which s2megatron asks "
    "for where nothing is set; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False before the "
    "start"
)


def apply(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Sets what is not set; returns the names that it set."""
    added = []
    for name, (value, _) in DEFAULTS.items():
        if name not in environ and _OTHER_NAMES.get(name, name) not in environ:
            environ[name] = value
            added.append(name)
    return added


def be_the_only_rank(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes a process that nobody launched as a rank a run of one rank.

    Raises:
        ConfigError: it is one of several tasks, each of which would train by itself.
    """
    if "RANK" in environ:
        return
    for name in _TASKS:
        if environ.get(name, "1") != "1":
            raise ConfigError(
                f"{name}={environ[name]}: several processes were started, and none of them has a "
                "rank, so each would train by itself; let one process a node start torchrun "
                f"(scripts/slurm/train.sbatch does), or unset {name} for a run of one rank"
            )
    for name, value in ALONE.items():
        environ.setdefault(name, value)


def apply_for_options(args, environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """What these options need of the environment: set where nothing is set.

    To be called before NCCL starts and before Megatron checks. CUDA and Transformer Engine have
    read their variables by then, so what they would need otherwise is refused.

    Args:
        args: Megatron's arguments, parsed.

    Returns:
        The variables that the options need, with their values, whoever set them.

    Raises:
        ConfigError: an option that does not go with the value of a variable.
    """
    _refuse_misfits(args, environ)
    if not _may_register(args, environ):
        return {}
    value = environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    check_graph_memory(args, environ)
    return {"NCCL_GRAPH_REGISTER": value}


def check_graph_memory(args, environ: Mapping[str, str] = os.environ) -> None:
    """Refuses CUDA graphs whose memory NCCL may register in segments that can expand.

    Megatron does so under `transformer_engine` only.

    Args:
        args: Megatron's arguments.

    Raises:
        ConfigError: NCCL_GRAPH_REGISTER is not 0, its value where it is not set.
    """
    value = environ.get("NCCL_GRAPH_REGISTER")
    if _may_register(args, environ) and value != "0":
        raise ConfigError(
            f"NCCL_GRAPH_REGISTER={'(not set)' if value is None else value}: does not go with "
            f"megatron.{captures(args)} and the expandable segments of PYTORCH_CUDA_ALLOC_CONF: "
            "memory that NCCL registers for a graph would be accessed illegally; set it to 0, or "
            "give up expandable segments with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, "
            "before the start"
        )


def _may_register(args, environ: Mapping[str, str]) -> bool:
    return bool(captures(args)) and _expands_segments(environ)


def named_in(message: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each environment variable that an error of Megatron's names.

    It says the value here, which may be this file's and not the user's, and the way out.
    """
    lines = []
    for name in dict.fromkeys(_VARIABLE.findall(message)):
        value = environ.get(name)
        if value is None:
            said = "is not set here; set it before the start"
        elif DEFAULTS.get(name, ("",))[0] == value:
            said = (
                f"is {value} here, as s2megatron sets it; another value set before the start wins"
            )
        else:
            said = f"is {value} here; change or unset it before the start"
        lines.append(f"environment variable {name}: {said} (docs/launch.md)")
    return lines


def captures(args) -> str:
    """The option that asks for CUDA graphs, with its value; or ""."""
    old = [name for name in ("enable_cuda_graph", "external_cuda_graph") if getattr(args, name)]
    if args.cuda_graph_impl != "none":
        return f"cuda_graph_impl={args.cuda_graph_impl}"
    return f"{old[0]}=True" if old else ""


def _expands_segments(environ: Mapping[str, str]) -> bool:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    return any("expandable_segments:True" in environ.get(name, "") for name in names)


def _refuse_misfits(args, environ: Mapping[str, str]) -> None:
    """Options that do not go with what `apply` sets; some stop Megatron after the process groups
    have started only."""
    one_queue = environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    ucc = args.pipeline_model_parallel_comm_backend == "ucc"
    old_pools = release(torch.__version__) < (2, 11) and _expands_segments(environ)
    misfits = [
        ("use_torch_fsdp2", args.use_torch_fsdp2 and one_queue, _NOT_ONE_QUEUE),
        ("use_megatron_fsdp", args.use_megatron_fsdp and one_queue, _NOT_ONE_QUEUE),
        ("pipeline_model_parallel_comm_backend", ucc and one_queue, _NOT_ONE_QUEUE),
        ("nccl_ub", args.nccl_ub and old_pools, _NO_EXPANDABLE_POOLS),
    ]
    for name, found, way_out in misfits:
        if found:
            raise ConfigError(f"megatron.{name}={getattr(args, name)}: {way_out}")


def apply_threads(ranks: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """OpenMP threads of each of this node's `ranks`, unless set.

    torchrun would say 1, which makes the CPU part of the optimizer and the checkpoints slow; the
    default of every process, all cores, makes the ranks of a node fight for them.
    """
    environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, cores() // ranks))))


def cores() -> int:
    """CPU cores that this process may use: what SLURM or a container left of the machine's."""
    return len(os.sched_getaffinity(0))
