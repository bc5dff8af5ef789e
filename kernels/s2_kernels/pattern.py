"""Which KV blocks a head keeps, and for how long: the one concept everything derives from.

The sequence is cut into blocks of `block_size` tokens. For KV head h, KV block k has a *lifetime*
in blocks, and query block i attends to KV block k if and only if

    0 <= i - k < lifetime(h, k)          (inside the diagonal block i == k: token-causal)

A lifetime is given by *bands*: (reach, stride) pairs, both growing, each stride dividing the next.
A band selects block k when (k + shift(h)) % stride == 0, and the lifetime is the reach of the
widest band that selects k. Local + stride is two bands, a sliding window is one, dense is one that
reaches forever. A block once dropped is never needed again, so KV-cache efficiency holds by
construction, and a pattern costs O(heads) memory: only `block_mask` builds an (N/B)^2 table.

Source: "Sparsely-Sharded (S2) Attention", arXiv 2407.17678, sections 3.1-3.2. `local_stride`
selects the blocks of the paper's library (DKernel); docs/design.md derives the rest.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

FOREVER = 1 << 30
"""A reach, in blocks, that no sequence outgrows (16 G tokens at the smallest block size)."""

BLOCK_SIZES = (16, 32, 64, 128, 256)

_COVERAGE_BLOCKS = 1 << 24  # blocks looked at when strides share no short period


class Band(NamedTuple):
    """Every `stride`-th block is kept until it is `reach` blocks old (both in blocks)."""

    reach: int
    stride: int


@dataclass(frozen=True)
class HeadRule:
    """The lifetime rule of one KV head: bands from the narrowest to the widest, and a shift."""

    bands: tuple[Band, ...]
    shift: int = 0

    def lifetime(self, block: int) -> int:
        """How many query blocks, its own included, attend to KV block `block`."""
        return max(b.reach for b in self.bands if (block + self.shift) % b.stride == 0)

    def lifetimes(self, n_blocks: int) -> torch.Tensor:
        """Lifetimes of the first `n_blocks` KV blocks, int64 [n_blocks]."""
        life = torch.zeros(n_blocks, dtype=torch.int64)
        for reach, stride in self.bands:  # a later band is wider and selects a subset
            life[-self.shift % stride :: stride] = reach
        return life

    @property
    def is_dense(self) -> bool:
        return self.bands == (Band(FOREVER, 1),)

    def __str__(self) -> str:
        parts = [
            f"1/{b.stride}" + ("" if b.reach == FOREVER else f" to {b.reach}") for b in self.bands
        ]
        return " + ".join(parts)


@dataclass(frozen=True)
class LayerPattern:
    """The sparsity of one attention layer: one lifetime rule per KV head.

    Attributes:
        heads: number of query heads. Query head q reads KV head q // (heads / kv_heads).
        block_size: tokens per block, one of 16, 32, 64, 128, 256.
        rules: one `HeadRule` per KV head, in global head order.
        key: the pattern as a string (JSON of `to_dict`), which `from_key` reads.
    """

    heads: int
    block_size: int
    rules: tuple[HeadRule, ...]

    def __post_init__(self):
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size={self.block_size!r}: must be one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if not self.rules or self.heads < 1 or self.heads % len(self.rules):
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={len(self.rules)}: "
                "every KV head serves the same number of query heads"
            )
        # Kernels look a pattern up on every call: its name, and with it its hash, is made once.
        object.__setattr__(self, "key", json.dumps(self.to_dict()))

    @property
    def kv_heads(self) -> int:
        return len(self.rules)

    @property
    def is_dense(self) -> bool:
        """True when every head attends to the whole causal context."""
        return all(rule.is_dense for rule in self.rules)

    def __hash__(self) -> int:
        return hash(self.key)

    @functools.cached_property
    def n_bands(self) -> int:
        return max(len(rule.bands) for rule in self.rules)

    def lifetime(self, kv_head: int, block: int) -> int:
        """Lifetime in blocks of a KV block for a KV head; FOREVER if it is never dropped."""
        return self.rules[kv_head].lifetime(block)

    def block_mask(self, n_blocks: int) -> torch.Tensor:
        """Bool [kv_heads, n_blocks (query), n_blocks (KV)]. For tests and plots only."""
        age = torch.arange(n_blocks)[:, None] - torch.arange(n_blocks)
        return torch.stack([(age >= 0) & (age < rule.lifetimes(n_blocks)) for rule in self.rules])

    def kept_pairs(self, seq_len: int) -> int:
        """Exact number of (query token, KV token) pairs attended to, summed over query heads."""
        group = self.heads // self.kv_heads
        return group * sum(_rule_pairs(rule, self.block_size, seq_len) for rule in self.rules)

    def density(self, seq_len: int) -> float:
        """Kept pairs over the pairs of dense causal attention."""
        return self.kept_pairs(seq_len) / (self.heads * (seq_len * (seq_len + 1) // 2))

    def uncovered_fraction(self) -> float:
        """Fraction of blocks that no KV head keeps forever: 0 when the shards cover the context.

        Where strides share no short period, the first 2^24 blocks are counted.
        """
        shards = {(r.bands[-1].stride, r.shift) for r in self.rules if r.bands[-1].reach == FOREVER}
        if not shards:
            return 1.0
        period = min(math.lcm(*(stride for stride, _ in shards)), _COVERAGE_BLOCKS)
        covered = torch.zeros(period, dtype=torch.bool)
        for stride, shift in shards:
            covered[-shift % stride :: stride] = True
        return 1.0 - covered.sum().item() / period

    def shard(self, rank: int, world: int) -> "LayerPattern":
        """The heads of tensor-parallel rank `rank` of `world`, with their global lifetimes.

        With fewer KV heads than ranks, neighbouring ranks share a KV head, as in Megatron.

        Raises:
            ValueError: heads do not divide over the ranks.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not in 0..{world - 1}")
        if self.heads % world or (self.kv_heads % world and world % self.kv_heads):
            raise ValueError(
                f"heads={self.heads}, kv_heads={self.kv_heads} cannot be split over TP size "
                f"{world}: heads must be a multiple of it, and kv_heads a multiple or a divisor"
            )
        count = max(1, self.kv_heads // world)
        first = rank * self.kv_heads // world
        return LayerPattern(self.heads // world, self.block_size, self.rules[first : first + count])

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def from_key(cls, key: str) -> "LayerPattern":
        """The pattern whose `key` this is: patterns enter operators as strings."""
        return cls.from_dict(json.loads(key))

    def table(self) -> torch.Tensor:
        """Int32 [kv_heads, 1 + 2 * n_bands]: shift, then (reach, stride) from narrow to wide.

        This is all that a kernel needs. Heads with fewer bands repeat their last one, which then
        spans an empty range of ages.
        """
        rows = []
        for rule in self.rules:
            bands = rule.bands + rule.bands[-1:] * (self.n_bands - len(rule.bands))
            rows.append([rule.shift, *(number for band in bands for number in band)])
        return torch.tensor(rows, dtype=torch.int32)

    def to_dict(self) -> dict:
        """Plain numbers and lists, as recorded in checkpoints; `from_dict` reads them back."""
        return {
            "heads": self.heads,
            "block_size": self.block_size,
            "rules": [
                {"bands": [list(band) for band in rule.bands], "shift": rule.shift}
                for rule in self.rules
            ],
        }

    @classmethod
    def from_dict(cls, data: dict) -> "LayerPattern":
        rules = tuple(
            HeadRule(tuple(Band(*band) for band in rule["bands"]), rule["shift"])
            for rule in data["rules"]
        )
        return cls(data["heads"], data["block_size"], rules)


@functools.lru_cache(maxsize=4096)
def _rule_pairs(rule: HeadRule, block_size: int, seq_len: int) -> int:
    """Token pairs that one query head of this rule keeps; O(blocks)."""
    start = torch.arange(0, seq_len, block_size)  # first token of each KV block
    end = (start + block_size).clamp(max=seq_len)
    seen_until = torch.minimum(
        start + rule.lifetimes(len(start)) * block_size, torch.tensor(seq_len)
    )
    size = end - start
    return int((size * (size + 1) // 2 + size * (seen_until - end)).sum())


def dense(*, heads: int, kv_heads: int | None = None, block_size: int = 64) -> LayerPattern:
    """Every head attends to its whole causal context."""
    rule = HeadRule((Band(FOREVER, 1),))
    return LayerPattern(heads, block_size, (rule,) * (kv_heads or heads))


def sliding_window(
    *, heads: int, kv_heads: int | None = None, block_size: int = 64, local_blocks: int
) -> LayerPattern:
    """Every head attends to the last `local_blocks` blocks, the diagonal block included."""
    return ranges(heads=heads, kv_heads=kv_heads, block_size=block_size, bands=[(local_blocks, 1)])


def local_stride(
    *,
    heads: int,
    kv_heads: int | None = None,
    block_size: int = 64,
    local_blocks: int,
    stride: int | Sequence[int],
    head_offset: int = 0,
    head_step: int | None = None,
    homogeneous: bool = False,
    dense_heads: int = 0,
) -> LayerPattern:
    """The paper's pattern: a local window, and every `stride`-th block forever.

    Args:
        heads, kv_heads: global numbers of query and KV heads (default: as many).
        block_size: tokens per block.
        local_blocks: window in blocks, the diagonal block included (>= 1).
        stride: in blocks; one for all KV heads, or one per KV head.
        head_offset, head_step: KV head h keeps the blocks k with
            (k + h * head_step + head_offset) % stride == 0. The default step,
            max(1, stride // heads), is DKernel's.
        homogeneous: all heads keep the same blocks (step 0).
        dense_heads: the last so many KV heads are dense.

    Raises:
        ValueError: names the argument, its value and what would do.
    """
    return ranges(
        heads=heads,
        kv_heads=kv_heads,
        block_size=block_size,
        bands=[(local_blocks, 1), (None, stride)],
        head_offset=head_offset,
        head_step=head_step,
        homogeneous=homogeneous,
        dense_heads=dense_heads,
    )


def ranges(
    *,
    heads: int,
    kv_heads: int | None = None,
    block_size: int = 64,
    bands: Sequence[tuple[int | None, int | Sequence[int]]],
    head_offset: int = 0,
    head_step: int | None = None,
    homogeneous: bool = False,
    dense_heads: int = 0,
) -> LayerPattern:
    """Context ranges: `bands` of (reach in blocks, stride in blocks), from near to far.

    The first stride is 1 (a query always sees its own block), strides grow and each divides the
    next; a reach of None lasts forever. A stride may be a list, one per KV head. The head shift
    counts in the widest stride. Other arguments as in `local_stride`.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    for name, value, least in (
        ("heads", heads, 1),
        ("kv_heads", kv_heads, 1),
        ("dense_heads", dense_heads, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if dense_heads > kv_heads:
        raise ValueError(f"dense_heads={dense_heads}: there are only {kv_heads} KV heads")
    if head_step is not None and head_step < 0:
        raise ValueError(f"head_step={head_step}: must be at least 0")
    per_head = []
    for reach, stride in bands:
        strides = [stride] * kv_heads if isinstance(stride, int) else list(stride)
        if len(strides) != kv_heads:
            raise ValueError(
                f"stride={strides}: {len(strides)} strides given for {kv_heads} KV heads; "
                "give one number, or one per KV head"
            )
        per_head.append([Band(FOREVER if reach is None else reach, s) for s in strides])
    rules = []
    for head in range(kv_heads - dense_heads):
        own = _checked_bands([band[head] for band in per_head])
        widest = own[-1].stride
        step = max(1, widest // heads) if head_step is None else head_step
        shift = (head_offset + (0 if homogeneous else head * step)) % widest
        rules.append(HeadRule(own, shift))
    rules += [HeadRule((Band(FOREVER, 1),))] * dense_heads
    return LayerPattern(heads, block_size, tuple(rules))


def _checked_bands(bands: list[Band]) -> tuple[Band, ...]:
    """The bands of one head, checked; neighbours of equal stride become the wider one."""
    if not bands:
        raise ValueError("ranges=[]: give at least one band")
    merged: list[Band] = []
    for reach, stride in bands:
        if stride < 1:
            raise ValueError(f"stride={stride}: must be at least 1 block")
        if reach < 1:
            raise ValueError(
                f"reach={reach}: a window reaches at least 1 block, the diagonal one "
                "(local_blocks >= 1)"
            )
        if merged and reach <= merged[-1].reach:
            raise ValueError(
                f"ranges: reach {reach} after reach {merged[-1].reach}: "
                "each band must reach further than the one before it"
            )
        if not merged and stride != 1:
            raise ValueError(
                f"ranges: the first band has stride {stride}: it must be 1, "
                "so that every query sees its own block"
            )
        if merged and stride % merged[-1].stride:
            raise ValueError(
                f"ranges: stride {stride} after stride {merged[-1].stride}: "
                "each stride must be a multiple of the one before it"
            )
        if merged and stride == merged[-1].stride:
            merged.pop()
        merged.append(Band(reach, stride))
    return tuple(merged)
