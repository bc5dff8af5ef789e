"""Retrieval documents to train on, as a Megatron dataset.

    python scripts/quality/documents.py TOKENIZER OUT_PREFIX --length 1024 --sequences 20000 \
        --filler CODE_PREFIX --seed 1

Every document of the dataset has exactly `--length` tokens, so Megatron's samples of that length
begin where a document begins. It is filled with documents of s2megatron.evaluation.retrieval, each
with its end-of-text token: short ones first of all, since a model learns to look up a key among
eight before it learns it among hundreds. Most are records without filler, where half of the tokens
are questions and every second token of a question is an answer.
"""

import argparse
import multiprocessing
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerFast

from s2megatron.evaluation.retrieval import make_document

SHORTEST = 32
"""Tokens of the shortest document."""

RECORD = 4
"""Tokens of a record, and of a question about it, with the study's tokenizer: @key 123 4 end."""

MOST_RECORDS = 400
"""There are 676 keys of two letters."""

CHUNK = 64
"""Sequences that a process makes at a time, from one seed."""


@dataclass(frozen=True)
class Recipe:
    """What the documents are like.

    Args:
        records: share of tokens in plain records without filler; the others are of all tasks, in
            both styles, planted in filler.
        shortest: tokens of the shortest document.
    """

    records: float = 0.6
    shortest: int = SHORTEST


class Maker:
    """Makes the sequences of a dataset; one per process.

    Args:
        tokenizer: folder of the tokenizer.
        filler: prefix of a Megatron dataset, or None for generated sentences.
    """

    def __init__(self, tokenizer: str, filler: str | None, length: int, seed: int, recipe: Recipe):
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        self.end = self.tokenizer.eos_token_id
        self.text = None if filler is None else numpy.memmap(f"{filler}.bin", numpy.uint16, "r")
        self.length, self.seed, self.recipe = length, seed, recipe

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def sequences(self, chunk: int, count: int) -> numpy.ndarray:
        """uint16 [count, length], the same for the same seed and chunk."""
        rng = random.Random(f"train-{self.seed}-{self.length}-{chunk}")
        return numpy.asarray([self.sequence(rng) for _ in range(count)], dtype=numpy.uint16)

    def sequence(self, rng: random.Random) -> list[int]:
        tokens: list[int] = []
        while (room := self.length - len(tokens)) > 0:
            length = self.document_length(rng, room)
            tokens += [*self.document(rng, length - 1), self.end]
        return tokens

    def document_length(self, rng: random.Random, room: int) -> int:
        """A power of two times 32, shorter ones more often; the room left where less would stay."""
        lengths = [self.recipe.shortest]
        while lengths[-1] * 2 <= self.length:
            lengths.append(lengths[-1] * 2)
        length = rng.choice(lengths)
        return room if room - length < self.recipe.shortest else length

    def document(self, rng: random.Random, length: int) -> list[int]:
        most = max(1, min(MOST_RECORDS, length // (2 * RECORD)))
        if length < 256 or rng.random() < self.recipe.records:
            records = max(1, rng.randint(most // 2, most))
            made = make_document(
                "multi_key", self.encode, length, rng, queries=records, records=records,
                filler=self.filler(rng, length), style="records",
            )  # fmt: skip
            return made.tokens
        style = rng.choice(("records", "records", "sentences"))
        task = rng.choice(("single", "multi_key", "multi_key", "multi_value", "multi_query", "tracking"))
        size = RECORD if style == "records" else 40
        records = max(4, min(rng.randint(4, 64), length // (3 * size)))
        queries = None if task == "single" else rng.randint(2, max(2, records // 2))
        made = make_document(
            task, self.encode, length, rng, style=style, queries=queries,
            records=None if task == "single" else records, filler=self.filler(rng, length),
        )  # fmt: skip
        return made.tokens

    def filler(self, rng: random.Random, length: int) -> list[int] | None:
        if self.text is None:
            return None
        start = rng.randrange(len(self.text) - length)
        return [token or 1 for token in self.text[start : start + length].tolist()]


_maker: Maker | None = None


def _start(*arguments) -> None:
    global _maker  # one per worker process
    _maker = Maker(*arguments)


def _make(job: tuple[int, int]) -> numpy.ndarray:
    return _maker.sequences(*job)


def write(
    prefix: str,
    sequences: int,
    tokenizer: str,
    filler: str | None,
    length: int,
    seed: int,
    recipe: Recipe,
    processes: int | None = None,
) -> None:
    """Writes PREFIX.bin and PREFIX.idx: `sequences` documents of `length` tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    jobs = [(i, min(CHUNK, sequences - i * CHUNK)) for i in range(-(-sequences // CHUNK))]
    arguments = (tokenizer, filler, length, seed, recipe)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    part = f"{prefix}.part-{os.getpid()}"
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(16384))
    with multiprocessing.Pool(processes, _start, arguments) as pool:
        for rows in pool.imap(_make, jobs):
            for row in rows:
                builder.add_document(row, [len(row)])
    builder.finalize(f"{part}.idx")
    os.replace(f"{part}.bin", f"{prefix}.bin")
    os.replace(f"{part}.idx", f"{prefix}.idx")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("out", metavar="PREFIX")
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--filler", metavar="PREFIX")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=float, default=Recipe.records)
    parser.add_argument("--processes", type=int)
    a = parser.parse_args()
    recipe = Recipe(records=a.records)
    write(a.out, a.sequences, a.tokenizer, a.filler, a.length, a.seed, recipe, a.processes)


if __name__ == "__main__":
    main()
