"""Attention under any block mask, per head: the table-driven path for research."""

from s2_kernels.block_sparse.api import block_sparse_attention

__all__ = ["block_sparse_attention"]
