"""Progress: a line every few seconds, for a person who waits."""

import time
from collections.abc import Callable

Say = Callable[[str], None]

_EVERY = 15.0  # seconds


class Ticker:
    """Says how far a piece of work has come, every 15 seconds and at its end."""

    def __init__(self, name: str, total: int, unit: str, say: Say):
        self._name, self._total, self._unit, self._say = name, total, unit, say
        self._done = self._tokens = 0
        self._began = self._spoke = time.monotonic()
        self._sums: dict[str, float] = {}

    def step(self, count: int, tokens: int, **averages: float) -> None:
        """`count` more are done, with `tokens` tokens; `averages` are means over the `count`."""
        self._done += count
        self._tokens += tokens
        for name, value in averages.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * count
        now = time.monotonic()
        if self._done < self._total and now - self._spoke < _EVERY:
            return
        self._spoke = now
        figures = ", ".join(f"{value / self._done:.4f} {n}" for n, value in self._sums.items())
        speed = self._tokens / max(now - self._began, 1e-9)
        self._say(
            f"{self._name}: {self._done} of {self._total} {self._unit}, {figures}, "
            f"{speed:,.0f} tokens/s"
        )
