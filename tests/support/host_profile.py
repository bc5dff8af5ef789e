"""Where the host's time goes on its way to a launch: `host_profile.py hopper` or `triton`.

On the stub driver of host_path.py, with Triton's own launcher.
"""

import cProfile
import pstats
import statistics
import sys
import time

import torch
from host_path import stub_gpu

from s2_kernels import local_stride, s2_attention


def profile(backend: str, heads: int = 32, n: int = 1024) -> None:
    """Microseconds of the host per call, and the functions that take them."""
    torch.set_num_threads(1)
    pattern = local_stride(heads=heads, local_blocks=16, stride=heads)
    with stub_gpu():
        q, k, v = (torch.randn(1, n, heads, 128).bfloat16().requires_grad_() for _ in "qkv")
        dout = torch.randn_like(q)
        times = dict(forward=[], backward=[])
        profiler = cProfile.Profile()
        for i in range(1000):
            if i == 500:
                profiler.enable()
            began = time.perf_counter()
            out = s2_attention(q, k, v, pattern, backend=backend)
            between = time.perf_counter()
            torch.autograd.grad(out, (q, k, v), dout)
            if 10 < i < 500:
                times["forward"].append(between - began)
                times["backward"].append(time.perf_counter() - between)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    for name, seconds in times.items():
        print(f"{backend} {name}: {statistics.median(seconds) * 1e6:.0f} us")


if __name__ == "__main__":
    profile(sys.argv[1])
