"""The shipped configurations, compiled for GPUs that are not there with this environment's Triton.

Stack, registers, shared memory and the main loops as they were written down for it, and no
recompilation. The newest Triton compiles them in test_aot_newest.py.
"""

from collections import Counter

import pytest
from shipped import assert_that_all_fit, compile_in_a_process
from shipped_figures import LOOPS, check_main_loops, check_stack

HOPPER_VARIANTS = {name: 5 if "wide" in name else 13 for name in LOOPS}
"""How often each kernel is compiled: shipped.HOPPER."""
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
    "s2_decode_kernel": 10,
    "s2_merge_kernel": 5,
    "s2_write_kernel": 5,
    "s2_move_blocks_kernel": 20,
    "s2_hopper_decode_kernel": 15,
    **HOPPER_VARIANTS,
}
SHARED = {
    "s2_hopper_forward_kernel": 225,
    "s2_hopper_dkdv_kernel": 226.5,
    "s2_hopper_dq_kernel": 225,
    "s2_hopper_forward_wide_kernel": 225,
    "s2_hopper_dq_wide_kernel": 225,
    "s2_hopper_dkdv_wide_kernel": 226,
}
"""KiB of shared memory."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return compile_in_a_process(tmp_path_factory.mktemp("triton"))


def test_all_fit(report):
    assert_that_all_fit(report)
    for x in report["usage"]:
        if x["kernel"] in SHARED:
            assert x["registers"] == 168 and x["shared"] <= SHARED[x["kernel"]] * 1024, x


def test_stack_is_what_it_was(report):
    check_stack(report)


def test_every_kernel_is_compiled_for_hopper_as_often_as_it_has_variants(report):
    assert Counter(x["kernel"] for x in report["usage"] if x["arch"] == 90) == VARIANTS


@pytest.mark.parametrize("kernel", LOOPS)
def test_hopper_main_loops(report, kernel):
    check_main_loops(report, kernel)


def test_a_part_is_counted_when_all_threads_have_written_it(report):
    """Decoding in one launch: a barrier, then an atomic that releases and acquires."""
    counts = [tuple(one) for found in report["counts"] for one in found]
    assert counts == [("bar.sync", "atom.global.gpu.acq_rel.add.u32")] * (5 + 15)


def test_attention_may_start_once_the_kernel_that_writes_has_waited(report):
    """`after_write` reads what was there before that kernel: no other order will do."""
    found = [tuple(order) for order in report["dependents"]]
    assert set(found) == {("wait", "launch_dependents"), ()} and found.count(()) == 5  # sm_80


def test_two_programs_that_decode_fit_a_multiprocessor(report):
    """Of Hopper's 228 KiB, 1 KiB a program is the system's; 65,536 registers."""
    found = [x for x in report["usage"] if x["kernel"] == "s2_hopper_decode_kernel"]
    for x in found:
        if "d256" not in x["case"]:
            assert x["shared"] + 1024 <= 114 * 1024 and x["registers"] * 256 <= 65536, x


def test_a_second_length_compiles_nothing(report):
    assert report["recompiled"] == []
