"""Patterns as plain data: what checkpoints and config.json hold, and how messages describe them.

An S2 model has exactly a dense model's weights, so its weights alone would load under any sparsity
and silently be another model: whatever stores them stores this record beside them.
"""

from s2_kernels.pattern import LayerPattern

VERSION = 1
ARCHITECTURE_PREFIX = "S2"
"""Stands before the class name under `architectures` of a config.json with a record. A server that
does not know S2 attention then refuses the model by name; it would serve it dense, without a word.
transformers goes by `model_type`, and loads the model all the same."""


def record(patterns: tuple[LayerPattern, ...]) -> dict:
    """The patterns as plain data; layers that share a pattern share an entry."""
    groups: dict[LayerPattern, list[int]] = {}
    for number, pattern in enumerate(patterns, 1):
        groups.setdefault(pattern, []).append(number)
    return {
        "version": VERSION,
        "groups": [{"layers": layers} | pattern.to_dict() for pattern, layers in groups.items()],
    }


def read_record(data: dict) -> tuple[LayerPattern, ...]:
    """The patterns of a `record`, one per layer.

    Raises:
        ValueError: a newer version, or not a record; the message says which.
    """
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(
            f"s2_sparsity version {version!r}: this one reads {VERSION}; "
            "install the one that wrote the checkpoint, or a newer one"
        )
    try:
        by_layer = {
            number: LayerPattern.from_dict(group)
            for group in data["groups"]
            for number in group["layers"]
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"s2_sparsity cannot be read ({type(error).__name__}: {error}); it is not a record "
            "as s2megatron writes it: take config.json or the checkpoint from its source again"
        ) from None
    if sorted(by_layer) != list(range(1, len(by_layer) + 1)):
        raise ValueError(f"s2_sparsity names the layers {sorted(by_layer)}: some are missing")
    return tuple(by_layer[number] for number in sorted(by_layer))


def describe_difference(saved, configured) -> str:
    """One line per layer that differs, at most eight."""
    if len(saved) != len(configured):
        return f"  the checkpoint has {len(saved)} layers, the configuration {len(configured)}"
    lines = [
        f"  layer {n}: checkpoint {describe(a)} | configured {describe(b)}"
        for n, (a, b) in enumerate(zip(saved, configured, strict=True), 1)
        if a != b
    ]
    more = [f"  ... and {len(lines) - 8} more layers"] if len(lines) > 8 else []
    return "\n".join(lines[:8] + more)


def describe(pattern: LayerPattern) -> str:
    """A pattern in a few words, for tables and messages."""
    rules = pattern.rules
    bands = {rule.bands for rule in rules}
    size = f"block {pattern.block_size}"
    if pattern.is_dense:
        return f"dense, {size}"
    if len(bands) == 1:
        text = f"{rules[0]}, {size}"
    else:
        text = f"{size}, per head: " + "; ".join(str(rule) for rule in rules)
    shifts = [rule.shift for rule in rules]
    return f"{text}, {len(rules)} KV heads, shifts {_run(shifts)}"


def _run(numbers: list[int]) -> str:
    shown = ",".join(map(str, numbers[:4]))
    return shown + (",..." if len(numbers) > 4 else "")
