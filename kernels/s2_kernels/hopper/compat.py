"""Gluon's operations that were renamed between the Triton releases that run here (versions.py)."""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # 3.8 and later
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""All threads of a partition wait for each other."""


@builtin
def _async_add(tensor_desc, coord, src, _semantic=None):
    """`tma.async_atomic_add` of later releases: 3.6 has the operation, but no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle
    )


async_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _async_add
"""Adds a tile in shared memory to global memory, in the L2 cache; waited for as a store is."""
