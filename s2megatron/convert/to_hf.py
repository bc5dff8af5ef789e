"""Megatron torch_dist checkpoint -> Hugging Face folder, one shard in memory at a time."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from s2_kernels.record import ARCHITECTURE_PREFIX, read_record
from s2megatron.convert import architectures, hf_folder
from s2megatron.convert.hf_config import read_config, read_json, write_json
from s2megatron.convert.model import FIELD_NAMES, CheckpointModel, differences
from s2megatron.convert.reader import CheckpointReader, Place
from s2megatron.convert.sentencepiece_files import write_sentencepiece_tokenizer
from s2megatron.convert.tensors import TensorRule, tensor_rules
from s2megatron.convert.tokenizer import (
    RunTokenizer,
    copy_files,
    find_files,
    reads_otherwise,
    run_tokenizer,
    size_by_option,
    write_byte_tokenizer,
)
from s2megatron.convert.writing import check_output, check_space, whole_folder
from s2megatron.errors import ConfigError, as_config_error

SOURCE_FOLDER = "hf"
"""Where `to-megatron` keeps the config and tokenizer that a checkpoint came with."""


@dataclass(frozen=True)
class HuggingFaceReport:
    """What was written."""

    folder: Path
    architecture: str
    iteration: int
    parameters: int
    shards: int
    notes: list[str]


def to_hugging_face(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    step: int | None = None,
    architecture: str | None = None,
    like: str | Path | None = None,
    vocab_size: int | None = None,
) -> HuggingFaceReport:
    """Writes a folder that transformers loads with no code of ours.

    Args:
        checkpoint: Megatron's checkpoint folder, or one iteration in it.
        dtype: of the weights; None keeps each tensor's own.
        step: iteration; None is the latest.
        architecture: one of `ARCHITECTURES`; None is `like`'s, or the plainest that fits.
        like: Hugging Face folder to take tokenizer, generation config and the config fields that
            Megatron does not know from; None is what `to-megatron` kept, if anything.
        vocab_size: tokens without Megatron's padding, where the checkpoint does not say.

    Raises:
        ConfigError: before anything is written, for what cannot be converted; later for damage
            and a full disk. Nothing is left under `out`.
    """
    out, most = Path(out), hf_folder.parse_size(max_shard_size)
    cast = hf_folder.dtype_named(dtype) if dtype else None
    check_output(out)
    reader = CheckpointReader(checkpoint, step)
    where = f"checkpoint {reader.folder}"
    source = _source_folder(reader, like)
    source_config = read_config(source) if source else None
    notes = _rope_note(reader.args)
    tokenizer = run_tokenizer(reader.args)
    vocab = _true_vocab(reader, tokenizer, source_config, vocab_size, notes)
    model = architectures.from_megatron(reader.args, where, vocab=vocab)
    if architecture is None and source_config is not None:
        architecture = source_config.model_type
    name = architectures.choose_architecture(model, architecture, where)
    rules = list(tensor_rules(model, mixtral_names=name == "mixtral"))
    places = check_tensors(reader, rules, model)
    config = architectures.to_config(model, name) | tokenizer.token_ids
    if source_config is not None and source_config.model_type == name:
        config = _merged(source, source_config, config, model, notes)
    config.pop("s2", None)
    config |= _sparsity(reader, model, notes)
    config["architectures"] = _class_names(config, architectures.ARCHITECTURES[name].class_name)
    sizes = _sizes(rules, places, model, cast)
    check_space(out, sum(size for _, size in sizes))
    dtype_field = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5's, and 4's
    config[dtype_field] = str(cast or _commonest(places)).removeprefix("torch.")
    shards = hf_folder.plan_shards(sizes, most)
    with whole_folder(out) as part:
        with tqdm(
            total=sum(size for _, size in sizes), desc=f"to-hf {out}", unit="B", unit_scale=True
        ) as bar:
            tensors = _tensors(reader, rules, places, model, cast)
            hf_folder.write_shards(part, shards, tensors, bar.update)
        write_json(part / "config.json", config)
        _write_companions(reader, tokenizer, source, part, notes)
    parameters = sum(torch.Size(s).numel() for r in rules for s in r.part_shapes(model))
    iteration = reader.common.get("iteration", 0)
    return HuggingFaceReport(out, name, iteration, parameters, len(shards), notes)


def check_tensors(
    reader: CheckpointReader, rules: list[TensorRule], model: CheckpointModel
) -> list[Place]:
    """Places of all tensors, their shapes checked; no weight is left unread.

    Raises:
        ConfigError: a tensor is missing, has another shape, or has no place in the target.
    """
    places = [reader.place(rule) for rule in rules]
    for rule, place in zip(rules, places, strict=True):
        counts = (model.layers, model.experts) if rule.expert is not None else (model.layers,)
        wanted = (*counts[len(counts) - len(place.index) :], *rule.shape)
        fits = place.stored_shape == wanted
        if rule.kind == "vocab":
            fits = place.shape[0] >= model.vocab and place.shape[1:] == rule.shape[1:]
        if not fits:
            raise ConfigError(
                f"checkpoint {reader.folder}: {place.key} holds {list(place.stored_shape)}, its "
                f"args ask for {list(wanted)}; weights and args do not belong together"
            )
    # Stock specs name a norm one way or the other, `to-megatron` both: then the first is read.
    alternatives = {name for rule in rules for name in rule.megatron[1:]}
    used = {place.key for place in places}
    left = [
        key
        for key in reader.tensors
        if key not in used and not any(key.endswith(f".{name}") for name in alternatives)
    ]
    if left:
        raise ConfigError(
            f"checkpoint {reader.folder}: {', '.join(left[:5])} has no place in the Hugging Face "
            "models supported"
        )
    return places


def _rope_note(args) -> list[str]:
    """Megatron 0.19 builds its models with factor 8, unless s2megatron set it right."""
    factor = getattr(args, "rope_scaling_factor", 8.0)
    scaled = getattr(args, "use_rope_scaling", False) and factor != 8.0
    if not scaled or hasattr(args, "s2_sparsity"):
        return []
    return [
        f"rope: rope_scaling_factor={factor} is written, as in the args; Megatron 0.19 itself "
        "trains with 8.0 whatever the option says: put 8.0 into config.json if this one did"
    ]


def _source_folder(reader: CheckpointReader, like: str | Path | None) -> Path | None:
    if like is not None:
        if not (Path(like) / "config.json").is_file():
            raise ConfigError(f"--like {like}: holds no config.json")
        return Path(like)
    kept = reader.folder.parent / SOURCE_FOLDER
    return kept if (kept / "config.json").is_file() else None


def _true_vocab(reader, tokenizer, source_config, asked_for, notes: list[str]) -> int:
    """Tokens without padding: the most that is said of them, so that no token loses its row.

    The args' vocab_size says it only where the tokenizer is made from it. A model may have more
    tokens than its tokenizer.
    """
    embedding = TensorRule(("embedding.word_embeddings.weight",), (), ())
    padded = reader.place(embedding).shape[0]
    known = [
        ("vocab_size in its args", size_by_option(reader.args)),
        ("vocab_size in config.json", getattr(source_config, "vocab_size", None)),
        ("its tokenizer's size", tokenizer.size),
    ]
    if asked_for is not None:
        known = [("--vocab-size", asked_for)]
    known = {origin: size for origin, size in known if size is not None}
    if not known:
        notes.append(
            f"vocabulary: nothing says how many of the {padded} embedding rows are padding, so all "
            f"are written{_unread_size(reader.args, padded)}; --vocab-size trims them"
        )
        return padded
    origin, size = next(iter(known.items()))
    if not 0 < size <= padded:
        raise ConfigError(
            f"checkpoint {reader.folder}: {origin} is {size}, and the embedding has {padded} rows; "
            "give the tokenizer's size with --vocab-size"
        )
    rows = min(padded, max(known.values()))
    unread = "" if asked_for is not None else _unread_size(reader.args, rows)
    if unread or rows > size:
        said = ", ".join(f"{origin} is {size}" for origin, size in known.items())
        notes.append(
            f"vocabulary: {rows} of the {padded} embedding rows are written ({said}{unread}); "
            "--vocab-size N writes N of them"
        )
    return rows


def _unread_size(args, rows: int) -> str:
    """Words on another vocab_size in a checkpoint's args, which its tokenizer was not made from."""
    size = getattr(args, "vocab_size", None)
    if size in (None, rows) or size_by_option(args) is not None:
        return ""
    return f"; the vocab_size in its args, {size}, is not read by a {args.tokenizer_type}"


def _sizes(rules, places, model, cast) -> list[tuple[str, int]]:
    """(Hugging Face name, bytes) of all tensors, in order."""
    return [
        (name, torch.Size(shape).numel() * (cast or place.dtype).itemsize)
        for rule, place in zip(rules, places, strict=True)
        for name, shape in zip(rule.hugging_face, rule.part_shapes(model), strict=True)
    ]


def _commonest(places: list[Place]) -> torch.dtype:
    dtypes = [place.dtype for place in places]
    return max(dict.fromkeys(dtypes), key=dtypes.count)  # of two, always the same


def _tensors(reader, rules, places, model, cast) -> Iterator[tuple[str, Tensor]]:
    for rule, place in zip(rules, places, strict=True):
        parts = rule.split(reader.read(place), model)
        for name, part in zip(rule.hugging_face, parts, strict=True):
            # A copy: a view would keep the whole Megatron tensor alive until its shard is written.
            yield name, part.to(cast or part.dtype, copy=len(parts) > 1)


def _sparsity(reader: CheckpointReader, model: CheckpointModel, notes: list[str]) -> dict:
    """The `s2` key of config.json, if any layer is sparse."""
    patterns = recorded_patterns(reader, model)
    if patterns is None or all(pattern.is_dense for pattern in patterns):
        notes.append("attention: dense in every layer, so config.json has no s2 key")
        return {}
    notes.append(
        "attention: trained with S2; a plain from_pretrained computes dense attention, "
        "s2megatron.hf.load what was trained"
    )
    return {"s2": reader.args.s2_sparsity}


def _class_names(config: dict, class_name: str) -> list[str]:
    """`architectures` of a config: with an `s2` key under names that only S2's plugins serve."""
    stock = [n.removeprefix(ARCHITECTURE_PREFIX) for n in config.get("architectures", [class_name])]
    return [ARCHITECTURE_PREFIX + n for n in stock] if "s2" in config else stock


def recorded_patterns(reader: CheckpointReader, model: CheckpointModel):
    """The sparsity in the checkpoint's args, or None. Raises ConfigError if it does not fit."""
    saved = getattr(reader.args, "s2_sparsity", None)
    if saved is None:
        return None
    with as_config_error(f"checkpoint {reader.folder}"):
        patterns = read_record(saved)
    heads = {(p.heads, p.kv_heads) for p in patterns}
    if len(patterns) != model.layers or heads != {(model.heads, model.kv_heads)}:
        raise ConfigError(
            f"checkpoint {reader.folder}: its s2_sparsity has {len(patterns)} layers with (heads, "
            f"KV heads) {sorted(heads)}, the model {model.layers} with "
            f"{(model.heads, model.kv_heads)}; args and sparsity do not belong together"
        )
    return patterns


def _merged(source: Path, source_config, config: dict, model, notes: list[str]) -> dict:
    """The raw config of `source`, so that all its other fields survive."""
    raw = read_json(source / "config.json")
    raw.pop("transformers_weights", None)  # its own file's name, which is not written here
    described = architectures.from_hugging_face(source_config, str(source / "config.json"))
    changed = differences(model, described)
    for field in changed:
        notes.append(
            f"config.json: {FIELD_NAMES[field][1]} is {getattr(model, field)}, "
            f"{source / 'config.json'} has {getattr(described, field)}"
        )
    if not changed:
        return raw
    for key in _OTHER_SPELLINGS:
        raw.pop(key, None)
    token_ids = {key: raw[key] for key in raw if key.endswith("_token_id")}
    return raw | config | token_ids


# What transformers versions also call fields that `to_config` writes.
_OTHER_SPELLINGS = ("rope_parameters", "num_local_experts", "layer_types")


def _write_companions(reader, tokenizer: RunTokenizer, source, part: Path, notes) -> None:
    """Tokenizer and generation config: `source`'s, or the run's own."""
    from transformers import GenerationConfig

    files = find_files(source) if source else {}
    copy_files(files, part)
    if not files:
        _write_own_tokenizer(reader, tokenizer, part, notes)
    if source and (source / hf_folder.GENERATION_CONFIG).is_file():
        shutil.copyfile(source / hf_folder.GENERATION_CONFIG, part / hf_folder.GENERATION_CONFIG)
    else:
        GenerationConfig.from_model_config(read_config(part)).save_pretrained(part)


def _write_own_tokenizer(reader, tokenizer: RunTokenizer, part: Path, notes: list[str]) -> None:
    """The run's tokenizer, so that transformers makes the tokens that it was trained on."""
    trouble = f", which cannot be loaded: {tokenizer.trouble}" if tokenizer.trouble else ""
    files = dict(tokenizer.files)
    if tokenizer.sentencepiece is not None:
        try:
            write_sentencepiece_tokenizer(tokenizer.sentencepiece, part)
            files = {"tokenizer.model": tokenizer.sentencepiece}
        except ConfigError as error:
            trouble = f": {error}"
    copy_files(files, part)
    if tokenizer.is_bytes:
        write_byte_tokenizer(part)
    elif not files:
        kind, model = reader.args.tokenizer_type, reader.args.tokenizer_model
        used = f"{kind}{f' {model}' if model else ''}{trouble}"
        notes.append(
            f"tokenizer: none written (the run used {used}); --like DIR takes another folder's"
        )
        return
    if (how := reads_otherwise(part, tokenizer)) is not None:
        notes.append(
            f"tokenizer: transformers' AutoTokenizer {how}; `s2megatron generate` and `evaluate` "
            "read it right, programs with PreTrainedTokenizerFast.from_pretrained(DIR), vLLM with "
            "--tokenizer and a folder of the tokenizer's files alone, without a config.json"
        )
