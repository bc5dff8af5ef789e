"""Peak memory of a rank, in bytes, as torch.cuda.max_memory_allocated counts it.

What autograd keeps per layer was read off Megatron's and this plugin's modules: tensors in bf16
that a matrix product, a norm, RoPE or SwiGLU saves for its backward.
"""

from collections import Counter
from dataclasses import dataclass

from s2megatron.accounting import ModelShape
from s2megatron.planner.context import buffer_bytes
from s2megatron.planner.costs import layer_rank_parameters
from s2megatron.planner.layout import BF16, FP32, Layout, Model, layer_kinds


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> float:
    """Parameters that one rank of a pipeline stage holds."""
    layers = layout.stages(shape.layers)[stage]
    # A layer's parameters depend on its experts alone.
    alike = Counter(shape.moe_layers[layer] for layer in layers)
    first_of = {shape.moe_layers[layer]: layer for layer in layers}
    total = sum(
        times * layer_rank_parameters(shape, layout, first_of[moe]) for moe, times in alike.items()
    )
    embedding = shape.vocab * shape.hidden / layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        total += embedding + shape.position_embeddings * shape.hidden
    if last:
        total += shape.hidden * (2 if shape.norm_bias else 1)
        if not (shape.tied_embeddings and first):
            total += embedding
    return total


def stage_expert_parameters(shape: ModelShape, layout: Layout, stage: int) -> float:
    """The part of them in routed experts, which EP splits."""
    layers = layout.stages(shape.layers)[stage]
    routed = sum(shape.moe_layers[layer] for layer in layers) * shape.experts
    return routed * shape.expert_mlp_weights / (layout.ep * layout.tp)


def saved_per_layer(shape: ModelShape, layout: Layout, layer: int) -> float:
    """Bytes that a layer's forward keeps for its backward, for one micro-batch."""
    tokens, t = layout.local_tokens(shape), layout.tp
    outer = tokens / t if layout.sequence_parallel else tokens
    # Inputs and outputs of both norms (the outputs are the matrix products' inputs).
    between = 4 * outer * shape.hidden
    kv = max(shape.kv_heads / t, 1)
    heads = shape.head_dim * (shape.heads / t + 2 * kv) + shape.head_dim * shape.heads / t
    if shape.output_gate:
        heads += 2 * shape.head_dim * shape.heads / t  # the gate, and what it makes of the output
    if shape.moe_layers[layer]:
        between += 2 * outer * shape.hidden * shape.experts_per_token
    sums = FP32 * tokens * shape.heads / t  # attention's row sums
    mlp = saved_by_mlp(shape, layout, layer)
    return layout.width * (between + tokens * heads) + sums + mlp


def saved_by_mlp(shape: ModelShape, layout: Layout, layer: int) -> float:
    """Of these bytes, those between the MLP's products: both halves, and what comes of them."""
    ffn = shape.ffn
    if shape.moe_layers[layer]:
        ffn = shape.expert_ffn * shape.experts_per_token + shape.shared_expert_ffn
    act = ffn / layout.tp * (3 if shape.gated else 2)
    return layout.width * layout.local_tokens(shape) * act


def peak(model: Model, layout: Layout) -> Memory:
    """The stage with the most."""
    return max((_stage(model, layout, s) for s in range(layout.pp)), key=lambda m: m.total)


def _stage(model: Model, layout: Layout, stage: int) -> Memory:
    shape = model.shape
    parameters = stage_parameters(shape, layout, stage)
    sharded = layout.copies if layout.distributed_optimizer else 1
    # Adam's two moments, and beside bf16 weights a float32 copy.
    moments = (3 if layout.bf16 else 2) * FP32
    experts = stage_expert_parameters(shape, layout, stage)  # copies / EP ranks hold the same
    states = moments * (parameters - experts + experts * layout.ep) / sharded
    layers = layout.stages(shape.layers)[stage]
    kinds = layer_kinds(model, layers)
    saved = {layer: saved_per_layer(shape, layout, layer) for layer, _ in kinds}
    tokens = layout.local_tokens(shape)
    kept = sum(times * kept_per_layer(model, layout, layer) for layer, times in kinds)
    # The layer's MLP has gone backward by then, and what it saved is free.
    exchange = max(
        buffer_bytes(model, layout, layer) - saved_by_mlp(shape, layout, layer)
        for layer, _ in kinds
    )
    working = max(_working(shape, layout), exchange)
    if layout.recompute == "full":
        working += max(saved.values())
    last = stage == layout.pp - 1
    logits = 0.0
    if last:
        # bf16 and float32 side by side going forward; float32 and the bf16 gradient coming back.
        logits = tokens * shape.vocab / layout.tp * (BF16 + FP32)
        # They are gone before the first layer's backward begins: the larger of the two counts.
        working = max(0.0, working - logits)
    return Memory(
        weights=layout.width * parameters,
        gradients=FP32 * parameters,
        optimizer=states,
        activations=kept * in_flight(layout, stage) + working,
        logits=logits,
    )


def kept_per_layer(model: Model, layout: Layout, layer: int) -> float:
    """Bytes of a micro-batch that a layer holds between its passes, under the layout's recompute.

    Full recompute keeps the layer's input and what `kept_attention_output` says.
    """
    shape = model.shape
    if layout.recompute != "full":
        return saved_per_layer(shape, layout, layer)
    tokens = layout.local_tokens(shape)
    outer = tokens / layout.tp if layout.sequence_parallel else tokens
    return outer * shape.hidden * layout.width + kept_attention_output(model, layout, layer)


def kept_attention_output(model: Model, layout: Layout, layer: int) -> float:
    """Bytes of out and lse that a recomputed sparse layer keeps (attention/recompute.py)."""
    if not layout.keep_attention_output or model.patterns[layer].is_dense:
        return 0.0
    heads = model.shape.heads / layout.tp
    return layout.local_tokens(model.shape) * heads * (layout.width * model.shape.head_dim + FP32)


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in the 1F1B schedules."""
    if layout.pp == 1:
        return 1.0
    plain = min(layout.micro_batches, layout.pp - stage)
    if layout.vpp == 1:
        return plain
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.micro_batches * layout.vpp) / layout.vpp


def _working(shape: ModelShape, layout: Layout) -> float:
    """Temporary tensors of one layer's backward: the MLP's gradients and gathered tokens."""
    tokens = layout.local_tokens(shape)
    act = shape.ffn / layout.tp * (3 if shape.gated else 2)
    return layout.width * tokens * (act + 2 * shape.hidden)
