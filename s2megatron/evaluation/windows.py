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
        self._sequences = self._dataset.document_indices  # [documents + 1]: where each begins
        total = numpy.concatenate([[0], numpy.cumsum(self._dataset.sequence_lengths)])
        self._starts = total[self._sequences]  # [documents + 1], in tokens
        self.lengths = numpy.diff(self._starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        """Tokens `start` to `stop` of a document, int64."""
        first, end = self._sequences[number : number + 2]
        stop = int(self.lengths[number]) if stop is None else stop
        if end - first == 1:  # as `s2megatron data` writes them: read no more than is asked for
            tokens = self._dataset.get(int(first), offset=start, length=stop - start)
        else:
            tokens = numpy.concatenate(self._dataset[first:end])[start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise ConfigError(
                f"{self.option} {self.prefix}: document {number} has token {tokens.max()}, the "
                f"model's vocabulary has {self.vocab_size}: it was made with another tokenizer; "
                "make it again with `s2megatron data --tokenizer` and the model's"
            )
        return tokens.astype(numpy.int64)

    def windows(self, length: int, most: int, *, packed: bool = False) -> Iterator[Window]:
        """Whole windows that do not overlap, of each document or of all of them packed.

        Args:
            most: where there are more windows, so many, evenly spread over the dataset.

        Raises:
            ConfigError: there is not one.
        """
        whole = self._whole(length, packed)
        ends = numpy.cumsum(whole)
        total = int(ends[-1])
        if not total:
            if packed:
                raise ConfigError(
                    f"{self.option} {self.prefix}: its {self._starts[-1]:,} tokens do not fill a "
                    f"window of {length} + 1; choose a shorter length, or a larger dataset"
                )
            raise ConfigError(
                f"{self.option} {self.prefix}: the longest of {len(self)} documents has "
                f"{self.lengths.max()} tokens: none holds a window of {length} + 1; choose shorter "
                "--lengths, or --packed to put the documents one after the other"
            )
        count = min(most, total)
        for i in range(count):
            index = i * total // count
            number = int(numpy.searchsorted(ends, index, side="right"))
            start = (index - int(ends[number] - whole[number])) * (length + 1)
            tokens = (
                self._run(start, length + 1)
                if packed
                else self.read(number, start, start + length + 1)
            )
            yield Window(number, start, tokens)

    def count(self, length: int, most: int, *, packed: bool = False) -> int:
        """How many windows `windows` gives."""
        return min(most, int(self._whole(length, packed).sum()))

    def stretch(self, count: int, rng: random.Random) -> list[int]:
        """`count` tokens from a random place on; after a document's end comes the next one."""
        return self._run(rng.randrange(int(self._starts[-1])), count).tolist()

    def _whole(self, length: int, packed: bool) -> numpy.ndarray:
        """Windows in each document; [1] for all of them packed."""
        return (self._starts[-1:] if packed else self.lengths) // (length + 1)

    def _run(self, start: int, count: int) -> numpy.ndarray:
        """`count` tokens of all documents one after the other, the first again after the last."""
        number = int(numpy.searchsorted(self._starts, start, side="right")) - 1
        offset, parts = start - int(self._starts[number]), []
        while count > 0:
            parts.append(self.read(number, offset, min(int(self.lengths[number]), offset + count)))
            count -= len(parts[-1])
            number, offset = (number + 1) % len(self), 0
        return numpy.concatenate(parts)
