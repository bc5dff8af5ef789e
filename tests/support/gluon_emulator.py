"""Runs the Gluon kernels on the CPU: what they compute and how they wait, not how fast.

Triton's interpreter has no Gluon. Within `emulated()`, a launch of a Gluon kernel runs its source
as Python on torch tensors, with a thread for each partition of `gl.warp_specialize`, as late as its
barriers allow. What a load is about to write over holds NaN until it arrives, a moment later and in
any order; a product reads its operands when it is waited for, a store what it stores. So a missing
wait, a place freed too early, a wrong count, phase or number of bytes of a barrier end in NaN, in
an error, or in a wait that is given up.

Not emulated: layouts, and the threads of a warpgroup with all that orders them. Inline PTX is
replaced by what it computes (gluon_language.inline_asm).
"""

import contextlib
import functools
import heapq
import itertools
import queue
import random
import threading
import time
import types
from collections.abc import Sequence

import torch
from gluon_language import (
    DTYPES,
    FUNCTIONS,
    Int,
    Loaded,
    Pointer,
    Tile,
    dtype_of,
    ignored,
    mbarrier,
    static_range,
    tile,
)
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr

SECONDS = 60
"""How long a partition waits for a barrier before it gives up."""
WRITES = ("store", "atomic_add")
here = threading.local()
"""Of a partition: its launch, program and programs; products and stores under way; its dice; and
whether the kernel before may still run."""


class Launch:
    """A launch that runs: its loads, and whether something went wrong."""

    def __init__(self, early: bool, stale: dict[int, torch.Tensor]):
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.loads = queue.Queue()
        self.early, self.stale = early, stale

    def fail(self, error: BaseException):
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def run_loads(self):
        """TMA: what was asked for arrives later, some of it much later, in any order."""
        dice, waiting, asked = random.Random(0), [], 0
        while waiting or asked is not None:
            due = max(0, waiting[0][0] - time.monotonic()) if waiting else None
            with contextlib.suppress(queue.Empty):
                load = self.loads.get(timeout=due)
                asked = None if load is None else asked + 1
                if load:
                    delay = dice.random() ** 4 * 8e-3
                    heapq.heappush(waiting, (time.monotonic() + delay, asked, load))
                continue
            try:
                heapq.heappop(waiting)[2]()
            except AssertionError as error:
                self.fail(error)


class Barrier:
    """An mbarrier: a phase is complete after `count` arrivals and all bytes that were expected."""

    def __init__(self, launch: Launch):
        self.launch, self.bytes, self.phase = launch, 0, 0

    def init(self, count: int):
        self.count = self.pending = count

    def add(self, arrivals: int, nbytes: int):
        with self.launch.changed:
            self.pending -= arrivals
            self.bytes += nbytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.launch.changed.notify_all()

    def wait(self, parity: int):
        """Until the phase of this parity is complete."""
        launch = self.launch

        def over():
            return launch.error or self.phase != parity

        with launch.changed:
            if not launch.changed.wait_for(over, SECONDS):
                raise TimeoutError(f"a barrier was not completed within {SECONDS} s")
        if launch.error:
            raise RuntimeError("another partition failed") from launch.error
        if here.dice.random() < 0.02:
            time.sleep(here.dice.random() * 10e-3)


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, data: torch.Tensor):
        self.data, self.shape, self.dtype = data, tuple(data.shape), dtype_of(data)

    def index(self, i):
        assert 0 <= i < self.shape[0], "outside of the buffer"
        return Shared(self.data[int(i)])

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return Loaded.of(self.data)

    def store(self, x):
        assert x.dtype == self.data.dtype
        self.data.copy_(x)


class Barriers:
    """An array of mbarriers in shared memory."""

    def __init__(self, launch: Launch, n: int):
        self.all = [Barrier(launch) for _ in range(n)]

    def index(self, i):
        assert i >= 0
        return self.all[i]


def allocate_shared_memory(dtype, shape, layout):
    if dtype is DTYPES["int64"]:
        return Barriers(here.launch, shape[0])
    data = torch.empty(*shape, dtype=dtype.torch)
    return Shared(data.fill_(float("nan") if data.is_floating_point() else -(1 << 30)))


class Descriptor:
    """What TMA moves of a tensor."""

    def __init__(self, of: TensorDescriptor):
        start = of.base.storage_offset()
        self.view = of.base.detach().as_strided(list(of.shape), list(of.strides), start)
        self.dtype, self.base = dtype_of(of.base), of.base
        size = torch.Size(of.block_shape).numel() * of.base.element_size()
        self.block_type = types.SimpleNamespace(shape=list(of.block_shape), nbytes=size)

    def part(self, coord):
        """Of a box at coord: what lies within the tensor, and where that lies within the box."""
        assert coord[-1] * self.view.element_size() % 16 == 0, "TMA wants 16 bytes"
        there, inside = [], []
        for at, n, size in zip(coord, self.block_type.shape, self.view.shape, strict=True):
            at = int(at)
            low, high = min(max(at, 0), size), min(max(at + n, 0), size)
            there.append(slice(low, high))
            inside.append(slice(low - at, high - at) if low < high else slice(0, 0))
        view = self.view
        if here.early and (stale := here.launch.stale.get(self.base.data_ptr())) is not None:
            view = stale.as_strided(view.shape, view.stride(), stale.storage_offset())
        return view[tuple(there)], tuple(inside)


class tma:
    @staticmethod
    def async_load(desc, coord, barrier, buffer, pred=True):
        if not pred:
            return
        part, inside = desc.part(coord)
        buffer.data.fill_(float("nan"))

        def load():
            buffer.data.zero_()
            buffer.data[inside].copy_(part)
            barrier.add(0, -desc.block_type.nbytes)

        here.launch.loads.put(load)

    @staticmethod
    def async_store(desc, coord, buffer):
        # Seen on an H100: "illegal instruction". Loads below 0 are taken.
        assert min(map(int, coord)) >= 0, f"TMA stores nothing from {coord} on"
        part, inside = desc.part(coord)
        here.stores.append(lambda: part.copy_(buffer.data[inside]))

    @staticmethod
    def store_wait(pendings):
        while len(here.stores) > pendings:
            here.stores.pop(0)()


class Product:
    """A product of the tensor cores under way: a tile once it was waited for."""

    result: Tile | None = None

    def __init__(self, a, b, acc, use_acc):
        self.operands = a, b, acc, use_acc

    def compute(self):
        a, b, acc, use_acc = self.operands
        product = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
        self.result = tile(product + waited_for(acc) if use_acc else product)


def waited_for(x):
    if isinstance(x, Product):
        assert x.result is not None, "a product is used before it was waited for"
        return x.result
    return x


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    here.products.append(Product(a, b, acc, use_acc))
    return here.products[-1] if is_async else warpgroup_mma_wait(0, here.products[-1:])


def warpgroup_mma_wait(num_outstanding, deps):
    while len(here.products) > num_outstanding:
        here.products.pop(0).compute()
    done = tuple(waited_for(x) for x in deps)
    return done if len(done) > 1 else done[0]


def start(launch, program, programs, dice, function, arguments):
    """A thread that runs a partition."""

    def run():
        here.launch, here.program, here.programs = launch, program, programs
        here.products, here.stores, here.dice = [], [], random.Random(dice)
        here.early = launch.early
        try:
            function(*arguments)
            assert not here.products, "a product is not waited for"
            assert not here.stores, "a store is not waited for"
        except BaseException as error:
            launch.fail(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def warp_specialize(partitions, warps, registers):
    where = here.launch, here.program, here.programs
    threads = [start(*where, i, *part) for i, part in enumerate(partitions)]
    for thread in threads:
        thread.join()


def wait_for_the_kernel_before():
    """griddepcontrol.wait: what that has written is there for this program."""
    here.early = False


def after_the_kernel_before(function):
    """What a program may do only once it has waited: that kernel may use the same memory."""

    def run(*arguments, **options):
        assert not here.early, "written before the kernel before has ended"
        return function(*arguments, **options)

    return run


language = types.SimpleNamespace(
    **FUNCTIONS | {name: after_the_kernel_before(FUNCTIONS[name]) for name in WRITES},
    program_id=lambda axis: Int(here.program[axis]),
    num_programs=lambda axis: Int(here.programs[axis]),
    extra=types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            gdc_wait=wait_for_the_kernel_before, gdc_launch_dependents=ignored
        )
    ),
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
)
REPLACED = dict(
    gl=language,
    tl=language,
    mbarrier=mbarrier,
    tma=tma,
    async_load=tma.async_load,
    async_store=tma.async_store,
    thread_barrier=ignored,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
    fence_async_shared=ignored,
    range=static_range,
)
_globals: dict[int, dict] = {}
"""Of each module with kernels, by the identity of its names: its names as they are here."""


def translated(jit) -> types.FunctionType:
    """A jit function of triton or Gluon as one that runs here, with all that it calls."""
    function = jit.fn
    names = function.__globals__
    if id(names) not in _globals:
        new = _globals[id(names)] = names | REPLACED
        for name in names.keys() - REPLACED.keys():
            value = names[name]
            if isinstance(getattr(value, "fn", None), types.FunctionType):
                new[name] = translated(value)
            elif isinstance(value, constexpr):
                new[name] = value.value
    return types.FunctionType(
        function.__code__, _globals[id(names)], function.__name__, function.__defaults__
    )


def argument(x):
    """What a kernel gets of a launch's argument."""
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, torch.Tensor):
        n = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.detach().as_strided((n,), (1,), 0), Int(x.storage_offset()))
    if isinstance(x, tuple):
        return tuple(argument(part) for part in x)
    return Int(x) if isinstance(x, int) else x


def run(
    self, *arguments, stale, grid, warmup, num_warps, enable_fp_fusion, maxnreg=None,
    launch_pdl=False, **constants,
):  # fmt: skip
    """In place of GluonJITFunction.run: all programs at the same time."""
    launch, function = Launch(launch_pdl, stale), translated(self)
    constants = {k: v.value if isinstance(v, constexpr) else v for k, v in constants.items()}
    arguments = [argument(x) for x in arguments]
    loads = threading.Thread(target=launch.run_loads, daemon=True)
    loads.start()
    programs = [
        start(launch, program, grid, i, lambda: function(*arguments, **constants), ())
        for i, program in enumerate(itertools.product(*map(range, grid)))
    ]
    for thread in programs:
        thread.join()
    launch.loads.put(None)
    loads.join()
    if launch.error:
        raise launch.error


@contextlib.contextmanager
def emulated(stale: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()):
    """Within the context, launches of Gluon kernels run on the CPU.

    Args:
        stale: (tensor, what a program reads of it by TMA before it has waited for the kernel before
            that writes it, of the same strides), for programmatic dependent launch.
    """
    original = GluonJITFunction.run
    by_address = {x.data_ptr(): old for x, old in stale}
    GluonJITFunction.run = functools.partialmethod(run, stale=by_address)
    try:
        yield
    finally:
        GluonJITFunction.run = original
