"""Which optional packages are installed here, and which of Megatron's options follow from it.

A package is recognised by what it brings and not by its name.

PyPI's `apex` is an unrelated project, and a half-removed Transformer Engine leaves an empty folder
that still imports: both would send Megatron down a path that fails later.
"""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from s2_kernels.versions import release
from s2megatron.errors import ConfigError

MEGATRON = (0, 19)
"""The release of megatron-core that setup.py asks for."""
RESILIENCY = (0, 6)
"""The oldest nvidia-resiliency-ext that Megatron takes; its import fails beside an older one."""


@dataclass(frozen=True)
class Backends:
    """The optional parts that a run can use on this machine."""

    cuda: bool
    transformer_engine: str | None
    """Version, or None."""
    te_fails: bool
    """Transformer Engine is installed and does not import."""
    fused_adam: str | None
    """'Transformer Engine', 'Apex', or None (torch's AdamW)."""
    gradient_accumulation_fusion: bool
    """NVIDIA Apex's fused_weight_gradient_mlp_cuda, which Megatron's output layer asks for under
    Transformer Engine too."""
    resiliency: str | None = None
    """Version of nvidia-resiliency-ext, which writes checkpoints in the background; or None."""

    def lines(self, args) -> list[str]:
        """The start table's lines: which backend each part uses, and what is done without.

        Args:
            args: Megatron's arguments, validated.
        """
        te = args.transformer_impl == "transformer_engine"
        engine = f"Transformer Engine {self.transformer_engine}"
        why = "installed, not used" if self.transformer_engine else "not found"
        why = "installed, does not import" if self.te_fails else why
        fp8 = f", FP8 ({args.fp8}, {args.fp8_recipe}), attention in bf16" if args.fp8 else ""
        fusion = "off" if self.gradient_accumulation_fusion else "off (NVIDIA Apex not found)"
        adam = f"fused Adam ({self.fused_adam})" if self.fused_adam else "torch AdamW"
        parts = {
            "megatron-core": _megatron(),
            "device": "CUDA" if self.cuda else "CPU (no GPU found), gloo",
            "linear layers": engine + fp8
            if te
            else f"Megatron local modules (Transformer Engine: {why})",
            "norms": f"{engine}, fused with the linear layer that follows" if te else "torch",
            "rotary": "fused (Transformer Engine)" if args.apply_rope_fusion else "not fused",
            "S2 attention": "Triton" if self.cuda else "blocked (PyTorch)",
            "dense attention": "Transformer Engine" if te else "torch SDPA",
            "optimizer": adam if args.optimizer == "adam" else args.optimizer,
            "gradient fusion": "on (NVIDIA Apex)" if args.gradient_accumulation_fusion else fusion,
        }
        return [f"{name:<16} {value}" for name, value in parts.items()]


def find_backends() -> Backends:
    """Looks at this machine.

    Raises:
        ConfigError: a half-removed Transformer Engine, an Apex whose FusedAdam Megatron would take
            and could not build, or an nvidia-resiliency-ext beside which Megatron does not import.
    """
    te_spec = importlib.util.find_spec("transformer_engine")
    if te_spec is not None and te_spec.origin is None:
        folders = ", ".join(te_spec.submodule_search_locations or [])
        raise ConfigError(
            f"transformer_engine: {folders} holds no package (a half-removed installation), and "
            "Megatron's import fails on it; remove that folder or install Transformer Engine again"
        )
    te_version = None
    if te_spec is not None and _brings("transformer_engine.pytorch", "TransformerLayer"):
        te_version = importlib.metadata.version("transformer_engine")
    apex_adam = _brings("apex.optimizers", "FusedAdam")
    if apex_adam and not te_version and not _brings("amp_C", "multi_tensor_adam"):
        raise ConfigError(
            "apex: is installed without its CUDA extensions (amp_C), and Megatron would take its "
            "FusedAdam, which needs them; build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
            "(docs/install.md), or uninstall it to run with torch's AdamW"
        )
    return Backends(
        cuda=torch.cuda.is_available(),
        transformer_engine=te_version,
        te_fails=te_spec is not None and te_version is None,
        fused_adam="Transformer Engine" if te_version else "Apex" if apex_adam else None,
        gradient_accumulation_fusion=_brings(
            "fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"
        ),
        resiliency=_resiliency(),
    )


def _megatron() -> str:
    """The version here, and whether it was tried: setup.py asks for one, a container may not."""
    from megatron.core import __version__ as version

    if release(version) == MEGATRON:
        return version
    tried = ".".join(map(str, MEGATRON))
    return f"{version}, NOT TRIED: s2megatron was tried with {tried} only (docs/install.md)"


def _resiliency() -> str | None:
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        return None
    version = importlib.metadata.version("nvidia-resiliency-ext")
    if release(version) < RESILIENCY:
        least = ".".join(map(str, RESILIENCY))
        raise ConfigError(
            f"nvidia-resiliency-ext: {version} is installed, beside which Megatron does not "
            f"import; install {least} or newer, or uninstall it (checkpoints are written in the "
            "background without it, too)"
        )
    return version


def _brings(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def default_options(backends: Backends, chosen: dict) -> dict:
    """Megatron options that this machine and S2 attention call for; the run file's own win.

    Args:
        chosen: the run file's `megatron:` section.

    Raises:
        ConfigError: the run file asks for what is not installed.
    """
    impl = chosen.get("transformer_impl")
    if impl == "transformer_engine" and not backends.transformer_engine:
        raise ConfigError(
            "megatron.transformer_impl: 'transformer_engine' is not installed here; install it "
            "(docs/install.md), or leave the option out to run on Megatron's local modules"
        )
    if chosen.get("gradient_accumulation_fusion") and not backends.gradient_accumulation_fusion:
        raise ConfigError(
            "megatron.gradient_accumulation_fusion: true needs NVIDIA Apex (built with its "
            "fused_weight_gradient_mlp_cuda), which is not installed here; leave the option out"
        )
    nvrx = backends.cuda and backends.resiliency is not None
    if chosen.get("async_save") and chosen.get("async_strategy") == "nvrx" and not nvrx:
        raise ConfigError(
            "megatron.async_strategy: 'nvrx' needs nvidia-resiliency-ext and a GPU (its writer "
            "asks for one), which are not both here; leave the option out"
        )
    use_te = impl == "transformer_engine" or (
        impl is None and backends.transformer_engine is not None and backends.cuda
    )
    tp = chosen.get("tensor_model_parallel_size") or 1
    options = {
        # Megatron pads the vocabulary to a multiple of this times TP, and the rows added count in
        # the softmax: with a fixed product a checkpoint gives the same loss at any TP.
        "make_vocab_size_divisible_by": max(1, 128 // tp)
        if isinstance(tp, int) and tp > 0
        else 128,
        "transformer_impl": "transformer_engine" if use_te else "local",
        # S2 attention has no dropout, and builds its causal mask from lifetimes.
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "create_attention_mask_in_dataloader": False,
        "eval_interval": 1000,  # Megatron divides by it, and has no default
        "distributed_backend": "nccl" if backends.cuda else "gloo",
        # The distributed optimizer's state by parameter and not by bucket: at another TP or PP
        # there are other buckets. Every rank asks for whole parameters then; read once for all.
        "dist_ckpt_optim_fully_reshardable": True,
        "ckpt_fully_parallel_load": True,
        "gradient_accumulation_fusion": backends.gradient_accumulation_fusion,
        "async_strategy": "nvrx" if nvrx else "mcore",  # who writes in the background
    }
    if not use_te:
        options |= {
            "no_persist_layer_norm": True,
            "apply_rope_fusion": False,
        }
    return options | chosen
