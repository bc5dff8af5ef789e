"""Attention of a layer whose KV heads have page tables of their own, over s2_kernels.paged.

T tokens of a step, r requests, h query heads, g KV heads, d head size, B block size. vLLM hands
over q [T, h, d], k and v [T, g, d], request after request, and per cache group a table [r, blocks].
A page is [2, B, d]: the keys of a block, then its values.
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from s2_kernels.paged import paged_attention, write_pages
from s2_kernels.pattern import LayerPattern
from s2_kernels.prefill import paged_prefill, scratch_bytes, takes_prefill
from s2_vllm.checks import check_cache_dtype
from s2_vllm.compat import KeysThenValues, page_fields
from s2_vllm.rules import HeldBlocks, places
from s2_vllm.spec import S2Spec
from s2_vllm.warmup import get_ready


@dataclass(frozen=True)
class Run:
    """Requests first..end-1, with `tokens` new tokens each, from `token` on in the step's."""

    first: int
    end: int
    token: int
    tokens: int
    length: int = 0
    """Of a request with more than one new token: all its tokens, the new ones included."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    @property
    def new(self) -> slice:
        """Their new tokens, of the step's."""
        return slice(self.token, self.token + (self.end - self.first) * self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.first, self.tokens


@dataclass
class S2Metadata:
    """A step, as the layers of one cache group see it.

    Attributes:
        block_table: int32 [r, blocks]; entries of dead blocks are stale.
        seq_lens: int32 [r], the new tokens included; 0 where a row pads a CUDA graph.
        query_start_loc_cpu: int32 [r + 1] on the host.
        seq_lens_cpu: seq_lens on the host. vLLM has it as an upper bound, which is exact but for
            speculative decoding, which is refused (checks.py). None: the GPU is waited for.
        max_query_len: the most new tokens of a request.
        tables: int32 [r, g, blocks] of groups that belong to one launch, made at the first layer
            that asks.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    max_query_len: int
    tables: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbours that decode run as one batch, every chunk of a prompt by itself."""
        rows = len(self.seq_lens)
        if self.max_query_len == 1:  # rows that pad a graph come last, and their length is 0
            return (Run(0, rows, 0, 1),)
        runs = []
        starts = self.query_start_loc_cpu[: rows + 1].tolist()
        known = self.seq_lens if self.seq_lens_cpu is None else self.seq_lens_cpu
        lengths = known[:rows].tolist()
        for row in range(rows):
            tokens = starts[row + 1] - starts[row]
            if tokens == 1 and runs and runs[-1].tokens == 1 and runs[-1].end == row:
                runs[-1] = Run(runs[-1].first, row + 1, runs[-1].token, 1)
            elif tokens > 0:
                runs.append(Run(row, row + 1, starts[row], tokens, lengths[row]))
        return tuple(runs)


class S2MetadataBuilder(AttentionMetadataBuilder):
    """Does next to nothing: it is called for every group in every step."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1  # decoding requests first, so that they are one run

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> S2Metadata:
        common = common_attn_metadata
        return S2Metadata(
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            query_start_loc_cpu=common.query_start_loc_cpu,
            seq_lens_cpu=common.seq_lens_cpu_upper_bound,
            max_query_len=common.max_query_len,
        )


@dataclass(frozen=True)
class Pool:
    """Neighbouring KV heads of a layer whose pages lie in one tensor: one launch.

    Attributes:
        first, end: KV heads, as this rank counts them.
        pattern: of these heads and their query heads.
        names: of the heads, as vLLM's cache knows them.
        k_pages, v_pages: [pages, B, d].
    """

    first: int
    end: int
    pattern: LayerPattern
    names: tuple[str, ...]
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    def table(self, metadata: dict[str, S2Metadata]) -> torch.Tensor:
        """int32 [r, heads, blocks]; the layers whose heads share groups share it."""
        groups = [metadata[name] for name in self.names]
        tables, key = groups[0].tables, tuple(map(id, groups))
        if key not in tables:
            tables[key] = torch.stack([group.block_table for group in groups], dim=1)
        return tables[key]


class S2Impl(AttentionImpl):
    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
    ):
        asked = dict(alibi_slopes=alibi_slopes, sliding_window=sliding_window,
                     logits_soft_cap=logits_soft_cap,
                     kv_sharing_target_layer_name=kv_sharing_target_layer_name)  # fmt: skip
        for name, value in asked.items():
            if value is not None:
                raise ValueError(f"{name}={value!r}: S2 attention does not compute it")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: "S2Attention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: S2Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes k and v [T, g, d] into pages, then attends from q [T, h, d] into output."""
        if attn_metadata is None:  # memory is measured, or vLLM warms up
            query.new_empty(layer.scratch, dtype=torch.uint8)  # what a chunk of a prompt will take
            layer.get_ready()
            return output.zero_()
        metadata = get_forward_context().attn_metadata
        group = self.num_heads // self.num_kv_heads
        for pool in layer.pools:
            table = pool.table(metadata)
            heads = slice(pool.first * group, pool.end * group)
            kv_heads = slice(pool.first, pool.end)
            runs = attn_metadata.runs
            pages = [
                (pool.k_pages, pool.v_pages, table[run.rows], attn_metadata.seq_lens[run.rows],
                 pool.pattern)
                for run in runs
            ]  # fmt: skip
            # All are written before any attends: vLLM lets a request find blocks in the prefix
            # cache that another one, maybe behind it, computes in the same step.
            for run, its in zip(runs, pages, strict=True):
                k, v = (x[run.new, kv_heads].unflatten(0, run.shape) for x in (key, value))
                write_pages(k, v, *its, check=False)
            for run, its in zip(runs, pages, strict=True):
                q = query[run.new, heads].unflatten(0, run.shape)
                if takes_prefill(run.tokens, pool.pattern.block_size):
                    into = output[None, run.new, heads]
                    known = dict(lengths=(run.length,), softmax_scale=self.scale)
                    paged_prefill(q, *its[:3], pool.pattern, into=into, check=False, **known)
                    continue
                out = paged_attention(q, *its, softmax_scale=self.scale, check=False)
                output[run.new, heads] = out.flatten(0, 1)
        return output


@register_backend(AttentionBackendEnum.CUSTOM)
class S2Backend(KeysThenValues):
    forward_includes_kv_cache_update = True
    supported_dtypes = (torch.float16, torch.bfloat16, torch.float32)

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return S2Impl

    @staticmethod
    def get_builder_cls():
        return S2MetadataBuilder


class S2HeadCache(nn.Module, AttentionLayerBase):
    """The pages of one more KV head: to vLLM's cache a layer, with nothing to compute."""

    def __init__(self, name: str, spec: S2Spec, num_heads: int):
        super().__init__()
        self.layer_name, self.spec = name, spec
        self.num_heads = num_heads  # vLLM splits a group where it differs
        self.kv_cache = torch.tensor([])
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def get_attn_backend(self):
        return S2Backend

    def get_kv_cache_spec(self, vllm_config) -> S2Spec:
        return self.spec


class S2Attention(Attention):
    """vLLM's attention layer in the place of `stock`; its own cache is that of KV head 0.

    Args:
        stock: the layer that it takes the place of.
        pattern: of this rank's heads.
        held: per KV head of a rank, what is held for it (rules.held_by_ranks).
    """

    def __init__(self, stock: Attention, pattern: LayerPattern, held: tuple[HeldBlocks, ...]):
        config = get_current_vllm_config()
        self._of_model = config.compilation_config.static_forward_context
        del self._of_model[stock.layer_name]
        super().__init__(
            stock.num_heads,
            stock.head_size,
            stock.impl.scale,
            num_kv_heads=stock.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=stock.quant_config,
            prefix=stock.layer_name,
            attn_backend=S2Backend,
        )
        check_cache_dtype(self.kv_cache_dtype, config.model_config, None, stock.layer_name)
        self.pattern, self._pools_of = pattern, None
        self.sequences = config.scheduler_config.max_num_seqs
        self.longest = config.model_config.max_model_len
        self.new_tokens = min(config.scheduler_config.max_num_batched_tokens, self.longest)
        row_bytes = 2 * self.head_size * self.kv_cache_torch_dtype.itemsize
        self.scratch = scratch_bytes(pattern, row_bytes, self.new_tokens, self.longest)
        self.specs = tuple(
            self._spec(head, place, config.max_in_flight_tokens)
            for head, place in zip(held, places(held), strict=True)
        )
        name = stock.layer_name
        # In a tuple: as submodules they would appear in the state dict.
        self.other_heads = tuple(
            S2HeadCache(f"{name}.kv{head}", spec, stock.num_heads)
            for head, spec in enumerate(self.specs[1:], 1)
        )

    def _spec(self, held: HeldBlocks, place: int, in_flight: int) -> S2Spec:
        return S2Spec(
            block_size=held.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            rules=held.rules,
            in_flight=in_flight,
            place=place,
            **page_fields(self.head_size, self.kv_cache_torch_dtype),
        )

    def get_kv_cache_spec(self, vllm_config) -> S2Spec:
        return self.specs[0]

    @property
    def pools(self) -> tuple[Pool, ...]:
        """One of all KV heads where vLLM put them into one tensor, as it does for equal layers."""
        self.get_ready()
        return self._pools

    def get_ready(self) -> None:
        """With a new cache, all layers find their pools and their kernels are compiled.

        vLLM gives all layers their caches at once: small ones first, to measure memory.
        """
        if self._pools_of is self.kv_cache or self.kv_cache.numel() == 0:
            return
        layers = [layer for layer in self._of_model.values() if isinstance(layer, S2Attention)]
        for layer in layers:
            layer._pools, layer._pools_of = layer._find_pools(), layer.kv_cache
        get_ready(layers)

    def _find_pools(self) -> tuple[Pool, ...]:
        layers = (self, *self.other_heads)
        caches = [layer.kv_cache for layer in layers]
        group, pools, first = self.num_heads // self.num_kv_heads, [], 0
        for end in range(1, len(layers) + 1):
            if end < len(layers) and caches[end].data_ptr() == caches[first].data_ptr():
                continue
            rules = self.pattern.rules[first:end]
            pattern = LayerPattern(group * len(rules), self.pattern.block_size, rules)
            names = tuple(layer.layer_name for layer in layers[first:end])
            k_pages, v_pages = caches[first].unbind(1)
            pools.append(Pool(first, end, pattern, names, k_pages, v_pages))
            first = end
        return tuple(pools)
