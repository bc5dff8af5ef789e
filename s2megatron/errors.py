"""The one exception a user of the launcher is meant to read."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A run cannot start as configured. The message names the field, the value and the way out."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
