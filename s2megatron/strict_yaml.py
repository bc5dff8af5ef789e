"""A YAML reader that refuses a key which stands twice in one mapping.

PyYAML would take the second without a word."""

from typing import Any

import yaml

from s2megatron.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


def load(text: str, where: str) -> Any:
    """What the YAML holds. Merge keys (`<<`) work, and what stands beside them wins.

    Args:
        where: the file, for messages.

    Raises:
        ConfigError: not YAML, or a key twice in one mapping, naming both lines. `num-layers` and
            `num_layers` are one key.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, where, "", set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: cannot be read as YAML: {error}") from None
    finally:
        loader.dispose()


def one_spelling(tree: Any) -> Any:
    """The tree with `_` for `-` in every key of its mappings."""
    if isinstance(tree, dict):
        return {_spelled(key): one_spelling(value) for key, value in tree.items()}
    return [one_spelling(item) for item in tree] if isinstance(tree, list) else tree


def _spelled(key: Any) -> Any:
    return key.replace("-", "_") if isinstance(key, str) else key


def _check_keys(node: yaml.Node, where: str, path: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_keys(item, where, f"{path}[{number}]", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else str(key.value)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            line, spelled = key.start_mark.line + 1, _spelled(key.value)
            if spelled in first:
                raise ConfigError(
                    f"{where}: {name} stands in line {first[spelled]} and again in line {line}; "
                    "keep one of them"
                )
            first[spelled] = line
        _check_keys(value, where, name, seen)
