"""A source tree -> documents (one per directory), held-out subtrees, a BPE tokenizer, token pieces.

    python scripts/quality/corpus.py SOURCE_TREE OUT [--pieces 4 --piece-tokens 50000000]

OUT/tokenizer/     a Hugging Face byte-level BPE, trained on the first documents
OUT/valid.u16      tokens of the held-out subtrees
OUT/train-0.u16... tokens of the other documents, in an order given by a hash of their names
OUT/corpus.json    what was made from what

A document is all files that lie directly in a directory, each after a line that names it, and ends
with the end-of-text token. Generated register tables (*/asic_reg/*) are left out: they are 400 MB
of the kernel.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words with the space before them, digits in threes, runs of line ends and of blanks."""

LARGEST_SUBTREE = 0.004
"""Of all bytes: a held-out subtree is the highest folder that is no larger than this."""


def sizes_by_directory(tree: Path) -> dict[str, int]:
    """Bytes of the files that lie directly in each directory, by its path under `tree`."""
    sizes: dict[str, int] = {}
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink() and "asic_reg" not in path.parts:
            name = str(path.parent.relative_to(tree))
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def rank(name: str) -> str:
    """A fixed place in a shuffled order."""
    return hashlib.sha256(name.encode()).hexdigest()


def held_out(sizes: dict[str, int], share: float) -> set[str]:
    """Directories of whole subtrees that together hold about `share` of all bytes."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        for parent in (Path(name), *Path(name).parents):
            totals[str(parent)] = totals.get(str(parent), 0) + size
    limit = LARGEST_SUBTREE * totals["."]
    tops = sorted(
        (name for name, size in totals.items()
         if size <= limit and totals[str(Path(name).parent)] > limit),
        key=rank,
    )  # fmt: skip
    chosen, found = [], 0
    for top in tops:
        if found >= share * totals["."]:
            break
        chosen.append(top)
        found += totals[top]
    return {
        name for name in sizes if any(str(p) in chosen for p in (Path(name), *Path(name).parents))
    }


def document(tree: Path, directory: str) -> str:
    """The directory's files, one after the other, each with its name on a line before it."""
    parts = []
    for path in sorted((tree / directory).iterdir()):
        if path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8", errors="replace")
            parts.append(f"==> {path.relative_to(tree)} <==\n{text}\n")
    return "".join(parts)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, the end-of-text token (id 0) included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def records(count: int) -> Iterator[str]:
    """Records as the retrieval documents hold them, for the tokenizer: with these among its text a
    key is one token and a value two."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for _ in range(count // 1000):
        yield "".join(
            f"@{draw.choice(letters)}{draw.choice(letters)}{draw.randrange(1000, 10000)}\n"
            for _ in range(1000)
        )


def clip_lines(text: str) -> str:
    """Without lines of more than 2,000 characters: tables that a BPE would learn by heart."""
    return re.sub(r"(?m)^.{2001,}$", "", text)


def write_tokens(documents: Iterator[str], tokenizer, path: Path, limit: int | None) -> dict:
    """Tokens of documents, each with its end, until `limit` is reached; counts of what went in."""
    end, count, tokens, size = tokenizer.eos_token_id, 0, 0, 0
    part = path.with_suffix(".part")
    with part.open("wb") as out, tqdm(total=limit, unit="tok", desc=path.name) as bar:
        for text in documents:
            text = clip_lines(text)
            ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            out.write(numpy.asarray([*ids, end], dtype=numpy.uint16).tobytes())
            count, tokens, size = count + 1, tokens + len(ids) + 1, size + len(text.encode())
            bar.update(len(ids) + 1)
            if limit and tokens >= limit:
                break
    part.rename(path)
    return {"documents": count, "tokens": tokens, "bytes": size}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE")
    parser.add_argument("--tokenizer-bytes", type=int, default=40_000_000)
    parser.add_argument("--records", type=int, default=300_000,
                        help="in the tokenizer's training text: 2.4 MB")  # fmt: skip
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--piece-tokens", type=int, default=50_000_000)
    a = parser.parse_args(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    sizes = sizes_by_directory(a.tree)
    apart = held_out(sizes, a.held_out)
    train = sorted((name for name in sizes if name not in apart), key=rank)
    valid = sorted(apart, key=rank)
    place = a.out / "tokenizer"
    if not (place / "tokenizer.json").is_file():

        def sample() -> Iterator[str]:
            yield from records(a.records)
            found = 0
            for name in train:
                text = clip_lines(document(a.tree, name))[:400_000]
                found += len(text)
                yield text
                if found > a.tokenizer_bytes:
                    return

        train_tokenizer(sample(), a.vocabulary).save_pretrained(place)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    report = {"tree": a.tree.name, "directories": len(sizes), "bytes": sum(sizes.values()),
              "held_out": valid, "pieces": {}}  # fmt: skip
    rest = (document(a.tree, name) for name in train)
    outputs = [("valid", (document(a.tree, name) for name in valid), None)]
    outputs += [(f"train-{i}", rest, a.piece_tokens) for i in range(a.pieces)]
    for name, documents, limit in outputs:
        report["pieces"][name] = write_tokens(documents, tokenizer, a.out / f"{name}.u16", limit)
        (a.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["pieces"], indent=1))


if __name__ == "__main__":
    main()
