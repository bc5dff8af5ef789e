"""Launches prepared once: a pass over tensors of known shapes runs again without asking Triton.

A launcher works out tiles, lists, strides and descriptors, and Triton finds the compiled kernel by
all of its arguments: for the same shapes the same answer every time, in up to half a millisecond on
slow hosts. A `Plan` keeps the answer. To run it takes new memory, the addresses, and the compiled
kernels' own C launchers.

What may differ from call to call are addresses, the stream, and what is in the tensors. Everything
else belongs to the key under which a plan is kept (`Plans`). Addresses that are no multiples of 16
bytes, launch hooks (profilers of Triton's), and other releases of Triton take the launchers' way.
"""

import inspect
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from s2_kernels.launch import arrivals, fresh_counter
from s2_kernels.recording import CannotRecordError, Noted, Operand, Recorder
from s2_kernels.versions import prepares_launches

MOST_PLANS = 256
"""As many as work lists are kept of each kind (schedule.py): plans hold theirs."""
MOST_MAPS = 512
"""TMA descriptors kept of one operand: the layers of a model that share a plan get the same
addresses in every step."""
ALIGNMENT = 256
"""Bytes: of each part of a plan's scratch memory, as PyTorch's allocator has it or more."""


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A TMA descriptor of a tensor: what the driver makes it from, beside the address."""

    index: int
    arguments: tuple
    made: dict[int, Any] = field(default_factory=dict)

    def at(self, address: int):
        """The descriptor for an address; it is a few numbers, and keeps no memory alive."""
        found = self.made.get(address)
        if found is None:
            if len(self.made) >= MOST_MAPS:
                self.made.clear()
            found = driver.active.utils.fill_tma_descriptor(address, *self.arguments)
            self.made[address] = found
        return found


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan.

    Attributes:
        start: the compiled kernel's C launcher, which takes the grid, the stream, `fixed`, and the
            kernel's arguments.
        addresses: (place among the arguments, which of the plan's addresses); maps: the same.
        kept: the compiled kernel, and tensors whose addresses stand among the arguments.
    """

    start: Callable
    grid: tuple[int, int, int]
    fixed: tuple
    arguments: list
    addresses: tuple[tuple[int, int], ...]
    maps: tuple[tuple[int, int], ...]
    kept: tuple

    def run(self, stream: int, addresses: list[int], maps: list) -> None:
        arguments = self.arguments.copy()
        for place, i in self.addresses:
            arguments[place] = addresses[i]
        for place, i in self.maps:
            arguments[place] = maps[i]
        self.start(*self.grid, stream, *self.fixed, *arguments)


@dataclass(frozen=True, eq=False)
class Plan:
    """A pass. Its addresses are, in order: inputs, outputs, parts of the scratch memory,
    counters of both kinds.

    Attributes:
        outputs: (shape, strides, dtype) of what the pass returns.
        parts, scratch: where the parts begin in the scratch memory, and its size (bytes).
        counters: how many counters that are 0 (launch.fresh_counter).
        arrived: how many that launches leave at 0 (launch.arrivals), for each launch with such.
        zeroed: (which output, shape, strides), what of outputs is set to 0 before all launches.
    """

    outputs: tuple[tuple, ...]
    parts: tuple[int, ...]
    scratch: int
    counters: int
    maps: tuple[TensorMap, ...]
    launches: tuple[Launch, ...]
    zeroed: tuple[tuple, ...] = ()
    arrived: tuple[int, ...] = ()

    def run(self, tensors: tuple, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        """The pass on the current stream of a device.

        None where Triton must be asked: an address is not aligned, or a hook waits for launches.
        """
        if elsewhere(device):
            with torch.cuda.device(device):
                return self.run(tensors, device)
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if bits % 16 or knobs.runtime.launch_enter_hook.calls:
            return None
        made = tuple(
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in self.outputs
        )
        addresses += [x.data_ptr() for x in made]
        for i, shape, strides in self.zeroed:
            made[i].as_strided(shape, strides).zero_()
        if self.scratch:
            scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
            start = scratch.data_ptr()
            addresses += [start + part for part in self.parts]
        # A captured launch reads this plan's work lists again with every replay.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _CAPTURED.add(self)
        counters = [fresh_counter(device) for _ in range(self.counters)]
        counters += [arrivals(device, count) for count in self.arrived]
        addresses += [x.data_ptr() for x in counters]
        maps = [x.at(addresses[x.index]) for x in self.maps]
        stream = driver.active.get_current_stream(device.index)
        for launch in self.launches:
            launch.run(stream, addresses, maps)
        return made


def elsewhere(device: torch.device) -> bool:
    """Whether a device is another one than the current, on which Triton launches."""
    return device.index is not None and device.index != driver.active.get_current_device()


_CAPTURED: set[Plan] = set()
"""Plans that ran while a CUDA graph was captured: they stay, whatever else is forgotten."""


def record(launcher: Callable, tensors: tuple, device: torch.device) -> Plan:
    """The plan of `launcher(*tensors)`, which returns what it allocated for its caller.

    Kernels that were not compiled yet are.

    Raises:
        CannotRecordError: the launcher does more than allocate, set outputs to 0, and launch.
    """
    recorder = Recorder(tensors, device)
    results = launcher(*recorder.inputs) or ()
    ours = {x.slot for x in (*recorder.inputs, *results) if x is not None}
    ours |= recorder.counters | recorder.arrived.keys()
    parts, scratch = {}, 0
    for x in recorder.slots:
        if x.slot not in ours and x.numel():
            parts[x.slot] = scratch
            scratch += -(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT
    order = (*recorder.inputs, *results)
    order = [*(x and x.slot for x in order), *parts, *sorted(recorder.counters), *recorder.arrived]
    where = {slot: i for i, slot in enumerate(order) if slot is not None}
    maps: dict[tuple, TensorMap] = {}
    launches = [_prepare(noted, where, maps) for noted in recorder.launches]
    places = [x.slot for x in results]
    if any(x.slot not in places for x in recorder.zeroed):
        raise CannotRecordError("memory that is set to 0 and not returned")
    return Plan(
        outputs=tuple((x.shape, x.strides, x.dtype) for x in results),
        parts=tuple(parts.values()),
        scratch=scratch,
        counters=len(recorder.counters),
        maps=tuple(maps.values()),
        launches=tuple(launches),
        arrived=tuple(recorder.arrived.values()),
        zeroed=tuple((places.index(x.slot), x.shape, x.strides) for x in recorder.zeroed),
    )


def _prepare(noted: Noted, where: dict[int, int], maps: dict[tuple, TensorMap]) -> Launch:
    """A launch as its compiled kernel wants it: Triton 3.6, backends/nvidia/driver.py.

    A slot that `where` does not know has no memory, since it has no elements: its address is 0.
    """
    kernel = noted.kernel.run(*noted.args, grid=noted.grid, warmup=True, **noted.constants)
    runner = kernel.run  # loads the kernel onto the device
    if runner.global_scratch_size or runner.profile_scratch_size:
        raise CannotRecordError(f"{kernel.name} takes memory of its own")
    parameters = [x.name for x in noted.kernel.params]
    values = dict(zip(parameters, noted.args, strict=False)) | noted.constants
    descriptors = iter(kernel.metadata.tensordesc_meta or ())  # none on GPUs without TMA
    arguments, addresses, places, kept = [], [], [], [kernel]
    for name in parameters:
        value, place = values[name], len(arguments)
        if isinstance(value, torch.Tensor):
            kept.append(value)
            arguments.append(value.data_ptr())
        elif isinstance(value, Operand):
            arguments.append(0)
            if value.slot in where:
                addresses.append((place, where[value.slot]))
        elif hasattr(value, "block_shape"):
            key = _map_arguments(value, next(descriptors))
            index = where[value.base.slot]
            made = maps.setdefault((index, repr(key)), TensorMap(index, key))
            places.append((place, list(maps.values()).index(made)))
            arguments += [None, *value.shape, *value.strides]
        else:
            arguments.append(value)
    grid = (*noted.grid, 1, 1)[:3]
    fixed = (
        kernel.function,
        runner.launch_cooperative_grid,
        runner.launch_pdl,
        None,  # scratch memory of the kernel and of a profiler
        None,
        kernel.packed_metadata,
        None,  # what hooks are told, and the hooks
        None,
        None,
    )
    start = _c_launcher(runner.launch)
    return Launch(start, grid, fixed, arguments, tuple(addresses), tuple(places), tuple(kept))


def _map_arguments(descriptor, meta: dict) -> tuple:
    """What `fill_tma_descriptor` takes after the address."""
    return (
        meta["swizzle"],
        meta["elem_size"],
        nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        meta["block_size"],
        list(descriptor.shape),
        list(descriptor.strides),
        1 if descriptor.padding == "nan" else 0,
    )


def _c_launcher(launch: Callable) -> Callable:
    """The function in C, which may have one around it that makes descriptors of arguments."""
    if inspect.isfunction(launch):
        return inspect.getclosurevars(launch).nonlocals["launcher"]
    return launch


class Plans:
    """Plans by key: everything about a pass but the addresses and contents of its tensors.

    A pass gets its plan the second time it comes: lengths of packed batches may never come again.
    The oldest key goes where there are too many.
    """

    def __init__(self):
        self._plans: dict[tuple, Plan] = {}
        self._others: dict[tuple, bool] = {}
        """Passes without a plan, and whether they get one when they come again."""
        self._lock = threading.Lock()
        self.get = self._plans.get
        """The plan that a key has, or None."""

    def find(
        self, key: tuple, launcher: Callable, tensors: tuple, device: torch.device
    ) -> Plan | None:
        """As `get`, and makes the plan of a pass that came before; None: call the launcher."""
        plan = self.get(key)
        if plan is not None:
            return plan
        with self._lock:
            again = self._others.get(key)
            if again:
                try:
                    _keep(self._plans, key, record(launcher, tensors, device))
                    del self._others[key]
                except CannotRecordError:
                    self._others[key] = False
            elif again is None:
                _keep(self._others, key, True)
            return self.get(key)

    def run(
        self, key: tuple, launcher: Callable, tensors: tuple, device: torch.device
    ) -> tuple[torch.Tensor, ...] | None:
        """What `launcher(*tensors)` returns, by plan where there is one."""
        if elsewhere(device):
            with torch.cuda.device(device):
                return self.run(key, launcher, tensors, device)
        plan = self.find(key, launcher, tensors, device) if ON else None
        made = None if plan is None else plan.run(tensors, device)
        return launcher(*tensors) if made is None else made


def _keep(kept: dict, key: tuple, value) -> None:
    if len(kept) >= MOST_PLANS:
        del kept[next(iter(kept))]
    kept[key] = value


ON = (
    os.environ.get("S2_KERNELS_PLANS", "1") != "0"
    and prepares_launches(triton.__version__)
    and not knobs.runtime.interpret
)
"""Whether plans are made at all; `S2_KERNELS_PLANS=0` leaves every call to Triton."""
