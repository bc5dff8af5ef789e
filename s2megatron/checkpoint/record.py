"""The sparsity a checkpoint was trained with: written with it, compared when it is resumed.

An S2 model has exactly a dense model's weights, so a checkpoint would load under any sparsity and
silently train another model. The resolved patterns travel in the checkpoint's own `args` (as
`s2_sparsity`), which Megatron saves in the common state of every format.
"""

from pathlib import Path

from s2_kernels import LayerPattern
from s2megatron.errors import ConfigError

VERSION = 1


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
    """The patterns of a `record`, one per layer. Raises ConfigError for a newer version."""
    if data.get("version") != VERSION:
        raise ConfigError(
            f"s2_sparsity version {data.get('version')!r}: this one reads {VERSION}; "
            "install the one that wrote the checkpoint, or a newer one"
        )
    by_layer = {
        number: LayerPattern.from_dict(group)
        for group in data["groups"]
        for number in group["layers"]
    }
    return tuple(by_layer[number] for number in sorted(by_layer))


def latest_iteration_dir(load: str | Path, step: int | None = None) -> Path | None:
    """The checkpoint folder that Megatron would load from `load`, or None if there is none."""
    load = Path(load)
    if step is None:
        tracker = load / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if text == "release":
            return load / "release"
        if not text.isdigit():
            raise ConfigError(f"{tracker}: {text!r} is not an iteration; the checkpoint is damaged")
        step = int(text)
    return load / f"iter_{step:07d}"


def load_common(folder: Path) -> dict:
    """A torch_dist checkpoint's common state. Raises ConfigError when it cannot be read."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return load_common_state_dict(str(folder))
    except (CheckpointingException, OSError, EOFError, KeyError) as error:
        raise ConfigError(
            f"checkpoint {folder}: cannot be read ({type(error).__name__}: {error}); it may be "
            "incomplete or not in torch_dist format: name an earlier one with megatron.ckpt_step"
        ) from None


def check_resume(args, patterns: tuple[LayerPattern, ...], on_resume: str) -> None:
    """Compares the checkpoint that Megatron is about to load with the configured sparsity.

    Args:
        args: Megatron's arguments (`load`, `pretrained_checkpoint`, `ckpt_step`).
        on_resume: "error" or "replace" (`sparsity.on_resume`).

    Raises:
        ConfigError: they differ and `on_resume` is "error"; the message shows the difference.
    """
    folder = None
    if args.load:
        folder = latest_iteration_dir(args.load, args.ckpt_step)
    if folder is None and args.pretrained_checkpoint:
        folder = latest_iteration_dir(args.pretrained_checkpoint)
    if folder is None:
        return
    saved = getattr(load_common(folder).get("args"), "s2_sparsity", None)
    if saved is None:
        difference = "it records no sparsity: a dense checkpoint"
        same = all(pattern.is_dense for pattern in patterns)
    else:
        saved_patterns = read_record(saved)
        same = saved_patterns == patterns
        difference = "" if same else describe_difference(saved_patterns, patterns)
    if same:
        return
    message = (
        f"checkpoint {folder} was trained with another sparsity than configured:\n{difference}"
    )
    if on_resume == "error":
        raise ConfigError(
            f"{message}\nRestore the sparsity, or set sparsity.on_resume=replace to go on with "
            "the configured one"
        )
    if args.rank == 0:
        print(f"s2megatron: {message}\ngoing on with the configured one (sparsity.on_resume)")


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
