"""The run file's `data:` section as Megatron options, its files checked before anything starts."""

import math
import os
import shlex
import struct
import sys
from pathlib import Path

from s2megatron.config import DataConfig
from s2megatron.data.tokenizers import BYTE_VOCAB, SIZED_BY_OPTION
from s2megatron.errors import ConfigError
from s2megatron.paths import user_path

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
# numpy types that Megatron's index header numbers, and their sizes in bytes
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}


PATHS = ("data_path", "data_args_path", "per_split_data_args_path")
SPLITS = ("train_data_path", "valid_data_path", "test_data_path")
"""Megatron's options that name datasets: of all splits together, and of each."""


def resolve(data: DataConfig, options: dict) -> dict:
    """Adds dataset and tokenizer options to Megatron's.

    Args:
        options: the run file's `megatron:` section; what is null there is not given.

    Raises:
        ConfigError: a dataset is missing or corrupt, or the two sections do not agree.
    """
    added: dict = {}
    for split in ("train", "valid", "test"):
        if getattr(data, split):
            added[f"{split}_data_path"] = _data_path(getattr(data, split), f"data.{split}")
    if data.mock:
        if added:
            raise ConfigError("data.mock: true beside data.train, valid or test: choose one")
        added["mock_data"] = True
    named = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
    if not added and not any(options.get(name) for name in (*named, "mock_data")):
        raise ConfigError(
            "data.train: is missing; name a dataset prefix (make one with `s2megatron data`), or "
            "set data.mock: true for random tokens"
        )
    _refuse_other_data(data, added, options)
    if data.cache:
        added["data_cache_path"] = data.cache
    added |= _tokenizer(data.tokenizer)
    _refuse_other_tokenizer(data, added, options)
    given = {k: v for k, v in options.items() if v is not None or k not in added}
    return _without_unread_size(added | given, options.get("vocab_size"))


def _without_unread_size(found: dict, given: int | None) -> dict:
    """Without a vocab_size that Megatron does not read, which would go into the checkpoint.

    Whoever reads the checkpoint would take it for the vocabulary's size.

    Args:
        found: all options.
        given: what the run file has.
    """
    kind = found.get("tokenizer_type")
    if kind is None or kind in SIZED_BY_OPTION:
        return found
    if given is not None and os.environ.get("RANK", "0") == "0":
        print(
            f"s2megatron: megatron.vocab_size: {given} is not read: {kind} has a size of its own; "
            "leave it out (null)",
            file=sys.stderr,
            flush=True,
        )
    return {name: value for name, value in found.items() if name != "vocab_size"}


def _refuse_other_data(data: DataConfig, added: dict, options: dict) -> None:
    """Megatron's options would win, so that a field of `data:` would not be read."""
    sections = []
    if data.mock:
        sections = [(name, "data.mock") for name in (*PATHS, *SPLITS)]
    elif added:
        first = next(iter(added)).removesuffix("_data_path")
        sections = [(name, f"data.{first}") for name in (*PATHS, "mock_data")]
        sections += [(name, f"data.{name.removesuffix('_data_path')}") for name in added]
    if data.cache:
        sections.append(("data_cache_path", "data.cache"))
    for name, ours in sections:
        if options.get(name):
            raise ConfigError(
                f"megatron.{name}: {options[name]!r} beside {ours}: leave one of them out"
            )


def _refuse_other_tokenizer(data: DataConfig, added: dict, options: dict) -> None:
    if data.tokenizer == "megatron":
        return
    named = "tokenizer" in data.model_fields_set
    beside = f"beside data.tokenizer: {data.tokenizer!r}"
    for name in ("tokenizer_type", "tokenizer_model"):
        value = options.get(name)
        if named and value not in (None, added.get(name)):
            raise ConfigError(
                f"megatron.{name}: {value!r} {beside}: these are two tokenizers; leave the first "
                f"one out (megatron.{name}=null), or set data.tokenizer to megatron"
            )
    size = options.get("vocab_size") or BYTE_VOCAB
    ours = data.tokenizer == "bytes" and (named or not options.get("tokenizer_type"))
    if ours and size != BYTE_VOCAB:
        raise ConfigError(
            f"megatron.vocab_size: {size} {beside}, which has {BYTE_VOCAB}, and the end of a "
            "document as the last one: leave it out (null; make_vocab_size_divisible_by gives "
            "the model more rows), or name the tokenizer"
        )


def _tokenizer(name: str) -> dict:
    if name == "bytes":
        return {"tokenizer_type": "NullTokenizer", "vocab_size": BYTE_VOCAB}
    kind, _, model = name.partition(":")
    if kind == "huggingface":
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": model}
    if kind == "sentencepiece":
        if not Path(model).is_file():
            raise ConfigError(f"data.tokenizer: {model}: there is no such SentencePiece model")
        return {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": model}
    return {}


def _data_path(entries: list[str], field: str) -> list[str]:
    """Megatron's list of prefixes, or of weights and prefixes, from 'PREFIX' or 'WEIGHT PREFIX'.

    Raises:
        ConfigError: a dataset is missing or corrupt, or only some entries have a weight.
    """
    parts = [_weight_and_prefix(entry) for entry in entries]
    for _, prefix in parts:
        check_dataset(prefix, field)
    without = [prefix for weight, prefix in parts if weight is None]
    if not without:
        return [part for pair in parts for part in pair]
    if len(without) < len(parts):
        raise ConfigError(
            f"{field}: {without[0]!r} has no weight and others have one; write 'WEIGHT PREFIX' for "
            "all of them, or for none"
        )
    return without


def _weight_and_prefix(entry: str) -> tuple[str | None, str]:
    """What is written before the first blank is a weight if it is a number, else of the prefix."""
    weight, _, prefix = entry.strip().partition(" ")
    if not prefix.strip() or not _is_weight(weight):
        weight, prefix = None, entry
    prefix = user_path(prefix.strip())
    # Megatron takes a number in its list for a weight.
    return weight, f"./{prefix}" if _is_weight(prefix) else prefix


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def check_dataset(prefix: str, field: str) -> int:
    """PREFIX.bin and PREFIX.idx exist and fit each other.

    Args:
        field: where the prefix comes from, for the message.

    Returns:
        How many documents there are.

    Raises:
        ConfigError: a file is missing, the index is corrupt or does not fit the data.
    """
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    command = f"`s2megatron data INPUT --out {shlex.quote(prefix)}`"
    for file in (data, index):
        if not file.is_file():
            raise ConfigError(f"{field}: {file} does not exist; make it with {command}")
    remedy = f"make it again with {command}"
    with index.open("rb") as stream:
        header = stream.read(34)
    if len(header) < 34 or header[:9] != _INDEX_MAGIC:
        raise ConfigError(f"{field}: {index} is not a Megatron index (bad header); {remedy}")
    version, code, sequences, documents = struct.unpack("<QBQQ", header[9:34])
    expected = 34 + sequences * 12 + documents * 8
    if sequences == 0:
        raise ConfigError(f"{field}: {index} holds no documents; {remedy}")
    if version != 1 or code not in _TOKEN_BYTES or index.stat().st_size < expected:
        raise ConfigError(
            f"{field}: {index} is corrupt (version {version}, type {code}, {sequences} sequences, "
            f"{index.stat().st_size} bytes of at least {expected}); {remedy}"
        )
    # Lengths (int32) stand before pointers (int64): the last sequence ends where the data ends.
    with index.open("rb") as stream:
        stream.seek(34 + (sequences - 1) * 4)
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(34 + sequences * 12 - 8)
        (last_pointer,) = struct.unpack("<q", stream.read(8))
    end, stored = last_pointer + last_length * _TOKEN_BYTES[code], data.stat().st_size
    if end != stored:
        raise ConfigError(
            f"{field}: {index} speaks of {end} bytes, {data} holds {stored}; one of them is cut "
            f"short or belongs to another dataset; {remedy}"
        )
    return sequences
