"""Times the paged decode kernel on one GPU against its bytes and against dense decoding.

    python3 scripts/bench/decode_kernel.py [--out FILE.json] [--tune | --split | --configs A,B]

Prints whether the kernel is right (float64 reference, poisoned pages, under a CUDA graph), the
measured copy bandwidth, and a row per case: the time of one call inside a CUDA graph that walks
several pools (so that no page is still in the L2 cache), the live bytes, and the time these bytes
take at the copy bandwidth. Dense is torch's SDPA over contiguous keys, and this kernel with a dense
pattern; the page says which one was the fastest.

"hopper" among the configurations is the kernel of s2_kernels/hopper/decode.py, which serves takes
where it can; the others, by name, are of s2_kernels/decode.py.

Calls follow each other at once, so that a call may start while the one before it merges. "After
write" is a call behind `s2_write_kernel`, as in a layer, less the write alone. --split tells where
a call's time goes, kernel by kernel, with nothing overlapped. --configs times configurations by
name, stride 16; NAME@256 is one that shares the work among 256 programs.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from s2_kernels import decode, dense, hopper, local_stride, ranges
from s2_kernels.cache import alive_blocks, alive_pages
from s2_kernels.decode import DecodeConfig, decode_config, launch_decode
from s2_kernels.decode_write import launch_write
from s2_kernels.paged import paged_reference
from s2megatron import provenance

HOPPER = "hopper"
CONFIGS = [
    "n64w4s3x2c4a8one",
    "n64w4s4x2c4", "n64w4s4x2c4one", "n64w4s4x2c4a8", "n64w4s4x2c4a8one", "n64w4s4x2c12",
    "n64w4s3x3c4r168", "n64w4s4x4c4", "n32w4s4x4c8", "n64w4s4x2c4nopdl",
]  # fmt: skip
CASES = ((16, 8), (16, 1), (1, 16), (16, 16), (8, 8), (16, 64), (1, 1), (8, 1))
"""(stride, batch); stride 1 is dense."""
TUNED = {(16, 1): 12, (16, 16): 12, (16, 8): 9, (8, 1): 12, (16, 64): 7, (16, 20): 7}
"""The same, and how many configurations are tried."""


def parse_config(text: str) -> DecodeConfig | None:
    """Reads what `str` writes: n64w4s4x2c4, then r168, a8, one or nopdl where it differs.

    None for the kernel for Hopper.
    """
    if text == HOPPER:
        return None
    found = re.fullmatch(
        r"n(\d+)w(\d+)s(\d+)x(\d+)c(\d+)(?:r(\d+))?(?:a(\d+))?(one)?(nopdl)?", text
    )
    sizes, (start, maxnreg, ahead) = found.groups()[:4], found.groups()[4:7]
    return DecodeConfig(
        *map(int, sizes), pdl=not found[9], start=int(start), maxnreg=int(maxnreg or 0),
        ahead=int(ahead or 1), one_launch=bool(found[8]),
    )  # fmt: skip


def fill(pattern, lengths, d, dtype, poison=False):
    """A pool in which every live block has a page of its own, in random order; the page table."""
    kv_heads, size = pattern.kv_heads, pattern.block_size
    blocks = -(-max(lengths) // size)
    table = torch.zeros(len(lengths), kv_heads, blocks, dtype=torch.int32)
    listed = {}
    for i, n in enumerate(lengths):
        for head, rule in enumerate(pattern.rules):
            # Alive for the token that is the last one now.
            key = rule, n
            if key not in listed:
                listed[key] = torch.tensor(alive_blocks(rule, n - 1, size) or [0])
                last = (n - 1) // size
                if listed[key][-1] != last:
                    listed[key] = torch.cat([listed[key], torch.tensor([last])])
            table[i, head, listed[key]] = 1
    live = table.flatten().nonzero()[:, 0]
    pages = torch.randperm(len(live) + 1)[: len(live)].int()
    table.view(-1)[live] = pages
    shape = (len(live) + 1, size, d)
    k, v = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    if poison:
        free = set(range(len(live) + 1)) - set(pages.tolist())
        for page in free:
            k[page], v[page] = math.nan, math.nan
    return k, v, table.cuda(), len(live) * size * d * 2 * dtype.itemsize


def check(config: DecodeConfig | None = None, most: int = 99) -> list[str]:
    """The largest error of a few cases against float64, and what must not change any bit.

    Args:
        config: default: what each case takes by itself, a kernel for Hopper where that goes.
        most: of the cases.
    """
    lines = []
    launch_decode = functools.partial(decode.launch_decode, config=config)
    bf16, fp16 = torch.bfloat16, torch.float16
    s2 = local_stride(heads=32, kv_heads=8, local_blocks=16, stride=16)
    bands = ranges(heads=8, block_size=32, bands=[(4, 1), (16, 4), (None, 8)])
    partly = local_stride(heads=12, kv_heads=4, local_blocks=2, stride=4, dense_heads=1)
    wide = local_stride(heads=8, kv_heads=8, block_size=128, local_blocks=2, stride=4)
    cases = [
        (s2, (9000, 64, 65, 1), 128, bf16, 1),
        (s2, (9000, 9000, 8900), 128, bf16, 1),
        (s2, (9000, 500), 128, bf16, 3),
        (s2, (3000, 70), 128, fp16, 200),
        (bands, (5000, 33), 64, fp16, 1),
        (dense(heads=16, kv_heads=4), (700, 3000), 256, bf16, 1),
        (partly, (999,), 96, bf16, 1),
        (wide, (4097,), 128, bf16, 1),
    ]
    for pattern, lengths, d, dtype, s in cases[:most]:
        lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        # Every block has a page here: a chunk of queries needs what is dead by its end.
        every = dense(heads=pattern.heads, kv_heads=pattern.kv_heads,
                      block_size=pattern.block_size)  # fmt: skip
        k, v, table, _ = fill(every, lengths, d, dtype, poison=True)
        q = torch.randn(len(lengths), s, pattern.heads, d, device="cuda").to(dtype)
        scale = 1 / math.sqrt(d)
        out, lse = launch_decode(q, k, v, table, lens, pattern, scale)
        exact, exact_lse = paged_reference(
            q.double(), k.double(), v.double(), table, lens, pattern, scale
        )
        real = torch.isfinite(exact_lse)
        error = (out.double() - exact).abs().max().item()
        lse_error = (lse.double() - exact_lse)[real].abs().max().item()
        again, _ = launch_decode(q, k, v, table, lens, pattern, scale)
        rows, _ = decode.tile_of(s, pattern.heads // pattern.kv_heads)
        usual = config or decode_config(d, d, rows, pattern.block_size, dtype, q.device)
        both = [
            launch_decode(q, k, v, table, lens, pattern, scale,
                          config=dataclasses.replace(usual, one_launch=one))
            for one in (False, True)
        ]  # fmt: skip
        one = all(map(torch.equal, *both))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = launch_decode(q, k, v, table, lens, pattern, scale)
        graph.replay()
        torch.cuda.synchronize()
        same = torch.equal(out, again) and torch.equal(out, captured)
        verdict = "ok" if error < 0.02 and lse_error < 1e-3 and same and one else "WRONG"
        lines.append(
            f"{verdict} {config or kernel_of(q, k, v, pattern)} d{d} B{pattern.block_size} "
            f"{dtype} s{s} lengths {lengths}: error {error:.1e}, lse {lse_error:.1e}, "
            f"same bits again and captured: {same}, merged by one launch or two: {one}"
        )
    return lines


def kernel_of(q, k, v, pattern) -> str:
    return HOPPER if hopper.takes_decode(q, k, v, pattern) else "portable"


def graph_time(calls, rounds=7) -> float:
    """Microseconds of one of `calls`, which a CUDA graph runs one after the other, 8 or more.

    To start a graph takes microseconds, too: with few calls in it they would count.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    repeats = -(-8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (len(calls) * repeats))
    return sorted(times)[rounds // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest of three ways to copy 2 GiB."""
    x = torch.empty(1 << 29, dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    ways = dict(
        copy=lambda: y.copy_(x),
        negate=lambda: torch.neg(x, out=y),
        triton=lambda: copy_kernel[(x.numel() // 8192,)](x, y, N=8192, num_warps=8),
    )
    speeds = {name: 2 * x.nbytes / graph_time([way]) * 1e6 for name, way in ways.items()}
    print({name: f"{speed / 1e12:.3f} TB/s" for name, speed in speeds.items()})
    return max(speeds.values())


@triton.jit
def copy_kernel(p_from, p_to, N: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    tl.store(p_to + offsets, tl.load(p_from + offsets))


def calls_of(pattern, batch, tokens, d, dtype, config, pools, programs=None, after_write=False):
    lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, 1, pattern.heads, d, device="cuda").to(dtype)
    return [
        lambda k=k, v=v, t=t: launch_decode(
            q,
            k,
            v,
            t,
            lens,
            pattern,
            1 / math.sqrt(d),
            config=config,
            programs=programs,
            after_write=after_write,
        )
        for k, v, t, _ in pools
    ]


def make_pools(pattern, batch, tokens, d, dtype):
    first = fill(pattern, [tokens] * batch, d, dtype)
    count = max(1, min(12, int(4e8 / first[3])))
    return [first] + [fill(pattern, [tokens] * batch, d, dtype) for _ in range(count - 1)]


def dense_sdpa(batch, tokens, heads, kv_heads, d, dtype) -> dict[str, float]:
    """Microseconds of torch's SDPA, each of its kernels, for one query token a sequence."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(batch, heads, 1, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, d, device="cuda", dtype=dtype) for _ in range(2))
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def call(backend=backend):
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            found[backend.name] = graph_time([call], 5)
        except RuntimeError as error:  # this torch has no such kernel for the shape
            print(f"{backend.name}: {str(error).splitlines()[0][:90]}")
    return found


def pattern_of(stride: int):
    if stride == 1:
        return dense(heads=32, kv_heads=8)
    return local_stride(heads=32, kv_heads=8, local_blocks=16, stride=stride)


class Table:
    """Times cases one after the other and prints them, until the time is over."""

    def __init__(self, tokens: int, deadline: float):
        self.tokens, self.deadline, self.began = tokens, deadline, time.time()
        self.d, self.dtype = 128, torch.bfloat16
        self.bandwidth = copy_bandwidth()
        self.rows: list[dict] = []

    @property
    def late(self) -> bool:
        return time.time() - self.began > self.deadline

    def add(self, stride: int, batch: int, name: str, size: int, us: float) -> None:
        floor = size / self.bandwidth * 1e6
        self.rows.append(dict(stride=stride, batch=batch, config=name, us=us, bytes=size,
                              floor_us=floor, share=floor / us))  # fmt: skip
        print(f"V{stride} b{batch} {name}: {us:.1f} us, {size / 2**20:.1f} MiB, floor "
              f"{floor:.1f} us, {floor / us:.1%} of copy", flush=True)  # fmt: skip

    def time_case(self, stride: int, batch: int, configs: list[str]) -> None:
        """This kernel with each configuration; dense kernels of torch, too, where stride is 1."""
        pattern = pattern_of(stride)
        pools = make_pools(pattern, batch, self.tokens, self.d, self.dtype)
        size = pools[0][3]
        for name in configs:
            if self.late:
                return print("out of time", flush=True)
            name_of_config, _, programs = name.partition("@")
            config, programs = parse_config(name_of_config), int(programs or 0) or None
            try:
                calls = calls_of(
                    pattern, batch, self.tokens, self.d, self.dtype, config, pools, programs
                )
                self.add(stride, batch, name, size, graph_time(calls))
                calls = calls_of(
                    pattern, batch, self.tokens, self.d, self.dtype, config, pools, programs, True
                )
                if stride == 16:
                    self.time_after_write(batch, name, size, calls, pools)
            except (RuntimeError, triton.CompilationError, triton.OutOfResources) as error:
                print(f"{name}: {type(error).__name__} {str(error)[:90]}")
        if stride == 1:
            del pools, calls
            torch.cuda.empty_cache()
            for name, us in dense_sdpa(batch, self.tokens, 32, 8, self.d, self.dtype).items():
                self.add(stride, batch, name, size, us)

    def time_after_write(self, batch, name, size, calls, pools) -> None:
        pattern = pattern_of(16)
        lens = torch.full((batch,), self.tokens, dtype=torch.int32, device="cuda")
        new = torch.randn(batch, 1, 8, self.d, device="cuda").to(self.dtype)
        writes = [
            functools.partial(launch_write, new, new, *pool[:3], lens, pattern, alive_only=False)
            for pool in pools
        ]
        pairs = [x for pair in zip(writes, calls, strict=True) for x in pair]
        write, both = graph_time(writes), 2 * graph_time(pairs)
        self.add(16, batch, f"{name} after write ({write:.1f} us)", size, both - write)


def time_kernels(tokens: int, configs: list[str]) -> None:
    """Microseconds of each kernel by itself, as the profiler sees them, nothing overlapped."""
    from torch.profiler import ProfilerActivity, profile

    d, dtype = 128, torch.bfloat16
    for batch in (1, 8, 16, 64):
        pools = make_pools(pattern_of(16), batch, tokens, d, dtype)
        for name in configs:
            config = dataclasses.replace(parse_config(name), pdl=False)
            calls = calls_of(pattern_of(16), batch, tokens, d, dtype, config, pools)
            calls[0]()
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                for call in calls * 4:
                    call()
                torch.cuda.synchronize()
            times = [(e.key, e.self_device_time_total / e.count) for e in record.key_averages()
                     if e.key.startswith("s2_")]  # fmt: skip
            print(f"b{batch} {config}", *(f"{key}: {us:.1f} us" for key, us in times), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--tune", action="store_true", help="try every configuration")
    parser.add_argument("--configs", type=lambda names: names.split(","), help="by name")
    parser.add_argument("--batches", default="1,8,16,64", help="of --configs")
    parser.add_argument("--split", action="store_true", help="time each kernel by itself")
    parser.add_argument("--check-only", action="store_true", help="time nothing (memcheck)")
    parser.add_argument("--deadline", type=float, default=85, help="seconds, then stop")
    a = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    default = str(decode_config(128, 128, 16, 64, torch.bfloat16, torch.device("cuda")))
    if torch.cuda.get_device_capability()[0] == 9:
        default = HOPPER
    configs = [default, *(c for c in CONFIGS if c != default)] if a.tune else [default]
    configs = a.configs or configs
    lines = check(most=4 if a.configs else 99)
    for name in configs if a.configs else configs[1:]:
        if "@" not in name and name != HOPPER:
            lines += check(parse_config(name), 2)
    print("\n".join(lines), flush=True)
    if a.check_only:
        return
    if a.split:
        return time_kernels(a.tokens, ["n64w4s4x2c4", "n64w4s4x2c4one"])
    table = Table(a.tokens, a.deadline)
    print(f"copy: {table.bandwidth / 1e12:.3f} TB/s", flush=True)
    cases = [(16, int(batch)) for batch in a.batches.split(",")] if a.configs else CASES
    for stride, batch in TUNED if a.tune else cases:
        table.time_case(stride, batch, configs[: TUNED[stride, batch]] if a.tune else configs)
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__,
                  copy=table.bandwidth, check=lines, rows=table.rows,
                  alive=alive_pages(pattern_of(16), a.tokens),
                  **provenance.describe(ROOT, ("triton",)))  # fmt: skip
    if a.out:
        a.out.write_text(json.dumps(result, indent=1))
    print(f"{time.time() - table.began:.0f} s in all")


if __name__ == "__main__":
    main()
