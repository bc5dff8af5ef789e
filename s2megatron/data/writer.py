"""Documents -> tokens -> PREFIX.bin and PREFIX.idx, several processes encoding.

Batches of documents go to the processes and come back in their order, a few at a time: neither the
text nor the tokens of a corpus are ever in memory as a whole. The files are written beside their
final names and renamed when whole.
"""

import collections
import functools
import itertools
import multiprocessing
import os
import shlex
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy

from s2megatron.data.tokenizers import Encode, make_tokenizer
from s2megatron.errors import ConfigError
from s2megatron.paths import user_path

BATCH = 1 << 20
"""Characters of text that make a batch full."""


@dataclass(frozen=True)
class DataReport:
    """What was written."""

    prefix: str
    documents: int
    tokens: int
    vocab_size: int
    empty: int = 0
    """Documents without a token, left out."""


def write_dataset(
    texts: Iterable[str], prefix: str, tokenizer: str = "bytes", *, workers: int = 1
) -> DataReport:
    """Tokenizes documents into PREFIX.bin and PREFIX.idx; each ends with an end-of-document token.

    Args:
        workers: processes that encode; they start once the text is more than a batch, so that a
            small input does not wait for them.

    Raises:
        ConfigError: the tokenizer cannot be loaded or gives an id outside its vocabulary, there is
            not one token, or the prefix is none.
    """
    prefix = check_prefix(prefix)
    encode, end, vocab_size = make_tokenizer(tokenizer)
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    part = f"{prefix}.part-{os.getpid()}"
    count = tokens = empty = 0
    try:
        builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(vocab_size))
        for ids in _encoded(_batches(texts), encode, tokenizer, workers):
            if not len(ids):
                empty += 1
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocab_size:
                raise ConfigError(
                    f"--tokenizer {tokenizer}: gives token {low if low < 0 else high} in document "
                    f"{count + empty + 1}, and has {vocab_size} tokens (0 to {vocab_size - 1}): a "
                    "model with its vocabulary could not read this; mend the tokenizer"
                )
            builder.add_document(numpy.append(ids, end), [len(ids) + 1])
            count += 1
            tokens += len(ids) + 1
        if not count:
            raise ConfigError(f"data {prefix}: the input holds no text")
        builder.finalize(f"{part}.idx")
        os.replace(f"{part}.bin", f"{prefix}.bin")
        os.replace(f"{part}.idx", f"{prefix}.idx")
    finally:
        for leftover in (f"{part}.bin", f"{part}.idx"):
            Path(leftover).unlink(missing_ok=True)
    return DataReport(prefix, count, tokens, vocab_size, empty)


def check_prefix(prefix: str) -> str:
    """The prefix with `~` expanded. Raises ConfigError where a run file could not name it."""
    path = user_path(prefix)
    if not path.strip() or path.endswith("/") or Path(path).is_dir():
        raise ConfigError(
            f"--out {shlex.quote(prefix)}: is a folder; add a name, as in "
            f"{shlex.quote(os.path.join(path, 'train'))}, for train.bin and train.idx"
        )
    if path != path.strip():
        raise ConfigError(
            f"--out {shlex.quote(prefix)}: begins or ends with a blank, which Megatron drops"
        )
    return path


def _encoded(
    batches: Iterator[list[str]], encode: Encode, tokenizer: str, workers: int
) -> Iterator[numpy.ndarray]:
    """The token ids of each document, in order."""
    start = list(itertools.islice(batches, 2))
    batches = itertools.chain(start, batches)
    if workers <= 1 or len(start) < 2:
        for batch in batches:
            yield from _encode(encode, batch)
        return
    # Not forked: the tokenizer's own threads, and torch's, would not come along.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_leave_signals_alone
    )
    try:
        waiting: collections.deque[Future] = collections.deque()
        for batch in batches:
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
            waiting.append(pool.submit(_encode_by_name, tokenizer, batch))
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            f"--workers {workers}: a process that encodes was killed, most likely for want of "
            "memory (the largest documents decide how much each needs); take fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _leave_signals_alone() -> None:
    """Ctrl-C reaches the whole terminal: the process that writes is the one that answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_by_name(tokenizer: str, batch: list[str]) -> list[numpy.ndarray]:
    """In a process of the pool."""
    return _encode(_loaded(tokenizer), batch)


@functools.lru_cache(maxsize=1)
def _loaded(tokenizer: str) -> Encode:
    return make_tokenizer(tokenizer)[0]


def _encode(encode: Encode, batch: list[str]) -> list[numpy.ndarray]:
    found = (encode(text) for text in batch)
    return [i if isinstance(i, numpy.ndarray) else numpy.asarray(i, numpy.int64) for i in found]
