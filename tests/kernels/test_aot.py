"""The shipped configurations, compiled for GPUs that are not there with the pinned Triton.

No spills, what fits in shared memory, the main loops as written, and no recompilation. The newest
Triton compiles them in test_aot_newest.py.
"""

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
WIDE_DKDV_LOOPS = [  # the warpgroup of dk, that of dv
    ["HGMMA", "WAIT 0", "HGMMA", "WAIT 0"],
    ["EX2", "HGMMA", "WAIT 1", "WAIT 0"],
]
HOPPER_VARIANTS = {True: 2, False: 7}
"""How often each kernel for wide heads is compiled, and each other one: shipped.HOPPER."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return compile_in_a_process(tmp_path_factory.mktemp("triton"))


def test_all_fit_and_hopper_spills_little(report):
    """The portable kernels on Hopper, 16-bit and dense, spill nothing up to head size 128.

    The Hopper kernels hand registers from warp to warp, and keep scalars of an item on the stack.
    """
    assert_that_all_fit(report)
    for x in report["usage"]:
        if x["kernel"] in HOPPER:
            written = HOPPER[x["kernel"]]
            assert x["registers"] == 168 and x["stack"] <= written["stack"], x
            assert x["shared"] <= written["shared"] * 1024, x
        elif x["arch"] == 90 and x["case"] in TUNED:
            assert x["stack"] == 0, x
        elif x["arch"] == 90 and x["case"] == "portable-d128-packed":  # by pointers, not TMA
            assert x["stack"] <= 128, x


TUNED = ("portable-d64", "portable-d128", "portable-d128-fused", "sparse-d128")


@pytest.mark.parametrize("kernel", HOPPER)
def test_hopper_main_loops(report, kernel):
    """Both warpgroups' loops: no spills but a scalar, and work under the products as written."""
    variants = [loops for name, loops in report["loops"] if name == kernel]
    assert len(variants) == HOPPER_VARIANTS["wide" in kernel]
    for loops in variants:
        assert len(loops) == 2
        for loop in loops:
            assert loop["loads"] <= 2 and loop["stores"] == 0
        written = HOPPER[kernel]["loop"]
        expected = [written] * 2 if written else WIDE_DKDV_LOOPS
        assert [loop["ops"] for loop in loops] == expected


def test_a_second_length_compiles_nothing(report):
    assert report["recompiled"] == []
