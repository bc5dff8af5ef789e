"""Text files, folders of text, or JSONL -> Megatron's indexed dataset (PREFIX.bin, PREFIX.idx).

Each file is a document, and so is each line of a .jsonl file (its "text" field). The files are
written beside their final names and renamed when whole.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from tqdm import tqdm

from s2megatron.errors import ConfigError
from s2megatron.training.data_options import BYTE_VOCAB

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".cu", ".json", ".html", ".tex")


@dataclass(frozen=True)
class DataReport:
    """What was written."""

    prefix: str
    documents: int
    tokens: int
    vocab_size: int


def find_files(inputs: Iterable[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The files named, and the text files under the folders named, in a stable order.

    Raises:
        ConfigError: an input does not exist, or nothing is found.
    """
    files = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.is_file() and p.suffix in (*suffixes, ".jsonl")
            )
            if not found:
                raise ConfigError(
                    f"data {path}: no files ending in {', '.join((*suffixes, '.jsonl'))} there; "
                    "name files, or other endings with --suffix"
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"data {path}: there is no such file or folder")
    return files


def documents(files: Iterable[Path], field: str = "text") -> Iterator[str]:
    """The documents of the files. Raises ConfigError naming file, line and field."""
    for file in files:
        if file.suffix != ".jsonl":
            yield file.read_text(encoding="utf-8", errors="replace")
            continue
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[field]
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise ConfigError(
                        f"data {file}, line {number}: is not a JSON object with a {field!r} field; "
                        "name the right one with --field"
                    ) from None
                yield text


def make_tokenizer(name: str) -> tuple[Callable[[str], list[int]], int, int]:
    """(text -> token ids, end-of-document id, vocabulary size) of a tokenizer by name.

    Args:
        name: "bytes", "huggingface:NAME_OR_DIR" or "sentencepiece:FILE", as in a run file.

    Raises:
        ConfigError: unknown kind, or it cannot be loaded.
    """
    kind, _, model = name.partition(":")
    if name == "bytes":
        return lambda text: list(text.encode()), BYTE_VOCAB - 1, BYTE_VOCAB
    if kind == "huggingface" and model:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--tokenizer {name}: cannot be loaded: {error}") from None
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"--tokenizer {name}: has no end-of-text token to part documents")
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        return encode, tokenizer.eos_token_id, len(tokenizer)
    if kind == "sentencepiece" and model:
        if not Path(model).is_file():
            raise ConfigError(f"--tokenizer {name}: there is no file {model}")
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        return processor.encode, processor.eos_id(), processor.vocab_size()
    raise ConfigError(
        f"--tokenizer {name!r}: must be 'bytes', 'huggingface:NAME_OR_DIR' or 'sentencepiece:FILE'"
    )


def write_dataset(
    texts: Iterable[str], prefix: str, tokenizer: str = "bytes", *, total: int | None = None
) -> DataReport:
    """Tokenizes documents into PREFIX.bin and PREFIX.idx; each ends with an end-of-document token.

    Args:
        total: number of documents, for the progress bar, where known.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or there is not one token.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encode, end, vocab_size = make_tokenizer(tokenizer)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    part = f"{prefix}.part-{os.getpid()}"
    count = tokens = 0
    try:
        builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(vocab_size))
        for text in tqdm(texts, total=total, unit="doc", desc=f"data {prefix}", mininterval=0.5):
            ids = [*encode(text), end]
            if len(ids) == 1:
                continue
            builder.add_document(numpy.asarray(ids), [len(ids)])
            count += 1
            tokens += len(ids)
        if not count:
            raise ConfigError(f"data {prefix}: the input holds no text")
        builder.finalize(f"{part}.idx")
        os.replace(f"{part}.bin", f"{prefix}.bin")
        os.replace(f"{part}.idx", f"{prefix}.idx")
    finally:
        for leftover in (f"{part}.bin", f"{part}.idx"):
            Path(leftover).unlink(missing_ok=True)
    return DataReport(prefix, count, tokens, vocab_size)
