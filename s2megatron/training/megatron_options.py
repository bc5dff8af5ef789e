"""Megatron's own options, checked against Megatron's own parser."""

import argparse
import functools
from collections.abc import Iterable
from typing import Any

from megatron.core.transformer.enums import CudaGraphModule
from megatron.training.arguments import add_megatron_arguments

from s2megatron.errors import ConfigError, did_you_mean

_REQUIRED = {
    "num_layers": "how many layers the model has",
    "hidden_size": "the width of the model",
    "num_attention_heads": "query heads per layer",
    "seq_length": "tokens per sequence",
    "max_position_embeddings": "the longest sequence, at least seq_length",
    "micro_batch_size": "sequences that a rank computes at a time",
}
_FILLED_LATER = {"recompute_modules": "['core_attn']"}
"""Lists whose default is null to the parser, and these names to the model that is built."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, with the run file's name of the option."""

    def error(self, message: str):
        raise ConfigError(message.replace("argument --", "megatron.", 1))


@functools.cache  # Megatron reads the source of its options for their help: 0.1 s each time
def megatron_parser() -> argparse.ArgumentParser:
    return add_megatron_arguments(_Parser(allow_abbrev=False))


def keys_of(options: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The keys of `options`, as they are written, that name one of these options of Megatron's."""
    by_name = _actions_by_name(megatron_parser())
    actions = {key: by_name.get(str(key).replace("-", "_")) for key in options}
    return [key for key, action in actions.items() if action is not None and action.dest in names]


def canonical(options: dict[str, Any]) -> dict[str, Any]:
    """The options under the names that Megatron stores them under, each of them once.

    A key is such a name ("apply_rope_fusion") or an option's ("no-rope-fusion", "no_rope_fusion"),
    whose value is turned round where the option is there to switch something off. An empty list
    becomes null, the default, where Megatron's default names nothing either.

    Raises:
        ConfigError: unknown option (suggests the nearest), true or false where a value is wanted or
            the other way round, more or fewer values than it takes, two names for one option.
    """
    by_name = _actions_by_name(megatron_parser())
    result: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            near = did_you_mean(name, by_name)
            raise ConfigError(f"megatron.{key}: Megatron has no such option{near}")
        action = by_name[name]
        if action.dest in written:
            raise ConfigError(
                f"megatron.{written[action.dest]} and megatron.{key} are names of one option; "
                "leave one of them out"
            )
        written[action.dest] = key
        _check_value(key, value, action)
        value = None if value == [] else value
        turned = action.nargs == 0 and name != action.dest and _switches_off(action, name)
        result[action.dest] = not value if turned and value is not None else value
    return result


def check_required(options: dict[str, Any]) -> None:
    """What Megatron has no default for, and misses by a bare assertion. Raises ConfigError.

    Args:
        options: under their stored names (`canonical`).
    """
    if options.get("use_checkpoint_args") or options.get("yaml_cfg"):
        return
    for name, meaning in _REQUIRED.items():
        if options.get(name) is None:
            raise ConfigError(f"megatron.{name}: is missing: {meaning}")


def to_argv(options: dict[str, Any]) -> tuple[list[str], argparse.Namespace]:
    """The run file's `megatron:` section as Megatron's command line, and what it parses to.

    Flags take true and false, null leaves an option at its default.

    Raises:
        ConfigError: unknown option (suggests the nearest), or a value that does not fit.
    """
    parser = megatron_parser()
    argv = []
    for name, value in canonical(options).items():
        if value is not None:
            actions = [action for action in parser._actions if action.dest == name]
            argv += _one_option(value, actions)
    return argv, parser.parse_args(argv)


def _actions_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """By stored names first: `ckpt_fully_parallel_save` is also an old option that does nothing."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    found: dict[str, argparse.Action] = {}
    for action in actions:
        found.setdefault(action.dest, action)
    for action in actions:
        for flag in action.option_strings:
            found.setdefault(flag.lstrip("-").replace("-", "_"), action)
    return found


def _switches_off(action: argparse.Action, name: str) -> bool:
    """Whether the option of this name, given on the command line, stores false."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return name.startswith("no_")
    return action.const is False


def _check_value(key: str, value: Any, action: argparse.Action) -> None:
    if value is None:
        return
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"megatron.{key}: {value!r}: this option takes true or false")
        return
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, dict | list) for v in values):
        raise ConfigError(f"megatron.{key}: {value!r}: must be one value or a plain list")
    if any(isinstance(v, bool) for v in values):
        raise ConfigError(
            f"megatron.{key}: {value!r}: this option takes a value, not true or false"
            " (YAML reads on, off, yes and no as these)"
        )
    _check_count(key, value, action)
    for name in values:
        _check_name(key, name, action)


def _check_count(key: str, value: Any, action: argparse.Action) -> None:
    """As many values as the option takes, or none where that is its default. Raises ConfigError."""
    if not isinstance(value, list):
        return
    default = _FILLED_LATER.get(action.dest) or repr(action.default)
    if not value and action.nargs is not None and default in ("None", "[]"):
        return
    if not value:
        raise ConfigError(
            f"megatron.{key}: []: an empty list is no value of this option; leave it out (or write "
            f"null) for Megatron's default, {default}, or name a value"
        )
    takes = 1 if action.nargs is None else action.nargs
    if isinstance(takes, int) and len(value) != takes:
        as_text = "; a list that Megatron reads itself is one text, in quotes" if takes == 1 else ""
        raise ConfigError(f"megatron.{key}: {value!r}: this option takes {takes} value(s){as_text}")


def _check_name(key: str, value: Any, action: argparse.Action) -> None:
    """A member of the option's enumeration, which is a bare KeyError to Megatron's parser.

    Raises:
        ConfigError: there is no member of this name.
    """
    if action.type in (None, str, int, float):
        return
    try:
        action.type(str(value))
    except KeyError:
        known = ", ".join(member.name for member in action.choices or CudaGraphModule)
        raise ConfigError(f"megatron.{key}: {value!r}: must be one of {known}") from None
    except (ValueError, argparse.ArgumentTypeError):
        pass  # the parser names these


def _one_option(value: Any, actions: list[argparse.Action]) -> list[str]:
    """The words that store this value; `actions` are those that store under its name."""
    action = actions[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [next(f for f in action.option_strings if f.startswith("--no-") != value)]
    if action.nargs == 0:
        return [a.option_strings[0] for a in actions if a.const == value][:1]
    texts = [str(v) for v in (value if isinstance(value, list) else [value])]
    flag = action.option_strings[0]
    if len(texts) == 1:  # '--lr=-1' reads a leading minus as a value
        return [f"{flag}={texts[0]}"]
    return [flag, *texts]
