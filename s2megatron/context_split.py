"""How a run cuts its sequences among context-parallel ranks: does it fit, and what is exchanged."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from s2_kernels import LayerPattern
from s2_kernels.exchange import (
    Chunks,
    block_bytes,
    crossing_blocks,
    forever_before,
    near_start,
    zigzag,
)
from s2_kernels.pattern import FOREVER
from s2megatron.errors import ConfigError, as_config_error


@dataclass(frozen=True)
class Blocks:
    """Blocks of K and V on the CP rank with most of each, over the KV heads of one TP rank.

    A chunk attends to a buffer, in which rows lie before the chunk's own (`exchange.ChunkView`).
    These are counted over the buffers of a rank, and in the last one alone.
    """

    received: int
    """From other ranks. Who sends most sends as many; a fifth more, if a window spans chunks."""
    itself: int
    """What a rank's later chunk needs of its earlier one: it is sent from the rank to itself."""
    asked: int
    """Of a rank's own blocks, those that somebody needs; each once."""
    before: int
    """Rows of the buffers before the chunks; all heads have as many as the head with most."""
    filled: int
    """Of these rows, those that hold a block: others belong to nobody."""
    last_before: int
    lead: int
    """Rows of memory before the rank's own tokens, into which gradients of its buffers reach."""


@functools.lru_cache(maxsize=4096)
def busiest(pattern: LayerPattern, n_blocks: int, cp: int) -> Blocks:
    """What crosses for these heads, in zigzag: the most that any rank receives, and holds.

    Of many ranks only the first and the last are looked at. Among the first, a halo grows until it
    is as long as the window; among the last, the window reaches from one chunk of a rank into the
    other. Between them every count is convex in the rank, but for where the chunk begins within a
    stride, which comes back after a period of ranks.

    Args:
        pattern: of one TP rank.
        cp: context-parallel ranks.
    """
    bands = [band for rule in pattern.rules for band in rule.bands]
    window = max((band.reach for band in bands if band.reach != FOREVER), default=0)
    period, size = math.lcm(*(band.stride for band in bands)), max(1, n_blocks // (2 * cp))
    edge = max(16, 2 + window // size + period // math.gcd(period, size))
    ranks = zigzag(cp, n_blocks)
    some = ranks if cp <= 2 * edge else ranks[:edge] + ranks[-edge:]
    found = [_of_rank(pattern, n_blocks, chunks) for chunks in some]
    return Blocks(*(max(getattr(f, x.name) for f in found) for x in fields(Blocks)))


def _of_rank(pattern: LayerPattern, n_blocks: int, chunks: Chunks) -> Blocks:
    whole, g = (range(n_blocks),), pattern.kv_heads
    itself = crossing_blocks(pattern, chunks, chunks)
    starts = [near_start(pattern, chunk) for chunk in chunks]
    far = [max(forever_before(rule, start) for rule in pattern.rules) for start in starts]
    before = [g * (f + c.start - s) for f, c, s in zip(far, chunks, starts, strict=True)]
    earlier = itertools.accumulate((g * len(chunk) for chunk in chunks), initial=0)
    filled = sum(crossing_blocks(pattern, (range(c.start),), (c,)) for c in chunks)
    return Blocks(
        received=crossing_blocks(pattern, whole, chunks) - itself,
        itself=itself,
        asked=sum(
            crossing_blocks(pattern, (c,), (range(c.stop, n_blocks),))
            for c in chunks
            if c.stop < n_blocks
        ),
        before=sum(before),
        filled=filled,
        last_before=before[-1],
        lead=max(0, *(rows - own for rows, own in zip(before, earlier, strict=False))),
    )


@functools.lru_cache(maxsize=4096)
def tp_shards(pattern: LayerPattern, tp: int) -> frozenset[LayerPattern]:
    """The different patterns of the TP ranks.

    Raises:
        ConfigError: heads do not divide over the ranks.
    """
    with as_config_error(f"megatron.tensor_model_parallel_size={tp}"):
        return frozenset(pattern.shard(rank, tp) for rank in range(tp))


@dataclass(frozen=True, kw_only=True)
class ContextSplit:
    """The sizes that the split depends on; `from_options` reads them off Megatron's options.

    Attributes:
        ranks: context_parallel_size.
        tensor_ranks: tensor_model_parallel_size.
        sequence_parallel: each rank's tokens are cut once more, among the tensor-parallel ranks.
        seq_len: tokens.
        batch: sequences in a micro-batch.
        head_sizes: of K and V, added up.
        element_bytes: of activations.
        comm_types: how Transformer Engine exchanges for dense layers, once for all or per layer;
            empty where this package does that, too.
        unfused: Transformer Engine is asked for its attention of plain products.
    """

    ranks: int
    tensor_ranks: int
    sequence_parallel: bool
    seq_len: int
    batch: int
    head_sizes: int
    element_bytes: int
    comm_types: tuple[str, ...]
    unfused: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "ContextSplit":
        """From a run file's `megatron:` section, or from all of Megatron's arguments (`vars`)."""
        head = options.get("kv_channels")
        head = head or options["hidden_size"] // options["num_attention_heads"]
        half = options.get("bf16") or options.get("fp16")
        te = options.get("transformer_impl") == "transformer_engine"
        backend = options.get("attention_backend")
        return cls(
            ranks=options.get("context_parallel_size") or 1,
            tensor_ranks=options.get("tensor_model_parallel_size") or 1,
            sequence_parallel=bool(options.get("sequence_parallel")),
            seq_len=options["seq_length"],
            batch=options.get("micro_batch_size") or 1,
            head_sizes=2 * head,
            element_bytes=2 if half else 4,
            comm_types=tuple(_comm_types(options)) if te else (),
            unfused=getattr(backend, "name", backend) == "unfused",  # Megatron's own is an enum
        )

    @property
    def dense_by(self) -> str | None:
        """Who exchanges for dense layers, where it is not this package."""
        kinds = ", ".join(dict.fromkeys(self.comm_types))
        return f"Transformer Engine, {kinds}" if kinds else None

    def check(self, patterns: Sequence[LayerPattern]) -> None:
        """Do the sequences divide among the ranks, and can Transformer Engine run dense layers so?

        Raises:
            ConfigError: names the value and the way out.
        """
        blocks = {p.block_size for p in patterns if not (self.dense_by and p.is_dense)}
        inner = self.tensor_ranks if self.sequence_parallel else 1
        check_length(self.seq_len, self.ranks, block=math.lcm(*blocks), inner=inner)
        if self.ranks > 1 and self.dense_by:
            self._check_transformer_engine(patterns)

    def _check_transformer_engine(self, patterns: Sequence[LayerPattern]) -> None:
        """What its dense layers need under context parallelism (2.20: dot_product_attention/utils).

        Raises:
            ConfigError: it would find no attention for them, or no heads for every rank.
        """
        over, within = self.ranks * self.tensor_ranks, f"context_parallel_size={self.ranks}"
        if len(self.comm_types) not in (1, len(patterns)):
            raise ConfigError(
                f"megatron.cp_comm_type={list(self.comm_types)}: give one for all layers, or one "
                f"for each of the {len(patterns)}"
            )
        kinds = self.comm_types * (len(patterns) if len(self.comm_types) == 1 else 1)
        for kind, pattern in zip(kinds, patterns, strict=True):
            if not pattern.is_dense:
                continue
            if self.unfused:
                raise ConfigError(
                    "megatron.attention_backend=unfused: Transformer Engine has no such attention "
                    f"with {within} for dense layers; choose auto, flash or fused"
                )
            if self.element_bytes != 2:
                raise ConfigError(
                    f"megatron.transformer_impl=transformer_engine: with {within} its dense layers "
                    "run in 16 bits only; set bf16, or transformer_impl to local"
                )
            if kind == "a2a" and pattern.kv_heads % over:
                raise ConfigError(
                    f"megatron.cp_comm_type=a2a: gives every context-parallel rank heads of its "
                    f"own, and dense layers have {pattern.kv_heads} KV heads for {over} ranks "
                    f"(TP {self.tensor_ranks} x CP {self.ranks}); choose p2p or all_gather"
                )

    def received(self, pattern: LayerPattern) -> tuple[int, float]:
        """What a layer's forward pass brings to the rank that receives most.

        Returns:
            Bytes of K and V per micro-batch, and their share of what the other ranks hold, which
            is what an all-gather or a ring brings.
        """
        blocks = self.seq_len // pattern.block_size
        parts = tp_shards(pattern, self.tensor_ranks)
        count = max(busiest(part, blocks, self.ranks).received for part in parts)
        size = block_bytes(pattern, batch=self.batch, head_sizes=self.head_sizes,
                           element_bytes=self.element_bytes)  # fmt: skip
        groups = max(1, pattern.kv_heads // self.tensor_ranks)
        everything = groups * blocks * (self.ranks - 1) // self.ranks
        return count * size, count / everything if everything else 0.0


def check_length(seq_len: int, ranks: int, *, block: int = 1, inner: int = 1) -> None:
    """Does a sequence divide into two chunks of whole blocks for every context-parallel rank?

    Args:
        seq_len: tokens.
        block: tokens.
        inner: tensor-parallel ranks that cut a rank's tokens once more, under sequence parallelism.

    Raises:
        ConfigError: names the lengths and the numbers of ranks that work.
    """

    def unit(ranks: int) -> int:
        return 1 if ranks == 1 else ranks * math.lcm(2 * block, inner)

    step = unit(ranks)
    if seq_len % step == 0:
        return
    wanted = "two chunks a rank" + (f", blocks of {block} tokens" if block > 1 else "")
    wanted += f", sequence_parallel over {inner} ranks" if inner > 1 else ""
    nearest = {seq_len // step * step, -(-seq_len // step) * step} - {0}
    fitting = [n for n in range(1, seq_len // (2 * block) + 2) if seq_len % unit(n) == 0]
    raise ConfigError(
        f"megatron.seq_length={seq_len}: with context_parallel_size={ranks} it must be a multiple "
        f"of {step} ({wanted}), as {' or '.join(map(str, sorted(nearest)))}; or choose a "
        f"context_parallel_size of {_some(fitting)}"
    )


def check_context_options(options: Mapping[str, Any]) -> None:
    """Refuses, by name, what does not go with context parallelism.

    Args:
        options: as in `ContextSplit.from_options`.

    Raises:
        ConfigError: the first option refused.
    """
    ranks = options.get("context_parallel_size") or 1
    if ranks == 1:
        return
    within = f"context_parallel_size={ranks}"
    refused = [
        ("dataloader_inter_document_masking", options.get("dataloader_inter_document_masking"),
         f"does not go with {within}: documents and context-parallel chunks do not fit together in "
         "Megatron 0.19; leave one of them out"),
        ("hybrid_context_parallel", options.get("hybrid_context_parallel"),
         f"cuts every sequence in another way; leave it out, {within} alone is enough"),
        ("hierarchical_context_parallel_sizes", options.get("hierarchical_context_parallel_sizes"),
         f"sparse layers exchange in one step; leave it out, {within} alone is enough"),
        ("cp_comm_type", "a2a+p2p" in _comm_types(options),
         "is hierarchical; choose p2p, all_gather or a2a for Transformer Engine's dense layers"),
    ]  # fmt: skip
    for name, asked_for, way_out in refused:
        if asked_for:
            raise ConfigError(f"megatron.{name}={options.get(name)!s}: {way_out}")


def check_exchange_groups(groups: int | None, options: Mapping[str, Any]) -> None:
    """Do `sparsity.exchange_groups` divide a rank's KV heads? Without ranks nothing reads them.

    Args:
        options: a run file's `megatron:` section. What is no whole number is Megatron's to refuse.

    Raises:
        ConfigError: names the numbers that do.
    """
    grouped = options.get("group_query_attention")
    heads = (
        (options.get("num_query_groups") or 1) if grouped else options.get("num_attention_heads")
    )
    ranks, tensor = (options.get(f"{x}_parallel_size") or 1 for x in ("context", "tensor_model"))
    if groups is None or any(type(n) is not int or n < 1 for n in (heads, ranks, tensor)):
        return
    heads = max(1, heads // tensor)
    if ranks > 1 and heads % groups:
        raise ConfigError(
            f"sparsity.exchange_groups: {groups}: must divide the {heads} KV heads of a rank (with "
            f"tensor_model_parallel_size={tensor}); choose "
            f"{_some([n for n in range(1, heads + 1) if heads % n == 0])}, or leave it out, and it "
            "is chosen"
        )


def check_stock_loss(options: Mapping[str, Any]) -> None:
    """Refuses a loss that Megatron's own script gets wrong under context parallelism.

    It divides a rank's gradient by the tokens that count on this rank, and takes the mean of the
    ranks. Where masks lie unevenly that is another loss than the sequence's. (This package's
    launcher adds the tokens up first.)

    Raises:
        ConfigError: masks that may lie unevenly, without calculate_per_token_loss.
    """
    apart = (options.get("context_parallel_size") or 1) > 1
    if apart and options.get("eod_mask_loss") and not options.get("calculate_per_token_loss"):
        raise ConfigError(
            "megatron.eod_mask_loss=True: the tokens that count lie unevenly on context-parallel "
            "ranks, whose losses Megatron's script averages; give --calculate-per-token-loss, too"
        )


def _comm_types(options: Mapping[str, Any]) -> list[str]:
    kinds = options.get("cp_comm_type") or ["p2p"]
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _some(numbers: list[int]) -> str:
    if len(numbers) > 8:
        return f"{', '.join(map(str, numbers[:7]))}, ..., {numbers[-1]}"
    return ", ".join(map(str, numbers))
