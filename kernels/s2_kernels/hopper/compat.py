"""Gluon's operations that were renamed between the Triton releases that run here (versions.py)."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):  # 3.8 and later
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""All threads of a partition wait for each other."""
