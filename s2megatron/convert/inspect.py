"""What a Megatron checkpoint holds, in a page: `s2megatron convert inspect CKPT_DIR`."""

from pathlib import Path

import torch

from s2_kernels.record import read_record
from s2megatron.convert.architectures import choose_architecture, from_megatron
from s2megatron.convert.reader import CheckpointReader
from s2megatron.convert.tensors import MLP_NORM
from s2megatron.convert.tokenizer import size_by_option
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.layer_table import layer_table


def inspect(checkpoint: str | Path, step: int | None = None) -> str:
    """Parameters, layout, vocabulary, sparsity and iteration of a checkpoint, as text.

    Raises:
        ConfigError: the checkpoint is incomplete or damaged.
    """
    reader = CheckpointReader(checkpoint, step)
    args = reader.args
    rows = {
        "checkpoint": str(reader.folder),
        "iteration": f"{reader.common.get('iteration', 0)}{_optimizer(reader)}",
        "model": _model(args),
        "parameters": f"{_parameters(reader):,}, {_dtypes(reader)}",
        "keys": _keys(reader),
        "saved at": _layout(args),
        "vocabulary": _vocabulary(reader),
        "Hugging Face": _hugging_face(reader),
    }
    lines = [f"{name:<14} {value}" for name, value in rows.items()]
    saved = getattr(args, "s2_sparsity", None)
    if saved is None:
        return "\n".join([*lines, f"{'sparsity':<14} none recorded: a dense checkpoint"])
    with as_config_error(f"checkpoint {reader.folder}"):
        patterns = read_record(saved)
    return "\n".join([*lines, layer_table(patterns, args.seq_length)])


def _optimizer(reader: CheckpointReader) -> str:
    return ", with optimizer state" if reader.has_optimizer else ", weights only"


def _model(args) -> str:
    heads = args.num_attention_heads
    kv_heads = args.num_query_groups if args.group_query_attention else heads
    text = (
        f"{args.num_layers} layers, hidden {args.hidden_size}, {heads} heads, {kv_heads} KV heads "
        f"of {args.kv_channels}, {args.seq_length} tokens"
    )
    experts = getattr(args, "num_experts", None)
    return text + (f", {experts} experts, {args.moe_router_topk} per token" if experts else "")


def _parameters(reader: CheckpointReader) -> int:
    fused, alone = MLP_NORM
    twice = [  # `to-megatron` writes this norm under both names
        key
        for key in reader.tensors
        if key.endswith(alone) and key.replace(alone, fused) in reader.tensors
    ]
    return sum(entry.size.numel() for key, entry in reader.tensors.items() if key not in twice)


def _dtypes(reader: CheckpointReader) -> str:
    sizes: dict[torch.dtype, int] = {}
    for entry in reader.tensors.values():
        dtype = entry.properties.dtype
        sizes[dtype] = sizes.get(dtype, 0) + entry.size.numel() * dtype.itemsize
    return ", ".join(
        f"{str(dtype).removeprefix('torch.')} ({size / 1e9:.3f} GB)"
        for dtype, size in sizes.items()
    )


def _keys(reader: CheckpointReader) -> str:
    stacked = any(key.startswith("decoder.layers.self_attention") for key in reader.tensors)
    return "layers stacked" if stacked else "one per layer"


def _layout(args) -> str:
    parts = [
        f"TP {args.tensor_model_parallel_size}{' + SP' if args.sequence_parallel else ''}",
        f"PP {args.pipeline_model_parallel_size}",
    ]
    if virtual := getattr(args, "virtual_pipeline_model_parallel_size", None):
        parts.append(f"VPP {virtual}")
    if (expert := getattr(args, "expert_model_parallel_size", 1)) > 1:
        parts.append(f"EP {expert}")
    parts.append(f"DP {args.data_parallel_size}")
    if args.use_distributed_optimizer:
        parts.append("distributed optimizer")
    return f"{', '.join(parts)}; {args.transformer_impl} modules (any layout can load it)"


def _vocabulary(reader: CheckpointReader) -> str:
    args, entry = reader.args, reader.tensors.get("embedding.word_embeddings.weight")
    rows = f"{entry.size[0]} rows" if entry else "no embedding"
    known = size_by_option(args)
    tied = "" if args.untie_embeddings_and_output_weights else ", tied to the output"
    named = f"{args.tokenizer_type}" + (f" {args.tokenizer_model}" if args.tokenizer_model else "")
    return f"{rows}, {f'{known} tokens' if known else 'tokens not recorded'}{tied}; {named}"


def _hugging_face(reader: CheckpointReader) -> str:
    try:
        model = from_megatron(reader.args, "this checkpoint", vocab=1)
        return f"converts to {choose_architecture(model, None, 'this checkpoint')}"
    except ConfigError as error:
        return str(error)
