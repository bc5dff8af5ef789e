"""Compiles the kernels that a server's requests need before the first request comes.

A kernel takes seconds to compile, and which one a step takes depends on how many sequences decode,
how many new tokens a sequence has, and where these stand. Here the launchers are called with
stand-ins for tensors (recording.py), for every batch and every kind of chunk that can occur: they
say which kernels they launch. Nothing runs, and a GPU's memory is taken by the kernels alone.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton

from s2_kernels.decode import launch_decode
from s2_kernels.decode_write import launch_write
from s2_kernels.ops import Problem, launch_attention
from s2_kernels.pattern import LayerPattern
from s2_kernels.prefill import kinds_of_chunks, takes_prefill
from s2_kernels.recording import Noted, Operand, Recorder

MOST_THREADS = 8
"""Compilers that run at a time; each takes a few hundred MiB of the host's memory."""


@dataclass(frozen=True)
class Requests:
    """What a server asks of pages that one launch reads: `write_pages`, `paged_attention`, and
    `paged_prefill` where `takes_prefill` says so.

    Attributes:
        pattern: of the heads of these pages.
        head_size: of keys and values; dtype, device: of all tensors.
        sequences: that decode together, at most.
        new_tokens: of a sequence in one step, at most. Sequences with more than one have a launch
            of their own.
        longest: tokens of a sequence, at most.
    """

    pattern: LayerPattern
    head_size: int
    dtype: torch.dtype
    device: torch.device
    sequences: int
    new_tokens: int
    longest: int


def compile_ahead(requests: Iterable[Requests]) -> int:
    """Compiles every kernel that such requests launch, several at a time, and loads them.

    Kernels that were compiled before, in this process or by Triton's cache on disk, cost little.

    Returns:
        How many kernels there are.
    """
    wanted = {}
    for one in set(requests):
        for noted in launches_of(one):
            wanted.setdefault(_kind(noted), noted)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool):
        for noted in wanted.values():
            _compile(noted)
    kernels = {id(kernel): kernel for kernel in map(_compile, wanted.values())}
    for kernel in kernels.values():
        _ = kernel.run  # loads it onto the device
    return len(kernels)


def launches_of(requests: Requests) -> Iterator[Noted]:
    """A launch for each batch of decoding sequences, each short chunk, each kind of long chunk."""
    for sequences in range(1, requests.sequences + 1):
        yield from _decoding(requests, sequences, 1)
    size = requests.pattern.block_size
    for new in range(2, requests.new_tokens + 1):
        if takes_prefill(new, size):
            yield from _chunks(requests, new)
            break
        yield from _decoding(requests, 1, new)


def _decoding(requests: Requests, b: int, s: int) -> list[Noted]:
    """Of s new tokens of each of b sequences: written, and attended from."""
    pattern, d = requests.pattern, requests.head_size
    recorder, new = _stand_ins(requests)
    pages = [new(1024, pattern.block_size, d) for _ in range(2)]
    blocks = -(-requests.longest // pattern.block_size)
    table, lengths = (
        new(*shape, dtype=torch.int32) for shape in ((b, pattern.kv_heads, blocks), (b,))
    )
    k, v = (new(b, s, pattern.kv_heads, d) for _ in range(2))
    launch_write(k, v, *pages, table, lengths, pattern, alive_only=False)
    if not takes_prefill(s, pattern.block_size):
        launch_decode(new(b, s, pattern.heads, d), *pages, table, lengths, pattern, 1.0)
    return recorder.launches


def _chunks(requests: Requests, fewest: int) -> Iterator[Noted]:
    """Of long chunks: what attends, for every kind of keys that their sequences' lengths leave."""
    yield from _decoding(requests, 1, fewest)
    d = requests.head_size
    row_bytes = 2 * d * requests.dtype.itemsize
    sizes = (fewest, requests.new_tokens, requests.longest)
    for kind in kinds_of_chunks(requests.pattern, row_bytes, *sizes):
        recorder, new = _stand_ins(requests)
        q, into = (new(1, fewest, kind.pattern.heads, d) for _ in range(2))
        k, v = (new(1, kind.rows, kind.pattern.kv_heads, d) for _ in range(2))
        place = dict(zip(("near_start", "near_row"), kind.near or (0, 0), strict=True))
        problem = Problem(kind.pattern.key, 1.0, q_offset=kind.length - fewest, **place)
        launch_attention(q, k, v, None, None, into, problem=problem)
        yield from recorder.launches


def _stand_ins(requests: Requests) -> tuple[Recorder, Callable[..., Operand]]:
    recorder = Recorder((), requests.device)
    like = recorder.allocate((1,), (1,), requests.dtype)

    def new(*shape: int, dtype: torch.dtype | None = None) -> Operand:
        return like.new_empty(shape, dtype=dtype)

    return recorder, new


def _kind(noted: Noted) -> tuple:
    """Launches of one kind have one kernel; not the other way round."""
    constants = tuple(sorted((name, str(x)) for name, x in noted.constants.items()))
    return noted.kernel, constants, tuple(map(_kind_of, noted.args))


def _kind_of(x) -> object:
    """What Triton compiles for: types, layouts, and of whole numbers 1 and multiples of 16."""
    if isinstance(x, tuple | list):
        return tuple(map(_kind_of, x))
    if isinstance(x, int):
        return x == 1, x % 16 == 0, abs(x) >> 31 == 0
    if hasattr(x, "block_shape"):
        return x.base.dtype, tuple(x.block_shape)
    return getattr(x, "dtype", type(x))


def _compile(noted: Noted):
    """The kernel of a launch, compiled or being compiled."""
    return noted.kernel.run(*noted.args, grid=noted.grid, warmup=True, **noted.constants)
