"""Windows of equal length out of a Megatron indexed dataset (PREFIX.bin, PREFIX.idx)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from s2megatron.errors import ConfigError
from s2megatron.training.data_options import check_dataset


@dataclass(frozen=True)
class Window:
    """Tokens [length + 1] that follow one another: the last `length` of them are predicted."""

    document: int
    """0 for all documents one after the other."""
    start: int
    """Position in the document, in tokens."""
    tokens: numpy.ndarray


class Documents:
    """The documents of a dataset.

    Raises:
        ConfigError: a file is missing or damaged, or (when read) a token that is not in the
            vocabulary.
    """

    def __init__(self, prefix: str, vocab_size: int, option: str = "--data"):
        check_dataset(prefix, option)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.prefix, self.vocab_size, self.option = prefix, vocab_size, option
        self._dataset = IndexedDataset(prefix)
        self._ends = self._dataset.document_indices  # [documents + 1], counting sequences
        total = numpy.concatenate([[0], numpy.cumsum(self._dataset.sequence_lengths)])
        self.lengths = numpy.diff(total[self._ends])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, number: int) -> numpy.ndarray:
        """The tokens of a document, int64."""
        parts = self._dataset[self._ends[number] : self._ends[number + 1]]
        tokens = numpy.concatenate(parts).astype(numpy.int64)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise ConfigError(
                f"{self.option} {self.prefix}: document {number} has token {tokens.max()}, the "
                f"model's vocabulary has {self.vocab_size}: it was made with another tokenizer; "
                "make it again with `s2megatron data --tokenizer` and the model's"
            )
        return tokens

    def windows(self, length: int, most: int, *, packed: bool = False) -> Iterator[Window]:
        """Whole windows in order, at most `most`: of each document, or of all of them packed.

        Raises:
            ConfigError: there is not one.
        """
        found = 0
        for window in self._packed(length) if packed else self._of_each(length):
            if found == most:
                return
            found += 1
            yield window
        if not found:
            raise ConfigError(
                f"{self.option} {self.prefix}: the longest of {len(self)} documents has "
                f"{self.lengths.max()} tokens: none holds a window of {length} + 1; choose shorter "
                "--lengths, or --packed to put the documents one after the other"
            )

    def count(self, length: int, most: int, *, packed: bool = False) -> int:
        """How many windows `windows` gives."""
        whole = self.lengths.sum() if packed else self.lengths
        return min(most, int(numpy.sum(whole // (length + 1))))

    def _of_each(self, length: int) -> Iterator[Window]:
        for number in numpy.flatnonzero(self.lengths > length):
            tokens = self.read(int(number))
            for start in range(0, len(tokens) - length, length + 1):
                yield Window(int(number), start, tokens[start : start + length + 1])

    def _packed(self, length: int) -> Iterator[Window]:
        held, start = numpy.empty(0, numpy.int64), 0
        for number in range(len(self)):
            held = numpy.concatenate([held, self.read(number)])
            while len(held) > length:
                yield Window(0, start, held[: length + 1])
                held, start = held[length + 1 :], start + length + 1

    def stretch(self, count: int, rng: random.Random) -> list[int]:
        """`count` tokens from a random place on; after a document's end comes the next one."""
        weights = self.lengths.tolist()
        number = rng.choices(range(len(self)), weights)[0]
        first = rng.randrange(weights[number])
        parts = [self.read(number)[first:]]
        held = len(parts[0])
        while held < count:
            number = (number + 1) % len(self)
            parts.append(self.read(number))
            held += len(parts[-1])
        return numpy.concatenate(parts)[:count].tolist()
