"""From a run file to a run that has passed all checks which need no process group."""

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from s2_kernels import LayerPattern
from s2megatron.accounting import ModelShape
from s2megatron.cluster import environment
from s2megatron.config import RunConfig, load_config
from s2megatron.context_split import ContextSplit
from s2megatron.errors import ConfigError
from s2megatron.layer_table import layer_table
from s2megatron.training import data_options, output
from s2megatron.training.backends import Backends, default_options, find_backends
from s2megatron.training.machine_checks import check_machine
from s2megatron.training.schedule import (
    check_batch_steps,
    check_interleaving,
    check_rates,
    check_schedule,
)


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check that needs no process group and no GPU memory."""

    run: RunConfig
    backends: Backends
    args: object
    """Megatron's arguments, validated."""
    model_config: object
    """Megatron's GPTModelConfig, with our layer spec and model check."""
    patterns: tuple[LayerPattern, ...]
    shape: ModelShape
    output: output.Output | None
    """Its folder, where the run file names one."""
    variables: dict[str, str]
    """Of the environment, those that this run's options asked for."""
    asked: frozenset[str]
    """Megatron options that the run file has, by their stored names."""
    sources: object
    """Of its documents (data_checks.Sources)."""


@contextlib.contextmanager
def megatrons_refusals() -> Iterator[None]:
    """What Megatron asserts of options becomes a ConfigError that says where it does."""
    try:
        yield
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = str(error) or where.line
        lines = [f"Megatron refuses these options: {told}", *environment.named_in(told)]
        raise ConfigError("\n".join([*lines, f"({where.filename}:{where.lineno})"])) from error


def prepare(
    config: str,
    overrides: Sequence[str],
    *,
    writers: bool = True,
    choose: output.Choice = output.by_name,
) -> Prepared:
    """Everything up to the start of the process group.

    Args:
        writers: the run starts here: look at this machine, and let Megatron open its TensorBoard
            and wandb writers.
        choose: which checkpoint of an output folder to resume from.

    Raises:
        ConfigError: what is wrong, where, and the way out.
    """
    run = load_config(config, overrides)
    backends = find_backends()
    if not backends.cuda:
        from s2megatron.training import cpu_runtime

        cpu_runtime.install()
    from megatron.training.argument_utils import gpt_config_from_args

    from s2megatron.attention.megatron_fixes import skip_missing_makefile
    from s2megatron.training.attach import attach
    from s2megatron.training.data_checks import find_sources
    from s2megatron.training.data_identity import data_identity
    from s2megatron.training.megatron_options import canonical, check_required, to_argv
    from s2megatron.training.resume_layout import check_resumable

    skip_missing_makefile()
    chosen = canonical(run.megatron)
    options = default_options(backends, chosen)
    check_required(options)  # before the data: a run file without a model has none either
    options = data_options.resolve(run.data, options)
    place = output.resolve(run.output, options, choose)
    options = place.options if place else options
    if not writers:
        options |= {"tensorboard_dir": None, "wandb_project": None}
    argv, parsed = to_argv(options)
    if writers:  # they are packages, too
        check_machine(backends, parsed)
    _check_parsed(parsed)
    variables = environment.apply_for_options(parsed)  # Megatron's check is next, NCCL later
    args = _validated_by_megatron(argv, options)
    check_resumable(args, backends.fused_adam)
    sources = find_sources(args)
    args.s2_data = data_identity(args)  # goes into every checkpoint, as all arguments do
    with megatrons_refusals():
        model_config = gpt_config_from_args(args)
    patterns = attach(model_config, args, run.sparsity, on_gpu=backends.cuda)
    args.s2_tokenizer = run.data.tokenizer  # Megatron's args do not tell bytes from any numbers
    shape = ModelShape.from_megatron(model_config.transformer, args)
    asked = frozenset(name for name, value in chosen.items() if value is not None)
    return Prepared(
        run, backends, args, model_config, patterns, shape, place, variables, asked, sources
    )


def _check_parsed(parsed) -> None:
    """What is refused before Megatron's own validation words things differently."""
    from s2megatron.attention.checks import check_run_options
    from s2megatron.training.megatron_options import megatron_parser
    from s2megatron.training.option_checks import (
        check_first_step,
        check_read_options,
        check_sizes,
    )

    check_sizes(parsed)
    check_run_options(parsed)
    check_read_options(parsed, megatron_parser().get_default)
    check_first_step(parsed)
    check_rates(parsed)
    check_batch_steps(parsed)


def _validated_by_megatron(argv: list[str], options: dict):
    """Megatron's arguments. Its parser reads the command line: from here on the run file's."""
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *argv]
    try:
        with megatrons_refusals():
            return parse_and_validate_args()
    except OSError as error:  # it has opened TensorBoard's files
        raise ConfigError(
            f"{error.filename or options.get('tensorboard_dir')}: {error.strerror}: make room, see "
            "who may write there, or name another output.folder"
        ) from error


def check_start(ready: Prepared) -> list[str]:
    """What a run that is to start needs beside a model that can be built.

    Returns:
        Lines for the start table.

    Raises:
        ConfigError: the schedule, the data or what is to be loaded does not fit.
    """
    from s2megatron.training.data_checks import check_data, settle_evaluation
    from s2megatron.training.resume import check_load

    args = ready.args
    check_schedule(args)
    loading = check_load(args)
    check_data(args, ready.sources)
    evaluation = settle_evaluation(args, ready.sources, asked=ready.asked)
    check_interleaving(args)
    saving = [] if args.save else ["none are saved: name output.folder to keep what is trained"]
    in_vain = ready.run.sparsity.in_vain(args.num_layers)
    return [
        *(f"{'attention':<16} {line}" for line in in_vain),
        *(f"{'evaluation':<16} {line}" for line in evaluation),
        *(f"{'checkpoints':<16} {line}" for line in (*loading, *saving)),
    ]


def prepare_without_launch(config: str, overrides: Sequence[str]) -> Prepared:
    """`prepare` outside torchrun, for the fewest ranks that the run file's layout needs.

    Where WORLD_SIZE is set, that many. It is not left behind: what comes next in this process may
    be another run. What Megatron prints and warns of on the way is not shown.
    """
    with _quiet_megatron():
        if "WORLD_SIZE" in os.environ:
            return prepare(config, overrides, writers=False)
        os.environ["WORLD_SIZE"] = str(ranks_named_by(load_config(config, overrides)))
        try:
            return prepare(config, overrides, writers=False)
        finally:
            del os.environ["WORLD_SIZE"]


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Without Megatron's 900 lines of arguments, its log and its word on the missing launch."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message="Could not determine rank")
            yield
    finally:
        logging.disable(disabled)


def dry_run(config: str, overrides: Sequence[str]) -> str:
    """The layer table, parameter count and true FLOPs per step of a run, without starting it."""
    ready = prepare_without_launch(config, overrides)
    notes = check_start(ready)
    split = ContextSplit.from_options(vars(ready.args))
    table = layer_table(ready.patterns, split.seq_len, split=split)
    return "\n".join(summary(ready, [*notes, table]))


def ranks_named_by(run: RunConfig) -> int:
    """The fewest ranks that the run file's layout needs."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = 1
    for name in sizes:
        size = run.megatron.get(name) or 1
        ranks *= size if isinstance(size, int) and size > 0 else 1
    return ranks


def summary(ready: Prepared, lines: list[str]) -> list[str]:
    """What the start table says of a run, above `lines`."""
    from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

    args, shape = ready.args, ready.shape
    batch, schedule = get_current_running_global_batch_size(), args.step_batch_size_schedule
    later = f", then by step_batch_size_schedule ({schedule})" if schedule else ""
    sparse = shape.flops_per_sequence(ready.patterns) * batch
    attention = shape.attention_flops(ready.patterns) * batch
    dense = shape.dense_attention_flops() * batch
    stages = args.virtual_pipeline_model_parallel_size
    experts, contexts = args.expert_model_parallel_size, args.context_parallel_size
    layout = (
        f"TP {args.tensor_model_parallel_size}"
        f"{' + SP' if args.sequence_parallel else ''}, PP {args.pipeline_model_parallel_size}"
        f"{f' x {stages} virtual stages' if stages else ''}"
        f"{f', CP {contexts}' if contexts > 1 else ''}, DP {args.data_parallel_size}"
        f"{f', EP {experts}' if experts > 1 else ''}"
    )
    packed = args.dataloader_inter_document_masking
    assumed = "; if every sequence were one document: the log counts documents" if packed else ""
    return [
        *ready.backends.lines(args),
        f"{'layout':<16} {layout}: {args.world_size} rank(s)",
        f"{'parameters':<16} {shape.parameters():,}",
        f"{'batch':<16} {batch} sequences of {args.seq_length} tokens{later}",
        f"{'FLOPs per step':<16} {sparse:.4e} true model FLOPs, {attention / sparse:.1%} of them "
        f"attention; with dense attention {sparse - attention + dense:.4e}{assumed}",
        *(f"{'environment':<16} {name}={value}" for name, value in ready.variables.items()),
        *_resuming(args),
        *lines,
    ]


def _resuming(args) -> list[str]:
    """A line for a run whose checkpoints do not resume everywhere."""
    if args.save and args.no_save_optim:
        return [f"{'resuming':<16} never: checkpoints are without the optimizer (no_save_optim)"]
    if not args.save or not args.use_distributed_optimizer:
        return []
    if args.dist_ckpt_optim_fully_reshardable:
        return []
    return [f"{'resuming':<16} at this TP and PP alone (dist_ckpt_optim_fully_reshardable is off)"]
