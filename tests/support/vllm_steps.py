"""Steps of vLLM's on the stub driver: which kernels are compiled before requests come, and after.

Layers, caches and page tables as vLLM has them, without an engine. What is asked is what kernels
are compiled for, and that goes by shapes, strides, and addresses (tests/support/host_path.py).
"""

import random
from types import SimpleNamespace

import host_path
import torch

import s2_vllm.backend as backend
from s2_kernels import decode, dense, local_stride, ops, paged, ranges
from s2_kernels.hopper import primitives
from s2_kernels.plans import Plans
from s2_vllm import warmup

HEADS = dict(heads=8, kv_heads=4, block_size=64)
LAYERS = {
    "stride": local_stride(**HEADS, local_blocks=3, stride=4),
    "dense": dense(**HEADS),
    "mixed": ranges(**HEADS, bands=[(2, 1), (6, 2), (20, 4)], dense_heads=1),
}
D, BATCHES, CHUNK, LONGEST, PAGES = 64, 40, 8192, 20_000, 64


def compiled(job: dict) -> dict:
    """Names of kernels compiled ahead, and during the steps that came then.

    Args:
        job: dtype; ahead: False leaves the warm-up out.
    """
    decode.multiprocessors = lambda device: 132  # an H100's
    primitives.concurrent_programs = lambda device, num_warps: 132
    dtype = getattr(torch, job["dtype"])
    # As a new process has it: nothing is compiled, planned, or ready.
    host_path.DEVICE += 1
    ops._PLANS, paged._PLANS = Plans(), Plans()
    warmup._READY.clear()
    with host_path.stub_gpu() as gpu:
        layers = [Layer(name, pattern, dtype) for name, pattern in LAYERS.items()]
        if job["ahead"]:
            warmup.get_ready(layers)
        ahead, draw = len(gpu.compiled), random.Random(5)
        for step in steps(draw):
            for layer in layers:
                layer.step(step, draw)
    return {"ahead": gpu.compiled[:ahead], "after": gpu.compiled[ahead:]}


def steps(draw: random.Random) -> list[list[tuple[int, int]]]:
    """(new tokens, tokens in all) of each request of a step, those that decode first."""
    made = [[(1, draw.randint(1, LONGEST)) for _ in range(n)] for n in range(1, BATCHES + 1)]
    lengths = [2, 3, 5, 9, 31, 33, 127, 255, 256, 257, 511, 1000, 4096, 4099, CHUNK]
    for new in lengths:
        for before in (0, 1, 63, 64, 130, 1000 + new, LONGEST - new):
            decoding = [(1, draw.randint(1, LONGEST)) for _ in range(draw.randint(0, 5))]
            made.append([*decoding, (new, before + new), (draw.randint(2, 300), 300)])
    return made


class Layer:
    """A layer with its cache; heads of the dense one lie in tensors of their own."""

    head_size, sequences, new_tokens, longest, scratch = D, BATCHES, CHUNK, LONGEST, 1

    def __init__(self, name: str, pattern, dtype):
        self.pattern, self.dtype = pattern, dtype
        apart = name == "dense"
        ends = range(1, 5) if apart else (4,)
        self.pools, first = [], 0
        for end in ends:
            of = backend.LayerPattern(2 * (end - first), 64, pattern.rules[first:end])
            cache = torch.zeros(PAGES, 2, 64, D, dtype=dtype)
            names = tuple(f"{name}.{head}" for head in range(first, end))
            self.pools.append(backend.Pool(first, end, of, names, *cache.unbind(1)))
            first = end
        self.impl = backend.S2Impl(8, D, D**-0.5, 4)

    def step(self, requests: list[tuple[int, int]], draw: random.Random) -> None:
        tokens = sum(new for new, _ in requests)
        qkv = torch.zeros(tokens, 16 * D, dtype=self.dtype)
        q, k, v = (x.unflatten(1, (-1, D)) for x in qkv.split([8 * D, 4 * D, 4 * D], dim=1))
        starts = torch.tensor([0, *(new for new, _ in requests)]).cumsum(0)
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        table = torch.zeros(len(requests), -(-LONGEST // 64), dtype=torch.int32)
        own = backend.S2Metadata(table, lengths, starts, lengths, max(new for new, _ in requests))
        metadata = {name: own for pool in self.pools for name in pool.names}
        backend.get_forward_context = lambda: SimpleNamespace(attn_metadata=metadata)
        self.impl.forward(self, q, k, v, None, own, torch.empty(tokens, 8, D, dtype=self.dtype))
