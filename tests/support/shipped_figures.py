"""What the shipped configurations take on Hopper, by the Triton that compiles them.

Exact figures: each Triton brings a ptxas of its own, so that the same source gives the same bytes
everywhere. A changed kernel, or a Triton without figures, gets them from a run of this file:

    PYTHONPATH=kernels:tests/support[:FOLDER WITH ANOTHER TRITON] \\
        python tests/support/shipped_figures.py
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from shipped import compile_in_a_process

from s2_kernels.versions import release

VERSIONS = ((3, 6), (3, 8), (3, 9))
"""The columns below. 3.6 is the pinned one, 3.8 what newer torches bring, 3.9 the newest."""

STACK = {
    ("hopper-d64-packed", "s2_hopper_dkdv_kernel"): (104, 96, 104),
    ("hopper-d64-q_offset", "s2_hopper_dq_kernel"): (0, 0, 8),
    ("hopper-d128", "s2_hopper_dkdv_kernel"): (80, 64, 40),
    ("hopper-d128", "s2_hopper_dq_kernel"): (0, 0, 56),
    ("hopper-d128", "s2_hopper_forward_kernel"): (0, 0, 272),
    ("hopper-d128-near", "s2_hopper_dkdv_kernel"): (72, 56, 32),
    ("hopper-d128-near", "s2_hopper_dq_kernel"): (0, 0, 72),
    ("hopper-d128-near", "s2_hopper_forward_kernel"): (16, 0, 144),
    ("hopper-d128-packed", "s2_hopper_dkdv_kernel"): (168, 152, 160),
    ("hopper-d128-packed", "s2_hopper_dq_kernel"): (0, 0, 80),
    ("hopper-d128-packed", "s2_hopper_forward_kernel"): (8, 8, 144),
    ("hopper-d128-pattern", "s2_hopper_dkdv_kernel"): (64, 48, 16),
    ("hopper-d128-pattern", "s2_hopper_dq_kernel"): (0, 0, 64),
    ("hopper-d128-pattern", "s2_hopper_forward_kernel"): (0, 0, 272),
    ("hopper-d128-pattern-q_offset", "s2_hopper_dkdv_kernel"): (64, 56, 40),
    ("hopper-d128-pattern-q_offset", "s2_hopper_dq_kernel"): (0, 0, 8),
    ("hopper-d128-pattern-q_offset", "s2_hopper_forward_kernel"): (0, 0, 280),
    ("hopper-d128-q_offset", "s2_hopper_dkdv_kernel"): (72, 56, 40),
    ("hopper-d128-q_offset", "s2_hopper_dq_kernel"): (0, 0, 72),
    ("hopper-d128-q_offset", "s2_hopper_forward_kernel"): (16, 8, 128),
    ("hopper-d128-torch.float16", "s2_hopper_dkdv_kernel"): (80, 64, 40),
    ("hopper-d128-torch.float16", "s2_hopper_dq_kernel"): (0, 0, 56),
    ("hopper-d128-torch.float16", "s2_hopper_forward_kernel"): (0, 0, 272),
    ("hopper-d256", "s2_hopper_dkdv_wide_kernel"): (0, 0, 40),
    ("hopper-d256", "s2_hopper_dq_wide_kernel"): (0, 0, 24),
    ("hopper-d256", "s2_hopper_forward_wide_kernel"): (16, 8, 48),
    ("hopper-d256-near", "s2_hopper_dkdv_wide_kernel"): (0, 0, 40),
    ("hopper-d256-near", "s2_hopper_dq_wide_kernel"): (0, 0, 24),
    ("hopper-d256-near", "s2_hopper_forward_wide_kernel"): (24, 24, 128),
    ("hopper-d256-pattern-q_offset", "s2_hopper_dkdv_wide_kernel"): (0, 0, 40),
    ("hopper-d256-pattern-q_offset", "s2_hopper_forward_wide_kernel"): (16, 8, 40),
    ("hopper-d256-q_offset", "s2_hopper_dkdv_wide_kernel"): (0, 0, 40),
    ("hopper-d256-q_offset", "s2_hopper_forward_wide_kernel"): (24, 24, 128),
    ("hopper-d256-torch.float16", "s2_hopper_dkdv_wide_kernel"): (0, 0, 40),
    ("hopper-d256-torch.float16", "s2_hopper_dq_wide_kernel"): (0, 0, 24),
    ("hopper-d256-torch.float16", "s2_hopper_forward_wide_kernel"): (16, 8, 48),
    ("hopper_paged-d128", "s2_hopper_decode_kernel"): (0, 32, 0),
    ("hopper_paged-d128-pattern", "s2_hopper_decode_kernel"): (0, 32, 0),
    ("hopper_paged-d256", "s2_hopper_decode_kernel"): (80, 80, 160),
    ("paged-d64-pattern-torch.float16", "s2_decode_kernel"): (24, 8, 0),
    ("paged-d256", "s2_decode_kernel"): (0, 8, 72),
    ("portable-d64-torch.float32", "s2_dkdv_kernel"): (320, 0, 320),
    ("portable-d64-torch.float32", "s2_row_terms_kernel"): (0, 0, 8),
    ("portable-d64-fused-torch.float32", "s2_dkdv_kernel"): (328, 0, 336),
    ("portable-d128-near", "s2_dkdv_kernel"): (0, 0, 8),
    ("portable-d128-packed", "s2_dkdv_kernel"): (72, 96, 72),
    ("portable-d128-torch.float32", "s2_forward_kernel"): (8, 8, 16),
    ("portable-d256", "s2_add_pieces_kernel"): (216, 216, 224),
    ("portable-d256", "s2_dkdv_kernel"): (0, 0, 248),
    ("portable-d256-fused", "s2_dkdv_kernel"): (416, 416, 376),
}
"""Bytes of stack, by case and kernel; the most, where a case compiles a kernel more than once. The
Hopper kernels hand registers from warp to warp and keep scalars of an item there; the portable ones
spill. Where nothing is written there are none."""

LATE = "HGMMA, WAIT 1, WAIT 0, EX2"
EARLY = "HGMMA, WAIT 1, EX2, WAIT 0, EX2"
"""The same loop, but that ptxas has moved one exponential a row, that of the rescaling, before the
second wait."""
BACKWARD = "HGMMA, WAIT 1, EX2, WAIT 0, EX2, HGMMA, WAIT 0"
LATER = "HGMMA, WAIT 1, WAIT 0, EX2, HGMMA, WAIT 0"
OF_DK, OF_DV = "HGMMA, WAIT 0, HGMMA, WAIT 0", "EX2, HGMMA, WAIT 1, WAIT 0"

LOOPS = {
    "s2_hopper_forward_kernel": (
        {(LATE, LATE): 13}, {(EARLY, EARLY): 13}, {(EARLY, EARLY): 13},
    ),
    "s2_hopper_dkdv_kernel": (
        {(BACKWARD, BACKWARD): 13}, {(BACKWARD, BACKWARD): 13},
        {(BACKWARD, BACKWARD): 12, (LATER, BACKWARD): 1},
    ),
    "s2_hopper_dq_kernel": ({(BACKWARD, BACKWARD): 13},) * 3,
    "s2_hopper_forward_wide_kernel": (
        {(LATE, LATE): 3, (EARLY, EARLY): 2}, {(LATE, EARLY): 3, (EARLY, LATE): 2},
        {(LATE, LATE): 5},
    ),
    "s2_hopper_dkdv_wide_kernel": ({(OF_DK, OF_DV): 5},) * 3,
    "s2_hopper_dq_wide_kernel": ({(BACKWARD, BACKWARD): 5},) * 3,
}  # fmt: skip
"""The main loops of the two warpgroups, and in how many variants of a kernel they are these: a
second product is in flight when the first one is waited for. The exponentials (EX2) stand after
both, when the other warpgroup has the tensor cores. That is what measured faster (with 3.6)."""

LOADS = {"s2_hopper_dkdv_kernel": (1, 0, 6)}
"""From the stack in a main loop: scalars of an item. None in the other kernels, and no store."""


def column(report: dict) -> int:
    """Which figures are those of the Triton that compiled; skips the test where there are none."""
    version = release(report["triton"])
    if version not in VERSIONS:
        pytest.skip(
            f"no figures for Triton {report['triton']}: see tests/support/shipped_figures.py"
        )
    return VERSIONS.index(version)


def stack(report: dict) -> dict[tuple[str, str], int]:
    """As STACK, of one Triton."""
    found: dict[tuple[str, str], int] = {}
    for x in report["usage"]:
        if x["arch"] == 90 and x["stack"]:
            key = x["case"], x["kernel"]
            found[key] = max(x["stack"], found.get(key, 0))
    return found


def main_loops(report: dict, kernel: str) -> tuple[dict[tuple[str, str], int], int, int]:
    """As LOOPS and LOADS, of one Triton and kernel, and the most stores."""
    variants = [loops for name, loops in report["loops"] if name == kernel]
    ops = Counter(tuple(", ".join(loop["ops"]) for loop in loops) for loops in variants)
    every = [loop for loops in variants for loop in loops]
    return dict(ops), max(x["loads"] for x in every), max(x["stores"] for x in every)


def check_stack(report: dict) -> None:
    """Each kernel keeps as many bytes on the stack as are written, no more and no fewer."""
    at = column(report)
    assert stack(report) == {key: x[at] for key, x in STACK.items() if x[at]}


def check_main_loops(report: dict, kernel: str) -> None:
    """Both warpgroups' loops are as written, and no register is spilled in them."""
    at = column(report)
    expected = LOOPS[kernel][at], LOADS.get(kernel, (0,) * len(VERSIONS))[at], 0
    assert main_loops(report, kernel) == expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        found = compile_in_a_process(Path(cache))
    print(json.dumps({"triton": found["triton"],
                      "stack": {" ".join(key): x for key, x in sorted(stack(found).items())},
                      "loops": {name: str(main_loops(found, name)) for name in LOOPS}},
                     indent=1))  # fmt: skip
