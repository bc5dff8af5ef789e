"""What one rank computes, moves and sends for one layer and one micro-batch.

Symbols: T tokens of a micro-batch on one CP rank (b * s / c), h hidden size, t tensor-parallel
size; with sequence parallelism the parts between the matrix products hold T / t tokens.
"""

import functools
from dataclasses import dataclass

from s2_kernels import LayerPattern
from s2megatron.accounting import ModelShape
from s2megatron.context_split import tp_shards
from s2megatron.machine import Machine
from s2megatron.planner.context import context_traffic, copied_bytes
from s2megatron.planner.layout import BF16, GATHER, ULYSSES, Layout, Model
from s2megatron.planner.links import Axis, Transfer, all_to_all_seconds, gather_seconds


@dataclass
class Seconds:
    """Forward and backward of something, for one micro-batch."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    exposed: float = 0.0
    """TP, SP and EP communication that nothing hides."""
    context: float = 0.0
    """The same of context parallelism."""

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory + self.exposed + self.context

    def add(self, part: "Seconds", times: int = 1) -> None:
        self.matmul += times * part.matmul
        self.attention += times * part.attention
        self.memory += times * part.memory
        self.exposed += times * part.exposed
        self.context += times * part.context


def attention_seconds(
    machine: Machine, model: Model, layout: Layout, layer: int
) -> tuple[float, float]:
    """Forward and backward of the core attention of a layer on its busiest TP rank.

    Zigzag gives every CP rank as many pairs. Kernels that see a rank's own queries (S2's, a ring's
    steps) have the rate of so many tokens; with whole sequences of some heads, or of all keys, that
    of the sequence.
    """
    shape, pattern = model.shape, model.patterns[layer]
    shards = tp_shards(pattern, layout.tp)
    pairs = max(kept_pairs(shard, shape.seq_len) for shard in shards) / layout.cp
    flops = 4 * pairs * shape.head_dim * layout.micro_batch
    rates = machine.attention_rates(pattern)
    whole = not layout.exchanges_blocks(pattern) and layout.cp_comm in (GATHER, ULYSSES)
    tokens = shape.seq_len if whole else shape.seq_len // layout.cp
    return (
        machine.attention_seconds(flops, rates.forward, tokens),
        machine.attention_seconds(2.5 * flops, rates.backward, tokens),
    )


@functools.lru_cache(maxsize=4096)
def kept_pairs(pattern: LayerPattern, seq_len: int) -> int:
    """`LayerPattern.kept_pairs`, which a search asks for the same few patterns many times."""
    return pattern.kept_pairs(seq_len)


def layer_matmuls(shape: ModelShape, layout: Layout, layer: int) -> list[tuple[float, ...]]:
    """(m, n, k) of a layer's forward products on one rank; backward has two of each."""
    tokens, t, h = layout.local_tokens(shape), layout.tp, shape.hidden
    kv = max(1, shape.kv_heads // t)
    up, queries = (2 if shape.gated else 1), (2 if shape.output_gate else 1)
    products = [
        (tokens, shape.head_dim * (queries * shape.heads / t + 2 * kv), h),
        (tokens, h, shape.head_dim * shape.heads / t),
    ]
    if not shape.moe_layers[layer]:
        return [*products, (tokens, up * shape.ffn / t, h), (tokens, h, shape.ffn / t)]
    # Tokens spread evenly over the experts; Megatron splits experts over EP, and over TP too.
    local = shape.experts / layout.ep
    rows = tokens * shape.experts_per_token / shape.experts * layout.ep
    for _ in range(int(local)):
        products.append((rows, up * shape.expert_ffn / t, h))
        products.append((rows, h, shape.expert_ffn / t))
    if shape.shared_expert_ffn:
        products.append((tokens, up * shape.shared_expert_ffn / t, h))
        products.append((tokens, h, shape.shared_expert_ffn / t))
    return products


def layer_traffic(shape: ModelShape, layout: Layout, layer: int) -> float:
    """Least bytes that a layer's norms, residuals, RoPE and SwiGLU read and write, forward."""
    tokens, t = layout.local_tokens(shape), layout.tp
    outer = tokens / t if layout.sequence_parallel else tokens
    between = outer * shape.hidden * (2 * 2 + 2 * 3)  # norm: in, out; residual: two in, one out
    heads = shape.head_dim * (shape.heads + shape.kv_heads) / t
    gate = 3 * shape.head_dim * shape.heads / t if shape.output_gate else 0  # two in, one out
    ffn = shape.ffn
    if shape.moe_layers[layer]:
        ffn = shape.expert_ffn * shape.experts_per_token + shape.shared_expert_ffn
        between += 4 * outer * shape.hidden * shape.experts_per_token  # to the experts and back
    act = ffn / t * (3 if shape.gated else 2)
    return BF16 * (between + tokens * (2 * heads + gate + act))


def layer_seconds(
    machine: Machine, model: Model, layout: Layout, layer: int, axes: dict[str, Axis]
) -> tuple[Seconds, Seconds]:
    """Forward and backward of one layer; adds one micro-batch's communication to the axes."""
    shape, assume = model.shape, machine.assumptions
    matmul = sum(machine.matmul_seconds(*sizes) for sizes in layer_matmuls(shape, layout, layer))
    attention = attention_seconds(machine, model, layout, layer)
    passes = assume.elementwise_fused if layout.fused else assume.elementwise_local
    memory = machine.memory_seconds(passes * layer_traffic(shape, layout, layer))
    copies = [machine.memory_seconds(size) for size in copied_bytes(model, layout, layer)]
    weights = layer_rank_parameters(shape, layout, layer)
    accumulate = machine.memory_seconds(weights * (8 if layout.fused_accumulation else 12))
    tensor = _tensor_traffic(machine, shape, layout, matmul)
    experts = _experts_traffic(machine, shape, layout, layer)
    context = context_traffic(machine, model, layout, layer, attention)
    forward, backward = (
        Seconds(
            matmul=times * matmul,
            attention=attention[way],
            memory=times * memory + copies[way] + way * accumulate,
            exposed=tensor[way].exposed + experts[way].exposed,
            context=context[way].exposed,
        )
        for way, times in enumerate((1, 2))
    )
    layer_again = layout.recompute == "full"
    kept = not model.patterns[layer].is_dense and layout.keep_attention_output
    attention_again = layout.recompute == "core_attn" or (layer_again and not kept)
    if layer_again:
        backward.add(Seconds(matmul=matmul, memory=memory, exposed=forward.exposed))
    if attention_again:
        backward.add(Seconds(attention=attention[0], memory=copies[0], context=forward.context))
    floor = machine.host_layer_us * 1e-6
    for part, least in ((forward, floor), (backward, floor * (2 + layer_again))):
        part.memory += max(0.0, least - part.total)
    for name, size, traffic, again in (
        ("SP" if layout.sequence_parallel else "TP", layout.tp, tensor, layer_again),
        ("CP", layout.cp, context, attention_again),
        ("EP", layout.ep if shape.moe_layers[layer] else 1, experts, layer_again),
    ):
        if size > 1:
            axis = axes.setdefault(name, Axis(size))
            axis.add(traffic[0], 1 + again)
            axis.add(traffic[1])
    return forward, backward


def _tensor_traffic(
    machine: Machine, shape: ModelShape, layout: Layout, matmul: float
) -> tuple[Transfer, Transfer]:
    """Two gathers and two scatters each way; with SP the backward gathers saved inputs too.

    Backward, what column-parallel products gather and scatter runs beside them. With SP the two
    row-parallel ones need the gradients of their outputs gathered first: both wait for that.
    """
    size = layout.local_tokens(shape) * shape.hidden * BF16
    once, sent = gather_seconds(machine, size, layout.tp, stride=1)
    back, first = (6, 2) if layout.sequence_parallel else (4, 0)
    hidden = machine.assumptions.tp_backward_overlap * 2 * matmul
    return (
        Transfer.waited_for(4 * sent, 4 * once),
        Transfer(back * sent, back * once, first * once + max(0.0, (back - first) * once - hidden)),
    )


def _experts_traffic(
    machine: Machine, shape: ModelShape, layout: Layout, layer: int
) -> tuple[Transfer, Transfer]:
    """Two all-to-alls of a MoE layer's tokens each way."""
    if not shape.moe_layers[layer]:
        return Transfer(), Transfer()
    tokens = layout.local_tokens(shape) / layout.tp
    size = tokens * shape.experts_per_token * shape.hidden * BF16
    sent = size * (layout.ep - 1) / layout.ep
    once = all_to_all_seconds(machine, sent, layout.ep, stride=layout.tp)
    both = Transfer.waited_for(2 * sent, 2 * once)
    return both, both


def layer_rank_parameters(shape: ModelShape, layout: Layout, layer: int) -> float:
    """Parameters of a layer that one rank holds: matrices over TP (and EP), norms whole."""
    kv = max(shape.kv_heads / layout.tp, 1)
    whole = shape.layer_parameters(layer) - shape.attention_weights
    mlp = shape.mlp_weights(layer, per_token=False)
    norms_and_biases = whole - mlp
    heads = shape.heads * (3 if shape.output_gate else 2)
    attention = shape.hidden * shape.head_dim * (heads / layout.tp + 2 * kv)
    if shape.moe_layers[layer]:
        routed = shape.experts * shape.expert_mlp_weights
        rest = mlp - routed
        return attention + (routed / layout.ep + rest) / layout.tp + norms_and_biases
    return attention + mlp / layout.tp + norms_and_biases


def output_seconds(machine: Machine, model: Model, layout: Layout) -> tuple[Seconds, Seconds]:
    """Logits and the cross entropy of the last stage, in float32 as Megatron computes it."""
    shape = model.shape
    tokens, vocab = layout.local_tokens(shape), shape.vocab / layout.tp
    matmul = machine.matmul_seconds(tokens, vocab, shape.hidden)
    logits = tokens * vocab
    once, _ = gather_seconds(machine, tokens * shape.hidden * BF16, layout.tp, stride=1)
    # Bytes per logit: written in bf16, made float32, max, subtract, exp, sum, divide (40 in all);
    # backward: scaled in float32, rounded to bf16 (14).
    return (
        Seconds(matmul, 0.0, machine.memory_seconds(40 * logits), once),
        Seconds(2 * matmul, 0.0, machine.memory_seconds(14 * logits), 0.0),
    )
