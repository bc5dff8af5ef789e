"""vLLM's own models with S2 attention: what `s2megatron convert to-hf` writes.

A class is made when it is asked for, so that naming one model does not import the other five.
"""

import importlib

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from s2_kernels.record import read_record
from s2_vllm.backend import S2Attention
from s2_vllm.checks import ARCHITECTURES, OURS
from s2_vllm.rules import held_by_ranks


def use_s2_attention(model, config) -> None:
    """Puts `S2Attention` into every layer of a vLLM model that has been built, not yet loaded.

    Args:
        config: the model's, with an `s2` key.
    """
    patterns = read_record(config.s2)
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    stock = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Attention)
    ]
    for parent, name, layer in stock:
        pattern = patterns[extract_layer_index(layer.layer_name)]
        attention = S2Attention(layer, pattern.shard(rank, ranks), held_by_ranks(pattern, ranks))
        setattr(parent, name, attention)


def __getattr__(name: str):
    """The class `S2...` of an architecture of ARCHITECTURES."""
    stock = name.removeprefix(OURS)
    if not name.startswith(OURS) or stock not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(importlib.import_module(ARCHITECTURES[stock]), stock)

    def __init__(self, *, vllm_config, prefix=""):
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        use_s2_attention(self, vllm_config.model_config.hf_text_config)

    made = type(name, (base,), {"__init__": __init__, "__module__": __name__})
    globals()[name] = made
    return made
