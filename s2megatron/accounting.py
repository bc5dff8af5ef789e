"""What a model costs: parameters and true FLOPs, from its shape and its patterns.

Megatron's own throughput line counts dense attention. Here attention counts the (query, key) pairs
that the patterns keep, and nothing that is recomputed: 4 FLOPs per pair and head dimension forward,
8 backward; 6 per weight and token for the matrix products.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2_kernels import LayerPattern


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that parameters and FLOPs depend on; `from_megatron` reads them off Megatron."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Padded."""
    seq_len: int
    gated: bool
    """SwiGLU: two input matrices."""
    bias: bool
    qkv_bias: bool
    norm_bias: bool
    """LayerNorm has one, RMSNorm has none."""
    qk_norm: bool
    output_gate: bool
    """Attention's output times a gate, whose projection lies beside q's."""
    tied_embeddings: bool
    position_embeddings: int
    """Learned positions (0 with rotary embeddings)."""
    experts: int
    """0: no mixture of experts."""
    experts_per_token: int
    expert_ffn: int
    shared_expert_ffn: int
    shared_expert_gate: bool
    """The shared expert's output times a number that a projection makes of each token."""
    moe_layers: tuple[bool, ...]
    """Which layers hold experts."""

    @classmethod
    def from_megatron(cls, config, args) -> "ModelShape":
        """From Megatron's TransformerConfig and arguments."""
        experts = config.num_moe_experts or 0
        frequency = config.moe_layer_freq
        if isinstance(frequency, int):
            frequency = [i % frequency == 0 for i in range(config.num_layers)]
        learned = args.position_embedding_type == "learned_absolute"
        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            ffn=config.ffn_hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_query_groups,
            head_dim=config.kv_channels,
            vocab=args.padded_vocab_size,
            seq_len=args.seq_length,
            gated=config.gated_linear_unit,
            bias=config.add_bias_linear,
            qkv_bias=config.add_bias_linear or config.add_qkv_bias,
            norm_bias=config.normalization == "LayerNorm",
            qk_norm=config.qk_layernorm,
            output_gate=config.attention_output_gate,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            position_embeddings=args.max_position_embeddings if learned else 0,
            experts=experts,
            experts_per_token=config.moe_router_topk if experts else 0,
            expert_ffn=(config.moe_ffn_hidden_size or config.ffn_hidden_size) if experts else 0,
            shared_expert_ffn=config.moe_shared_expert_intermediate_size or 0,
            shared_expert_gate=config.moe_shared_expert_gate,
            moe_layers=tuple(bool(x) and experts > 0 for x in frequency),
        )

    @property
    def attention_weights(self) -> int:
        """Matrix weights of one layer's projections."""
        return self.hidden * self.head_dim * (self.heads + self.qkv_heads)

    @property
    def qkv_heads(self) -> int:
        """Heads that the first projection makes: of q, k, v and the gate."""
        return self.heads * (2 if self.output_gate else 1) + 2 * self.kv_heads

    def _mlp_weights(self, ffn: int) -> int:
        return self.hidden * ffn * (3 if self.gated else 2)

    def mlp_weights(self, layer: int, *, per_token: bool) -> int:
        """Matrix weights of layer `layer` (0-based); only a token's own experts if `per_token`."""
        if not self.moe_layers[layer]:
            return self._mlp_weights(self.ffn)
        experts = self.experts_per_token if per_token else self.experts
        shared = self._mlp_weights(self.shared_expert_ffn)
        if self.shared_expert_ffn and self.shared_expert_gate:
            shared += self.hidden
        return experts * self._mlp_weights(self.expert_ffn) + shared + self.hidden * self.experts

    def parameters(self) -> int:
        """All parameters of the model, the padded vocabulary included."""
        total = self._norm + self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        total += self.position_embeddings * self.hidden
        return total + sum(self.layer_parameters(layer) for layer in range(self.layers))

    def layer_parameters(self, layer: int) -> int:
        """All parameters of layer `layer` (0-based)."""
        total = self.attention_weights + self.mlp_weights(layer, per_token=False) + 2 * self._norm
        if self.qk_norm:
            total += 2 * self.head_dim * (2 if self.norm_bias else 1)
        if self.qkv_bias:
            total += self.head_dim * self.qkv_heads
        if self.bias:
            total += self.hidden + self._mlp_biases(layer)
        return total

    @property
    def _norm(self) -> int:
        return self.hidden * (2 if self.norm_bias else 1)

    @property
    def expert_mlp_weights(self) -> int:
        """Matrix weights of one routed expert."""
        return self._mlp_weights(self.expert_ffn)

    def _mlp_biases(self, layer: int) -> int:
        up = 2 if self.gated else 1
        if not self.moe_layers[layer]:
            return up * self.ffn + self.hidden
        shared = up * self.shared_expert_ffn + self.hidden if self.shared_expert_ffn else 0
        return self.experts * (up * self.expert_ffn + self.hidden) + shared

    def matmul_flops_per_token(self) -> int:
        """Forward and backward of all matrix products but attention's, per token."""
        weights = self.vocab * self.hidden
        for layer in range(self.layers):
            weights += self.attention_weights + self.mlp_weights(layer, per_token=True)
        return 6 * weights

    def layer_flops(self, layer: int, pattern: LayerPattern) -> int:
        """Forward and backward of layer `layer` (0-based) for one sequence."""
        weights = self.attention_weights + self.mlp_weights(layer, per_token=True)
        return 6 * weights * self.seq_len + 12 * self.head_dim * pattern.kept_pairs(self.seq_len)

    def output_flops(self) -> int:
        """Forward and backward of the logits' matrix product for one sequence."""
        return 6 * self.vocab * self.hidden * self.seq_len

    def attention_flops(self, patterns: tuple[LayerPattern, ...]) -> int:
        """Forward and backward of all layers' attention for one sequence: kept pairs only."""
        return 12 * self.head_dim * sum(p.kept_pairs(self.seq_len) for p in patterns)

    def dense_attention_flops(self) -> int:
        """The same for dense causal attention in every layer."""
        pairs = self.heads * self.seq_len * (self.seq_len + 1) // 2
        return 12 * self.head_dim * self.layers * pairs

    def flops_per_sequence(self, patterns: tuple[LayerPattern, ...]) -> int:
        """True model FLOPs of one training sequence, forward and backward."""
        return self.matmul_flops_per_token() * self.seq_len + self.attention_flops(patterns)


class KeptPairs:
    """Pairs that a model's layers keep of sequences of any lengths, counted from tables.

    `LayerPattern.kept_pairs` takes a pass over the blocks for every length; packed documents have
    new lengths in every batch. Here a table per pattern grows to the longest sequence seen.

    Args:
        patterns: one per layer.
    """

    def __init__(self, patterns: Sequence[LayerPattern]):
        self.layers = Counter(patterns)
        self.heads = sum(pattern.heads for pattern in patterns)
        self._tables: dict[LayerPattern, tuple[torch.Tensor, torch.Tensor]] = {}

    def count(self, lengths: torch.Tensor) -> tuple[int, int]:
        """(pairs kept, pairs of dense causal attention), of all layers and query heads.

        Args:
            lengths: tokens of each sequence, on the host.
        """
        lengths = lengths.long()
        dense = int((lengths * (lengths + 1) // 2).sum())
        kept = sum(
            layers * self._count_pattern(pattern, lengths)
            for pattern, layers in self.layers.items()
        )
        return kept, dense * self.heads

    def _count_pattern(self, pattern: LayerPattern, lengths: torch.Tensor) -> int:
        size = pattern.block_size
        blocks, rest = lengths // size, lengths % size
        past, before = self._table(pattern, int(blocks.max()) + 1)
        # Whole blocks, then the rows of the cut one: the kept past of each, and their triangle.
        pairs = before[blocks] + rest * past[blocks] * size
        return int((pairs + pattern.heads * (rest * (rest + 1) // 2)).sum())

    def _table(self, pattern: LayerPattern, n_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Per query block: the past blocks its heads keep, and all pairs of the blocks before it.

        Sums over query heads.
        """
        if pattern in self._tables and len(self._tables[pattern][0]) >= n_blocks:
            return self._tables[pattern]
        changes = torch.zeros(n_blocks + 1, dtype=torch.int64)
        first = torch.arange(n_blocks)
        group = pattern.heads // pattern.kv_heads
        for rule, heads in Counter(pattern.rules).items():
            # Block k is past from k + 1 on, and dropped at k + lifetime.
            dropped = (first + rule.lifetimes(n_blocks)).clamp(max=n_blocks)
            changes[1:] += heads * group
            changes.index_add_(0, dropped, torch.full_like(dropped, -heads * group))
        past = changes.cumsum(0)[:n_blocks]
        size = pattern.block_size
        pairs = past * size * size + pattern.heads * (size * (size + 1) // 2)
        self._tables[pattern] = past, pairs.cumsum(0) - pairs
        return self._tables[pattern]
