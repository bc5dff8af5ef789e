"""Reads a GGUF file: its metadata, and its tensors in float32.

The format is little-endian: a head, key-value pairs, descriptions of the tensors, and their data.
Of the ways to pack weights it knows those that SmolLM2's file has: F32, F16, Q4_1 and Q8_0.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy import ndarray

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
STRING, ARRAY = 8, 9
BLOCK = 32
"""Weights that share a scale."""


@dataclass(frozen=True)
class Packing:
    """How a tensor type stores weights."""

    name: str
    weights: int
    """In a block of `size` bytes."""
    size: int
    unpack: Callable[[ndarray], ndarray]
    """uint8 [blocks, size] -> float32 [blocks, weights]."""


def _q4_1(blocks: ndarray) -> ndarray:
    """A scale and a minimum in fp16, then 4 bits a weight: the first half of them low."""
    scale, least = blocks[:, :4].copy().view(numpy.float16).astype(numpy.float32).T[:, :, None]
    nibbles = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * scale + least


def _q8_0(blocks: ndarray) -> ndarray:
    """A scale in fp16, then 8 bits a weight with a sign."""
    scale = blocks[:, :2].copy().view(numpy.float16).astype(numpy.float32)
    return blocks[:, 2:].copy().view(numpy.int8) * scale


PACKINGS = {
    0: Packing("F32", 1, 4, lambda blocks: blocks.copy().view(numpy.float32)),
    1: Packing("F16", 1, 2, lambda blocks: blocks.copy().view(numpy.float16).astype("float32")),
    3: Packing("Q4_1", BLOCK, 20, _q4_1),
    8: Packing("Q8_0", BLOCK, 34, _q8_0),
}


class GGUF:
    """A file's `fields` (metadata by name) and `shapes` (of its tensors, as torch has them).

    Raises:
        ValueError: not a GGUF file of version 2 or 3, or cut short.
    """

    def __init__(self, path: str | Path):
        self.path, self._bytes, self._at = Path(path), numpy.memmap(path, numpy.uint8, "r"), 0
        try:
            self._read_head()
        except struct.error:
            raise ValueError(f"{path}: the file is cut short") from None

    def _read_head(self) -> None:
        magic = self._bytes[:4].tobytes()
        self._at = 4
        version, tensors, pairs = self._take("I"), self._take("Q"), self._take("Q")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{self.path}: begins with {magic!r}, version {version}: no GGUF file")
        self.fields = {self._string(): self._value(self._take("I")) for _ in range(pairs)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for _ in range(tensors):
            name, dimensions = self._string(), self._take("I")
            sizes = [self._take("Q") for _ in range(dimensions)]
            self.shapes[name] = tuple(reversed(sizes))
            self._places[name] = self._take("I"), self._take("Q")
        step = self.fields.get("general.alignment", 32)
        self._data = -(-self._at // step) * step

    def _take(self, kind: str):
        size = struct.calcsize(kind)
        self._at += size
        return struct.unpack("<" + kind, self._bytes[self._at - size : self._at].tobytes())[0]

    def _string(self) -> str:
        size = self._take("Q")
        self._at += size
        return self._bytes[self._at - size : self._at].tobytes().decode()

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(SCALARS[kind])
        of, count = self._take("I"), self._take("Q")
        return [self._value(of) for _ in range(count)]

    def tensor(self, name: str) -> ndarray:
        """float32, in torch's order of dimensions. Raises ValueError for another packing."""
        kind, offset = self._places[name]
        if kind not in PACKINGS:
            known = ", ".join(packing.name for packing in PACKINGS.values())
            raise ValueError(f"{self.path}: {name} is packed as type {kind}; known are {known}")
        packing, shape = PACKINGS[kind], self.shapes[name]
        blocks = int(numpy.prod(shape)) // packing.weights
        begin = self._data + offset
        packed = numpy.asarray(self._bytes[begin : begin + blocks * packing.size])
        if len(packed) < blocks * packing.size:
            raise ValueError(f"{self.path}: {name} is cut short")
        return packing.unpack(packed.reshape(blocks, packing.size)).reshape(shape)
