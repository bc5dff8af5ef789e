"""What launchers see while a plan is made: tensors without memory, which note what is launched.

A launcher is called with an `Operand` for each tensor of a pass. It asks for shapes and strides,
allocates, sets to 0, and launches as ever; the `Recorder` keeps all that, and plans.py makes a plan
of it. Nothing runs, and the GPU is not asked.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch


class CannotRecordError(Exception):
    """A launcher does what no plan can do again; it goes on being called every time."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of a pass, as far as launchers look at it.

    Attributes:
        recorder: where its pass is noted.
        slot: its place among the tensors of the pass: views share it.
        shape, strides: in elements.
    """

    recorder: "Recorder"
    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    is_cuda = True

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int | None = None):
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """An address that is aligned, as a plan's are, and of no other slot."""
        return (self.slot + 1) << 40

    def transpose(self, a: int, b: int) -> "Operand":
        order = list(range(self.dim()))
        order[a], order[b] = order[b], order[a]
        shape, strides = ([x[dim] for dim in order] for x in (self.shape, self.strides))
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def __getitem__(self, index: int | None) -> "Operand":
        """x[None], or x[0] of a tensor with one row.

        Raises:
            CannotRecordError: anything else.
        """
        if index is None:
            return replace(
                self,
                shape=(1, *self.shape),
                strides=(self.shape[0] * self.strides[0], *self.strides),
            )
        if index != 0 or self.shape[0] != 1:
            raise CannotRecordError(f"a part of a tensor, {index}")
        return replace(self, shape=self.shape[1:], strides=self.strides[1:])

    def narrow(self, dim: int, start: int, length: int) -> "Operand":
        """The first `length` of a dimension: like all views here it begins where the tensor does.

        Raises:
            CannotRecordError: another start.
        """
        if start:
            raise CannotRecordError(f"a part of a tensor from {start} on")
        return replace(self, shape=(*self.shape[:dim], length, *self.shape[dim + 1 :]))

    def zero_(self) -> None:
        """A plan does it before all launches.

        Raises:
            CannotRecordError: something was launched before, which may have written there.
        """
        if self.recorder.launches:
            raise CannotRecordError("memory that is set to 0 after a launch")
        self.recorder.zeroed.append(self)

    def contiguous(self) -> "Operand":
        if not is_contiguous(self.shape, self.strides):
            raise CannotRecordError(f"a copy of a tensor with strides {self.strides}")
        return self

    def new_empty(self, shape, *, dtype: torch.dtype | None = None) -> "Operand":
        shape, strides = tuple(shape), []
        for i in range(len(shape)):
            step = 1
            for size in shape[i + 1 :]:
                step *= max(size, 1)
            strides.append(step)
        return self.recorder.allocate(shape, tuple(strides), dtype or self.dtype)

    def new_like(self, size: int) -> "Operand":
        """What launch.empty_like makes of a tensor; dimensions of size 1 may get another stride.

        A tensor of PyTorch's without memory could be asked in its place, but the first of these
        imports 500 modules, which takes 3 s of a training's second step.
        """
        outer = range(self.dim() - 1)
        order = [*sorted(outer, key=lambda dim: self.strides[dim], reverse=True), self.dim() - 1]
        shape, strides, step = (*self.shape[:-1], size), [0] * self.dim(), 1
        for dim in reversed(order):
            strides[dim] = step
            step *= max(shape[dim], 1)
        return self.recorder.allocate(shape, tuple(strides), self.dtype)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """As torch has it: dimensions of size 1 may have any stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@dataclass(frozen=True)
class Noted:
    """One launch: `kernel[grid](*args, **constants)`, with operands for tensors."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict


class Recorder:
    """Notes one pass on a device.

    Attributes:
        inputs: an operand for each tensor that the pass is given, None where there is none.
        slots: an operand for each place, in order: the inputs first, then what is allocated.
        counters: slots of counters that are 0 at the start of a launch (launch.fresh_counter).
        arrived: slots of counters that launches leave at 0 (launch.arrivals), how many in each.
        zeroed: what was set to 0, before all launches.
        launches: what was launched, in order.
    """

    def __init__(self, tensors: tuple[torch.Tensor | None, ...], device: torch.device):
        self.device, self.slots = device, []
        self.counters: set[int] = set()
        self.arrived: dict[int, int] = {}
        self.zeroed: list[Operand] = []
        self.launches: list[Noted] = []
        self.inputs = tuple(
            None if x is None else self.allocate(tuple(x.shape), x.stride(), x.dtype)
            for x in tensors
        )

    def allocate(self, shape, strides, dtype) -> Operand:
        operand = Operand(self, len(self.slots), shape, strides, dtype, self.device)
        self.slots.append(operand)
        return operand

    def counter(self) -> Operand:
        operand = self.allocate((1,), (1,), torch.int32)
        self.counters.add(operand.slot)
        return operand

    def arrivals(self, count: int) -> Operand:
        operand = self.allocate((count,), (1,), torch.int32)
        self.arrived[operand.slot] = count
        return operand

    def note(self, kernel, grid, args, constants) -> None:
        self.launches.append(Noted(kernel, grid, args, constants))


def recorder_of(args: tuple) -> Recorder | None:
    """The recorder of a launch's arguments, None if they are tensors."""
    return next((x.recorder for x in args if isinstance(x, Operand)), None)
