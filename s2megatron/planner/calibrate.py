"""`s2megatron calibrate`: measures a machine's constants and writes them as YAML.

Alone it measures the GPU: matrix products, memory, attention. Under torchrun it measures the
network too: collectives within a node, and between nodes where there are several.

    s2megatron calibrate --out my.yaml
    torchrun --nproc-per-node 8 -m s2megatron.cli calibrate --out my.yaml

What cannot be measured here is taken from `--base`, and `source` says what that was.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from s2_kernels import dense, local_stride, s2_attention
from s2megatron.errors import ConfigError
from s2megatron.machine import Machine, load_machine

SECONDS = 1.5
"""Of one thing after another, so that the clock is what it is under load."""


def calibrate(out: str, *, base: str, small: bool) -> None:
    """Measures, and writes `out` on rank 0.

    Args:
        base: a shipped machine or a file, for what is not measured.
        small: tiny sizes; the figures mean nothing but the code has run.

    Raises:
        ConfigError: there is no GPU (without `small`), or `base` is unknown.
    """
    known = load_machine(base)
    cuda = torch.cuda.is_available()
    if not cuda and not small:
        raise ConfigError(
            "there is no GPU here, and a CPU would take hours over these sizes; run it on a "
            "machine with one, or add --small to try it out (its figures mean nothing)"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        measured = _measure_device(known, device, small=small)
        if ranks > 1:
            measured |= _measure_network(known, device, small=small)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        taken = sorted(set(Machine.model_fields) - set(measured) - {"source"})
        measured["source"] = _source(small, ranks, base, taken)
        machine = Machine.model_validate(known.model_dump() | measured)
        write(machine, out)
        print(f"{out}: {machine.gpu}; use it with: s2megatron plan ... --gpu {out}")


def write(machine: Machine, out: str) -> None:
    """Beside, then renamed: never half a file. Checked by reading it."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    text = yaml.safe_dump(machine.model_dump(), sort_keys=False, width=100)
    Machine.model_validate(yaml.safe_load(text))
    beside.write_text(text)
    beside.rename(path)


def _source(small: bool, ranks: int, base: str, taken: list[str]) -> str:
    today = datetime.date.today().isoformat()
    tiny = " with --small (tiny sizes: no use for planning)" if small else ""
    return (
        f"measured by `s2megatron calibrate`{tiny} on {today}, {ranks} rank(s), torch "
        f"{torch.__version__}, host {platform.node()}; from {base}: {', '.join(taken)}"
    )


def _measure_device(known: Machine, device: torch.device, *, small: bool) -> dict:
    cuda = device.type == "cuda"
    edges = (64, 128) if small else (1024, 2048, 4096, 8192, 16384)
    lengths = (256, 512) if small else (8192, 32768, 131072)
    copy = 2**20 if small else 2**32
    dtype = torch.bfloat16 if cuda else torch.float32
    found: dict = {"sustained": 1.0}  # every rate below is measured under load already
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        found["gpu"] = f"CPU ({platform.processor() or platform.machine()})"
    found["matmul_tflops"] = {}
    for edge in edges:
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        seconds = timed(lambda a=a, b=b: a @ b, device, small=small)
        found["matmul_tflops"][edge] = _round(2 * edge**3 / seconds / 1e12)
        _say(f"matmul {edge}: {found['matmul_tflops'][edge]} TFLOP/s")
    found["memory_tb_s"] = _copy(copy, device, small=small)
    _say(f"memory: {found['memory_tb_s']} TB/s")
    for name in ("dense_attention", "s2_attention"):
        rates: dict = {"forward": {}, "backward": {}}
        for length in lengths:
            forward, backward = _attention(name, length, device, dtype, small=small)
            rates["forward"][length], rates["backward"][length] = forward, backward
            _say(f"{name} {length}: forward {forward}, backward {backward} TFLOP/s")
        found[name] = rates
    return found


def _copy(size: int, device: torch.device, *, small: bool) -> float:
    """TB/s, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _round(2 * size / timed(lambda: target.copy_(source), device, small=small) / 1e12)


def _attention(name: str, length: int, device, dtype, *, small: bool) -> tuple[float, float]:
    """Useful TFLOP/s, head size 128, window 1,024 tokens, stride = heads."""
    heads, block = (4, 16) if small else (16, 64)
    sizes = {"heads": heads, "kv_heads": heads, "block_size": block}
    sparse = name == "s2_attention"
    pattern = local_stride(**sizes, local_blocks=16, stride=heads) if sparse else dense(**sizes)
    shape = (1, length, heads, 128)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend():
        if sparse:
            return s2_attention(q, k, v, pattern)
        wanted = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION] if q.is_cuda else [
            torch.nn.attention.SDPBackend.MATH]  # fmt: skip
        with torch.nn.attention.sdpa_kernel(wanted):
            q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, is_causal=True)
        return out.transpose(1, 2)

    out = attend()
    grad = torch.randn_like(out)
    with torch.no_grad():
        forward = timed(attend, device, small=small)
    backward = timed(
        lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device, small=small
    )
    flops = 4 * pattern.kept_pairs(length) * 128
    return _round(flops / forward / 1e12), _round(2.5 * flops / backward / 1e12)


def _measure_network(known: Machine, device: torch.device, *, small: bool) -> dict:
    """Ring bandwidth and latency of an all-gather over one node, and over all."""
    ranks, per_node = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    found: dict = {"gpus_per_node": per_node}
    node = dist.get_rank() // per_node
    groups = [dist.new_group(range(n * per_node, (n + 1) * per_node))
              for n in range(ranks // per_node)]  # fmt: skip
    if per_node > 1:
        found["node"] = _gathers(groups[node], device, small=small)
        _say(f"within a node: {found['node']}")
    if ranks > per_node:
        whole = _gathers(dist.group.WORLD, device, small=small)
        # All ranks of a node share the ring's way out: a GPU's part is one of per_node.
        found["cluster"] = whole | {"gb_s": _round(whole["gb_s"] / per_node)}
        _say(f"between nodes, per GPU: {found['cluster']}")
    return found


def _gathers(group, device: torch.device, *, small: bool) -> dict:
    ranks = dist.get_world_size(group)

    def once(size: int) -> float:
        part = torch.ones(max(1, size // ranks), dtype=torch.uint8, device=device)
        parts = torch.empty(part.numel() * ranks, dtype=torch.uint8, device=device)

        def gather():
            dist.all_gather_into_tensor(parts, part, group=group)

        return timed(gather, device, group, small=small)

    size = 2**16 if small else 2**28
    latency = once(1024)
    seconds = max(once(size) - latency, 1e-9)
    doublings = (ranks - 1).bit_length()
    return {
        "gb_s": _round(size * (ranks - 1) / ranks / seconds / 1e9),
        "latency_us": _round(latency * 1e6 / doublings),
    }


def timed(call: Callable[[], object], device, group=None, *, small: bool = False) -> float:
    """Mean seconds of a call, after warm-up, over SECONDS of it; the same count on all ranks."""

    def run(count: int) -> float:
        if group is not None:
            dist.barrier(group)
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        return (time.perf_counter() - began) / count

    run(1)
    estimate = run(1 if small else 3)
    count = max(2, int((0.02 if small else SECONDS) / max(estimate, 1e-6)))
    count = min(count, 3 if small else 5000)
    if group is not None:  # ranks must make the same number of collective calls
        agreed = torch.tensor([count], device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
        count = int(agreed.item())
    return run(count)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _round(number: float) -> float:
    return float(f"{number:.4g}")


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
