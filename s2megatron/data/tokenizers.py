"""Tokenizers by name, all held to what a dataset needs; and a byte-level BPE trained on text."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy

from s2megatron.errors import ConfigError
from s2megatron.paths import user_path

BYTE_VOCAB = 257
"""256 bytes and the end of document, token 256."""

END_OF_TEXT = "<|endoftext|>"

# Words with the blank or sign before them, digits in threes, signs, ends of lines, blanks: the
# split of GPT-4's tokenizer.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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


def _hugging_face(name: str, model: str) -> tuple[Encode, int | None, int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
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
    # Without each token's place in the text: twice as fast, and far less memory for a long one.
    return lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


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
