"""Hugging Face folder -> Megatron torch_dist checkpoint, ready for `s2megatron.pretrain`."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from s2_kernels import LayerPattern
from s2_kernels.record import describe_difference, read_record, record
from s2megatron.config import load_config
from s2megatron.convert import architectures, hf_folder
from s2megatron.convert.model import FIELD_NAMES, CheckpointModel, differences
from s2megatron.convert.tensors import LAYERS, MLP_NORM, TensorRule, tensor_rules
from s2megatron.convert.to_hf import SOURCE_FOLDER
from s2megatron.convert.tokenizer import copy_files, find_files
from s2megatron.convert.torch_dist import Chunk, write_release
from s2megatron.convert.writing import check_output, check_space, whole_folder
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.layer_table import first_block_dropped

# Modules whose (empty) extra state Megatron asks for when it loads, under some layer spec.
_EXTRA_STATE = {
    "layer": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "qk_norm": ("self_attention.q_layernorm", "self_attention.k_layernorm"),
    "mlp": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "norms": ("input_layernorm", "pre_mlp_layernorm"),
    "experts": ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"),
    "model": ("decoder.final_layernorm", "output_layer"),
}


@dataclass(frozen=True)
class MegatronReport:
    """What was written."""

    folder: Path
    architecture: str
    parameters: int
    notes: list[str]


def to_megatron(
    source: str | Path, out: str | Path, config: str, overrides: tuple[str, ...] = ()
) -> MegatronReport:
    """Writes a checkpoint folder that the run file's `megatron.load` can name, at any layout.

    Args:
        source: Hugging Face model folder (config.json and safetensors).
        config, overrides: the run file that will train it, as `s2megatron.pretrain` takes them.

    Raises:
        ConfigError: before anything is written: the run file asks for another model, by field, or
            either side has something that the other has no place for. Nothing is left under `out`.
    """
    out = Path(out)
    check_output(out)
    folder = hf_folder.HuggingFaceFolder(source)
    where = str(folder.folder / "config.json")
    hf_config = folder.config
    model = architectures.from_hugging_face(hf_config, where)
    args, patterns, on_resume = read_run(config, overrides)
    notes = folder.notes
    _check_against_run(model, args, f"--config {config}", where, notes)
    padded = _padded_vocab(model, args, notes)
    rules = list(tensor_rules(model, mixtral_names=hf_config.model_type == "mixtral"))
    _check_tensors(folder, rules, model)
    args = copy.copy(args)
    args.s2_sparsity = _sparsity(hf_config, patterns, on_resume, where, notes)
    chunks = _chunks(folder, rules, model, padded)
    check_space(out, sum(chunk.nbytes for chunk in chunks))
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    objects = {"common_state/shard_0_1": common, **_extra_state(model)}
    with whole_folder(out) as part:
        total = sum(chunk.nbytes for chunk in chunks)
        with tqdm(total=total, desc=f"to-megatron {out}", unit="B", unit_scale=True) as bar:
            write_release(part, chunks, objects, bar.update)
        kept = part / SOURCE_FOLDER
        kept.mkdir()
        files = find_files(folder.folder)
        for name in ("config.json", hf_folder.GENERATION_CONFIG):
            if (folder.folder / name).is_file():
                files[name] = folder.folder / name
        copy_files(files, kept)
    parameters = sum(torch.Size(folder.shapes[n]).numel() for r in rules for n in r.hugging_face)
    return MegatronReport(out, hf_config.model_type, parameters, notes)


def read_run(config: str, overrides: tuple[str, ...]):
    """(Megatron's validated arguments, patterns, sparsity.on_resume) of a run file, untrained.

    Its datasets and checkpoints are not looked at: they may be on another machine. It need not say
    what only training asks for (`micro_batch_size`).
    """
    from s2megatron.training.data_options import PATHS, SPLITS
    from s2megatron.training.megatron_options import keys_of
    from s2megatron.training.prepare import prepare_without_launch

    given = load_config(config, overrides).megatron
    unused = [
        "data.train=[]",
        "data.valid=[]",
        "data.test=[]",
        "data.mock=true",
        "megatron.load=null",
        "megatron.save=null",
        "megatron.pretrained_checkpoint=null",
        "output.folder=null",
        *(f"megatron.{key}=null" for key in keys_of(given, (*PATHS, *SPLITS))),
    ]
    if given.get("micro_batch_size") is None:
        unused.append("megatron.micro_batch_size=1")
    ready = prepare_without_launch(config, (*overrides, *unused))
    return ready.args, ready.patterns, ready.run.sparsity.on_resume


def _check_against_run(model, args, run: str, source: str, notes: list[str]) -> None:
    """The run trains this model. Raises ConfigError naming every field that differs."""
    wanted = architectures.from_megatron(args, run, vocab=model.vocab)
    changed = differences(model, wanted)
    if "max_positions" in changed:  # no weight depends on it
        changed.remove("max_positions")
        notes.append(
            f"max_position_embeddings: {wanted.max_positions} in {run}, {model.max_positions} in "
            f"{source}; the run's is kept"
        )
    if changed:
        lines = []
        for field in changed:
            megatron, hugging_face = FIELD_NAMES[field]
            lines.append(
                f"  megatron.{megatron}: {_shown(getattr(wanted, field))}, but {hugging_face} is "
                f"{_shown(getattr(model, field))}"
            )
        raise ConfigError(
            f"{run} does not describe the model of {source}; set in the run file what differs:\n"
            + "\n".join(lines)
        )


def _shown(value) -> str:
    return str([int(x) for x in value]) if isinstance(value, tuple) else repr(value)


def _padded_vocab(model: CheckpointModel, args, notes: list[str]) -> int:
    padded = args.padded_vocab_size
    if padded < model.vocab:
        raise ConfigError(
            f"megatron.vocab_size: the run's tokenizer and padding give {padded} embedding rows, "
            f"the checkpoint has {model.vocab} (vocab_size in config.json); set "
            f"megatron.padded_vocab_size to {model.vocab} or a multiple of the tensor-parallel "
            "size above it"
        )
    if padded > model.vocab:
        notes.append(
            f"vocabulary: {model.vocab} tokens, padded with {padded - model.vocab} rows of zeros "
            f"to {padded}; they count in the softmax until they are trained down. "
            "megatron.make_vocab_size_divisible_by decides"
        )
    return padded


def _check_tensors(folder, rules: list[TensorRule], model: CheckpointModel) -> None:
    """Every tensor is there in its shape, and none is left over. Raises ConfigError."""
    wanted = {
        name: shape
        for rule in rules
        for name, shape in zip(rule.hugging_face, rule.part_shapes(model), strict=True)
    }
    for name, shape in wanted.items():
        found = folder.shapes.get(name)
        if found is None:
            raise ConfigError(f"{folder.folder}: {name} is missing, which config.json asks for")
        if found != tuple(shape):
            raise ConfigError(
                f"{folder.folder}: {name} holds {list(found)}, config.json asks for {list(shape)}"
            )
    left = [n for n in folder.shapes if n not in wanted and not n.endswith("rotary_emb.inv_freq")]
    if model.tied_embeddings and "lm_head.weight" in left:
        head, embedding = (folder.read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if head.dtype == embedding.dtype and torch.equal(head, embedding):
            left.remove("lm_head.weight")
    if left:
        raise ConfigError(
            f"{folder.folder}: {', '.join(left[:5])} has no place in Megatron's model"
        )


def _sparsity(
    hf_config, patterns: tuple[LayerPattern, ...], on_resume: str, where: str, notes: list[str]
) -> dict:
    """What the checkpoint records: the run file's sparsity, which it is converted to train with."""
    saved = getattr(hf_config, "s2", None)
    dense = all(pattern.is_dense for pattern in patterns)
    if saved is None:
        if not dense:
            notes.append(
                "attention: the source was trained dense; the checkpoint records the run file's "
                "sparsity, with which it goes on"
            )
            if (dropped := first_block_dropped(patterns)) is not None:
                notes.append(f"sparsity: {dropped}")
        return record(patterns)
    with as_config_error(where):
        trained = read_record(saved)
    if trained != patterns:
        told = f"{where} was trained with another sparsity than the run file's:\n" + (
            describe_difference(trained, patterns)
        )
        if on_resume == "error":
            raise ConfigError(
                f"{told}\nRestore the sparsity, or set sparsity.on_resume=replace to go on with "
                "the run file's"
            )
        notes.append(f"attention: {told}\n  the run file's is recorded (sparsity.on_resume)")
    return record(patterns)


def _chunks(folder, rules: list[TensorRule], model: CheckpointModel, padded: int) -> list[Chunk]:
    """All of Megatron's tensors, each layer a chunk of its own."""
    per_layer = bool(model.moe_layers) and not all(model.moe_layers)
    chunks, first_part = [], {}
    for rule in rules:
        shape = (padded, *rule.shape[1:]) if rule.kind == "vocab" else rule.shape

        def make(rule=rule, shape=shape) -> Tensor:
            tensor = rule.merge([folder.read(name) for name in rule.hugging_face], model)
            if rule.kind != "vocab" or shape[0] == tensor.shape[0]:
                return tensor
            return torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], shape[1])])

        lead = _leading_axes(rule, model, per_layer)
        # Before experts, Transformer Engine's spec and the local one name the norm differently.
        both = rule.megatron == MLP_NORM and model.is_moe(rule.layer)
        for name in rule.megatron if both else rule.megatron[:1]:
            if rule.layer is not None:
                name = f"{LAYERS}.{rule.layer}.{name}" if per_layer else f"{LAYERS}.{name}"
            _check_dtypes(folder, name, rule, first_part.setdefault(name, rule.hugging_face[0]))
            chunks.append(
                Chunk(
                    key=name,
                    offsets=(*(index for index, _ in lead), *(0 for _ in shape)),
                    sizes=(*(1 for _ in lead), *shape),
                    global_shape=(*(count for _, count in lead), *shape),
                    dtype=folder.dtype(rule.hugging_face[0]),
                    make=make,
                )
            )
    return chunks


def _check_dtypes(folder, key: str, rule: TensorRule, first: str) -> None:
    """Every part of a Megatron tensor has the dtype of its first. Raises ConfigError."""
    for name in rule.hugging_face:
        if folder.dtype(name) != folder.dtype(first):
            raise ConfigError(
                f"{folder.folder}: {first} is {folder.dtype(first)}, {name} is "
                f"{folder.dtype(name)}; Megatron keeps both in {key}, and a tensor has one dtype. "
                "Give the model one: in transformers, from_pretrained(..., dtype=torch.bfloat16) "
                "and save_pretrained"
            )


def _leading_axes(rule: TensorRule, model, per_layer: bool) -> list[tuple[int, int]]:
    """(index, count) of the axes in front: layers where they are stacked, and experts."""
    axes = [(rule.layer, model.layers)] if rule.layer is not None and not per_layer else []
    return axes + ([(rule.expert, model.experts)] if rule.expert is not None else [])


def _extra_state(model: CheckpointModel) -> dict[str, Tensor]:
    """Empty extra states of all modules that have one under some layer spec, by unique key."""
    per_layer = bool(model.moe_layers) and not all(model.moe_layers)
    states = {f"{name}._extra_state/shard_0_1": _EMPTY for name in _EXTRA_STATE["model"]}
    for layer in range(model.layers):
        prefix = f"{LAYERS}.{layer}" if per_layer else LAYERS
        offset, count = ("0", "1") if per_layer else (str(layer), str(model.layers))
        groups = ["layer", "norms"] + (["qk_norm"] if model.qk_norm else [])
        groups += [] if model.is_moe(layer) else ["mlp"]
        for name in (name for group in groups for name in _EXTRA_STATE[group]):
            states[f"{prefix}.{name}._extra_state/shard_{offset}_{count}"] = _EMPTY
        if model.is_moe(layer):
            for expert in range(model.experts):
                at = f"{expert}" if per_layer else f"{layer}.{expert}"
                of = f"{model.experts}" if per_layer else f"{model.layers}.{model.experts}"
                for name in _EXTRA_STATE["experts"]:
                    states[f"{prefix}.{name}._extra_state/shard_{at}_{of}"] = _EMPTY
    return states


_EMPTY = torch.empty(0, dtype=torch.uint8)
"""What Transformer Engine writes where there is no FP8 state, and reads as nothing."""
