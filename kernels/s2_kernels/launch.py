"""What the launchers share: descriptors, head sizes in tiles, the pattern's table on a device."""

import functools
import threading
from dataclasses import dataclass

import torch
import triton
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from s2_kernels.pattern import LayerPattern
from s2_kernels.recording import Operand, recorder_of


@dataclass(frozen=True)
class Packing:
    """Sequences packed one after the other: int32 offsets [n_seqs + 1] on the device, longest."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int

    @property
    def n_seqs(self) -> int:
        return len(self.cu_q) - 1


def on_grid(kernel, grid: tuple[int, ...]):
    """`kernel[grid]`: the function that launches it, or notes the launch where operands come in."""

    def launch(*args, **constants) -> None:
        recorder = recorder_of(args)
        if recorder is None:
            kernel[grid](*args, **constants)
        else:
            recorder.note(kernel, grid, args, constants)

    return launch


def pad(size: int) -> int:
    """The extent of a tile that holds `size` columns: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A list that the host made, on a device.

    Raises:
        RuntimeError: while a CUDA graph is captured, which cannot hold such a copy.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "S2 attention meets these shapes for the first time while a CUDA graph is captured, "
            "and its work lists would have to be copied to the GPU, which a graph cannot hold; "
            "call it with such inputs, and its backward pass, once before the capture"
        )
    return x.to(device)


@functools.lru_cache(maxsize=1024)
def device_table(pattern: LayerPattern, device: torch.device) -> torch.Tensor:
    """`pattern.table()` on a device: all that a kernel knows of the pattern."""
    return upload(pattern.table(), device)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; CPU tensors (the interpreter) count as Hopper, to test its paths."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def takes_pdl(kernel, device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: not under the interpreter."""
    return isinstance(kernel, triton.JITFunction) and capability(device)[0] >= 9


@functools.cache
def concurrent_programs(device: torch.device, num_warps: int) -> int:
    """About how many programs of so many warps run at a time: 8 warps a multiprocessor."""
    if device.type != "cuda":
        return 4
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count * max(1, 8 // num_warps)


_COUNTERS: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
"""Counters that no launch has had yet, by device and stream."""


def fresh_counter(device: torch.device) -> torch.Tensor:
    """int32 [1], 0, for one launch on the current stream: persistent programs count items with it.

    Of many that are set to 0 at once: before every launch that would cost microseconds of a GPU
    that waits. A captured launch runs many times: it has a counter that the graph sets to 0.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, driver.active.get_current_stream(device.index)
    try:
        return _COUNTERS[key].pop()
    except (KeyError, IndexError):
        # 16 bytes apart: Triton compiles once more for another alignment.
        rows = torch.zeros((256, 4), dtype=torch.int32, device=device)[:, :1].unbind()
        _COUNTERS[key] = list(rows)
        return _COUNTERS[key].pop()


def counter_for(x: torch.Tensor) -> torch.Tensor:
    """`fresh_counter` on the device of a tensor of the launch."""
    return x.recorder.counter() if isinstance(x, Operand) else fresh_counter(x.device)


_ARRIVALS: dict[tuple[torch.device, int], torch.Tensor] = {}
"""Counters that launches leave at 0, by device and stream."""
_RESERVES: dict[torch.device, "_Reserve"] = {}
_TAKING = threading.Lock()


class _Reserve:
    """Counters for captured launches, all 0, which are taken once and never given back.

    A graph knows nothing but their address: their memory must not go to others while the graph may
    run, so that it is held here for good.
    """

    SIZE = 1 << 18
    """64 launches of 4,096 units; 1 MiB."""

    def __init__(self, device: torch.device):
        self.device = device
        self.held: list[torch.Tensor] = []
        self.left: torch.Tensor | None = None

    def fill(self) -> None:
        """A new stretch of counters where less than half of one is left; not while capturing."""
        if self.left is None or len(self.left) < self.SIZE // 2:
            self.left = torch.zeros(self.SIZE, dtype=torch.int32, device=self.device)
            self.held.append(self.left)

    def take(self, count: int) -> torch.Tensor | None:
        """int32 [count] that no one else has; None where too few are left."""
        if self.left is None or len(self.left) < count:
            return None
        found, self.left = self.left[:count], self.left[count:]
        return found


def arrivals(device: torch.device, count: int) -> torch.Tensor:
    """int32 [count], all 0, for a launch that leaves them so: nothing sets them before it.

    The launches of a stream come one after the other and share theirs. A captured launch may run
    beside any other, on whatever stream: it gets its own for good, of a reserve that is filled by
    launches which are not captured, of the warm-up for example. Where too few are left, the graph
    holds one node more, which sets them to 0.
    """
    count = -(-count // 32) * 32  # 128 bytes: Triton compiles once more for another alignment
    with _TAKING:
        reserve = _RESERVES.setdefault(device, _Reserve(device))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            found = reserve.take(count)
            if found is None:
                found = torch.zeros(count, dtype=torch.int32, device=device)
            return found
        stream = 0
        if device.type == "cuda":
            stream = driver.active.get_current_stream(device.index)
            reserve.fill()
        found = _ARRIVALS.get((device, stream))
        if found is None or len(found) < count:
            found = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            _ARRIVALS[device, stream] = found
        return found


def arrivals_for(x: torch.Tensor, count: int) -> torch.Tensor:
    """`arrivals` on the device of a tensor of the launch."""
    return x.recorder.arrivals(count) if isinstance(x, Operand) else arrivals(x.device, count)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """[b, s, h, d] or packed [T, h, d] -> the view [b, h, s, d] that descriptors cover."""
    return (x[None] if x.dim() == 3 else x).transpose(1, 2)


def rows_and_heads(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of [b, h, s, d] in the order the kernels take them: batch, row, head."""
    batch, head, row, _ = x.stride()
    return batch, row, head


def takes_descriptor(x: torch.Tensor) -> bool:
    """Whether TMA takes a tensor of 2 or more dimensions, all but the last in any order."""
    return x.data_ptr() % 16 == 0 and _fits_tma(x.shape, x.stride(), x.element_size())


@functools.lru_cache(maxsize=1024)
def _fits_tma(shape: torch.Size, strides: tuple[int, ...], element_size: int) -> bool:
    """TMA wants a contiguous last dimension, else strides of multiples of 16 bytes, int32 rows.

    A stride of 0, which expanded gradients have, is not taken either.
    """
    outer = [stride for size, stride in zip(shape[:-1], strides, strict=False) if size > 1]
    aligned = all(stride > 0 and stride * element_size % 16 == 0 for stride in outer)
    return aligned and strides[-1] == 1 and max(shape) < 2**31


def tma_strides(x: torch.Tensor) -> list[int]:
    """Strides as TMA takes them: a dimension of size 1 may have any, and gets one that will do."""
    unit = 16 // x.element_size()
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    return [*(stride if n > 1 else unit for n, stride in strides), 1]


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor over [batch, head, row, d] that loads [1, 1, rows, columns]."""
    return TensorDescriptor(x, list(x.shape), tma_strides(x), [1, 1, rows, columns])


def row_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor over [batch, head, row] that loads [1, 1, rows]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows])


def empty_like(x: torch.Tensor, size: int) -> torch.Tensor:
    """An empty tensor laid out in memory like x, with `size` columns in its last dimension.

    So what enters as Megatron's [s, b, h, d] leaves as it: its reshape to [s, b, h * d] is a view.
    """
    if isinstance(x, Operand):
        return x.new_like(size)
    if size == x.shape[-1]:
        return torch.empty_like(x)
    order = sorted(range(x.dim() - 1), key=lambda dim: x.stride(dim), reverse=True)
    shape = [x.shape[dim] for dim in order] + [size]
    inverse = [order.index(dim) for dim in range(x.dim() - 1)]
    return x.new_empty(shape).permute(*inverse, x.dim() - 1)
