"""The tokenizer that a run was trained with: its size, special tokens, and files to hand on."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
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

    @property
    def token_ids(self) -> dict[str, int | None]:
        """For config.json: transformers' defaults would be another vocabulary's."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def run_tokenizer(args) -> RunTokenizer:
    """From Megatron's arguments; empty where it lies on another machine or on the hub."""
    kind, model = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    size = getattr(args, "vocab_size", None)
    if kind == "NullTokenizer" and size:
        end = getattr(args, "null_tokenizer_eod_id", None)
        return RunTokenizer(size, eos=size - 1 if end is None else end)
    if kind == "HuggingFaceTokenizer" and model and Path(model).is_dir():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(model)
        ids = (found.bos_token_id, found.eos_token_id, found.pad_token_id)
        return RunTokenizer(len(found), *ids, find_files(Path(model)))
    if kind == "GPTSentencePieceTokenizer" and model and Path(model).is_file():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=model)
        ids = (i if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()))
        return RunTokenizer(pieces.vocab_size(), *ids, {"tokenizer.model": Path(model)})
    return RunTokenizer(size)


def find_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a Hugging Face folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def copy_files(files: dict[str, Path], target: Path) -> None:
    for name, file in files.items():
        shutil.copyfile(file, target / name)
