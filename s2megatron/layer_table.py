"""The layer table: what every layer attends to, printed at start and by `s2megatron show`."""

from collections.abc import Mapping

from s2_kernels import FOREVER, LayerPattern
from s2megatron.context_split import ContextSplit

COLUMNS = (
    "layers",
    "kind",
    "block",
    "local",
    "stride or ranges",
    "density",
    "uncovered",
)


def layer_table(
    patterns: tuple[LayerPattern, ...],
    seq_len: int,
    runs_as: Mapping[int, str] | None = None,
    split: ContextSplit | None = None,
) -> str:
    """Neighbouring layers that are alike share a row.

    Args:
        seq_len: tokens, for the density (kept pairs over the pairs of dense causal attention).
        runs_as: name of the built attention per layer; left out before the model is built.
        split: of the sequences among context-parallel ranks; a column says what a layer exchanges.
    """
    apart = split is not None and split.ranks > 1
    groups: list[tuple[int, int, LayerPattern, str]] = []
    for number, pattern in enumerate(patterns, 1):
        name = (runs_as or {}).get(number, "")
        if groups and groups[-1][2:] == (pattern, name):
            groups[-1] = (groups[-1][0], number, pattern, name)
        else:
            groups.append((number, number, pattern, name))
    added = ["receives"] * apart + ["runs as"] * bool(runs_as)
    rows = [(*COLUMNS, *added)]
    for first, last, pattern, name in groups:
        layers = str(first) if first == last else f"{first}-{last}"
        added = [*([_received(pattern, split)] if apart else []), *([name] if runs_as else [])]
        rows.append((layers, *_describe(pattern), *_figures(pattern, seq_len), *added))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
             for row in rows]  # fmt: skip
    density = sum(p.kept_pairs(seq_len) for p in patterns) / sum(
        p.heads * seq_len * (seq_len + 1) // 2 for p in patterns
    )
    sparse = sum(not p.is_dense for p in patterns)
    lines.append(
        f"S2 attention: {sparse} of {len(patterns)} layers sparse; at {seq_len} tokens the model "
        f"attends to {density:.2%} of the dense causal pairs"
    )
    if apart:
        lines.append(
            f"receives: K and V that a layer brings to the busiest of {split.ranks} "
            "context-parallel ranks per micro-batch and forward pass, and its share of what the "
            "others hold; the backward pass brings them again, and gradients of what a rank sent"
        )
    uncovered = [n for n, p in enumerate(patterns, 1) if 0 < p.uncovered_fraction() < 1]
    if uncovered:
        lines.append(
            f"note: the shards of layer(s) {_list(uncovered)} leave blocks uncovered (column "
            "'uncovered'): beyond their windows no head of that layer sees these blocks; "
            f"{patterns[0].kv_heads} KV heads cover a stride of up to {patterns[0].kv_heads}, with "
            "head_step 1"
        )
    return "\n".join(line.rstrip() for line in lines)


def first_block_dropped(patterns: tuple[LayerPattern, ...]) -> str | None:
    """What to tell whoever puts patterns over a model that was trained dense; None: nothing.

    Such a model's heads attend to its first tokens wherever nothing else is asked for, and it loses
    far more where they are taken away than by all else that is dropped.
    Source: docs/benchmarks/quality-pretrained.md.
    """
    heads = [rule for pattern in patterns for rule in pattern.rules]
    dropping = sum(rule.lifetime(0) != FOREVER for rule in heads)
    if not dropping:
        return None
    return (
        f"{dropping} of {len(heads)} KV heads (all layers together) drop the first block, which a "
        "model that was trained dense leans on: it will lose more than it has to. Keep it in every "
        "head (homogeneous: true and strides with few common factors, one per KV head), and choose "
        "the dense layers with `s2megatron choose-dense` (docs/benchmarks/quality-pretrained.md)"
    )


def _describe(pattern: LayerPattern) -> tuple[str, str, str, str]:
    """kind, block, local, stride or ranges."""
    rules = [rule for rule in pattern.rules if not rule.is_dense]
    block = str(pattern.block_size)
    if not rules:
        return "dense", block, "-", "-"
    local = str(rules[0].bands[0].reach)
    bands = {rule.bands for rule in rules}
    if all(len(b) == 1 for b in bands):
        kind, text = "sliding window", "-"
    elif all(len(b) == 2 and b[-1].reach == FOREVER for b in bands):
        strides = [rule.bands[-1].stride for rule in rules]
        kind = "local + stride"
        text = str(strides[0]) if len(set(strides)) == 1 else ",".join(map(str, strides))
    else:
        kind = "ranges"
        text = " | ".join(sorted({str(rule) for rule in rules}))
    dense_heads = len(pattern.rules) - len(rules)
    return kind + (f", {dense_heads} dense" if dense_heads else ""), block, local, text


def _figures(pattern: LayerPattern, seq_len: int) -> tuple[str, str]:
    return f"{pattern.density(seq_len):.2%}", f"{pattern.uncovered_fraction():.0%}"


def _received(pattern: LayerPattern, split: ContextSplit) -> str:
    if pattern.is_dense and split.dense_by:
        return split.dense_by
    size, share = split.received(pattern)
    return f"{size / 2**20:.4g} MiB, {share:.1%}"


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
