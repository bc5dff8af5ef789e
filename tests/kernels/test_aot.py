"""The shipped configurations, compiled for GPUs that are not there with the pinned Triton.

No spills, what fits in shared memory, the main loops as written, and no recompilation. The newest
Triton compiles them in test_aot_newest.py.
"""

from collections import Counter

import pytest
from shipped import assert_that_all_fit, compile_in_a_process

# Bytes of stack, KiB of shared memory, and the main loop: a second product is in flight when the
# first one is waited for. The exponentials (EX2) stand after both, when the other warpgroup has the
# tensor cores. That is what measured faster.
BACKWARD_LOOP = ["HGMMA", "WAIT 1", "EX2", "WAIT 0", "EX2", "HGMMA", "WAIT 0"]
HOPPER = dict(
    s2_hopper_forward_kernel=dict(stack=8, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]),
    s2_hopper_dkdv_kernel=dict(stack=176, shared=226.5, loop=BACKWARD_LOOP),
    s2_hopper_dq_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_forward_wide_kernel=dict(
        stack=16, shared=225, loop=["HGMMA", "WAIT 1", "WAIT 0", "EX2"]
    ),
    s2_hopper_dq_wide_kernel=dict(stack=0, shared=225, loop=BACKWARD_LOOP),
    s2_hopper_dkdv_wide_kernel=dict(stack=8, shared=226, loop=None),  # two, see below
)
AT_AN_OFFSET = dict(s2_hopper_forward_kernel=16, s2_hopper_forward_wide_kernel=24)
"""Bytes of stack there: a tile that begins before the first query is stored through pointers."""
WIDE_DKDV_LOOPS = [  # the warpgroup of dk, that of dv
    ["HGMMA", "WAIT 0", "HGMMA", "WAIT 0"],
    ["EX2", "HGMMA", "WAIT 1", "WAIT 0"],
]
OTHER_LOOPS = dict(
    s2_hopper_forward_wide_kernel=[[["HGMMA", "WAIT 1", "EX2", "WAIT 0", "EX2"]] * 2] * 2
)
"""Of single variants: at an offset, and with keys in two parts, ptxas moves one exponential a row,
that of the rescaling, before the second wait."""
HOPPER_VARIANTS = {name: 5 if "wide" in name else 13 for name in HOPPER}
"""How often each kernel is compiled: shipped.HOPPER."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return compile_in_a_process(tmp_path_factory.mktemp("triton"))


def test_all_fit_and_spill_no_more_than_they_did(report):
    """On Hopper the portable kernels spill where SPILLS says, and nowhere else.

    The Hopper kernels hand registers from warp to warp, and keep scalars of an item on the stack.
    """
    assert_that_all_fit(report)
    for x in report["usage"]:
        if x["kernel"] in HOPPER:
            written = HOPPER[x["kernel"]]
            at_an_offset = x["case"].endswith(("q_offset", "near"))
            stack = AT_AN_OFFSET.get(x["kernel"], 0) if at_an_offset else 0
            assert x["registers"] == 168 and x["stack"] <= max(stack, written["stack"]), x
            assert x["shared"] <= written["shared"] * 1024, x
        elif x["arch"] == 90:
            assert x["stack"] <= SPILLS.get((x["case"], x["kernel"]), 0), x


def test_every_kernel_is_compiled_for_hopper_as_often_as_it_has_variants(report):
    assert Counter(x["kernel"] for x in report["usage"] if x["arch"] == 90) == VARIANTS


SPILLS = {
    ("portable-d128-torch.float32", "s2_forward_kernel"): 8,
    ("portable-d128-packed", "s2_dkdv_kernel"): 72,
    ("portable-d64-torch.float32", "s2_dkdv_kernel"): 320,
    ("portable-d64-fused-torch.float32", "s2_dkdv_kernel"): 328,
    ("portable-d256-fused", "s2_dkdv_kernel"): 416,
    ("portable-d256", "s2_add_pieces_kernel"): 216,
    ("paged-d128-one_launch", "s2_decode_kernel"): 8,  # a chunk of a prompt
}
"""Bytes of stack, by case and kernel."""
VARIANTS = {
    "s2_forward_kernel": 9,
    "s2_row_terms_kernel": 8,
    "s2_dkdv_kernel": 14,
    "s2_add_pieces_kernel": 7,
    "s2_dq_kernel": 9,
    "s2_packed_slots_kernel": 2,
    "s2_sparse_forward_kernel": 1,
    "s2_sparse_dkdv_kernel": 1,
    "s2_sparse_dq_kernel": 1,
    "s2_decode_kernel": 20,
    "s2_merge_kernel": 10,
    "s2_write_kernel": 5,
    "s2_move_blocks_kernel": 20,
    **HOPPER_VARIANTS,
}


@pytest.mark.parametrize("kernel", HOPPER)
def test_hopper_main_loops(report, kernel):
    """Both warpgroups' loops: no spills but a scalar, and work under the products as written."""
    variants = [loops for name, loops in report["loops"] if name == kernel]
    assert len(variants) == HOPPER_VARIANTS[kernel]
    others = []
    for loops in variants:
        assert len(loops) == 2
        for loop in loops:
            assert loop["loads"] <= 2 and loop["stores"] == 0
        written = HOPPER[kernel]["loop"]
        expected = [written] * 2 if written else WIDE_DKDV_LOOPS
        found = [loop["ops"] for loop in loops]
        others += [found] if found != expected else []
    assert others == OTHER_LOOPS.get(kernel, [])


def test_a_part_is_counted_when_all_threads_have_written_it(report):
    """Decoding in one launch: a barrier, then an atomic that releases and acquires."""
    counts = [tuple(one) for found in report["counts"] for one in found]
    assert counts == [("bar.sync", "atom.global.gpu.acq_rel.add.u32")] * 10


def test_a_second_length_compiles_nothing(report):
    assert report["recompiled"] == []
