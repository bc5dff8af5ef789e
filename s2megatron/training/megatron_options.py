"""Megatron's own options, checked against Megatron's own parser."""

import argparse
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from s2megatron.errors import ConfigError, did_you_mean


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, with the run file's name of the option."""

    def error(self, message: str):
        raise ConfigError(message.replace("argument --", "megatron.", 1))


def megatron_parser() -> argparse.ArgumentParser:
    return add_megatron_arguments(_Parser(allow_abbrev=False))


def to_argv(options: dict[str, Any]) -> tuple[list[str], argparse.Namespace]:
    """The run file's `megatron:` section as Megatron's command line, and what it parses to.

    A key is an option's name ("no-rope-fusion", "no_rope_fusion") or the name it is stored under
    ("apply_rope_fusion"); flags take true and false, null leaves an option at its default.

    Raises:
        ConfigError: unknown option (suggests the nearest), or a value that does not fit.
    """
    parser = megatron_parser()
    by_flag, by_dest = {}, {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        by_dest.setdefault(action.dest, action)
        for flag in action.option_strings:
            by_flag[flag.lstrip("-").replace("-", "_")] = (action, flag)
    argv = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name in by_flag:
            action, flag = by_flag[name]
            named_by_flag = True
        elif name in by_dest:
            action = by_dest[name]
            flag = action.option_strings[0]
            named_by_flag = False
        else:
            near = did_you_mean(name, [*by_flag, *by_dest])
            raise ConfigError(f"megatron.{key}: Megatron has no such option{near}")
        argv += _one_option(key, value, action, flag, named_by_flag)
    return argv, parser.parse_args(argv)


def _one_option(key, value, action, flag: str, named_by_flag: bool) -> list[str]:
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"megatron.{key}: {value!r}: this option takes true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            positive = not flag.startswith("--no-")
            wanted = next(
                f for f in action.option_strings if f.startswith("--no-") != (value == positive)
            )
            return [wanted]
        # A store_false option is --no-x stored as x: under that name, false is what sets it.
        sets_it = value if named_by_flag else value == action.const
        return [flag] if sets_it else []
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, dict | list) for v in values):
        raise ConfigError(f"megatron.{key}: {value!r}: must be one value or a plain list")
    if isinstance(value, bool):
        raise ConfigError(
            f"megatron.{key}: {value!r}: this option takes a value, not true or false"
        )
    texts = [str(v) for v in values]
    if len(texts) == 1:  # '--lr=-1' reads a leading minus as a value
        return [f"{flag}={texts[0]}"]
    return [flag, *texts]
