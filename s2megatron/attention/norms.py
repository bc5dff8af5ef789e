"""Torch norms that take part in sequence parallelism.

Megatron's local norm refuses sequence parallelism. One thing only is missing there: each rank sees
other tokens, so the gradients of the norm's parameters must be summed over the tensor-parallel
ranks. Megatron does that for parameters which are marked `sequence_parallel`.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Builds torch's LayerNorm or RMSNorm as Megatron's config asks, with marked parameters."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"normalization={config.normalization!r}: must be one of {', '.join(norms)}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma: not supported without Transformer Engine"
            )
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
