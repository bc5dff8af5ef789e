"""Can a run's checkpoints be resumed: with an optimizer at all, and at this TP, PP and EP?"""

from pathlib import Path

from s2megatron.errors import ConfigError


def check_layout(args, common: dict, folder: Path) -> None:
    """Refuses a checkpoint without an optimizer, EP that comes or goes, and another TP or PP of
    optimizer state saved by bucket.

    Megatron has one optimizer where each rank holds all experts, and a second one for the experts
    where they are spread over ranks; the states of the two are not told apart.

    Args:
        common: the checkpoint's common state.

    Raises:
        ConfigError: names both layouts and the ways out.
    """
    if getattr(args, "no_load_optim", False) or getattr(args, "finetune", False):
        return
    if getattr(common["args"], "no_save_optim", False):
        raise ConfigError(
            f"checkpoint {folder} was saved without its optimizer (megatron.no_save_optim), and "
            f"training cannot go on from it; {_anew(folder)}"
        )
    saved = getattr(common["args"], "expert_model_parallel_size", 1)
    wanted = getattr(args, "expert_model_parallel_size", 1)
    if (saved == 1) != (wanted == 1):
        raise ConfigError(
            f"megatron.expert_model_parallel_size={wanted}: checkpoint {folder} was saved at "
            f"{saved}, and Megatron cannot read the optimizer's state of one rank's experts where "
            f"they are spread over ranks, or the other way round; go on at {saved}"
            f"{' or another value above 1' if saved > 1 else ''}, or {_anew(folder)}"
        )
    if not _by_bucket(common) or not args.use_distributed_optimizer:
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        saved, wanted = getattr(common["args"], name), getattr(args, name)
        if saved != wanted:
            raise ConfigError(
                f"megatron.{name}={wanted}: checkpoint {folder} was saved at {saved}, with the "
                "distributed optimizer's state by bucket (dist_ckpt_optim_fully_reshardable=false)"
                f", which only another data-parallel size can read; go on at {saved} until a "
                "checkpoint is saved with megatron.dist_ckpt_optim_fully_reshardable=true, or "
                f"{_anew(folder)}"
            )


def _by_bucket(common: dict) -> bool:
    metadata = common.get("content_metadata") or {}
    return metadata.get("distrib_optim_sharding_type") == "dp_reshardable"


def told_of_buckets(args, common: dict) -> list[str]:
    """A line where state saved by bucket may meet other buckets: those of another size.

    The size follows from the number of DP x CP ranks above 40, so that it may change by itself.
    Where the parameters of a rank fit into one bucket of either size, nothing changes.

    Args:
        common: the checkpoint's common state.
    """
    saved = common["args"]
    if not _by_bucket(common) or not args.use_distributed_optimizer:
        return []
    before, now = _bucket_options(saved), _bucket_options(args)
    if before == now:
        return []
    was, given = (
        " ".join(f"megatron.{name}={str(value).lower()}" for name, value in options.items())
        for options in (before, now)
    )
    return [
        f"the optimizer's state was saved by bucket, with {was}; with {given} it loads only where "
        f"a rank's parameters fit into one bucket. If it does not, go on with {was}"
    ]


def _bucket_options(args) -> dict:
    """What the size of buckets follows from (Megatron's training.resolve_ddp_bucket_size)."""
    overlap = {"overlap_grad_reduce": bool(getattr(args, "overlap_grad_reduce", False))}
    if not overlap["overlap_grad_reduce"]:
        return overlap  # one bucket
    if (number := getattr(args, "ddp_num_buckets", None)) is not None:
        return overlap | {"ddp_num_buckets": number}
    ranks = getattr(args, "data_parallel_size", 1) * getattr(args, "context_parallel_size", 1)
    size = getattr(args, "ddp_bucket_size", None) or max(40_000_000, 1_000_000 * ranks)
    return overlap | {"ddp_bucket_size": size}


def _anew(folder: Path) -> str:
    """The way out that leaves the optimizer's state behind: `no_load_optim` is for first starts."""
    return (
        "start a new output.folder from these weights with "
        f"megatron.load={folder.parent} megatron.finetune=true"
    )


def check_resumable(args, fused_adam: str | None) -> None:
    """Refuses a run whose checkpoints its own optimizer could not be resumed from.

    Args:
        args: Megatron's arguments, validated.
        fused_adam: who brings Adam (`Backends.fused_adam`); None for torch.

    Raises:
        ConfigError: the option, and the one that makes resuming possible.
    """
    if args.save and args.ckpt_format == "torch":
        raise ConfigError(
            "megatron.ckpt_format=torch is a format that is not read here, so that this run's "
            "checkpoints could not be resumed; use 'torch_dist'"
        )
    if args.save and args.optimizer == "soap" and not args.no_save_optim:
        raise ConfigError(
            "megatron.optimizer=soap in a run that saves: Megatron cannot save its state (the "
            "preconditioners have another shape than the weights) and would end at the first save; "
            "choose adam, or set no_save_optim=true, with which nothing can be resumed"
        )
    if not args.save or not args.use_distributed_optimizer:
        return
    local = args.non_persistent_ckpt_type == "local" and args.dist_ckpt_optim_fully_reshardable
    refused = [
        ("optimizer", args.optimizer == "sgd" or (args.optimizer == "lion" and not fused_adam),
         "the distributed optimizer saves Adam's state and no other; set "
         "use_distributed_optimizer=false, or optimizer=adam"),
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
