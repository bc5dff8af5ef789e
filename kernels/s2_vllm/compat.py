"""What differs between the releases of vLLM that the plugin runs in, each thing in one place.

    0.26                                            0.33
    the backend's class says how pages lie          a layer's spec does; the backend says which
                                                    orders of all pages in memory it takes
    the sizes of kernel blocks are asked for        they are asked for with a spec
    the manager says which pages all requests       it is not asked: nobody computes attention to
    share (abstract)                                a shared beginning by itself any more

Both come to the same bytes: a page is [2, B, d], the keys of a block and then its values. What the
plugin needs and neither release changed is used as it is, where it is needed. Features are asked
for, not version numbers, because the releases between the two have either form.
"""

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

SPEC_SAYS_HOW_PAGES_LIE = not hasattr(AttentionBackend, "get_kv_cache_shape")


def page_fields(head_size: int, dtype: torch.dtype) -> dict:
    """Fields of an AttentionSpec of one KV head, by which the layer's cache is [pages, 2, B, d].

    To vLLM these are two heads, one of keys and one of values, with half of the content each.
    """
    if not SPEC_SAYS_HOW_PAGES_LIE:
        return {}
    return dict(num_head_slots=2, state_content_bytes=head_size * dtype.itemsize)


class KeysThenValues(AttentionBackend):
    """A backend whose pages hold the keys of a block and then its values, in any release."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"
    ) -> tuple[int, ...]:
        """[pages, 2, B, d] of one KV head; asked for up to the release that let specs say it."""
        assert num_kv_heads == 1, f"{num_kv_heads} KV heads: every head has pages of its own"
        return (num_blocks, 2, block_size, head_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple:
        """Layer by layer, page by page: what is in a page is contiguous."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(16)]
