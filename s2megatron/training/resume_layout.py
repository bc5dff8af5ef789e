"""Can a run's checkpoints be resumed: by its optimizer at all, and at this TP and PP?"""

from pathlib import Path

from s2megatron.errors import ConfigError


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
