"""The Hopper kernels on the CPU (gluon_emulator): what they compute, and that they wait for it.

The same rule as on a GPU: float64, twice the error of eager at the same precision.
"""

import dataclasses

import gluon_emulator
import pytest
import test_varlen
import torch
from attention_cases import (
    Case,
    _ls,
    assert_as_good_as_eager,
    make_inputs,
    reference_results,
    run_with_grads,
)
from near_cases import HOPPER_NEAR_CASES, NearCase, check_into, check_near

from s2_kernels import dense, hopper, ranges, s2_attention, schedule, sliding_window

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="plain Triton beside it needs the interpreter"
)

EDGES = [(2, 1), (7, 3), (20, 6)]
CASES = [
    Case("gqa", _ls(4, 2, 64, 2, 3), 393, d=128),
    Case("batch_of_one_block", _ls(2, 2, 64, 1, 3), 150, d=64, b=2),
    Case("block128", _ls(2, 1, 128, 1, 2), 391, d=128),
    Case("many_edges", ranges(heads=2, kv_heads=1, block_size=64, bands=EDGES), 1411, d=64),
    Case("one_token", _ls(2, 2, 64, 2, 3), 1, d=128),
    Case("head96", sliding_window(heads=1, block_size=64, local_blocks=2), 200, d=96),
    Case("wide_gqa", _ls(4, 2, 64, 2, 3), 393, d=256),
    Case("wide_batch_of_one_block", _ls(2, 1, 64, 1, 3), 270, d=192, b=2),
    Case("wide_block128", _ls(2, 1, 128, 1, 2), 391, d=192),
    Case("wide_many_edges", ranges(heads=1, block_size=64, bands=EDGES), 1411, d=256),
    Case("wide_one_token", _ls(2, 2, 64, 2, 3), 1, d=256),
]
OFFSETS = [  # further keys than the queries' own, offsets that no tile divides, queries of one tile
    Case("gqa", _ls(4, 2, 64, 2, 3), 201, t=534, d=128, q_offset=333),
    Case("batch_of_one_block", _ls(2, 2, 64, 1, 3), 200, t=520, d=64, b=2, q_offset=320),
    Case("block128", _ls(2, 1, 128, 1, 2), 139, t=700, d=128, q_offset=430),
    Case("many_edges", ranges(heads=2, kv_heads=1, block_size=64, bands=EDGES), 300, t=1411, d=64,
         q_offset=1111),
    Case("more_keys", _ls(2, 2, 64, 2, 3), 200, t=470, d=96),
    Case("one_query", _ls(2, 2, 64, 2, 3), 1, t=386, d=128, q_offset=385),
    Case("wide_gqa", _ls(4, 2, 64, 2, 3), 201, t=534, d=256, q_offset=333),
    Case("wide_batch_of_one_block", _ls(2, 1, 64, 1, 3), 200, t=577, d=192, b=2, q_offset=258),
    Case("wide_many_edges", ranges(heads=1, block_size=64, bands=EDGES), 130, t=1411, d=256,
         q_offset=1281),
    Case("wide_more_keys", _ls(2, 1, 128, 1, 2), 100, t=391, d=192),
]  # fmt: skip
ALL_SEEN = [  # every query stands past the keys, all of which it sees
    Case("gqa", dense(heads=4, kv_heads=2), 201, t=320, d=128, q_offset=320),
    Case("one_half_tile", dense(heads=2), 150, t=64, d=64, b=2, q_offset=1000),
    Case("two_half_tiles", dense(heads=1, block_size=128), 129, t=128, d=96, q_offset=129),
    Case("three_half_tiles", dense(heads=1), 300, t=192, d=128, q_offset=192),
    Case("wide_gqa", dense(heads=4, kv_heads=2), 201, t=320, d=256, q_offset=321),
    Case("wide_one_half_tile", dense(heads=1), 150, t=64, d=192, b=2, q_offset=1000),
    Case("wide_two_half_tiles", dense(heads=1, block_size=256), 300, t=128, d=256, q_offset=130),
]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The Hopper kernels take CPU tensors; memory that nobody has written holds NaN."""
    monkeypatch.setattr(hopper, "takes", lambda *problem: True)
    monkeypatch.setattr(gluon_emulator, "SECONDS", 20)
    torch.use_deterministic_algorithms(True)
    with gluon_emulator.emulated():
        yield
    torch.use_deterministic_algorithms(False)


def check(case, dtype=torch.bfloat16, change=lambda inputs: None):
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        change(inputs)

    def attend(q, k, v):
        return s2_attention(
            q, k, v, case.pattern, q_offset=case.q_offset, return_lse=True, backend="hopper"
        )

    truth, eager = reference_results(case, inputs)
    assert_as_good_as_eager(run_with_grads(attend, inputs), truth, eager, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_reference(case):
    check(case)


@pytest.mark.parametrize("case", OFFSETS, ids=str)
def test_queries_at_an_offset(case):
    check(case)


@pytest.mark.parametrize("case", ALL_SEEN, ids=str)
def test_queries_past_all_keys(case):
    check(case)


@pytest.mark.parametrize("case", HOPPER_NEAR_CASES, ids=str)
def test_far_and_near_keys_in_one_launch(case):
    check_near(case)


@pytest.mark.parametrize("case", [HOPPER_NEAR_CASES[1], HOPPER_NEAR_CASES[8]], ids=str)
def test_results_where_they_belong(case):
    check_into(case, torch.bfloat16, "hopper")


@pytest.mark.parametrize("d", [64, 256])
def test_pieces_of_far_columns(d, monkeypatch):
    case = NearCase("pieces", _ls(2, 1, 64, 1, 4), 11, 6, d=d)
    monkeypatch.setattr(schedule, "SHORTEST_PIECE", 1)
    work = schedule.single_columns if case.d > 128 else schedule.column_pairs
    work.cache_clear()
    check_near(case)
    common = (case.pattern, case.case.s, 1, 4, torch.device("cpu"), case.case.t, case.case.q_offset)
    assert work(*common, near=case.near).n_slots > 0
    work.cache_clear()


@pytest.mark.parametrize("case", [OFFSETS[3], OFFSETS[6]], ids=str)
def test_pieces_of_columns_at_an_offset(case, monkeypatch):
    """Columns cut into many pieces, of which the first begins where the queries do."""
    monkeypatch.setattr(schedule, "SHORTEST_PIECE", 2)
    work = schedule.single_columns if case.d > 128 else schedule.column_pairs
    work.cache_clear()
    check(case)
    common = (case.pattern, case.s, 1, 4, torch.device("cpu"), case.kv_len, case.q_offset)
    assert work(*common).n_slots > 0
    work.cache_clear()


@pytest.mark.parametrize("d", [128, 256])
def test_float16_and_scores_that_rise(d):
    """The keys grow from block to block, so that the maximum of a row moves again and again."""

    def grow(inputs):
        q, k, *_ = inputs
        k.mul_((torch.arange(k.shape[1]) // 64 + 1).view(1, -1, 1, 1) * 2)

    check(Case("rising", _ls(2, 2, 64, 3, 4), 450, d=d), torch.float16, grow)


@pytest.mark.parametrize("pattern", [_ls(2, 1, 64, 2, 3), _ls(2, 2, 128, 1, 2)], ids=str)
def test_packed(pattern):
    lengths = [37, 1, 0, 299, 64]
    test_varlen.check(pattern, lengths, lengths, torch.bfloat16, d=64, backend="hopper")


BROKEN = {
    "no_wait": (gluon_emulator.mbarrier, "wait", lambda *barrier, **pred: None),
    "no_expected_bytes": (
        gluon_emulator.mbarrier, "expect", lambda barrier, nbytes: barrier.add(1, 0)
    ),
    "no_arrival": (gluon_emulator.mbarrier, "arrive", lambda *barrier, **pred: None),
    "store_not_waited_for": (gluon_emulator.tma, "store_wait", lambda pendings: None),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_found(broken, monkeypatch):
    where, name, function = BROKEN[broken]
    monkeypatch.setattr(where, name, staticmethod(function))
    monkeypatch.setattr(gluon_emulator, "SECONDS", 1)
    case = Case("broken", _ls(2, 2, 64, 2, 3), 700, d=128)
    with pytest.raises((AssertionError, TimeoutError)):
        check(case)


def test_a_kernel_is_not_changed_by_it():
    """Kernels' own functions and names are left as they were."""
    from s2_kernels.hopper import forward

    before = dict(vars(forward))
    check(dataclasses.replace(CASES[4], d=64))
    assert vars(forward) == before
