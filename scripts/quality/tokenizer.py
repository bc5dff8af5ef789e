"""The study's tokenizer: a byte-level BPE, trained on a source tree and on retrieval records.

    python scripts/quality/tokenizer.py SOURCE_TREE FOLDER [--exclude '*/asic_reg/*']

With records among its text a key such as `@ab` is one token and a value of four digits two, as the
retrieval documents want it (documents.py). `s2megatron data --train-tokenizer` makes the same from
the tree alone.
"""

import argparse
import random
from collections.abc import Iterator

from s2megatron.data.reading import ReadOptions, documents
from s2megatron.data.sources import by_hash, find_files
from s2megatron.data.tokenizers import train_bpe
from s2megatron.evaluation.words import LETTER_KEYS

LINES = 1000
"""Records of a text."""


def records(count: int) -> Iterator[str]:
    """Texts of records as documents.py plants them, `count` records in all."""
    draw = random.Random(0)
    for _ in range(count // LINES):
        lines = (f"@{draw.choice(LETTER_KEYS)}{draw.randrange(1000, 10000)}" for _ in range(LINES))
        yield "\n".join(lines) + "\n"


def text(tree: str, exclude: list[str], size: int) -> Iterator[str]:
    """Files of the tree in a hashed order until they make up `size` characters."""
    sources = find_files([tree], ("*",), exclude)
    sources.sort(key=lambda source: by_hash(source.name))
    for one in documents(sources, ReadOptions(skip_bad=True)):
        yield one
        size -= len(one)
        if size <= 0:
            return


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree")
    parser.add_argument("folder")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--records", type=int, default=300_000, help="2.4 MB")
    parser.add_argument("--mb", type=float, default=40, help="of the tree")
    a = parser.parse_args(argv)

    def texts() -> Iterator[str]:
        yield from records(a.records)
        yield from text(a.tree, a.exclude, int(a.mb * 1e6))

    size = train_bpe(texts(), a.vocabulary, a.folder)
    print(f"{a.folder}: {size:,} tokens")


if __name__ == "__main__":
    main()
