"""Errors that a user of the command line reads, and warnings that are hidden from them."""

import argparse
import contextlib
import difflib
import logging
import warnings
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
    """A run cannot start as configured. The message names the field, the value and the way out."""


@contextlib.contextmanager
def as_config_error(where: str) -> Iterator[None]:
    """A ValueError raised within becomes a ConfigError that says where it came from."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def refuse_unread(options: argparse.Namespace, names: str, needed: str) -> None:
    """Refuses options of a command that nothing would read.

    Args:
        options: parsed; `parser` is the command's own parser.
        names: of the options, blanks between; one at its default is not given.
        needed: what they are for, as "--plot".

    Raises:
        ConfigError: the first option that is given.
    """
    for name in names.split():
        if getattr(options, name) != options.parser.get_default(name):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: is for {needed}, and is not read here; leave it out")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest of the known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def hide_import_warnings() -> None:
    """Megatron says nine times while it is imported that TE and Apex are missing.

    The start table says once which backend each part uses. torch and Megatron also say
    that a checkpoint is read by a single process, which is what was asked. A docstring of
    Megatron's has an escape sequence that is none; Python says so when it makes that bytecode.
    """
    missing = "Transformer Engine and Apex are not|Apex is not installed|Only transformer-engine"
    warnings.filterwarnings("ignore", message=missing)
    warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unin")
    warnings.filterwarnings("ignore", message="invalid escape sequence", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime"
