"""What one rank computes, moves and sends for one layer and one micro-batch.

Symbols: T tokens of a micro-batch (b * s), h hidden size, t tensor-parallel size; with sequence
parallelism the parts between the matrix products hold T / t tokens.
"""

from dataclasses import dataclass, field

from s2_kernels import LayerPattern
from s2megatron.accounting import ModelShape
from s2megatron.planner.constants import Link, Machine
from s2megatron.planner.layout import Layout

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Model:
    """What is trained."""

    shape: ModelShape
    patterns: tuple[LayerPattern, ...]


@dataclass
class Axis:
    """One axis' communication of a rank in a step."""

    size: int
    bytes: float = 0.0
    """Sent by this rank."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Not hidden behind computation."""


@dataclass
class Seconds:
    """Forward and backward of something, for one micro-batch."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    exposed: float = 0.0
    """Communication that nothing hides."""
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory + self.exposed


def gather_seconds(
    machine: Machine, size: float, ranks: int, *, stride: int, kind: str = "ring"
) -> tuple[float, float]:
    """An all-gather or reduce-scatter of `size` bytes in all over ranks `stride` apart.

    Members of a group that share a node use that many network adapters at once, as NCCL's rings do.

    Returns:
        (seconds, bytes that a rank sends).
    """
    if ranks == 1:
        return 0.0, 0.0
    sent = size * (ranks - 1) / ranks
    together = max(1, min(ranks, machine.gpus_per_node // stride))
    link: Link = machine.node
    rate = machine.node.gb_s
    if ranks > together:
        link = machine.cluster
        lanes = 1 if kind == "all-to-all" else together
        rate = min(rate, lanes * machine.cluster.gb_s)
    doublings = (ranks - 1).bit_length()
    return sent / (rate * 1e9) + link.latency_us * 1e-6 * doublings, sent


def attention_seconds(
    machine: Machine, model: Model, layout: Layout, layer: int
) -> tuple[float, float]:
    """Forward and backward of the core attention of a layer on its busiest TP rank."""
    shape, pattern = model.shape, model.patterns[layer]
    ranks = range(1) if pattern.is_dense else range(layout.tp)
    pairs = max(kept_pairs(pattern.shard(r, layout.tp), shape.seq_len) for r in ranks)
    flops = 4 * pairs * shape.head_dim * layout.micro_batch
    rates = machine.dense_attention if pattern.is_dense else machine.s2_attention
    return (
        machine.attention_seconds(flops, rates.forward, shape.seq_len),
        machine.attention_seconds(2.5 * flops, rates.backward, shape.seq_len),
    )


_PAIRS: dict[tuple[LayerPattern, int], int] = {}


def kept_pairs(pattern: LayerPattern, seq_len: int) -> int:
    """`LayerPattern.kept_pairs`, which a search asks for the same few patterns many times."""
    key = (pattern, seq_len)
    if key not in _PAIRS:
        _PAIRS[key] = pattern.kept_pairs(seq_len)
    return _PAIRS[key]


def layer_matmuls(shape: ModelShape, layout: Layout, layer: int) -> list[tuple[float, ...]]:
    """(m, n, k) of a layer's forward products on one rank; backward has two of each."""
    tokens, t, h = layout.micro_batch * shape.seq_len, layout.tp, shape.hidden
    kv = max(1, shape.kv_heads // t)
    up = 2 if shape.gated else 1
    products = [
        (tokens, shape.head_dim * (shape.heads / t + 2 * kv), h),
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
    tokens, t = layout.micro_batch * shape.seq_len, layout.tp
    outer = tokens / t if layout.sequence_parallel else tokens
    between = outer * shape.hidden * (2 * 2 + 2 * 3)  # norm: in, out; residual: two in, one out
    heads = shape.head_dim * (shape.heads + shape.kv_heads) / t
    ffn = shape.ffn
    if shape.moe_layers[layer]:
        ffn = shape.expert_ffn * shape.experts_per_token + shape.shared_expert_ffn
        between += 4 * outer * shape.hidden * shape.experts_per_token  # to the experts and back
    act = ffn / t * (3 if shape.gated else 2)
    return BF16 * (between + tokens * (2 * heads + act))


def layer_seconds(
    machine: Machine, model: Model, layout: Layout, layer: int, axes: dict[str, Axis]
) -> tuple[Seconds, Seconds]:
    """Forward and backward of one layer; adds one micro-batch's communication to the axes."""
    shape, assume = model.shape, machine.assumptions
    matmul = sum(machine.matmul_seconds(*sizes) for sizes in layer_matmuls(shape, layout, layer))
    forward_attention, backward_attention = attention_seconds(machine, model, layout, layer)
    passes = assume.elementwise_fused if layout.fused else assume.elementwise_local
    memory = machine.memory_seconds(passes * layer_traffic(shape, layout, layer))
    weights = layer_rank_parameters(shape, layout, layer)
    accumulate = machine.memory_seconds(weights * (8 if layout.fused_accumulation else 12))
    # Two gathers and two scatters each way; the backward's gathers of saved inputs are two more.
    size = layout.micro_batch * shape.seq_len * shape.hidden * BF16
    once, sent = gather_seconds(machine, size, layout.tp, stride=1)
    again = 6 if layout.sequence_parallel else 4
    exchange, exchanged = _experts_exchange(machine, shape, layout, layer)
    hidden = assume.tp_backward_overlap * 2 * matmul
    forward = Seconds(matmul, forward_attention, memory, 4 * once + 2 * exchange)
    backward = Seconds(
        2 * matmul,
        backward_attention,
        2 * memory + accumulate,
        max(0.0, again * once - hidden) + 2 * exchange,
    )
    passes_forward = 1
    if layout.recompute == "core_attn":
        backward.attention += forward_attention
    elif layout.recompute == "full":
        passes_forward = 2
        backward.matmul += forward.matmul
        if model.patterns[layer].is_dense or not layout.keep_attention_output:
            backward.attention += forward.attention
        backward.memory += forward.memory
        backward.exposed += forward.exposed
    floor = machine.host_layer_us * 1e-6
    for part, least in ((forward, floor), (backward, floor * (1 + passes_forward))):
        part.memory += max(0.0, least - part.total)
    if layout.tp > 1:
        name = "SP" if layout.sequence_parallel else "TP"
        axis = axes.setdefault(name, Axis(layout.tp))
        count = 4 * passes_forward + again
        axis.bytes += sent * count
        axis.seconds += once * count
        axis.exposed += 4 * passes_forward * once + max(0.0, again * once - hidden)
    if exchange:
        axis = axes.setdefault("EP", Axis(layout.ep))
        count = 2 * passes_forward + 2
        axis.bytes += exchanged * count
        axis.seconds += exchange * count
        axis.exposed += exchange * count
    return forward, backward


def _experts_exchange(machine, shape, layout, layer) -> tuple[float, float]:
    """One all-to-all of a MoE layer's tokens."""
    if not shape.moe_layers[layer] or layout.ep == 1:
        return 0.0, 0.0
    tokens = layout.micro_batch * shape.seq_len / layout.tp
    size = tokens * shape.experts_per_token * shape.hidden * BF16
    return gather_seconds(machine, size, layout.ep, stride=layout.tp, kind="all-to-all")


def layer_rank_parameters(shape: ModelShape, layout: Layout, layer: int) -> float:
    """Parameters of a layer that one rank holds: matrices over TP (and EP), norms whole."""
    kv = max(shape.kv_heads / layout.tp, 1)
    whole = shape.layer_parameters(layer) - shape.attention_weights
    mlp = shape.mlp_weights(layer, per_token=False)
    norms_and_biases = whole - mlp
    attention = shape.hidden * shape.head_dim * (2 * shape.heads / layout.tp + 2 * kv)
    if shape.moe_layers[layer]:
        routed = shape.experts * shape.expert_mlp_weights
        rest = mlp - routed
        return attention + (routed / layout.ep + rest) / layout.tp + norms_and_biases
    return attention + mlp / layout.tp + norms_and_biases


def output_seconds(machine: Machine, model: Model, layout: Layout) -> tuple[Seconds, Seconds]:
    """Logits and the cross entropy of the last stage, in float32 as Megatron computes it."""
    shape = model.shape
    tokens, vocab = layout.micro_batch * shape.seq_len, shape.vocab / layout.tp
    matmul = machine.matmul_seconds(tokens, vocab, shape.hidden)
    logits = tokens * vocab
    once, _ = gather_seconds(machine, tokens * shape.hidden * BF16, layout.tp, stride=1)
    # Bytes per logit: written in bf16, made float32, max, subtract, exp, sum, divide (40 in all);
    # backward: scaled in float32, rounded to bf16 (14).
    return (
        Seconds(matmul, 0.0, machine.memory_seconds(40 * logits), once),
        Seconds(2 * matmul, 0.0, machine.memory_seconds(14 * logits), 0.0),
    )
