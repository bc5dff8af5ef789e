"""Adds up a torch profiler trace's GPU kernels by kind: where a training step's time goes.

python3 scripts/profile_kinds.py TRACE.pt.trace.json
"""

import gzip
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

KINDS = (  # the first that matches a kernel's name
    ("S2 attention, forward", r"^s2_(hopper_)?(sparse_)?forward"),
    ("S2 attention, backward", r"^s2_"),
    ("dense attention, forward", r"(flash|fmha|sdpa|attn|attention).*(fwd|fprop|forward)"),
    ("dense attention, backward", r"(flash|fmha|sdpa|attn|attention).*(bwd|bprop|dgrad|backward)"),
    ("communication (NCCL)", r"nccl"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitK"),
    ("optimizer", r"multi_tensor|adam|l2norm"),
    ("rotary embedding", r"rope|rotary"),
    ("normalisation", r"norm"),
    ("copies", r"copy|memcpy|memset|transpose|cat"),
    ("element-wise and other", r""),
)


def open_trace(path: Path) -> dict:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return json.load(file)


def add_up(path: Path) -> dict:
    """ms by kind, the most expensive kernels, and the step's length and idle time.

    Kernels of different streams overlap, so kinds may add up to more than the step;
    `exposed` is communication during which no other kernel ran.
    """
    events = [
        e
        for e in open_trace(Path(path))["traceEvents"]
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    kinds, kernels, spans = defaultdict(float), defaultdict(float), {True: [], False: []}
    for event in events:
        name = event["name"]
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        kinds[kind] += event["dur"] / 1e3
        kernels[name[:90]] += event["dur"] / 1e3
        spans["nccl" in name.lower()].append((event["ts"], event["ts"] + event["dur"]))
    both, compute = (covered(x) / 1e3 for x in (spans[True] + spans[False], spans[False]))
    begin = min(e["ts"] for e in events)
    length = (max(e["ts"] + e["dur"] for e in events) - begin) / 1e3
    heaviest = sorted(kernels.items(), key=lambda item: -item[1])[:12]
    return dict(
        step=length,
        idle=length - both,
        exposed=both - compute,
        kinds=dict(kinds),
        heaviest=heaviest,
    )


def covered(spans) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def table(found: dict) -> list[str]:
    """Markdown lines."""
    lines = ["| kind | ms | share |", "| --- | --- | --- |"]
    for kind, ms in sorted(found["kinds"].items(), key=lambda item: -item[1]):
        lines.append(f"| {kind} | {ms:.1f} | {ms / found['step']:.1%} |")
    lines.append(
        f"| no kernel running | {found['idle']:.1f} | {found['idle'] / found['step']:.1%} |"
    )
    lines.append(f"| the step, first kernel to last | {found['step']:.1f} | |")
    lines += [
        "",
        f"Communication with nothing else running: {found['exposed']:.1f} ms. Heaviest:",
        "",
    ]
    lines += [f"- {ms:.1f} ms `{name}`" for name, ms in found["heaviest"]]
    return lines


if __name__ == "__main__":
    print("\n".join(table(add_up(Path(sys.argv[1])))))
