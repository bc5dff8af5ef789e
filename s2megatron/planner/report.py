"""`s2megatron plan`: a run file, a number of GPUs, and what it would cost."""

from dataclasses import replace

from s2_kernels.record import describe
from s2megatron.config import load_config
from s2megatron.errors import ConfigError
from s2megatron.machine import Machine, load_machine
from s2megatron.planner.context import received_bytes
from s2megatron.planner.layout import Layout, Model, layer_kinds, layout_of
from s2megatron.planner.memory import kept_per_layer
from s2megatron.planner.search import search
from s2megatron.planner.step import Plan, plan
from s2megatron.planner.unplanned import unplanned


def read_run(config: str, overrides: list[str], gpus: int, *, local: bool) -> tuple[Model, Layout]:
    """The model and the layout that a run file names, on so many GPUs. Raises ConfigError."""
    return read_with_notes(config, overrides, gpus, local=local)[:2]


def read_with_notes(
    config: str, overrides: list[str], gpus: int, *, local: bool
) -> tuple[Model, Layout, list[str]]:
    """`read_run`, and a line on each option that a plan leaves out. Raises ConfigError."""
    from s2megatron.cluster import environment
    from s2megatron.training.backends import find_backends
    from s2megatron.training.megatron_options import keys_of
    from s2megatron.training.prepare import prepare_without_launch

    environment.apply()  # what Megatron asks for where there are GPUs

    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: must be at least 1")
    given = load_config(config, overrides).megatron
    modules = {key: given[key] for key in keys_of(given, ["transformer_impl"])}
    local = local or "local" in modules.values()
    if not find_backends().transformer_engine:  # the run that is planned is another machine's
        wanted = [key for key, value in modules.items() if value == "transformer_engine"]
        overrides = [*overrides, *(f"megatron.{key}=null" for key in wanted)]
    ready = prepare_without_launch(config, overrides)
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    layout = layout_of(ready.args, gpus)
    unset_global_variables()  # Megatron's: another run file may be read after this one
    unset_num_microbatches_calculator()
    if schedule := ready.args.step_batch_size_schedule:
        raise ConfigError(
            f"megatron.step_batch_size_schedule: {schedule!r}: a plan is of one batch: give it by "
            "megatron.step_batch_size_schedule=null megatron.global_batch_size=SEQUENCES"
        )
    keep = ready.run.sparsity.keep_attention_output
    layout = replace(layout, fused=not local, keep_attention_output=keep)
    return Model(ready.shape, ready.patterns), layout, unplanned(ready.args)


def check_fits_gpus(layout: Layout, model: Model) -> None:
    """Raises ConfigError for a layout that the GPUs or the model do not divide over."""
    if misfit := layout.misfit(model):
        raise ConfigError(
            f"--gpus {layout.gpus}: {misfit}; change the layout (megatron.*_parallel_size, "
            "megatron.global_batch_size), or let --search find one"
        )


def plan_run(
    config: str,
    overrides: list[str],
    *,
    gpus: int,
    gpu: str,
    tokens: float,
    local: bool = False,
    best: int | None = None,
) -> str:
    """The report's text; with `best`, the best layouts that fit instead of the run file's.

    Args:
        tokens: the budget that days are counted for.
        local: Megatron's local modules, not Transformer Engine's.
    """
    machine = load_machine(gpu)
    if best is not None and best < 1:
        raise ConfigError(f"--search {best}: must be at least 1")
    model, layout, notes = read_with_notes(config, overrides, gpus, local=local)
    head = [
        f"{gpus} x {machine.gpu}, {machine.gpus_per_node} per node",
        f"constants: {' '.join(machine.source.split())}",
        *notes,
        "",
    ]
    if best:
        plans = search(machine, model, layout, best)
        return "\n".join([*head, *_table(SEARCH_COLUMNS, [_search_row(machine, p) for p in plans])])
    check_fits_gpus(layout, model)
    return "\n".join(head + lines(machine, model, plan(machine, model, layout), tokens))


def lines(machine: Machine, model: Model, result: Plan, tokens: float) -> list[str]:
    """One plan in full."""
    layout, memory = result.layout, result.memory
    gib = 2**30
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    held = [(name, f"{getattr(memory, name) / gib:.2f}") for name in parts]
    held.append(("in all, at the peak", f"{memory.total / gib:.2f} of {machine.memory_gib:.0f}"))
    axes = [
        (f"{name} {axis.size}", f"{axis.bytes / 1e9:.2f}", f"{axis.seconds * 1e3:.1f}",
         f"{axis.exposed * 1e3:.1f}")
        for name, axis in result.axes.items()
    ]  # fmt: skip
    step = [
        (name, f"{seconds * 1e3:.1f}", f"{seconds / result.seconds:.1%}")
        for name, seconds in result.parts().items()
        if seconds
    ]
    step.append(("step", f"{result.seconds * 1e3:.1f}", ""))
    days = tokens / result.tokens_per_second / 86400
    per_gpu = result.tokens_per_second / layout.gpus
    return [
        f"layout: {layout}; {layout.micro_batches} micro-batches of {layout.micro_batch}, "
        f"{result.tokens:,} tokens a step",
        *_exchanges(machine, model, layout),
        "",
        *_table(("layers", "attention", "parameters", "true FLOPs", "attention's",
                 f"keeps MiB (recompute {layout.recompute})"),
                _layer_rows(model, layout)),
        "",
        *_table(("memory per rank", "GiB"), held),
        *([] if result.fits else [
            f"DOES NOT FIT: {memory.total / gib:.1f} GiB, and "
            f"{machine.assumptions.memory_reserve:.0%} of {machine.memory_gib:.0f} GiB are for "
            "CUDA and NCCL; more TP or PP, recompute, or a shorter sequence (--search)"]),
        "",
        *_table(("axis", "GB sent per rank", "ms", "ms exposed"), axes or [("none", "", "", "")]),
        "",
        *_table(("step", "ms", "share"), step),
        "",
        f"{result.tokens_per_second:,.0f} tokens/s, {per_gpu:,.0f} per GPU; MFU "
        f"{result.mfu(max(machine.matmul_tflops.values())):.1%} (true model FLOPs, of "
        f"{max(machine.matmul_tflops.values()):.0f} TFLOP/s); {days:,.1f} days for {tokens:.3g} "
        "tokens",
    ]  # fmt: skip


def _exchanges(machine: Machine, model: Model, layout: Layout) -> list[str]:
    """In words, what context parallelism sends in each kind of layer, and what hides it."""
    if layout.cp == 1:
        return []
    said = []
    for layer, times in layer_kinds(model, range(model.shape.layers)):
        mib = received_bytes(model, layout, layer) / 2**20
        way = f"cp_comm_type {layout.cp_comm}"
        if layout.exchanges_blocks(model.patterns[layer]):
            groups = machine.assumptions.exchange_groups
            way = "blocks by lifetimes, " + (
                f"in {groups} groups of heads, the first waited for" if groups > 1 else "waited for"
            )
        kind = describe(model.patterns[layer]).split(", shifts")[0]
        said.append(f"CP {layout.cp}: {times} layers, {kind}: {mib:.1f} MiB forward ({way})")
    return said


def _layer_rows(model: Model, layout: Layout) -> list[tuple[str, ...]]:
    """Neighbouring layers that are alike share a row; FLOPs are of one sequence, fwd and bwd."""
    shape, rows, first = model.shape, [], 0
    kinds = list(zip(model.patterns, shape.moe_layers, strict=True))
    for layer in range(shape.layers):
        if layer + 1 < shape.layers and kinds[layer + 1] == kinds[layer]:
            continue
        pattern = model.patterns[layer]
        flops = shape.layer_flops(layer, pattern)
        attention = 12 * shape.head_dim * pattern.kept_pairs(shape.seq_len)
        name = f"{first + 1}-{layer + 1}" if layer > first else f"{layer + 1}"
        rows.append((name, describe(pattern).split(", shifts")[0],
                     f"{shape.layer_parameters(layer):,}", f"{flops:.4e}",
                     f"{attention / flops:.1%}",
                     f"{kept_per_layer(model, layout, layer) / 2**20:.0f}"))  # fmt: skip
        first = layer + 1
    rows.append(("logits", "", "", f"{shape.output_flops():.4e}", "", ""))
    total = shape.flops_per_sequence(model.patterns)
    share = shape.attention_flops(model.patterns) / total
    rows.append(("all", "embeddings included", f"{shape.parameters():,}", f"{total:.4e}",
                 f"{share:.1%}", ""))  # fmt: skip
    return rows


SEARCH_COLUMNS = ("layout", "GiB", "ms/step", "tokens/s", "tokens/s/GPU", "MFU", "limited by")


def _search_row(machine: Machine, result: Plan) -> tuple[str, ...]:
    return (
        str(result.layout),
        f"{result.memory.total / 2**30:.1f}",
        f"{result.seconds * 1e3:.0f}",
        f"{result.tokens_per_second:,.0f}",
        f"{result.tokens_per_second / result.layout.gpus:,.0f}",
        f"{result.mfu(max(machine.matmul_tflops.values())):.1%}",
        limits(result),
    )


def limits(result: Plan) -> str:
    """The two largest parts of a step."""
    parts = sorted(result.parts().items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{name} {seconds / result.seconds:.0%}" for name, seconds in parts)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    table = [columns, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table]  # fmt: skip
