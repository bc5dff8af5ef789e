"""Tokenizers by name, all held to what a dataset needs; and a byte-level BPE trained on text."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy

from s2megatron.errors import ConfigError
from s2megatron.paths import user_path

BYTE_VOCAB = 257
"""256 bytes and the end of document, token 256."""

END_OF_TEXT = "<|endoftext|>"

SIZED_BY_OPTION = ("NullTokenizer", "NullMultimodalTokenizer", "TikTokenizer")
"""Megatron's tokenizer types that read its vocab_size (0.19: build_tokenizer); others ignore it."""

# Words with the blank or sign before them, digits in threes, signs, ends of lines, blanks: the
# split of GPT-4's tokenizer.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LINE = re.compile(r"\n(?=[!-~])")
PIECE = 1 << 16
"""Characters of a long document that are encoded at a time, where that makes no difference."""

Encode = Callable[[str], Sequence[int]]


def split_name(name: str) -> tuple[str, str]:
    """(kind, model) of a tokenizer's name, its path expanded. Raises ConfigError."""
    kind, _, model = name.partition(":")
    if name == "bytes" or (kind in ("huggingface", "sentencepiece") and model):
        return kind, user_path(model)
    raise ConfigError(
        f"--tokenizer {name!r}: must be 'bytes', 'huggingface:NAME_OR_DIR' or 'sentencepiece:FILE'"
    )


def make_tokenizer(name: str) -> tuple[Encode, int, int]:
    """(text -> token ids, end-of-document id, vocabulary size) of a tokenizer by name.

    Args:
        name: "bytes", "huggingface:NAME_OR_DIR" or "sentencepiece:FILE", as in a run file.

    Raises:
        ConfigError: unknown kind, it cannot be loaded, or it has no end-of-text token to part
            documents with.
    """
    kind, model = split_name(name)
    load = {"bytes": _bytes, "huggingface": _hugging_face, "sentencepiece": _sentencepiece}[kind]
    encode, end, size = load(name, model)
    if end is None or not 0 <= end < size:
        raise ConfigError(
            f"--tokenizer {name}: has no end-of-text token among its {size} tokens to part "
            f"documents with (its id is {end}); give it one (eos_token), or take another tokenizer"
        )
    return encode, end, size


def _bytes(name: str, model: str) -> tuple[Encode, int | None, int]:
    return lambda text: numpy.frombuffer(text.encode(), numpy.uint8), BYTE_VOCAB - 1, BYTE_VOCAB


def load_hugging_face(model: str | Path):
    """The tokenizer in a folder or on the hub, as its own files describe it.

    transformers' AutoTokenizer goes by the model beside it for some: in the folder of a qwen2 it
    splits the text as Qwen2 does, whatever tokenizer.json says. Files that say that they are
    nobody's in particular are read as they stand.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(model)
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(model)
    return AutoTokenizer.from_pretrained(model)


def _hugging_face(name: str, model: str) -> tuple[Encode, int | None, int]:
    try:
        tokenizer = load_hugging_face(model)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--tokenizer {name}: cannot be loaded ({what})") from None

    return _encoder(tokenizer), tokenizer.eos_token_id, len(tokenizer)


def _encoder(tokenizer) -> Encode:
    """A Hugging Face tokenizer's text -> ids, the whole text, with no special tokens added."""
    if not tokenizer.is_fast:  # verbose: the model's longest input is no limit here
        return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str) -> list[int]:
        # Without each token's place in the text: twice as fast.
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    if not _parts_at_lines(json.loads(backend.to_str())):
        return ids
    return lambda text: numpy.concatenate(
        [numpy.asarray(ids(piece), numpy.int64) for piece in _pieces(text)]
    )


def _parts_at_lines(tokenizer: dict) -> bool:
    """Whether text cut before a line that starts with a sign or letter gives the same ids.

    It does under the split above, which Llama 3 and Qwen have too: none of its words goes from a
    line end to what follows, and none looks ahead from one. So a document of 20 MB need not be
    encoded at once, which takes the library 125 bytes a character.
    """
    splits = [{"Regex": words} for words in (_WORDS, _WORDS.replace("{1,3}", ""))]
    steps = (tokenizer["pre_tokenizer"] or {}).get("pretokenizers", [])
    return (
        tokenizer["normalizer"] in (None, {"type": "NFC"})
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] in splits
        and steps[0]["behavior"] == "Isolated"
        and not (steps[0]["invert"] or steps[1]["add_prefix_space"] or steps[1]["use_regex"])
        and not any(
            token["lstrip"] or token["rstrip"] or "\n" in token["content"]
            for token in tokenizer["added_tokens"]
        )
    )


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at least PIECE characters, but for the last."""
    start = 0
    while cut := _LINE.search(text, start + PIECE):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _sentencepiece(name: str, model: str) -> tuple[Encode, int | None, int]:
    if not Path(model).is_file():
        raise ConfigError(f"--tokenizer {name}: there is no file {model}")
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=model)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--tokenizer {name}: cannot be loaded: {error}") from None
    return processor.encode, processor.eos_id(), processor.vocab_size()


def train_bpe(texts: Iterable[str], size: int, folder: str | Path) -> int:
    """Trains a byte-level BPE and writes it as a folder that "huggingface:FOLDER" loads.

    The text is streamed: what stays in memory are the different words and their counts.

    Args:
        size: tokens, the 256 bytes and the end of text (id 0) among them.
        folder: a new one.

    Returns:
        How many tokens it has: fewer than `size` where the text does not give so many.

    Raises:
        ConfigError: the size is too small, or the folder is there.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < BYTE_VOCAB:
        raise ConfigError(f"--train-tokenizer bpe:{size}: needs at least {BYTE_VOCAB} tokens")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _new_folder(Path(folder)) as part:
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        ).save_pretrained(part)
    return tokenizer.get_vocab_size()


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that has its name only once it is whole."""
    if folder.exists():
        raise ConfigError(
            f"--train-tokenizer: {folder} is there already; leave the option out to use it, or "
            "name a new folder with --tokenizer huggingface:FOLDER"
        )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
