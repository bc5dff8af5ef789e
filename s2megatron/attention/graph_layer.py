"""Megatron's layer for Transformer Engine's CUDA graphs, without the mask that Megatron adds.

megatron-core 0.19 captures every attention with a mask [b, 1, s, s], and fills one with zeros
before each replay, also where no mask was given: 1 GiB a layer at 32k tokens, 16 GiB at 128k.
Attention that is causal by itself, S2's and Transformer Engine's, takes none.
"""

from functools import cache

from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class _NoMask:
    """What of a TransformerLayer has to do with the mask of a captured layer."""

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, Tensor]:
        """The inputs a capture runs with: hidden states [s, b, h] alone."""
        return GraphableMegatronModule.get_layer_static_inputs(self, seq_length, micro_batch_size)

    def _get_te_cuda_graph_replay_args(self, *args, attention_mask: Tensor | None = None, **kwargs):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: a captured layer is causal and takes no mask; give "
                "--no-create-attention-mask-in-dataloader"
            )
        return super()._get_te_cuda_graph_replay_args(*args, **kwargs)


@cache
def without_mask(layer: type[TransformerLayer]) -> type[TransformerLayer]:
    """The same layer, captured by Transformer Engine without a mask."""
    if issubclass(layer, _NoMask):  # layers may share one spec
        return layer
    return type(layer.__name__, (_NoMask, layer), {"__module__": __name__})
