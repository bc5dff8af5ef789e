"""One KV head as vLLM's KV cache knows it: `S2Spec`, and `S2Manager`, which holds its pages."""

from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from s2_kernels.pattern import HeadRule
from s2_vllm.rules import HeldBlocks


class S2Manager(SingleTypeKVCacheManager):
    """Holds of every request the pages that are alive, and finds them again in the prefix cache.

    As in vLLM's managers, a block that is not held is the null block in the request's list.
    """

    def __init__(self, kv_cache_spec: "S2Spec", **options):
        super().__init__(kv_cache_spec, **options)
        self._held = kv_cache_spec.held
        self._in_flight = kv_cache_spec.in_flight
        self._freed_until: dict[str, int] = {}
        """The block of the next query when the dead were last freed, of each request."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees the blocks that died, counted in tokens that are computed for good."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        since = self._freed_until.get(request_id, 0)
        now = processed_computed_tokens // self.block_size
        if now <= since:
            return
        self._freed_until[request_id] = now
        dead = [k for i in range(since + 1, now + 1) for k in self._held.dying(i)]
        dead = [k for k in dead if k < len(blocks) and blocks[k] is not self._null_block]
        freed = [blocks[k] for k in sorted(dead, reverse=True)]
        for k in dead:
            blocks[k] = self._null_block
        if freed:
            self.block_pool.free_blocks(freed)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks,
        *counts,
        apply_admission_cap: bool = False,
        **more_counts,
    ) -> int:
        """As vLLM's; to admit a whole text, the most pages that it holds at a time are asked for.

        Pages found in the prefix cache count as asked for where nobody else holds them: they leave
        the free ones.
        """
        if apply_admission_cap and request_id not in self.num_cached_block:
            shared = sum(not b.is_null and b.ref_cnt > 0 for b in new_computed_blocks)
            return max(0, self._held.most(num_tokens, self._in_flight) - shared)
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *counts, **more_counts
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks,
        num_local_computed_tokens: int,
        *counts,
        **more_counts,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, *counts, **more_counts
        )
        self._freed_until[request_id] = num_local_computed_tokens // self.block_size

    def pop_blocks_for_free(self, request_id: str):
        self._freed_until.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: attention to a shared prefix apart from the rest is not computed here."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool,
        kv_cache_spec: "S2Spec",
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ):
        """The longest prefix of which all that its next query needs is cached.

        Returns:
            Per group, the block of every number below the hit (dead ones: the null block), and the
            hit's tokens.
        """
        size = kv_cache_spec.block_size
        assert not drop_eagle_block and dcp_world_size == pcp_world_size == 1  # checks.py refuses
        assert alignment_tokens == size, f"{alignment_tokens} tokens: pages of one size, {size}"
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found = {}

        def is_cached(block: int) -> bool:
            found[block] = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
            return found[block] is not None

        held = kv_cache_spec.held
        blocks = held.longest_hit(is_cached, min(max_length // size, len(hashes)))
        hit = tuple([block_pool.null_block] * blocks for _ in kv_cache_group_ids)
        for block in held.alive(blocks * size):
            for of_group, cached in zip(hit, found[block], strict=True):
                of_group[block] = cached
        return hit, blocks * size


@register_kv_cache_spec(manager_class=S2Manager)
@dataclass(frozen=True, kw_only=True)
class S2Spec(AttentionSpec):
    """Pages of one KV head. Heads of one spec share page tables, whatever layer they are in.

    Attributes:
        rules: of the heads in this place on all tensor-parallel ranks (rules.HeldBlocks).
        in_flight: the most tokens that are scheduled and not yet computed, of all requests.
        place: which of its layer's heads with these rules it is, from 0 on. So heads of a layer
            that have equal rules come into groups of their own, and with it into one tensor: one
            launch. Dense heads are all 0: of few dense layers, groups would be smaller than others.
    """

    rules: tuple[HeadRule, ...]
    in_flight: int
    place: int = 0

    @property
    def held(self) -> HeldBlocks:
        return HeldBlocks(self.block_size, self.rules)

    def max_memory_usage_bytes(self, vllm_config) -> int:
        most = self.held.most(vllm_config.model_config.max_model_len, self.in_flight)
        return most * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs) -> bool:
        """Heads of different lifetimes need page tables of their own."""
        return all(spec == self for spec in kv_cache_specs.values())
