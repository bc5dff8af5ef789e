"""Megatron core attention: S2 for sparse layers, torch SDPA for dense ones without TE.

Contract (Megatron Core 0.19, megatron/core/transformer/attention.py): q is [s, b, h, d] and k, v
are [s, b, g, d] for this tensor-parallel rank's heads, positions already rotated, sequence
parallelism already gathered; the result is [s, b, h * d]. Under context parallelism s counts this
rank's tokens. Packed documents (THD): q is [t, h, d], k and v are [t, g, d], and the result is
[t, h * d].
"""

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2_kernels import LayerPattern, s2_attention_varlen
from s2megatron.attention.context_parallel import ContextAttention
from s2megatron.attention.recompute import OutputKeeper


def build_core_attention(
    *,
    patterns: tuple[LayerPattern, ...],
    dense: Callable | None,
    keep_output: bool,
    exchange_groups: int | None = None,
    config: TransformerConfig,
    layer_number: int,
    **contract,
) -> MegatronModule:
    """The core attention of one layer, chosen by its global number.

    One uniform layer spec serves all layers, so pipeline stages need no slicing and checkpoints
    stay homogeneous.

    Args:
        patterns: one per layer of the whole model, for global head counts.
        dense: builds the core attention of the layers whose pattern is dense; None for
            TorchDenseAttention.
        keep_output: of sparse layers, see S2CoreAttention.
        exchange_groups: see ContextAttention.
        layer_number: global and 1-based.
        contract: Megatron's other keywords, handed on.
    """
    pattern = patterns[layer_number - 1]
    contract |= {"config": config, "layer_number": layer_number}
    if not pattern.is_dense:
        ours = {"pattern": pattern, "exchange_groups": exchange_groups}
        return S2CoreAttention(keep_output=keep_output, **ours, **contract)
    if dense:
        return dense(**contract)
    return TorchDenseAttention(pattern=pattern, exchange_groups=exchange_groups, **contract)


def let_go(value: Tensor, query: Tensor) -> Tensor:
    """`value`, as a copy where keeping it for the backward pass would keep more than itself.

    Megatron cuts q, k and v out of one projection. Rotated q and k are new tensors, v is a view of
    all three, and would hold them: 3 GiB of 42 in a 1.3B model at 32k tokens on two GPUs, 12 of 133
    at 128k. The copy is 0.2% of a step's time.
    """
    shared = value.untyped_storage()
    whole = shared.nbytes() > value.numel() * value.element_size()
    pinned_anyway = query.untyped_storage().data_ptr() == shared.data_ptr()
    return value.contiguous() if whole and not pinned_anyway else value


class _CausalCoreAttention(MegatronModule):
    """What the two attentions here share: the contract. No parameters, no buffers.

    A subclass gives `_attend`: q [b, s, h, d], k and v [b, s, g, d] -> [b, s, h, d].

    Args:
        config, layer_number, ...: Megatron's core-attention contract. `cp_comm_type` is for layers
            that Transformer Engine runs: here one exchange serves all.
        pattern: the layer's lifetimes, for the model's global head counts. The slice of this
            tensor-parallel rank is taken here, and nowhere else.
        exchange_groups: see ContextAttention.

    Raises:
        ValueError: heads do not divide over the ranks, or the layer asks for what is not done here
            (dropout, masks, a KV cache, packed documents under context parallelism).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        *,
        pattern: LayerPattern,
        exchange_groups: int | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._require(attention_type == "self", f"attention_type={attention_type!r}", "'self' only")
        self._require(
            attn_mask_type == AttnMaskType.causal, f"attn_mask_type={attn_mask_type}", "causal only"
        )
        self._require(dropout == 0, f"attention_dropout={dropout}", "set attention_dropout to 0")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.pattern = pattern.shard(groups.tp.rank(), groups.tp.size())
        if groups.cp.size() == 1:
            exchange_groups = None  # nothing is exchanged, so any number will do
        self.context = ContextAttention(
            self.pattern, softmax_scale, groups.cp, exchange_groups=exchange_groups
        )
        recomputed = config.recompute_granularity == "full" or (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        self.keeps_inputs = not recomputed

    def _require(self, holds: bool, found: str, way_out: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}, layer {self.layer_number}: {found}: {way_out}"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q [s, b, h, d], k and v [s, b, g, d] -> [s, b, h * d], for this rank's heads.

        Packed: [t, h, d], [t, g, d] -> [t, h * d]; positions and blocks start afresh in each
        document.
        """
        self._require(attention_bias is None, "attention_bias", "is not supported")
        self._require(
            attn_mask_type in (None, AttnMaskType.causal),
            f"attn_mask_type={attn_mask_type}",
            "causal only",
        )
        self._require(
            attention_mask is None,
            "attention_mask",
            "the causal mask is built in and no other is applied; give "
            "--no-create-attention-mask-in-dataloader",
        )
        self._require(
            query.shape[0] == key.shape[0],
            f"{query.shape[0]} queries against {key.shape[0]} keys",
            "Megatron's KV cache is not supported; convert the checkpoint (s2megatron convert "
            "to-hf) and generate in transformers (docs/inference.md)",
        )
        if self.keeps_inputs and torch.is_grad_enabled():
            value = let_go(value, query)
        if packed_seq_params is not None:
            return self._attend_packed(query, key, value, packed_seq_params).flatten(1)
        out = self._attend(*(x.transpose(0, 1) for x in (query, key, value)))
        return out.transpose(0, 1).flatten(2)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams) -> Tensor:
        """[t, h, d] and [t, g, d] -> [t, h, d]: attention within each document."""
        self._require(packed.qkv_format == "thd", f"qkv_format={packed.qkv_format!r}", "'thd' only")
        self._require(
            self.cp_group.size() == 1,
            f"packed documents with context_parallel_size={self.cp_group.size()}",
            "documents and context-parallel chunks do not fit together; leave one of them out",
        )
        for rows, ends in (("cu_seqlens_q_padded", "cu_seqlens_q"),
                           ("cu_seqlens_kv_padded", "cu_seqlens_kv")):  # fmt: skip
            self._require(
                getattr(packed, rows) is None or getattr(packed, rows) is getattr(packed, ends),
                rows,
                f"documents are taken to lie where {ends} says; give the padded one there, too: "
                "nothing attends to what pads the end of a document",
            )
        return s2_attention_varlen(
            q,
            k,
            v,
            self.pattern,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_kv,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
        )


class S2CoreAttention(_CausalCoreAttention):
    """Sparsely-Sharded attention of one layer, for the heads of this tensor-parallel rank.

    Args:
        keep_output: under full activation recompute, keep the output instead of computing it again
            (recompute.py).
    """

    def __init__(self, *args, keep_output: bool = False, **contract):
        super().__init__(*args, **contract)
        keep = keep_output and self.config.recompute_granularity == "full"
        self.keeper = OutputKeeper(self.context) if keep else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = self.keeper if self.keeper and self.training else self.context
        return run.attend(q, k, v)


class TorchDenseAttention(_CausalCoreAttention):
    """Dense causal attention, for layers that the configuration calls dense.

    By torch SDPA: Megatron's own local attention holds all s x s scores. SDPA knows no documents
    and gives no lse, so packed documents and context parallelism go to the S2 kernels, with a
    pattern that keeps everything.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cp_group.size() > 1:
            return self.context.attend(q, k, v)
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)
