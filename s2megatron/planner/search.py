"""Which layouts fit on so many GPUs, best first."""

from s2megatron.errors import ConfigError
from s2megatron.machine import Machine
from s2megatron.planner.layout import Layout, Model, candidates
from s2megatron.planner.memory import Memory, peak
from s2megatron.planner.step import Plan, fits, plan


def search(
    machine: Machine,
    model: Model,
    base: Layout,
    best: int | None = None,
    *,
    most_cp: int | None = None,
) -> list[Plan]:
    """Plans that fit, fastest first. TP leaves the node only where nothing else fits.

    Args:
        base: GPUs, batch and what is not searched (optimizer, overlap, modules, cp_comm).
        most_cp: the largest context-parallel size tried; 1: none. None: any.

    Raises:
        ConfigError: no layout divides, or none fits; says how far the nearest is off.
    """
    found: list[tuple[Layout, Memory]] = []
    fitting: list[Plan] = []
    most_tp = machine.gpus_per_node
    while not fitting and most_tp <= max(machine.gpus_per_node, model.shape.heads):
        layouts = candidates(base, model, most_tp=most_tp, most_cp=most_cp)
        found = [(layout, peak(model, layout)) for layout in layouts]
        plans = [plan(machine, model, layout) for layout, held in found if fits(machine, held)]
        fitting = sorted(plans, key=lambda p: p.seconds)
        most_tp *= 2
    if not found:
        raise ConfigError(
            f"--gpus {base.gpus}: no TP x CP x PP x DP divides {model.shape.heads} heads, "
            f"{model.shape.layers} layers and a global batch of {base.global_batch}; change "
            "megatron.global_batch_size or the number of GPUs"
        )
    if not fitting:
        layout, held = min(found, key=lambda pair: pair[1].total)
        raise ConfigError(
            f"--gpus {base.gpus}: nothing fits in {machine.memory_gib:.0f} GiB: {layout} "
            f"comes nearest with {held.total / 2**30:.1f} GiB; take more GPUs or a "
            "shorter sequence"
        )
    return fitting[:best]
