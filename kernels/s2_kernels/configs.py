"""Tile sizes, warps and stages: one small table, chosen by measurement, nothing tuned at run time.

A configuration is looked up by compute capability, head size and dtype. Launchers take one
explicitly as well, which is how scripts/bench/tune_attention.py measures candidates.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

FUSED = dict(enable_fp_fusion=True)
"""Of every launch: a * b + c is rounded once. What Triton does unasked, up to 3.9."""


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut into tiles.

    Attributes:
        block_m: query rows of a tile. May span several blocks of the pattern, or be part of one.
        block_n: KV rows of a tile. More than a block means several blocks gathered in one tile
            (pointer loads only); the backward pass over KV blocks takes at most one block.
        num_warps, num_stages: of the compiled kernel.
        tma: load K and V (Q and dO in the backward pass over KV blocks) through TMA descriptors
            where the tensors' strides allow it; else, and where False, through pointers.
        maxnreg: cap on the registers of a thread, so that more programs fit on a multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = True
    maxnreg: int | None = None

    def __str__(self) -> str:
        cap = f"r{self.maxnreg}" if self.maxnreg else ""
        tile = f"{self.block_m}x{self.block_n}"
        return f"{tile}w{self.num_warps}s{self.num_stages}{'tma' if self.tma else 'ptr'}{cap}"

    @classmethod
    def parse(cls, text: str) -> "TileConfig":
        """Reads what `str` writes, e.g. 64x64w4s3tma or 128x64w8s2ptrr128."""
        found = re.fullmatch(r"(\d+)x(\d+)w(\d+)s(\d+)(tma|ptr)(?:r(\d+))?", text)
        if not found:
            raise ValueError(f"config {text!r}: must look like 64x64w4s3tma or 128x64w8s2ptrr128")
        m, n, warps, stages, load, cap = found.groups(default="0")
        return cls(
            block_m=int(m),
            block_n=int(n),
            num_warps=int(warps),
            num_stages=int(stages),
            tma=load == "tma",
            maxnreg=int(cap) or None,
        )

    def options(self) -> dict:
        """Launch options of the compiled kernel."""
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages, **FUSED)
        return options | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


# Per kind of kernel: (head size up to, configuration). 16-bit types on Hopper.
_HOPPER = dict(
    forward=(
        (128, TileConfig(64, 64, 4, 3)),
        (256, TileConfig(64, 64, 4, 2)),
    ),
    dq=(
        (128, TileConfig(64, 64, 4, 2)),
        (256, TileConfig(64, 64, 8, 1)),
    ),
    separate=(
        (128, TileConfig(64, 64, 4, 2)),
        (256, TileConfig(64, 64, 8, 1)),
    ),
    fused=(
        (64, TileConfig(64, 64, 4, 2)),
        (128, TileConfig(64, 64, 8, 2)),
        (256, TileConfig(64, 64, 8, 1)),
    ),
)
# Any other GPU: within 99 KiB of shared memory.
_PORTABLE = {
    kind: (
        (64, TileConfig(64, 64, 4, 2, tma=False)),
        (128, TileConfig(64, 32, 4, 2, tma=False)),
        (256, TileConfig(32, 32, 4, 1, tma=False)),
    )
    for kind in _HOPPER
}
_FLOAT32 = {
    kind: (
        (64, TileConfig(32, 32, 4, 1, tma=False)),
        (256, TileConfig(16, 16, 4, 1, tma=False)),
    )
    for kind in _HOPPER
}


def _look_up(kind: str, head_size: int, dtype: torch.dtype, capability: tuple[int, int]):
    tables = _HOPPER if capability[0] == 9 else _PORTABLE
    if dtype == torch.float32:
        tables = _FLOAT32
    return next(config for limit, config in tables[kind] if head_size <= limit)


def forward_config(head_size: int, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfig:
    """Tiles of the forward kernel for a head size, a dtype and a compute capability."""
    return _look_up("forward", head_size, dtype, capability)


def backward_config(
    kind: Literal["separate", "fused", "dq"],
    head_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> TileConfig:
    """Tiles of a backward kernel: over KV tiles (separate or fused with dq), or of dq alone."""
    return _look_up(kind, head_size, dtype, capability)


def fit(config: TileConfig, block_size: int, gather: bool) -> TileConfig:
    """The configuration with tiles that suit a block size.

    A TMA tile is at most one block; pointer loads may gather several small blocks where `gather`.
    """
    block_n = config.block_n
    if block_n > block_size and (config.tma or not gather):
        if gather and block_size < 64:
            return replace(config, tma=False)
        block_n = block_size
    return replace(config, block_n=block_n)
