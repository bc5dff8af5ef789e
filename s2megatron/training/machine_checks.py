"""What a run's options need of this machine: a GPU, or a package that is not here."""

import importlib.util
from typing import Any

from s2megatron.cluster.environment import captures
from s2megatron.errors import ConfigError
from s2megatron.training.backends import Backends

RECOMPUTED_BY_TE = {"layernorm", "moe_act", "mla_up_proj"}
"""Of recompute_modules: Megatron asks Transformer Engine about fp8 there, and fails without it."""


def check_machine(backends: Backends, args) -> None:
    """Of a run that is to start here, what its options need; a dry run may be of another machine's.

    Args:
        args: Megatron's arguments, validated.

    Raises:
        ConfigError: an option that needs a GPU or a package, without it.
    """
    for option, missing, way_out in _missing(backends, args):
        if missing:
            raise ConfigError(f"megatron.{option}: needs {missing}, which is not here; {way_out}")
    captured = captures(args) or ("te_rng_tracker=True" if args.te_rng_tracker else "")
    others = (f"{name}=True" for name in ("nccl_ub", "optimizer_cuda_graph") if getattr(args, name))
    for option in filter(None, (captured, *others)):
        if not backends.cuda:
            raise ConfigError(
                f"megatron.{option}: needs a GPU, and there is none here; leave it out"
            )
    if captured and not backends.transformer_engine:
        raise ConfigError(
            f"megatron.{captured}: needs Transformer Engine, whose random numbers CUDA graphs can "
            "replay, and it is not installed here; install it (docs/install.md), or leave it out"
        )


def _missing(backends: Backends, args) -> list[tuple[str, Any, str]]:
    """(Option, what it needs and does not find or '', way out): raw errors of Megatron's."""
    te = "" if backends.transformer_engine else "Transformer Engine"
    gpu = "" if backends.cuda else "a GPU"
    modules = RECOMPUTED_BY_TE & set(args.recompute_modules or ())
    recomputes = args.recompute_granularity == "selective" and modules
    offloads = args.optimizer_cpu_offload
    leave = "leave it out"
    return [
        ("wandb_project", args.wandb_project and _package("wandb"),
         f"pip install wandb, or {leave}"),
        (f"optimizer={args.optimizer}",
         args.optimizer not in ("adam", "sgd") and _package("emerging_optimizers"),
         "pip install emerging-optimizers, or choose adam"),
        ("enable_ft_package", args.enable_ft_package and _package("nvidia_resiliency_ext"),
         f"pip install nvidia-resiliency-ext, or {leave}"),
        ("num_distributed_optimizer_instances",
         args.num_distributed_optimizer_instances > 1 and _package("einops"),
         f"pip install einops, or {leave}"),
        ("adlr_autoresume", args.adlr_autoresume and _package("userlib"),
         f"it is for NVIDIA's own clusters: {leave}"),
        ("tp_comm_overlap", args.tp_comm_overlap and te, leave),
        ("cpu_offloading_num_layers", args.cpu_offloading_num_layers and te, leave),
        ("moe_latent_size", args.num_experts and args.moe_latent_size and te,
         f"install it (docs/install.md), or {leave}"),
        (f"recompute_modules={sorted(modules)}", recomputes and te, "name other modules"),
        ("use_precision_aware_optimizer",
         args.use_precision_aware_optimizer and not offloads and te, leave),
        ("distributed_backend=nccl", args.distributed_backend == "nccl" and gpu, leave),
        ("record_memory_history", args.record_memory_history and gpu, leave),
        ("profile", args.profile and not args.use_pytorch_profiler and gpu,
         "set use_pytorch_profiler as well"),
    ]  # fmt: skip


def _package(name: str) -> str:
    """'' where it is installed, else what is missing."""
    return "" if importlib.util.find_spec(name) else f"the package {name}"
