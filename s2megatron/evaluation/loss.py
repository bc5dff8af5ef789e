"""Loss by position, and on tokens that complete a 5-gram seen before, which shows recall.

A token *repeats* if it and the four before it stood in the window before, in this order; its
distance is how many tokens back the last such place ends. Sums are kept for every window, so that
two models can be compared window by window.
"""

import itertools
from dataclasses import dataclass

import numpy
import torch

from s2megatron.evaluation.network import Network
from s2megatron.evaluation.progress import Say, Ticker
from s2megatron.evaluation.statistics import Mean, mean
from s2megatron.evaluation.windows import Documents, Window

GRAM = 5
REPEAT_EDGES = (512, 2500, 8192, 32768)
"""Distances in tokens that part the bins of repeats."""
FAR = 2500
"""Repeats from so many tokens back and more are also counted together; one of REPEAT_EDGES."""


@dataclass(frozen=True)
class WindowLosses:
    """Summed losses (nats) and numbers of tokens of every window of one length.

    Shape letters: w windows, p position bins, r repeat bins; the last repeat bin holds the tokens
    that repeat nothing.
    """

    length: int
    places: list[tuple[int, int]]
    """Document and start of each window."""
    by_position: numpy.ndarray
    """[w, p]"""
    position_counts: numpy.ndarray
    by_repeat: numpy.ndarray
    """[w, r]"""
    repeat_counts: numpy.ndarray

    def table(self) -> dict[str, Mean]:
        """Name of a set of tokens -> loss in nats a token. Errors are between windows."""
        sums, counts = self.by_position, self.position_counts
        table = {"all": mean(sums.sum(1), counts.sum(1))}
        for i, name in enumerate(position_names(self.length)):
            table[f"position {name}"] = mean(sums[:, i], counts[:, i])
        sums, counts = self.by_repeat, self.repeat_counts
        for i, name in enumerate(repeat_names()):
            table[name] = mean(sums[:, i], counts[:, i])
        far = slice(REPEAT_EDGES.index(FAR) + 1, len(REPEAT_EDGES) + 1)
        table[f"repeats {FAR} and more back"] = mean(sums[:, far].sum(1), counts[:, far].sum(1))
        return table


def position_edges(length: int) -> list[int]:
    """Bins that double: 0, 256, 512, 1024, ... up to `length`."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(256, 2 * edges[-1])))
    return edges


def position_names(length: int) -> list[str]:
    edges = position_edges(length)
    return [f"{low} to {high}" for low, high in itertools.pairwise(edges)]


def repeat_names() -> list[str]:
    between = itertools.pairwise(REPEAT_EDGES)
    return [
        f"repeats under {REPEAT_EDGES[0]} back",
        *(f"repeats {low} to {high} back" for low, high in between),
        f"repeats {REPEAT_EDGES[-1]} and more back",
        "no repeats",
    ]


def repeat_distances(tokens: numpy.ndarray, gram: int = GRAM) -> numpy.ndarray:
    """How far back each token's n-gram ended before, 0 where it is new.

    Args:
        tokens: int64 [n].

    Returns:
        int64 [n]: for token t, t minus the last position before it where the same `gram` tokens
        end.
    """
    n = len(tokens)
    distances = numpy.zeros(n, dtype=numpy.int64)
    if n <= gram:
        return distances
    names = numpy.unique(tokens, return_inverse=True)[1]  # a number for every different n-gram
    for size in range(2, gram + 1):  # of the `size` tokens that end at position size - 1 + i
        pairs = names[:-1] * n + numpy.unique(tokens[size - 1 :], return_inverse=True)[1]
        names = numpy.unique(pairs, return_inverse=True)[1]
    order = numpy.argsort(names, kind="stable")
    again = names[order[1:]] == names[order[:-1]]
    distances[order[1:][again] + gram - 1] = (order[1:] - order[:-1])[again]
    return distances


def evaluate_loss(
    network: Network,
    documents: Documents,
    length: int,
    *,
    windows: int,
    packed: bool = False,
    batch_tokens: int,
    say: Say = print,
) -> WindowLosses:
    """Losses of a model over windows of `length` tokens.

    Args:
        windows: at most so many; where the dataset has more, spread over it evenly.
        packed: all documents one after the other, as in training; else each window lies in one.
        batch_tokens: tokens in one forward pass; one window goes in whole.

    Raises:
        ConfigError: no window of this length, or tokens beyond the vocabulary.
    """
    total = documents.count(length, windows, packed=packed)
    ticker = Ticker(f"loss at {length:,} tokens", total, "windows", say)
    size = max(1, batch_tokens // length)
    rows, places, batch = [], [], []

    def run() -> None:
        tokens = torch.from_numpy(numpy.stack([window.tokens for window in batch]))
        losses = network.token_losses(tokens).numpy().astype(float)
        for window, nats in zip(batch, losses, strict=True):
            rows.append(_sums(window, nats))
            places.append((window.document, window.start))
        ticker.step(len(batch), len(batch) * length, nats=float(losses.mean()))
        batch.clear()

    for window in documents.windows(length, windows, packed=packed):
        batch.append(window)
        if len(batch) == size:
            run()
    if batch:
        run()
    return WindowLosses(length, places, *map(numpy.stack, zip(*rows, strict=True)))


def _sums(window: Window, nats: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
    """Sums and counts of a window's losses [n]: by position, then by repeat."""
    edges = position_edges(len(nats))
    by_position = numpy.add.reduceat(nats, edges[:-1])
    distances = repeat_distances(window.tokens)[1:]  # the first token is not predicted
    bins = numpy.digitize(distances, REPEAT_EDGES)
    bins[distances == 0] = len(REPEAT_EDGES) + 1
    size = len(REPEAT_EDGES) + 2
    return (
        by_position,
        numpy.diff(edges),
        numpy.bincount(bins, weights=nats, minlength=size),
        numpy.bincount(bins, minlength=size),
    )
