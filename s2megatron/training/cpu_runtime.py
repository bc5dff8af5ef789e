"""Lets Megatron's CUDA-only training loop run on a CPU, for tests and for looking around.

Imported only where there is no GPU. Megatron 0.19 names CUDA in some 500 places; rather than touch
them, this module answers for the device: `torch.cuda` calls that only make sense on a GPU do
nothing, `device="cuda"` means the CPU, and the CUDA random state is the CPU's. What it cannot
answer is patched in `install`, each with its reason. Nothing here is for speed.
"""

import contextlib
import functools
import importlib
import os
import signal
import types
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from s2megatron.cluster.environment import cores
from s2megatron.cluster.orphans import die_with_parent
from s2megatron.errors import ConfigError

CPU = torch.device("cpu")


class _Stream:
    """Stands for a CUDA stream: work on the CPU is done when the call returns."""

    def __init__(self, *args, **kwargs):
        self.device, self.stream_id, self.cuda_stream = CPU, 0, 0

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    record = wait = synchronize = lambda self, *args, **kwargs: None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


_ASKS_FOR_A_DEVICE = frozenset({"cuda", "pin_memory", "type", "to"})
"""Calls that name a device without a keyword."""


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in every torch call; `.cuda()` and `.pin_memory()` do nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not kwargs and name not in _ASKS_FOR_A_DEVICE:  # most calls, thousands in a step
            return func(*args)
        kwargs = kwargs or {}
        if name in ("cuda", "pin_memory") and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:
            # Two optimizers ask for 'torch.cuda.FloatTensor' by name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if name == "to":
            args = tuple(_to_cpu(a) for a in args)
        if "device" in kwargs:
            kwargs = kwargs | {"device": _to_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _to_cpu(value):
    named_cuda = isinstance(value, str) and value.split(":")[0] == "cuda"
    if named_cuda or (isinstance(value, torch.device) and value.type == "cuda"):
        return CPU
    return value


# Megatron asks GPUs older than 10.0 for CUDA_DEVICE_MAX_CONNECTIONS=1.
_PROPERTIES = types.SimpleNamespace(
    name="CPU", major=10, minor=0, total_memory=0, multi_processor_count=1
)
_STATS = {
    "reserved_bytes.all.current": 0,
    "allocated_bytes.all.current": 0,
    "allocated_bytes.all.peak": 0,
    "allocation.all.current": 0,
}


def prepare_environment() -> None:
    """Before Megatron is imported: no compiler on this path."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # The default OpenMP pool of every rank takes all cores. (torchrun sets OMP_NUM_THREADS to 1 for
    # several ranks; for one it is what the user asked for, and torch has read it.)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // ranks))


def install() -> None:
    """Puts the CPU in the GPU's place for the rest of the process.

    Raises:
        ConfigError: called where there is a GPU.
    """
    if torch.cuda.Stream is _Stream:
        return  # installed already
    if torch.cuda.is_available():
        raise ConfigError(
            "cpu_runtime: this machine has a GPU; the CPU runtime is for those without"
        )
    # torch.compile's tables list torch.cuda's functions by identity: make them before any change.
    importlib.import_module("torch._dynamo")
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.training import training

    _answer_for_the_device()
    # initialize_megatron asserts a GPU unless told otherwise, and pretrain() does not pass it on.
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    # The background writer of checkpoints: a fresh process would ask for a GPU, a fork knows this
    # module's answers.
    # Megatron starts one at the beginning, and another for the save after the last iteration.
    start_writer = PersistentAsyncCaller._get_process
    PersistentAsyncCaller._get_process = lambda rank, mp_mode="fork", *priorities: start_writer(
        rank, "fork", *priorities
    )
    os.register_at_fork(after_in_child=die_with_parent)
    PersistentAsyncCaller.async_loop = staticmethod(_ends_when_told(PersistentAsyncCaller))
    FileSystemWriterAsync.preload_tensors = staticmethod(_preload_copies)
    # Its warm-up of fused kernels only compiles them.
    training.set_jit_fusion_options = _nothing()
    # These read and write the CUDA generator through torch._C.
    megatron_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )
    _CudaMeansCpu().__enter__()


def _preload_copies(write_buckets, non_blocking=True):
    """What the background writer saves, copied: a CPU tensor is shared with the training process.

    A GPU's tensors are copied to the host anyway before training goes on.
    """
    return [
        (name, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
        for name, key, (data, tensors) in write_buckets
    ]


def _nothing():
    """For a call that only matters to a GPU. Each is a function of its own: torch.compile's tables
    refuse one that stands in two places."""
    return lambda *args, **kwargs: None


def _zero():
    """For a question about a GPU's memory; each a function of its own."""
    return lambda *args, **kwargs: 0


def _ends_when_told(caller: type) -> Callable:
    """The writer's loop, which multiprocessing's SIGTERM ends when its rank has done its work.

    A fork has the rank's handler, which only notes the signal: a run that saved nothing (trained to
    its end before, or evaluating only) waited for its writer without end.
    """
    loop = caller.async_loop

    @functools.wraps(loop)
    def ended_by_a_signal(*args):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return loop(*args)

    return ended_by_a_signal


def _answer_for_the_device() -> None:
    answers = {
        # Model parallelism and its random state are set up only where GPUs are counted.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: CPU,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "reset_peak_memory_stats": _nothing(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "set_stream": _nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "memory_allocated": _zero(),
        "max_memory_allocated": _zero(),
        "memory_reserved": _zero(),
        "max_memory_reserved": _zero(),
        "device_memory_used": _zero(),
        "memory_stats": lambda device=None: dict(_STATS),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": _nothing(),  # torch.manual_seed calls it
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_name": lambda device=None: "CPU",
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
