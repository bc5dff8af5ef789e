"""The tokenizer that a run was trained with: its size, special tokens, and files to hand on."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from s2megatron.data.tokenizers import (
    BYTE_VOCAB,
    END_OF_TEXT,
    SIZED_BY_OPTION,
    load_hugging_face,
)

_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tokenizer_config.json",
)  # fmt: skip
"""Any one of which may be a whole tokenizer; the last alone where a class needs no vocabulary."""

PROBES = (
    "The quick brown fox jumps over 12,345.678 lazy dogs, and\n\n\tdef f(x):\n\t\treturn x ** 2",
    "  blanks  in front,   between, and behind  ",
    "\u00e9 e\u0301 \u65e5\u672c \ufb01 \u00bd \uff21\uff22\uff23 \u200b \u2026",
    "".join(map(chr, range(32, 127))),
    "a", "\n\n", " ", "", "word" * 40,
)  # fmt: skip
"""Texts that tell tokenizers apart."""

TOKENIZER_FILES = (
    *_VOCABULARIES, "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class RunTokenizer:
    """What Megatron's arguments say of the tokenizer, as far as it can be read here."""

    size: int | None = None
    """Tokens without padding."""
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    files: dict[str, Path] = field(default_factory=dict)
    """Name in a Hugging Face folder -> file."""
    is_bytes: bool = False
    """It was `bytes`, which no file describes: `write_byte_tokenizer` makes them."""
    sentencepiece: Path | None = None
    """It was this SentencePiece model, which `write_sentencepiece_tokenizer` writes out."""
    loaded: object | None = None
    """It was this tokenizer of transformers."""
    trouble: str = ""
    """Why its files, which are here, cannot be loaded."""

    def encode(self, text: str) -> list[int]:
        """As the dataset was encoded, without special tokens."""
        if self.is_bytes:
            return list(text.encode())
        if self.sentencepiece is not None:
            import sentencepiece

            return sentencepiece.SentencePieceProcessor(str(self.sentencepiece)).encode(text)
        return self.loaded(text, add_special_tokens=False).input_ids

    @property
    def token_ids(self) -> dict[str, int | None]:
        """For config.json: transformers' defaults would be another vocabulary's."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def run_tokenizer(args) -> RunTokenizer:
    """From Megatron's arguments; empty where it lies on another machine or on the hub."""
    kind, model = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    size = size_by_option(args)
    if kind == "NullTokenizer" and size:
        end = getattr(args, "null_tokenizer_eod_id", None)
        is_bytes = getattr(args, "s2_tokenizer", None) == "bytes" and size == BYTE_VOCAB
        return RunTokenizer(size, eos=size - 1 if end is None else end, is_bytes=is_bytes)
    if kind == "HuggingFaceTokenizer" and model and Path(model).is_dir():
        try:
            found = load_hugging_face(model)
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            return RunTokenizer(size, trouble=f"{type(error).__name__}: {error}")
        ids = (found.bos_token_id, found.eos_token_id, found.pad_token_id)
        size = max(len(found), 1 + max(found.get_vocab().values(), default=-1))  # ids may have gaps
        return RunTokenizer(size, *ids, find_files(Path(model)), loaded=found)
    if kind == "GPTSentencePieceTokenizer" and model and Path(model).is_file():
        import sentencepiece

        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError) as error:
            return RunTokenizer(size, trouble=str(error))
        ids = (i if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()))
        return RunTokenizer(pieces.vocab_size(), *ids, sentencepiece=Path(model))
    return RunTokenizer(size)


def size_by_option(args) -> int | None:
    """megatron.vocab_size where the tokenizer is made from it; elsewhere Megatron ignores it."""
    kind, size = getattr(args, "tokenizer_type", None), getattr(args, "vocab_size", None)
    if size is None or kind not in SIZED_BY_OPTION:
        return None
    return size + 1 if kind == "NullMultimodalTokenizer" else size  # the end of a text is one more


def find_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a Hugging Face folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def has_tokenizer(folder: Path) -> bool:
    """transformers makes an empty one of config.json where there is no file of one."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def reads_otherwise(folder: Path, tokenizer: RunTokenizer) -> str | None:
    """How AutoTokenizer reads a folder's tokenizer, where it makes other tokens than the run's.

    transformers 5 goes by config.json's model_type where the files name no class, and for a qwen2
    always. So the tokenizer is saved again with its class, and then as nobody's in particular:
    whoever reads tokenizer.json as it stands is right then, as `load_hugging_face` does.
    """
    told = _misread(folder, tokenizer)
    if told is not None and tokenizer.loaded is not None:
        tokenizer.loaded.save_pretrained(folder)
        told = _misread(folder, tokenizer)
    file = folder / "tokenizer_config.json"
    if told is not None and file.is_file() and (folder / "tokenizer.json").is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        told = _misread(folder, tokenizer)
    return told


def _misread(folder: Path, tokenizer: RunTokenizer) -> str | None:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        return f"cannot read it ({(str(error).splitlines() or [''])[0]})"

    def read(text: str) -> list[int]:
        return found(text, add_special_tokens=False).input_ids

    if any(_tokens(read, text) != _tokens(tokenizer.encode, text) for text in PROBES):
        return f"reads it as {type(found).__name__}, with other tokens than the run's"
    return None


def _tokens(encode, text: str) -> list[int] | None:
    """None of a text that a tokenizer without an unknown token has no tokens for."""
    try:
        return list(encode(text))
    except Exception as error:  # tokenizers raises nothing narrower, and subclasses go on
        if type(error) is not Exception:
            raise
        return None


def copy_files(files: dict[str, Path], target: Path) -> None:
    for name, file in files.items():
        shutil.copyfile(file, target / name)


def write_byte_tokenizer(target: Path) -> None:
    """tokenizer.json and its config for `tokenizer: bytes`: token i is byte i, 256 ends a text.

    A byte-level BPE without merges. Its vocabulary names every byte by a printable character, as
    the format has it: printable ones by themselves, the others by those from U+0100 on.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocab = {chr(b if b in printable else next(others)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {END_OF_TEXT: BYTE_VOCAB - 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
