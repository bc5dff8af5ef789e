"""The learning rate's and weight decay's schedule, checked before a process starts.

Megatron builds its scheduler after the model, on GPUs, and answers with a bare assertion there.
"""

from s2megatron.errors import ConfigError

GO_ON = (
    "; a run that goes on with another schedule than its checkpoint's also needs "
    "override_opt_param_scheduler: true"
)


def check_rates(args) -> None:
    """The learning rates, where they are given, are in order. Raises ConfigError.

    Args:
        args: not validated yet.
    """
    if args.min_lr < 0:
        raise ConfigError(f"megatron.min_lr: {args.min_lr:g} is negative; raise it to 0 or more")
    for name in ("min_lr", "lr_warmup_init"):
        if args.lr is not None and getattr(args, name) > args.lr:
            raise ConfigError(
                f"megatron.{name}: {getattr(args, name):g} is greater than megatron.lr, "
                f"{args.lr:g}; lower it"
            )


def check_batch_steps(args) -> None:
    """A batch that grows goes with lengths in samples: Megatron multiplies those in iterations.

    It takes micro_batch_size x DP for the batch of all of them, and so has another decay, another
    warm-up and too few samples.

    Args:
        args: not validated yet.

    Raises:
        ConfigError: the first length in iterations, with its name in samples.
    """
    for name in ("train_iters", "lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
        if args.step_batch_size_schedule and getattr(args, name):
            raise ConfigError(
                f"megatron.{name}: {getattr(args, name)} beside step_batch_size_schedule, "
                f"{args.step_batch_size_schedule!r}: an iteration has no fixed number of samples "
                f"then; give {name.replace('_iters', '_samples')} in its place"
            )


def check_schedule(args) -> None:
    """What the scheduler asks of Megatron's arguments, as far as the run file alone can tell.

    Args:
        args: validated; a run that only evaluates (skip_train) gets the length it does not need.

    Raises:
        ConfigError: the first thing that does not fit, with the values and the way out.
    """
    if args.skip_train:
        if not args.train_iters and not args.train_samples:
            args.train_iters = 1  # Megatron multiplies it, and trains none
        return
    if not args.train_iters and not args.train_samples:
        raise ConfigError("megatron.train_iters: is missing (or train_samples): how long to train")
    if args.lr is None:
        raise ConfigError("megatron.lr: is missing: the highest learning rate")
    if not 0 <= args.start_weight_decay <= args.end_weight_decay:
        raise ConfigError(
            f"megatron.start_weight_decay: {args.start_weight_decay:g} to end_weight_decay "
            f"{args.end_weight_decay:g}: weight decay is at least 0 and cannot fall"
        )
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            "megatron.override_opt_param_scheduler: true beside use_checkpoint_opt_param_scheduler "
            "(the run file's schedule, and the checkpoint's): leave one of them out"
        )
    _check_lengths(args, "iters" if args.train_iters else "samples")


def check_interleaving(args) -> None:
    """As many micro-batches as virtual pipeline stages ask for, in training and in evaluations.

    Megatron says so in the first step, and in the first evaluation.

    Args:
        args: validated.

    Raises:
        ConfigError: with the numbers, and what would fit.
    """
    if args.virtual_pipeline_model_parallel_size is None:
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    evaluates = args.eval_iters or args.full_validation
    sizes = [("global_batch_size", args.global_batch_size, args.micro_batch_size)]
    if args.step_batch_size_schedule:
        sizes = []  # Megatron asks for each of its sizes in time
    if evaluates:
        sizes += [
            ("eval_global_batch_size", args.eval_global_batch_size, args.eval_micro_batch_size)
        ]
    for name, batch, micro in sizes:
        number = batch // (micro * args.data_parallel_size)
        rest = number % group
        if not stages <= group <= number or 0 < rest < stages:
            raise ConfigError(
                f"megatron.{name}: {batch}: {number} micro-batches a rank, and virtual pipeline "
                f"stages take them in groups of {group} (microbatch_group_size_per_vp_stage, at "
                f"least {stages} for PP {stages}); a multiple of "
                f"{max(group, stages) * micro * args.data_parallel_size} fits"
            )


def _check_lengths(args, unit: str) -> None:
    """Warm-up ends before the decay does. Raises ConfigError."""
    decay, whole = getattr(args, f"lr_decay_{unit}"), getattr(args, f"train_{unit}")
    name, until = (f"lr_decay_{unit}", decay) if decay is not None else (f"train_{unit}", whole)
    if until <= 0:
        raise ConfigError(f"megatron.{name}: {until}: must be greater than 0")
    way_out = f"shorten the warm-up, or raise {name}{GO_ON}"
    if args.lr_warmup_fraction is not None:
        if not 0 <= args.lr_warmup_fraction < 1:
            raise ConfigError(
                f"megatron.lr_warmup_fraction: {args.lr_warmup_fraction:g}: is the share of {name} "
                f"that the warm-up takes, from 0 to less than 1; {way_out}"
            )
    else:
        warmup = getattr(args, f"lr_warmup_{unit}")
        if warmup >= until:
            raise ConfigError(
                f"megatron.lr_warmup_{unit}: {warmup} is not less than megatron.{name}, {until}, "
                f"where the learning rate has come down to min_lr; {way_out}"
            )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ConfigError(
            f"megatron.lr_wsd_decay_{unit}: is missing: how long the last phase of "
            "lr_decay_style WSD lasts"
        )
