"""What a run resumes from: the checkpoint's sparsity is compared with the configured one.

An S2 model has exactly a dense model's weights, so a checkpoint would load under any sparsity and
silently train another model. The resolved patterns travel in the checkpoint's own `args` (as
`s2_sparsity`), which Megatron saves in the common state of every format.
"""

from pathlib import Path

from s2_kernels import LayerPattern
from s2_kernels.record import describe_difference, read_record
from s2megatron.errors import ConfigError, as_config_error


def latest_iteration_dir(load: str | Path, step: int | None = None) -> Path | None:
    """The checkpoint folder that Megatron would load from `load`, or None if there is none."""
    load = Path(load)
    if step is None:
        tracker = load / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if text == "release":
            return load / "release"
        if not text.isdigit():
            raise ConfigError(f"{tracker}: {text!r} is not an iteration; the checkpoint is damaged")
        step = int(text)
    return load / f"iter_{step:07d}"


def load_common(folder: Path) -> dict:
    """A torch_dist checkpoint's common state. Raises ConfigError when it cannot be read."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return load_common_state_dict(str(folder))
    except (CheckpointingException, OSError, EOFError, KeyError) as error:
        raise ConfigError(
            f"checkpoint {folder}: cannot be read ({type(error).__name__}: {error}); it may be "
            "incomplete or not in torch_dist format: name an earlier one with megatron.ckpt_step"
        ) from None


def check_resume(args, patterns: tuple[LayerPattern, ...], on_resume: str) -> None:
    """Compares the checkpoint that Megatron is about to load with the configured sparsity.

    Args:
        args: Megatron's arguments (`load`, `pretrained_checkpoint`, `ckpt_step`).
        on_resume: "error" or "replace" (`sparsity.on_resume`).

    Raises:
        ConfigError: they differ and `on_resume` is "error"; the message shows the difference.
    """
    folder = None
    if args.load:
        folder = latest_iteration_dir(args.load, args.ckpt_step)
    if folder is None and args.pretrained_checkpoint:
        folder = latest_iteration_dir(args.pretrained_checkpoint)
    if folder is None:
        return
    common = load_common(folder)
    if args.load:
        check_layout(args, common, folder)
    saved = getattr(common.get("args"), "s2_sparsity", None)
    if saved is None:
        difference = "it records no sparsity: a dense checkpoint"
        same = all(pattern.is_dense for pattern in patterns)
    else:
        with as_config_error(f"checkpoint {folder}"):
            saved_patterns = read_record(saved)
        same = saved_patterns == patterns
        difference = "" if same else describe_difference(saved_patterns, patterns)
    if same:
        return
    message = (
        f"checkpoint {folder} was trained with another sparsity than configured:\n{difference}"
    )
    if on_resume == "error":
        raise ConfigError(
            f"{message}\nRestore the sparsity, or set sparsity.on_resume=replace to go on with "
            "the configured one"
        )
    if args.rank == 0:
        print(f"s2megatron: {message}\ngoing on with the configured one (sparsity.on_resume)")


def check_layout(args, common: dict, folder: Path) -> None:
    """Refuses another TP or PP where the optimizer's state was saved by bucket.

    Args:
        common: the checkpoint's common state.

    Raises:
        ConfigError: names both layouts and the ways out.
    """
    metadata = common.get("content_metadata") or {}
    by_bucket = metadata.get("distrib_optim_sharding_type") == "dp_reshardable"
    if not by_bucket or args.no_load_optim or args.finetune or not args.use_distributed_optimizer:
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        saved, wanted = getattr(common["args"], name), getattr(args, name)
        if saved != wanted:
            raise ConfigError(
                f"megatron.{name}={wanted}: checkpoint {folder} was saved at {saved}, with the "
                "distributed optimizer's state by bucket (dist_ckpt_optim_fully_reshardable=false)"
                f", which only another data-parallel size can read; go on at {saved} until a "
                "checkpoint is saved with megatron.dist_ckpt_optim_fully_reshardable=true, or "
                "leave the optimizer's state behind with megatron.no_load_optim=true"
            )


def check_resumable(args, fused_adam: str | None) -> None:
    """Refuses a run whose checkpoints its own optimizer could not be resumed from.

    Args:
        args: Megatron's arguments, validated.
        fused_adam: who brings Adam (`Backends.fused_adam`); None for torch.

    Raises:
        ConfigError: the option, and the one that makes resuming possible.
    """
    if not args.save or not args.use_distributed_optimizer:
        return
    local = args.non_persistent_ckpt_type == "local" and args.dist_ckpt_optim_fully_reshardable
    refused = [
        ("optimizer", args.optimizer == "sgd" or (args.optimizer == "lion" and not fused_adam),
         "the distributed optimizer saves Adam's state and no other; set "
         "use_distributed_optimizer=false, or optimizer=adam"),
        ("ckpt_format", args.ckpt_format == "torch",
         "is gathered by the distributed optimizer for one layout; use 'torch_dist'"),
        ("non_persistent_ckpt_type", local,
         "Megatron's local checkpoints hold optimizer state by bucket only; set "
         "dist_ckpt_optim_fully_reshardable=false, with which TP and PP are fixed"),
    ]  # fmt: skip
    for name, asked_for, way_out in refused:
        if asked_for:
            raise ConfigError(
                f"megatron.{name}={getattr(args, name)!s} with use_distributed_optimizer: its "
                f"checkpoints could not be resumed: {way_out}"
            )
