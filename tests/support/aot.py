"""Compiles the launchers' kernels for a GPU that is not there: registers, spills, shared memory.

`compiled(target)` replaces Triton's driver and the launch itself, so that a launcher called on CPU
tensors compiles exactly the kernels it would launch, and launches nothing. TRITON_INTERPRET must
be unset when the kernels are imported.
"""

import contextlib
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers a thread, bytes of stack, bytes of shared memory."""

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.registers} registers, {self.stack} B stack, "
            f"{self.shared / 1024:.1f} KiB shared, {self.warps} warps"
        )


class _NoGPU(DriverBase):
    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return "cpu"

    def get_benchmarker(self):
        return None

    def get_current_device(self):
        """A device for each architecture: Triton asks what it is once per kernel and device."""
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def _read_binary(kernel, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loops(kernel) -> list[dict]:
    """The innermost loops with tensor-core products, the two shortest.

    Of each, how often it loads from and stores to the stack, and its `ops` in order: HGMMA (a
    product is issued), EX2, WAIT n (until at most n products are in flight), runs as one entry.
    """
    # Branches name their targets without an analysis of the data's flow, a quarter of the time.
    lines = _read_binary(kernel, "nvdisasm", "-c", "--no-dataflow").splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if line.strip().endswith(":")}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L\w+)\)", line)
        if target and labels[target[1]] < end:
            body = "\n".join(lines[labels[target[1]] : end])
            if "HGMMA" in body:
                loops.append(body)
    names = r"HGMMA|EX2|LDL|STL|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d"
    found = []
    for body in sorted(loops, key=len)[:2]:
        ops = re.findall(names, body)
        ops = [op.replace("WARPGROUP.DEPBAR.LE gsb0, 0x", "WAIT ") for op in ops]
        order = itertools.groupby(op for op in ops if op not in ("LDL", "STL"))
        found.append(
            dict(loads=ops.count("LDL"), stores=ops.count("STL"), ops=[op for op, _ in order])
        )
    return found


def usage(kernel) -> Usage:
    """Resources of a compiled kernel, read from its binary. Spills show as stack."""
    text = _read_binary(kernel, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    meta = kernel.metadata
    return Usage(meta.name, int(found[1]), int(found[2]), meta.shared, meta.num_warps)


@contextlib.contextmanager
def compiled(target: GPUTarget | None = None):
    """Within the context, launches are compiled only; yields the list they are collected in."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = driver.active if driver._active is not None else None
    driver.set_active(_NoGPU(target or GPUTarget("cuda", 90, 32)))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        if before is not None:
            driver.set_active(before)
