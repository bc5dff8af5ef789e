"""S2 attention kernels. Imports torch and triton, never Megatron; useful on its own."""

from s2_kernels.api import s2_attention, s2_attention_backward, s2_attention_varlen
from s2_kernels.block_sparse import block_sparse_attention
from s2_kernels.paged import paged_attention, write_pages
from s2_kernels.pattern import (
    FOREVER,
    Band,
    HeadRule,
    LayerPattern,
    dense,
    local_stride,
    ranges,
    sliding_window,
)
from s2_kernels.prefill import paged_prefill

__all__ = [
    "FOREVER",
    "Band",
    "HeadRule",
    "LayerPattern",
    "block_sparse_attention",
    "dense",
    "local_stride",
    "paged_attention",
    "paged_prefill",
    "ranges",
    "s2_attention",
    "s2_attention_backward",
    "s2_attention_varlen",
    "sliding_window",
    "write_pages",
]
