"""Means with standard errors over samples of unequal size."""

import math
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Mean:
    """A mean over `count` things (tokens, answers), and its standard error."""

    value: float | None
    """None where there is nothing to take a mean of."""
    error: float | None
    """None with fewer than two samples."""
    count: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")

    def as_dict(self) -> dict:
        return {"value": self.value, "error": self.error, "count": self.count}


def mean(sums, counts) -> Mean:
    """The mean of all things in samples that were drawn one by one (windows, documents).

    Things in one sample are alike, so the error is that of a ratio of sample sums, not that of as
    many independent things.

    Args:
        sums, counts: [samples]: a sample's sum, and how many things it holds (0: left out).
    """
    sums, counts = numpy.asarray(sums, dtype=float), numpy.asarray(counts, dtype=float)
    used = counts > 0
    sums, counts = sums[used], counts[used]
    samples, total = len(counts), counts.sum()
    if not samples:
        return Mean(None, None, 0)
    value = float(sums.sum() / total)
    if samples == 1:
        return Mean(value, None, int(total))
    residuals = sums - value * counts
    error = math.sqrt(float((residuals**2).sum()) * samples / (samples - 1)) / float(total)
    return Mean(value, error, int(total))
