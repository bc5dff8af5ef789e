"""Gluon's language on the CPU, for gluon_emulator: scalars, tiles and pointers, without layouts."""

import threading
import types

import torch


class Int(int):
    """An integer of a kernel: divides towards zero, as C does, and knows `.to`."""

    def to(self, dtype, bitcast=False):
        return self


def _divide(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _give_operator(name, apply):
    def forward(self, other):
        return Int(apply(int(self), int(other))) if isinstance(other, int) else NotImplemented

    def reflected(self, other):
        return Int(apply(int(other), int(self))) if isinstance(other, int) else NotImplemented

    setattr(Int, f"__{name}__", forward)
    setattr(Int, f"__r{name}__", reflected)


for _name in "add", "sub", "mul", "and", "or", "xor", "rshift", "lt", "le", "gt", "ge", "eq", "ne":
    _give_operator(_name, getattr(int, f"__{_name}__"))
_give_operator("floordiv", _divide)
_give_operator("mod", lambda a, b: a - _divide(a, b) * b)
Int.__hash__ = int.__hash__


class DType:
    """A dtype of the language."""

    def __init__(self, dtype: torch.dtype):
        self.torch = dtype

    def is_bf16(self) -> bool:
        return self.torch == torch.bfloat16


DTYPES = {
    name: DType(getattr(torch, name))
    for name in ("float32", "float16", "bfloat16", "int16", "int32", "int64")
}


def dtype_of(x: torch.Tensor) -> DType:
    return next(dtype for dtype in DTYPES.values() if dtype.torch == x.dtype)


class Tile(torch.Tensor):
    """A tensor in registers."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        dtype = dtype.torch if isinstance(dtype, DType) else dtype
        return self.view(dtype) if bitcast else super().to(dtype)

    def expand_dims(self, dim):
        return self.unsqueeze(dim)

    def split(self):
        return self[..., 0], self[..., 1]


def tile(x: torch.Tensor) -> Tile:
    return x.as_subclass(Tile)


class Loaded(Tile):
    """What was loaded from shared memory: it is read when it is first used."""

    @classmethod
    def of(cls, source: torch.Tensor):
        loaded = torch.empty(source.shape, dtype=source.dtype).as_subclass(cls)
        loaded.source = source
        return loaded

    @classmethod
    def __torch_function__(cls, function, kinds, arguments=(), options=None):
        with torch._C.DisableTorchFunctionSubclass():
            for x in arguments:
                if isinstance(x, Loaded) and x.__dict__.get("source") is not None:
                    x.copy_(x.__dict__.pop("source"))
        return Tile.__torch_function__.__func__(Tile, function, (), arguments, options or {})


class Pointer:
    """Into the memory of a tensor."""

    def __init__(self, memory: torch.Tensor, offset):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)

    def __getitem__(self, index):
        return Pointer(self.memory, self.offset[index])

    def places(self, mask):
        """(offsets, mask) of a tile's elements; those that are not masked must lie in the memory.

        A masked one has offset 0.
        """
        at = torch.as_tensor(self.offset).long()
        mask = torch.as_tensor(True if mask is None else mask).bool()
        at, mask = torch.broadcast_tensors(at, mask)
        assert ((at >= 0) & (at < len(self.memory)) | ~mask).all(), "outside of the tensor"
        return torch.where(mask, at, 0), mask


def load(pointer, mask=None, other=None, cache_modifier=None):
    if isinstance(pointer.offset, int) and mask is None:
        return Int(pointer.memory[pointer.offset].item())
    at, mask = pointer.places(mask)
    fill = torch.tensor(0 if other is None else other, dtype=pointer.memory.dtype)
    return tile(torch.where(mask, pointer.memory[at], fill))


def store(pointer, value, mask=None):
    at, mask = pointer.places(mask)
    value = torch.as_tensor(value).to(pointer.memory.dtype).broadcast_to(at.shape)
    pointer.memory[at[mask]] = value[mask].as_subclass(torch.Tensor)


one_at_a_time = threading.Lock()


def atomic_add(pointer, value, sem=None):
    with one_at_a_time:
        before = load(pointer)
        store(pointer, before + value)
        return before


def _of(scalar, on_tiles):
    """A function of scalars and tiles."""

    def run(*arguments):
        tiles = [x for x in arguments if isinstance(x, torch.Tensor)]
        if not tiles:
            result = scalar(*arguments)
            return Int(result) if isinstance(result, int) else result
        numbers = [x.dtype for x in tiles if x.dtype != torch.bool]
        dtype = numbers[-1] if numbers else torch.int32  # `where` between whole numbers
        return tile(on_tiles(*(x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=dtype)
                               for x in arguments)))  # fmt: skip

    return run


def _reduced(reduce):
    def run(x, axis):
        x = tile(reduce(x, axis))
        return x if x.dim() else Int(x.item())

    return run


def inline_asm(asm, constraints, arguments, dtype, is_pure, pack):
    """What the inline PTX of the Hopper kernels computes."""
    if asm == "mov.b32 $0, 0;":
        return Int(0)
    if "cvt.rn" in asm:  # pack
        half = torch.bfloat16 if "bf16x2" in asm else torch.float16
        low, high = (x.to(half).view(torch.int16).int() for x in arguments)
        return low & 0xFFFF | high << 16
    if "mov.b32 {" in asm:  # unpack
        return arguments[0].short(), (arguments[0] >> 16).short()
    if "shfl" in asm:  # the maxima of rows where they lie above LAG, else 0
        rows = arguments[0].amax(1, keepdim=True).expand(-1, 4)
        return tile(torch.where(rows > 8, rows, 0.0))
    x, y = arguments  # all of them: where y is neutral nothing changes
    return x - y if "sub.f32" in asm else x * y


def static_range(*bounds):
    return map(Int, range(*bounds))


def ignored(*arguments, **options):
    """A layout, or what orders the threads of a partition."""


class mbarrier:
    MBarrierLayout = ignored

    @staticmethod
    def init(barrier, count):
        barrier.init(count)

    @staticmethod
    def wait(barrier, phase, pred=True):
        if pred:
            barrier.wait(phase)

    @staticmethod
    def arrive(barrier, pred=True):
        if pred:
            barrier.add(1, 0)

    @staticmethod
    def expect(barrier, nbytes, pred=True):
        if pred:
            barrier.add(1, nbytes)


class NVMMASharedLayout:
    """A layout in shared memory, ignored as all are."""

    __init__ = get_default_for = staticmethod(ignored)


FUNCTIONS = dict(
    DTYPES,
    static_range=static_range,
    num_warps=lambda: 4,
    where=_of(lambda c, a, b: a if c else b, lambda c, a, b: torch.where(c.bool(), a, b)),
    maximum=_of(max, torch.maximum),
    minimum=_of(min, torch.minimum),
    exp2=torch.exp2,
    log2=torch.log2,
    sum=_reduced(torch.sum),
    max=_reduced(torch.amax),
    cumsum=lambda x, axis: tile(torch.cumsum(x, axis, dtype=x.dtype)),
    cdiv=lambda a, b: (a + b - 1) // b,
    arange=lambda start, end, layout: tile(torch.arange(start, end, dtype=torch.int32)),
    full=lambda shape, value, dtype, layout: tile(torch.full(shape, value, dtype=dtype.torch)),
    zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype.torch)),
    zeros_like=torch.zeros_like,
    reshape=torch.reshape,
    convert_layout=lambda x, layout: x,
    split=Tile.split,
    join=lambda a, b: torch.stack([a, b], -1),
    inline_asm_elementwise=inline_asm,
    load=load,
    store=store,
    atomic_add=atomic_add,
    NVMMASharedLayout=NVMMASharedLayout,
    BlockedLayout=ignored,
    DotOperandLayout=ignored,
    NVMMADistributedLayout=ignored,
    SliceLayout=ignored,
    SwizzledSharedLayout=ignored,
)
