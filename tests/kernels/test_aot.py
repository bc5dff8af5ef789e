"""The shipped Hopper configurations, compiled for sm_90 with no GPU: no spills, no recompilation.

The kernels must be imported without the interpreter, so a process of its own compiles them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import json
import torch
from aot import compiled, main_loops, usage
from s2_kernels import backward_dkdv, local_stride, ranges
from s2_kernels.block_sparse import api as block_sparse
from s2_kernels.block_sparse import kernels as block_sparse_kernels
from s2_kernels.backward import launch_backward
from s2_kernels.decode import launch_decode, launch_write
from s2_kernels.forward import launch_forward
from s2_kernels.hopper.backward import launch_hopper_backward
from s2_kernels.hopper.forward import launch_hopper_forward
from s2_kernels.hopper.forward_wide import launch_hopper_forward_wide
from s2_kernels.launch import Packing

backward_dkdv.concurrent_programs = lambda *_: 264  # an H100's, so that columns are cut
pattern = local_stride(heads=4, local_blocks=4, stride=4)


def tensors(*shape, d=128):
    return [torch.randn(*shape, 4, d).bfloat16() for _ in range(4)]


def run(n, packing=None, deterministic=True):
    q, k, v, dout = tensors(n) if packing else tensors(1, n)
    common = (pattern, 0.1)
    out, lse = launch_forward(q, k, v, *common, packing=packing)
    options = dict(packing=packing, deterministic=deterministic)
    launch_backward(q, k, v, out, lse, dout, None, *common, **options)


def run_sparse(n):
    q, k, v, dout = tensors(1, n)
    mask = torch.ones(4, -(-n // 64), -(-n // 64), dtype=torch.bool)
    common = (block_sparse._tables_of(mask, q.device), 64, 0.1)
    out, lse = block_sparse_kernels.launch_forward(q, k, v, *common)
    block_sparse_kernels.launch_backward(q, k, v, out, lse, dout, None, *common)


three = ranges(heads=4, block_size=64, bands=[(2, 1), (5, 2), (None, 4)])


def run_hopper(n, d, pattern, packing=None, dtype=torch.bfloat16):
    shape = (n,) if packing else (1, n)
    q, k, v, dout = (x.to(dtype) for x in tensors(*shape, d=d))
    options = (packing,) if d <= 128 else ()
    launch = launch_hopper_forward if d <= 128 else launch_hopper_forward_wide
    out, lse = launch(q, k, v, pattern, 0.1, *options)
    launch_hopper_backward(q, k, v, out, lse, dout, None, pattern, 0.1, packing)


def run_pages(n):  # a token of two sequences of n, and a chunk of a prompt
    pages = torch.zeros(3, 64, 128, dtype=torch.bfloat16)
    table = torch.zeros(2, 4, n // 64, dtype=torch.int32)
    lengths = torch.full((2,), n - 1, dtype=torch.int32)
    for s in (1, 200):
        k = torch.zeros(2, s, 4, 128, dtype=torch.bfloat16)
        launch_write(k, k, pages, pages, table, lengths, pattern, alive_only=False)
        launch_decode(k, pages, pages, table, lengths, pattern, 0.1)


def packed(n):
    cu_seqlens = torch.tensor([0, n // 3, n], dtype=torch.int32)
    return Packing(cu_seqlens, cu_seqlens, n, n)


def run_all(n):  # returns how many launches came before those of packed sequences
    run(n)
    run(n, deterministic=False)
    run_sparse(n)
    run_hopper(n, 128, pattern)
    run_hopper(n, 128, local_stride(heads=4, block_size=128, local_blocks=2, stride=4))
    run_hopper(n, 128, three)
    run_hopper(n, 128, pattern, dtype=torch.float16)
    run_hopper(n, 64, pattern)
    run_hopper(n, 256, pattern)
    run_pages(n)
    dense = len(kernels)
    run(n, packed(n))
    run_hopper(n, 128, pattern, packed(n))
    return dense


with compiled() as kernels:
    dense = run_all(4096)
    first = {id(kernel): kernel for kernel in kernels}
    dense = {id(kernel) for kernel in kernels[:dense]}
    run_all(5519)
again = [kernel.metadata.name for kernel in kernels if id(kernel) not in first]
used = [vars(usage(k)) | dict(packed=id(k) not in dense) for k in first.values()]
hopper = [k for k in first.values() if k.metadata.name.startswith("s2_hopper")]
loops = [(k.metadata.name, main_loops(k)) for k in hopper]
print(json.dumps(dict(usage=used, recompiled=again, loops=loops)))
"""

# Bytes of stack, KiB of shared memory, and the main loop: a second product is in flight when the
# first one is waited for. The exponentials (EX2) stand after both, when the other warpgroup has the
# tensor cores. That is what measured faster.
BACKWARD_LOOP = ["HGMMA", "WAIT 1", "EX2", "WAIT 0", "EX2", "HGMMA", "WAIT 0"]
HOPPER = dict(
    s2_hopper_forward_kernel=dict(stack=8, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]),
    s2_hopper_dkdv_kernel=dict(stack=176, shared=226.5, loop=BACKWARD_LOOP),
    s2_hopper_dq_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_forward_wide_kernel=dict(
        stack=16, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]
    ),
    s2_hopper_dq_wide_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_dkdv_wide_kernel=dict(stack=8, shared=226, loop=None),  # two, see below
)
WIDE_DKDV_LOOPS = [  # the warpgroup of dk, that of dv
    ["HGMMA", "WAIT 0", "HGMMA", "WAIT 0"],
    ["EX2", "HGMMA", "WAIT 1", "WAIT 0"],
]
KERNELS = dict(  # how many kinds of each: dense and packed; dk and dv also fused with dq
    s2_forward_kernel=2,
    s2_hopper_forward_kernel=6,  # d = 128, blocks of 128, ranges, float16, packed, d = 64
    s2_hopper_dkdv_kernel=6,
    s2_hopper_dq_kernel=6,
    s2_hopper_forward_wide_kernel=1,
    s2_hopper_dq_wide_kernel=1,
    s2_hopper_dkdv_wide_kernel=1,
    s2_packed_slots_kernel=2,  # for queries, for columns
    s2_dkdv_kernel=3,
    s2_dq_kernel=2,
    s2_row_terms_kernel=2,  # d = 128, 256
    s2_add_pieces_kernel=2,
    s2_sparse_forward_kernel=1,
    s2_sparse_dkdv_kernel=1,
    s2_sparse_dq_kernel=1,
    s2_decode_kernel=2,  # one token, a chunk
    s2_merge_kernel=2,
    s2_write_kernel=1,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root / 'kernels'}:{root / 'tests/support'}"
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills(report):
    """But for dk and dv of packed sequences, a little: pointer loads, where TMA cannot be used.

    The Hopper kernels hand registers from warp to warp, and keep scalars of an item on the stack.
    """
    used = report["usage"]
    names = [x["kernel"] for x in used]
    assert {name: names.count(name) for name in names} == KERNELS
    spilling = [x for x in used if x["stack"] and x["kernel"] not in HOPPER]
    assert {x["kernel"] for x in spilling} <= {"s2_dkdv_kernel"}
    assert all(x["packed"] and x["stack"] <= 128 for x in spilling)
    assert all(x["shared"] <= 227 * 1024 for x in used)
    for x in used:
        if x["kernel"] in HOPPER:
            written = HOPPER[x["kernel"]]
            assert x["registers"] == 168 and x["stack"] <= written["stack"], x
            assert x["shared"] <= written["shared"] * 1024, x


@pytest.mark.parametrize("kernel", HOPPER)
def test_hopper_main_loops(report, kernel):
    """Both warpgroups' loops: no spills but a scalar, and work under the products as written."""
    variants = [loops for name, loops in report["loops"] if name == kernel]
    assert len(variants) == KERNELS[kernel]
    for loops in variants:
        assert len(loops) == 2
        for loop in loops:
            assert loop["loads"] <= 2 and loop["stores"] == 0
        written = HOPPER[kernel]["loop"]
        expected = [written] * 2 if written else WIDE_DKDV_LOOPS
        assert [loop["ops"] for loop in loops] == expected


def test_a_second_length_compiles_nothing(report):
    assert report["recompiled"] == []
