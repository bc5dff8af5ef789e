"""Adds up a torch profiler trace's GPU kernels by kind: where a training step's time goes.

python3 scripts/bench/profile_kinds.py TRACE.pt.trace.json
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

from s2megatron.planner.measured import exposed_share, read_trace, union

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


def add_up(events: list[dict]) -> dict:
    """ms by kind, the most expensive kernels, and the step's length and idle time.

    Kernels of different streams overlap, so kinds may add up to more than the step.

    Args:
        events: `traceEvents` of a torch.profiler trace.
    """
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_gpu:
        raise ValueError("no GPU kernels in this trace: it was made without a GPU")
    kinds, kernels, spans = defaultdict(float), defaultdict(float), []
    for event in on_gpu:
        name, ms = event["name"], event["dur"] / 1e3
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        kinds[kind] += ms
        kernels[name[:90]] += ms
        spans.append((event["ts"] / 1e3, event["ts"] / 1e3 + ms))
    busy = union(spans)
    step = busy[-1][1] - busy[0][0]
    return dict(
        step=step,
        idle=step - sum(end - start for start, end in busy),
        exposed=exposed_share(events) * step,
        kinds=dict(kinds),
        heaviest=sorted(kernels.items(), key=lambda item: -item[1])[:12],
    )


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
    print("\n".join(table(add_up(read_trace(Path(sys.argv[1]))))))
