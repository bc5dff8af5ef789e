"""Compiles every shipped configuration of the kernels for GPUs that are not there, with aot.py.

As a program, with TRITON_INTERPRET unset, it prints JSON: what each kernel takes (`usage`), the
main loops of the Hopper kernels, and what another length compiled again. Which Triton compiles is
for the caller to say, by PYTHONPATH.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from aot import compiled, main_loops, usage
from triton.backends.compiler import GPUTarget

from s2_kernels import (
    backward,
    backward_dkdv,
    decode,
    decode_write,
    dense,
    forward,
    local_stride,
    moves_kernel,
    ranges,
)
from s2_kernels import launch as launchers
from s2_kernels.block_sparse import api as block_sparse
from s2_kernels.block_sparse import kernels as sparse_kernels
from s2_kernels.hopper.backward import launch_hopper_backward
from s2_kernels.hopper.decode import launch_hopper_decode
from s2_kernels.hopper.forward import launch_hopper_forward
from s2_kernels.hopper.forward_wide import launch_hopper_forward_wide
from s2_kernels.launch import Packing
from s2_kernels.near import Near

SHARED = {80: 99, 90: 227, 100: 99}
"""Of each architecture, KiB of shared memory that a program may take: on GPUs other than Hopper,
what the smallest of their kind have. The Hopper kernels are for 90 only."""
PATTERN = local_stride(heads=4, local_blocks=4, stride=4)
BLOCKS_OF_16 = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=4, stride=4)
BLOCKS_OF_128 = local_stride(heads=4, block_size=128, local_blocks=2, stride=4)
DENSE = dense(heads=4)
THREE_RANGES = ranges(heads=4, block_size=64, bands=[(2, 1), (5, 2), (None, 4)])


DEPENDENTS = re.compile(r"griddepcontrol\.(\w+)")
"""Programmatic dependent launch in PTX: a wait for the kernel before, or leave for the next one."""
ONE_LAUNCH = ("s2_decode_kernel", "s2_hopper_decode_kernel")
"""The kernels whose programs count the parts that are written."""
COUNT = re.compile(r"(bar\.sync|st\.global)(?:(?!bar\.sync|st\.global).)*?(atom\.global\S+)", re.S)
"""Of each atomic operation in PTX: the barrier or store before it, and what it is."""


def tensors(n, pattern, d, dtype, packed):
    """q, k, v and dout of n tokens; and how they are packed, if so."""
    batch = () if packed else (1,)
    heads = (pattern.heads, pattern.kv_heads, pattern.kv_heads, pattern.heads)
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)
    packing = Packing(cu_seqlens, cu_seqlens, n, n) if packed else None
    return [torch.zeros(*batch, n, h, d, dtype=dtype) for h in heads], packing


def chunk_of(n, q, k, v, dout):
    """The last 16 blocks of 64 as a context-parallel rank's chunk: (tensors, offset, near)."""
    blocks = n // 64
    near = Near(blocks - 20, -(-(blocks - 20) // 4))
    keys = (near.row + 20) * 64
    at = dict(q_offset=(blocks - 16) * 64, near=near)
    return (q[:, :1024], k[:, :keys], v[:, :keys], dout[:, :1024]), at


def portable(
    arch, n, d, pattern=PATTERN, dtype=torch.bfloat16, packed=False, fused=False, near=False
):
    x, packing = tensors(n, pattern, d, dtype, packed)
    (q, k, v, dout), at = chunk_of(n, *x) if near else (x, {})
    out, lse = forward.launch_forward(q, k, v, pattern, 0.1, packing=packing, **at)
    options = dict(packing=packing, deterministic=not fused, tma_add=arch >= 90, **at)
    backward.launch_backward(q, k, v, out, lse, dout, None, pattern, 0.1, **options)


def sparse(arch, n, d):
    (q, k, v, dout), _ = tensors(n, PATTERN, d, torch.bfloat16, False)
    mask = torch.ones(4, -(-n // 64), -(-n // 64), dtype=torch.bool)
    common = (block_sparse._tables_of(mask, q.device), 64, 0.1)
    out, lse = sparse_kernels.launch_forward(q, k, v, *common)
    sparse_kernels.launch_backward(q, k, v, out, lse, dout, None, *common)


def hopper(arch, n, d, pattern=PATTERN, dtype=torch.bfloat16, packed=False, q_offset=0, near=False):
    """q_offset: the first of n tokens that are queries; n or more: all are, past the keys."""
    x, packing = tensors(n, pattern, d, dtype, packed)
    (q, k, v, dout), at = chunk_of(n, *x) if near else (x, dict(q_offset=q_offset))
    if 0 < q_offset < n:
        q, dout = q[:, q_offset:], dout[:, q_offset:]
    if q_offset >= n:
        k, v = k[:, : n // 64 * 64], v[:, : n // 64 * 64]
    if d > 128:
        out, lse = launch_hopper_forward_wide(q, k, v, pattern, 0.1, **at)
    else:
        out, lse = launch_hopper_forward(q, k, v, pattern, 0.1, packing, **at)
    launch_hopper_backward(q, k, v, out, lse, dout, None, pattern, 0.1, packing, **at)


def paged(arch, n, d, pattern=PATTERN, dtype=torch.bfloat16):
    """A token of each of two sequences of n tokens, and a chunk of a prompt, against pages."""
    kv_heads, size = pattern.kv_heads, pattern.block_size
    pages = torch.zeros(3, size, d, dtype=dtype)
    table = torch.zeros(2, kv_heads, -(-n // size), dtype=torch.int32)
    lengths = torch.full((2,), n - 1, dtype=torch.int32)
    for tokens in (1, 200):
        q = torch.zeros(2, tokens, pattern.heads, d, dtype=dtype)
        k = torch.zeros(2, tokens, kv_heads, d, dtype=dtype)
        decode_write.launch_write(k, k, pages, pages, table, lengths, pattern, alive_only=False)
        decode.launch_decode(q, pages, pages, table, lengths, pattern, 0.1)


def hopper_paged(arch, n, d, pattern=PATTERN, dtype=torch.bfloat16):
    """A token of one sequence, and of two behind `write_pages`; a draft of four tokens."""
    kv_heads, size = pattern.kv_heads, pattern.block_size
    pages = torch.zeros(3, size, d, dtype=dtype)
    for b, tokens, after_write in ((1, 1, False), (2, 1, True), (1, 4, True)):
        q = torch.zeros(b, tokens, pattern.heads, d, dtype=dtype)
        table = torch.zeros(b, kv_heads, -(-n // size), dtype=torch.int32)
        lengths = torch.full((b,), n - 1, dtype=torch.int32)
        out, lse = torch.empty_like(q), torch.empty(b, pattern.heads, tokens)
        inputs = (q, pages, pages, table, lengths, pattern, 0.1, out, lse)
        launch_hopper_decode(*inputs, programs=264, after_write=after_write)


def moved(arch, n, d, dtype=torch.bfloat16):
    """Blocks of n tokens as rows, and rows added to blocks."""
    x, rows = (
        torch.zeros(1, n // 64, 64, 4, d, dtype=dtype),
        torch.zeros(1, 9, 64, 1, d, dtype=dtype),
    )
    slots, starts = torch.zeros(9, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    moves_kernel.launch_copy(rows, x, slots, None, slots, slots, None)
    moves_kernel.launch_copy(x, rows, slots, slots, slots, None, None)
    moves_kernel.launch_copy(x, None, slots, slots, None, None, None)
    moves_kernel.launch_add(rows, x, slots, None, slots, slots, None)
    moves_kernel.launch_add(x, rows, slots, slots, slots, None, starts)


# Every row of configs.py; once per architecture what else is chosen at compile time: packed
# sequences, block masks, float16, small blocks, which are gathered, and more than two bands.
PORTABLE = [
    *((portable, dict(d=d, fused=fused)) for d in (64, 128, 256) for fused in (False, True)),
    *((portable, dict(d=d, fused=fused, dtype=torch.float32)) for d in (64, 128)
      for fused in (False, True)),
    (portable, dict(d=128, packed=True)),
    (sparse, dict(d=128)),
    *((paged, dict(d=d)) for d in (64, 128, 256)),
    (paged, dict(d=64, pattern=BLOCKS_OF_16, dtype=torch.float16)),
    (paged, dict(d=128, pattern=BLOCKS_OF_128, dtype=torch.float32)),
    (portable, dict(d=64, pattern=BLOCKS_OF_16, dtype=torch.float16)),
    (portable, dict(d=64, pattern=THREE_RANGES)),
    (portable, dict(d=128, near=True)),
    *((moved, dict(d=d)) for d in (64, 128, 256)),
    (moved, dict(d=128, dtype=torch.float32)),
]  # fmt: skip
HOPPER = [
    *((hopper, dict(d=d)) for d in (64, 128, 256)),
    *((hopper, dict(d=d, packed=True)) for d in (64, 128)),
    *((hopper, dict(d=d, dtype=torch.float16)) for d in (128, 256)),
    (hopper, dict(d=128, pattern=BLOCKS_OF_128)),
    (hopper, dict(d=128, pattern=THREE_RANGES)),
    *((hopper, dict(d=d, q_offset=1001)) for d in (64, 128, 256)),
    *((hopper, dict(d=d, q_offset=10000, pattern=DENSE)) for d in (64, 128, 256)),
    *((hopper, dict(d=d, near=True)) for d in (64, 128, 256)),
    *((hopper_paged, dict(d=d)) for d in (64, 128, 256)),
    (hopper_paged, dict(d=128, pattern=BLOCKS_OF_128, dtype=torch.float16)),
    (hopper_paged, dict(d=128, pattern=THREE_RANGES)),
]
ONCE = [
    (portable, dict(d=128)),
    (portable, dict(d=128, fused=True, dtype=torch.float32)),
    (sparse, dict(d=128)),
    (paged, dict(d=128)),
    (moved, dict(d=128)),
]
"""Each portable kernel: for architectures other than Hopper, with a Triton that is not pinned."""


def name_of(launch, options: dict) -> str:
    """Of a case, such as portable-d128-packed."""
    words = [launch.__name__, f"d{options['d']}"]
    keys = ("packed", "fused", "pattern", "q_offset", "near")
    words += [key for key in keys if options.get(key)]
    return "-".join(words + ([str(options["dtype"])] if "dtype" in options else []))


def compile_all(arch: int, cases: list) -> dict:
    """What the kernels for one architecture, 10 times its compute capability, take."""
    for module in (forward, backward, sparse_kernels, decode, launchers):
        module.capability = lambda *_: divmod(arch, 10)
    report = dict(usage=[], loops=[], counts=[], dependents=[])
    with compiled(GPUTarget("cuda", arch, 32)) as kernels:
        seen = set()
        for launch, options in cases:
            launch(arch, 4096, **options)
            new = {id(kernel): kernel for kernel in kernels if id(kernel) not in seen}
            seen |= new.keys()
            case = name_of(launch, options)
            report["usage"] += [vars(usage(x)) | dict(arch=arch, case=case) for x in new.values()]
            names = [(x.metadata.name, x) for x in new.values()]
            names = [(n, x) for n, x in names if n.startswith("s2_hopper") and "decode" not in n]
            report["loops"] += [(n, main_loops(x)) for n, x in names]
            decoding = [x for x in new.values() if x.metadata.name in ONE_LAUNCH]
            report["counts"] += [COUNT.findall(x.asm["ptx"]) for x in decoding if arch == 90]
            writing = [x for x in new.values() if x.metadata.name == "s2_write_kernel"]
            report["dependents"] += [DEPENDENTS.findall(x.asm["ptx"]) for x in writing]
        for launch, options in cases if arch == 90 else ():
            launch(arch, 5519, **options)
    report["recompiled"] = [x.metadata.name for x in kernels if id(x) not in seen]
    return report


def compile_in_a_process(cache: Path, newest: Path | None = None) -> dict:
    """What this program prints, run where kernels can be compiled.

    Args:
        newest: a folder with another Triton than this process's, which compiles all
            configurations for Hopper, and for the others each kernel once.
    """
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    compiler = newest or Path(triton.__file__).parents[1]  # this process's may come by PYTHONPATH
    paths = [root / "kernels", root / "tests/support", compiler]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, __file__, *(["once"] if newest else [])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_that_all_fit(report: dict) -> None:
    """Every kind of kernel was compiled for every architecture, within its shared memory."""
    kinds = {arch: {x["kernel"] for x in report["usage"] if x["arch"] == arch} for arch in SHARED}
    portable_kinds = {name for name in kinds[90] if not name.startswith(("s2_hopper", "s2_packed"))}
    assert len(portable_kinds) >= 8 and len(kinds[90] - portable_kinds) == 8
    assert kinds[80] == kinds[100] == portable_kinds
    for x in report["usage"]:
        assert x["shared"] <= SHARED[x["arch"]] * 1024, x


if __name__ == "__main__":
    gc.disable()  # the front end makes millions of small objects; 1.6 GiB at the most without
    backward_dkdv.concurrent_programs = lambda *_: 264  # an H100's, so that columns are cut
    others = ONCE if "once" in sys.argv else PORTABLE
    reports = [compile_all(arch, PORTABLE + HOPPER if arch == 90 else others) for arch in SHARED]
    whole = {key: [x for report in reports for x in report[key]] for key in reports[0]}
    print(json.dumps(whole | dict(triton=triton.__version__)))
