"""The host's way to a launch, without a GPU: Triton's own launcher in front of a stub CUDA driver.

Within `stub_gpu()` CPU tensors count as tensors of a Hopper GPU. A call of `s2_attention` then runs
everything that it runs on a GPU (checks, operator, autograd, Triton's C launcher, TMA descriptors),
but kernels are not compiled, and the driver (stub_cuda.c) notes launches instead of starting them.
"""

import contextlib
import ctypes
import functools
import hashlib
import re
import subprocess
import sysconfig
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.runtime.driver import driver

SOURCE = Path(__file__).with_name("stub_cuda.c")
DEVICE = 91
"""The device that the stub driver calls current: Triton keeps compiled kernels by device."""
SIZES = {"i1": 1, "u1": 1, "i32": 4, "i64": 8, "fp32": 4, "f32": 4}


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("n_bytes", ctypes.c_uint32),
        ("bytes", ctypes.c_uint8 * 4096),
    ]


@dataclass(frozen=True)
class Launch:
    """What the driver was asked to start.

    Attributes:
        attributes: of the launch, a bit for each of CUDA's numbers of them.
        parameters: (kind, bytes), as the kernel gets them.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    attributes: int
    stream: int
    parameters: tuple[tuple[str, bytes], ...]


@functools.cache
def stub_library() -> tuple[ctypes.CDLL, str]:
    """The stub driver, loaded, and its folder: afterwards libcuda.so.1 is its name."""
    folder = (
        Path(tempfile.gettempdir())
        / f"stub-cuda-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    )
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        include = Path(nvidia.__file__).parent / "include"
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so") as made:
            command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([*command, f"-I{include}", SOURCE, "-o", made.name], check=True)
            Path(made.name).replace(library)
            Path(made.name).touch()
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.stub_launch.restype = ctypes.POINTER(_Launch)
    loaded.stub_sizes.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p]
    return loaded, str(folder)


def build(name, source, folder, library_dirs, include_dirs, libraries) -> str:
    """Triton's launcher in C, compiled in a hurry."""
    made = Path(folder) / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [*include_dirs, sysconfig.get_paths()["include"]]
    link = [*(f"-L{x}" for x in library_dirs), *(f"-l:{x}" for x in libraries)]
    options = ["-O0", "-w", "-Wno-psabi", "-shared", "-fPIC", *(f"-I{x}" for x in include)]
    subprocess.run(["gcc", source, *options, *link, "-o", made], check=True)
    return str(made)


def parameters(signature) -> list[tuple[str, int]]:
    """What a kernel of such a signature is given: (kind, bytes) of each parameter."""
    found = []
    for kind in signature:
        if isinstance(kind, tuple):
            found += parameters(kind)
        elif kind.startswith("tensordesc"):
            rank = re.search(r"\[([^]]*)\]", kind)[1].count(",") + 1
            found += [("map", 128), *[("i32", 4)] * rank, *[("i64", 8)] * rank]
        elif kind != "constexpr":
            found.append(("address", 8) if kind[0] == "*" else (kind, SIZES[kind]))
    return found


def all_parameters(kernel) -> list[tuple[str, int]]:
    """And the scratch memory of the kernel and of a profiler."""
    return [*parameters(kernel.src.signature.values()), ("address", 8), ("address", 8)]


class _Uncompiled(compiler.CompiledKernel):
    """A compiled kernel without code."""

    def __init__(self, src, options):
        descriptors = [s for s in src.signature.values() if str(s).startswith("tensordesc")]
        boxes = [re.search(r"\[([^]]*)\]", s)[1] for s in descriptors]
        fields = dict(
            name=src.name,
            num_warps=options["num_warps"],
            num_ctas=1,
            shared=100_000,
            tmem_size=None,
            tensordesc_meta=[
                dict(
                    swizzle=3,
                    elem_size=2,
                    elem_type=10,
                    block_size=[int(n) for n in box.split(",")],
                    fp4_padded=False,
                )
                for box in boxes
            ],
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            launch_cooperative_grid=False,
            launch_pdl=options["launch_pdl"],
        )
        self.metadata = namedtuple("Metadata", fields)(**fields)
        self.packed_metadata = (options["num_warps"], 1, 100_000)
        self.src, self.name, self.hash, self.kernel = src, src.name, "", b"none"
        self.metadata_group = {}
        self.module = self.function = self._run = None


class _StubDriver(nvidia.CudaDriver):
    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.stream = 17

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class StubGPU:
    """What was launched since `clear`."""

    def __init__(self, library, active: _StubDriver):
        self.library, self.driver = library, active
        self.kernels: dict[int, _Uncompiled] = {}
        self.compiled: list[str] = []

    def compile(self, src, target=None, options=None, **_):
        self.compiled.append(src.name)
        kernel = _Uncompiled(src, options)
        kernel._init_handles()
        self.kernels[kernel.function] = kernel
        sizes = [size for _, size in all_parameters(kernel)]
        self.library.stub_sizes(kernel.function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        return kernel

    def clear(self) -> None:
        self.library.stub_clear()

    @property
    def maps(self) -> int:
        """How many TMA descriptors were made."""
        return self.library.stub_maps()

    @property
    def launches(self) -> list[Launch]:
        return [self._read(i) for i in range(self.library.stub_launches())]

    def _read(self, i: int) -> Launch:
        raw = self.library.stub_launch(i).contents
        kernel, data, values = self.kernels[raw.function], bytes(raw.bytes[: raw.n_bytes]), []
        for kind, size in all_parameters(kernel):
            values.append((kind, data[:size]))
            data = data[size:]
        numbers = (tuple(raw.grid), raw.threads, raw.attributes, raw.stream)
        return Launch(kernel.name, *numbers, tuple(values))


def renamed(launches: list[Launch], known: dict[int, str]) -> list[tuple]:
    """Launches with addresses as names: those of `known`, others numbered as they come.

    So two passes are alike if they give every kernel the same numbers, and the same memory where it
    was the same memory before.
    """
    names = dict(known) | {0: "none"}

    def name(address: bytes) -> str:
        return names.setdefault(int.from_bytes(address, "little"), f"memory {len(names)}")

    def value(kind: str, data: bytes):
        if kind == "address":
            return name(data)
        return (name(data[:8]), data[8:].hex()) if kind == "map" else data.hex()

    return [
        (
            *(x.kernel, x.grid, x.threads, x.attributes, x.stream),
            *(value(*parameter) for parameter in x.parameters),
        )
        for x in launches
    ]


@contextlib.contextmanager
def stub_gpu():
    """Within the context CPU tensors are launched on, as on a Hopper GPU; yields a `StubGPU`."""
    library, folder = stub_library()
    before = driver.active if driver._active is not None else None
    path, compile_before = knobs.nvidia.libcuda_path, compiler.compile
    knobs.nvidia.libcuda_path, knobs.build.impl = folder, build
    active = _StubDriver()
    stub = StubGPU(library, active)
    driver.set_active(active)
    compiler.compile = triton.compiler.compile = stub.compile
    torch.Tensor.is_cuda = True
    try:
        yield stub
    finally:
        del torch.Tensor.is_cuda
        compiler.compile = triton.compiler.compile = compile_before
        knobs.nvidia.libcuda_path, knobs.build.impl = path, None
        driver._active = before
        stub.clear()
