"""Retrieval documents to train on, as a Megatron dataset.

    python scripts/quality/documents.py TOKENIZER OUT_PREFIX --length 1024 --sequences 20000 \
        --filler CODE_PREFIX --seed 1

Every document of the dataset has exactly `--length` tokens, so Megatron's samples of that length
begin where a document begins. It is filled with shorter documents, each with its end-of-text token:
a model learns to look up a key among four before it learns it among hundreds. There are three
kinds:

- repeats: a few records again and again in new orders, nothing else. Nearly every value can be
  looked up close by, and frequent keys and values are met early: this is what looking up is
  learnt from.
- records: many records, each asked for once, without filler. Half of the values are answers.
- tasks: the tasks of s2megatron.evaluation.retrieval in both styles, planted in filler.
"""

import argparse
import math
import multiprocessing
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy
from transformers import PreTrainedTokenizerFast

from s2megatron.evaluation.retrieval import TASKS, make_document
from s2megatron.evaluation.words import LETTER_KEYS

SHORTEST = 32
"""Tokens of the shortest document."""

TASKS_FROM = 256
"""Tokens of the shortest document that has filler."""

MOST_RECORDS = 400
"""There are 676 keys of two letters."""

CHUNK = 64
"""Sequences that a process makes at a time, from one seed."""


@dataclass(frozen=True)
class DocumentMix:
    """What the documents are like.

    Args:
        repeats: share of the documents that are repeats.
        records: share of the other documents that are records; what is left are tasks.
        shortest: tokens of the shortest document, a power of two.
        styles: what tasks are written in, one drawn for each.
        tasks: one drawn for each document with filler.
        facts: the most that a document with filler has, where it is long enough for them.
        asked: the most of them that is asked for, as a share.
    """

    repeats: float = 0.5
    records: float = 0.6
    shortest: int = SHORTEST
    styles: tuple[str, ...] = ("records", "records", "sentences")
    tasks: tuple[str, ...] = TASKS
    facts: int = 64
    asked: float = 0.5


class Maker:
    """Makes the sequences of a dataset; one per process.

    Args:
        tokenizer: folder of the tokenizer.
        filler: prefix of a Megatron dataset, or None for generated sentences.
    """

    def __init__(
        self, tokenizer: str, filler: str | None, length: int, seed: int, mix: DocumentMix
    ):
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        self.end = self.tokenizer.eos_token_id
        self.text = None if filler is None else numpy.memmap(f"{filler}.bin", numpy.uint16, "r")
        self.length, self.seed, self.mix = length, seed, mix
        self.record = len(self.encode("@zq9876\n"))
        """Tokens of a record, and of a question about it: 4 with the study's tokenizer."""

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
        """A power of two from the shortest on; the room left where less would stay."""
        lengths = [self.mix.shortest]
        while lengths[-1] * 2 <= self.length:
            lengths.append(lengths[-1] * 2)
        length = rng.choice(lengths)
        return room if room - length < SHORTEST else length

    def document(self, rng: random.Random, length: int) -> list[int]:
        if rng.random() < self.mix.repeats:
            return self.repeats(rng, length)
        most = max(1, min(MOST_RECORDS, length // (2 * self.record)))
        if length < TASKS_FROM or rng.random() < self.mix.records:
            records = max(1, rng.randint(most // 2, most))
            made = make_document(
                "multi_key", self.encode, length, rng, queries=records, records=records,
                filler=self.filler(rng, length), style="records",
            )  # fmt: skip
            return made.tokens
        style = rng.choice(self.mix.styles)
        task = rng.choice(self.mix.tasks)
        size = self.record if style == "records" else 40
        records = max(4, min(rng.randint(4, self.mix.facts), length // (3 * size)))
        queries = (
            None if task == "single" else rng.randint(2, max(2, int(records * self.mix.asked)))
        )
        made = make_document(
            task, self.encode, length, rng, style=style, queries=queries,
            records=None if task == "single" else records, filler=self.filler(rng, length),
        )  # fmt: skip
        return made.tokens

    def repeats(self, rng: random.Random, length: int) -> list[int]:
        """Records of a few keys, all of them again in every round, each round in a new order."""
        records = int(min(2 ** rng.uniform(1, 7), length // self.record))
        keys = rng.sample(LETTER_KEYS[: max(records, frequent(rng, len(LETTER_KEYS)))], records)
        values = range(1000, 1000 + 10 * frequent(rng, 900))
        lines = [self.encode(f"@{key}{rng.choice(values)}\n") for key in keys]
        tokens: list[int] = []
        while len(tokens) < length:
            for line in rng.sample(lines, len(lines)):
                tokens += line
        return tokens[:length]

    def filler(self, rng: random.Random, length: int) -> list[int] | None:
        if self.text is None:
            return None
        start = rng.randrange(len(self.text) - length)
        return [token or 1 for token in self.text[start : start + length].tolist()]


def frequent(rng: random.Random, most: int) -> int:
    """How many of `most` symbols a document draws from: the first ones are met more often."""
    return int(2 ** rng.uniform(3, math.log2(most)))


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
    mix: DocumentMix,
    processes: int | None = None,
) -> None:
    """Writes PREFIX.bin and PREFIX.idx: `sequences` documents of `length` tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    jobs = [(i, min(CHUNK, sequences - i * CHUNK)) for i in range(-(-sequences // CHUNK))]
    arguments = (tokenizer, filler, length, seed, mix)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each worker has one thread
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    part = f"{prefix}.part-{os.getpid()}"
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=numpy.uint16)
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
    parser.add_argument("--repeats", type=float, default=DocumentMix.repeats)
    parser.add_argument("--records", type=float, default=DocumentMix.records)
    parser.add_argument("--processes", type=int)
    a = parser.parse_args()
    mix = DocumentMix(repeats=a.repeats, records=a.records)
    write(a.out, a.sequences, a.tokenizer, a.filler, a.length, a.seed, mix, a.processes)


if __name__ == "__main__":
    main()
