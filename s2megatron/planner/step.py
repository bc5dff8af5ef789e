"""The time of a step: layers into stages, stages into a pipeline, and what the axes add.

A step of m micro-batches on stages with times t_s (forward and backward together) takes

    m * max(t) + (sum(t) - max(t)) / v + exposed DP + optimizer + fixed

with v chunks per stage: the first term is the busiest stage, the second the bubble. With equal
stages that is 1F1B's (m + (p - 1) / v) * t; with dense layers in one stage only, that stage
decides.
"""

import functools
from dataclasses import dataclass

from s2megatron.machine import Machine
from s2megatron.planner.costs import Seconds, layer_seconds, output_seconds
from s2megatron.planner.layout import BF16, FP32, Layout, Model, layer_kinds
from s2megatron.planner.links import Axis, gather_seconds
from s2megatron.planner.memory import Memory, peak, stage_parameters


@dataclass(frozen=True)
class Plan:
    """What a layout costs."""

    layout: Layout
    memory: Memory
    fits: bool
    axes: dict[str, Axis]
    """Per rank of the busiest stage and step."""
    matmul: float
    attention: float
    elementwise: float
    """Memory traffic of the layers and the loss, or the host where that is slower."""
    exposed: float
    """TP, SP and EP communication that nothing hides."""
    context: float
    """The same of context parallelism."""
    bubble: float
    pipeline: float
    """Sends between stages."""
    data: float
    """Exposed reduction of gradients and gathering of parameters."""
    optimizer: float
    fixed: float
    model_flops: float
    """True model FLOPs of a step, all ranks."""
    tokens: int
    """Of a step."""

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by what limits them; they add up to the step."""
        return {
            "matrix products": self.matmul,
            "attention": self.attention,
            "elementwise": self.elementwise,
            "TP, SP, EP": self.exposed,
            "CP": self.context,
            "bubble": self.bubble,
            "PP sends": self.pipeline,
            "DP": self.data,
            "optimizer": self.optimizer,
            "fixed": self.fixed,
        }

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, peak_tflops: float) -> float:
        """True model FLOPs over what the GPUs' largest measured matrix product would do."""
        return self.model_flops / (self.seconds * self.layout.gpus * peak_tflops * 1e12)


def plan(machine: Machine, model: Model, layout: Layout) -> Plan:
    """The cost of a layout that divides (`Layout.misfit` says '')."""
    shape = model.shape
    m, stages = layout.micro_batches, layout.stages(shape.layers)
    stage_parts: list[tuple[Seconds, Seconds, dict[str, Axis]]] = []
    cache: dict = {}
    for number, layers in enumerate(stages):
        forward, backward, axes = Seconds(), Seconds(), {}
        for layer, times in layer_kinds(model, layers):
            key = (model.patterns[layer], shape.moe_layers[layer])
            if key not in cache:
                own: dict[str, Axis] = {}
                cache[key] = (*layer_seconds(machine, model, layout, layer, own), own)
            forward.add(cache[key][0], times)
            backward.add(cache[key][1], times)
            for name, axis in cache[key][2].items():
                axes.setdefault(name, Axis(axis.size)).add(axis, times)
        if number == layout.pp - 1:
            logits = output_seconds(machine, model, layout)
            forward.add(logits[0])
            backward.add(logits[1])
        stage_parts.append((forward, backward, axes))
    times = [forward.total + backward.total for forward, backward, _ in stage_parts]
    busiest = max(range(layout.pp), key=times.__getitem__)
    forward, backward, axes = stage_parts[busiest]
    for axis in axes.values():
        axis.bytes, axis.seconds, axis.exposed = (
            m * x for x in (axis.bytes, axis.seconds, axis.exposed)
        )
    bubble = (sum(times) - times[busiest]) / layout.vpp
    pipeline = _sends(machine, model, layout, axes)
    parameters = max(stage_parameters(shape, layout, s) for s in range(layout.pp))
    data = _data(machine, layout, parameters, forward.total, backward.total, axes)
    sharded = layout.copies if layout.distributed_optimizer else 1
    # Gradients are read for their norm and again by Adam, which reads and writes three states.
    update = machine.memory_seconds(parameters / sharded * (2 * FP32 + 6 * FP32 + BF16))
    memory = peak(model, layout)
    return Plan(
        layout=layout,
        memory=memory,
        fits=fits(machine, memory),
        axes=axes,
        matmul=m * (forward.matmul + backward.matmul),
        attention=m * (forward.attention + backward.attention),
        elementwise=m * (forward.memory + backward.memory),
        exposed=m * (forward.exposed + backward.exposed),
        context=m * (forward.context + backward.context),
        bubble=bubble,
        pipeline=pipeline,
        data=data,
        optimizer=update,
        fixed=machine.step_ms * 1e-3,
        model_flops=layout.global_batch * _sequence_flops(model),
        tokens=layout.global_batch * shape.seq_len,
    )


def fits(machine: Machine, memory: Memory) -> bool:
    """Whether a GPU holds it, beside what CUDA, NCCL and fragmentation take."""
    usable = machine.memory_gib * 2**30 * (1 - machine.assumptions.memory_reserve)
    return memory.total <= usable


@functools.lru_cache(maxsize=64)
def _sequence_flops(model: Model) -> int:
    return model.shape.flops_per_sequence(model.patterns)


def _sends(machine: Machine, model: Model, layout: Layout, axes: dict[str, Axis]) -> float:
    """Activations and their gradients between stages: exposed in 1F1B, hidden when interleaved
    except while the pipeline fills and drains."""
    if layout.pp == 1:
        return 0.0
    tokens = layout.local_tokens(model.shape) / (layout.tp if layout.sequence_parallel else 1)
    size = tokens * model.shape.hidden * BF16
    link = machine.node if layout.gpus <= machine.gpus_per_node else machine.cluster
    once = size / (link.gb_s * 1e9) + link.latency_us * 1e-6
    sends = 2 * layout.micro_batches * layout.vpp
    waits = 2 * (layout.pp - 1) if layout.vpp > 1 else 2 * (layout.micro_batches + layout.pp - 1)
    axes["PP"] = Axis(layout.pp, size * sends, once * sends, once * waits)
    return once * waits


def _data(
    machine: Machine,
    layout: Layout,
    parameters: float,
    forward: float,
    backward: float,
    axes: dict[str, Axis],
) -> float:
    """Exposed time of gradients (float32) and parameters (bf16) over DP and CP ranks."""
    copies = layout.copies
    if copies == 1:
        return 0.0
    reduce, sent = gather_seconds(machine, FP32 * parameters, copies, stride=layout.tp)
    if layout.distributed_optimizer:
        gather, more = gather_seconds(machine, layout.width * parameters, copies, stride=layout.tp)
    else:  # an all-reduce: scatter and gather of the gradients
        gather, more, reduce = 0.0, sent, 2 * reduce
    hidden = machine.assumptions.dp_overlap
    exposed_reduce = max(0.0, reduce - hidden * backward * layout.overlap_grad_reduce)
    exposed_gather = max(0.0, gather - hidden * forward * layout.overlap_param_gather)
    exposed = exposed_reduce + exposed_gather
    name = "DP" if layout.cp == 1 else "DP x CP"
    axes[name] = Axis(copies, sent + more, reduce + gather, exposed)
    return exposed
