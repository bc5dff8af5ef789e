"""Decoding for Hopper on the CPU (gluon_emulator): against float64, and what it must wait for."""

import dataclasses
import math

import gluon_emulator
import pytest
import torch
from paged_cases import PagedCase, make_paged, truth_of

from s2_kernels import dense, hopper, local_stride, ranges
from s2_kernels.hopper.decode import launch_hopper_decode

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="plain Triton beside it needs the interpreter"
)
LOCAL = local_stride(heads=4, kv_heads=2, block_size=64, local_blocks=2, stride=3)
BANDS = ranges(heads=4, kv_heads=1, block_size=64, bands=[(2, 1), (5, 2), (None, 4)])
LARGE = local_stride(heads=4, kv_heads=2, block_size=128, local_blocks=1, stride=2)
CASES = [
    PagedCase(LOCAL, (1500,), d=64),
    PagedCase(LOCAL, (64,), d=128),
    PagedCase(LOCAL, (1,), d=96),
    PagedCase(BANDS, (1411,), d=64),
    PagedCase(LARGE, (1000,), d=64),
    PagedCase(LARGE, (1024 - 64,), d=128, dv=64),
    PagedCase(dense(heads=8, kv_heads=1), (700,), d=64),
    PagedCase(LOCAL, (1500,), s=4, d=64),  # a draft to verify
    PagedCase(LOCAL, (770,), s=7, d=64),  # in two blocks
    PagedCase(LOCAL, (3,), s=5, d=64),  # padding in front
    PagedCase(LOCAL, (700, 0 + 64, 1), d=64),  # ragged
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that the kernel forgets to write holds NaN."""
    monkeypatch.setattr(gluon_emulator, "SECONDS", 20)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(case, x, programs, **options):
    out = torch.full((*x.q.shape[:3], x.v.shape[-1]), math.nan, dtype=x.q.dtype)
    lse = torch.full((x.q.shape[0], x.q.shape[2], case.s), math.nan)
    launch_hopper_decode(
        x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, case.pattern,
        1 / math.sqrt(case.d), out, lse, programs=programs, **options,
    )  # fmt: skip
    return out, lse


def assert_close(got, truth):
    for value, expected in zip(got, truth, strict=True):
        same = torch.isinf(expected) & (value == expected)
        assert torch.where(same, 0, value.double() - expected).abs().max() < 4e-3


@pytest.mark.parametrize("programs", [1, 7, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_is_the_definition(case, programs):
    """Also the second time: the counters are left as they were found."""
    x = make_paged(case, dtype=torch.float16)
    with gluon_emulator.emulated():
        got = attend(case, x, programs)
        assert_close(got, truth_of(case, x))
        again = attend(case, x, programs)
    assert all(torch.equal(*pair) for pair in zip(got, again, strict=True))


def test_pages_of_keys_and_values_in_one_pool():
    """As vLLM has them, with a gap behind each row."""
    case = CASES[0]
    x = make_paged(case, dtype=torch.float16)
    pool = torch.full((len(x.k_pages), 2, 64, case.d + 8), math.nan, dtype=torch.float16)
    k, v = pool[:, 0, :, : case.d], pool[:, 1, :, : case.d]
    k.copy_(x.k_pages)
    v.copy_(x.v_pages)
    with gluon_emulator.emulated():
        got, dense = (attend(case, y, 7) for y in (dataclasses.replace(x, k_pages=k, v_pages=v), x))
    assert all(torch.equal(*pair) for pair in zip(got, dense, strict=True))


HALF = torch.zeros(1, 1, 4, 64, dtype=torch.float16)
PAGES = torch.zeros(3, 64, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("q", "k", "v", "pattern", "reason"),
    [
        (HALF, PAGES, PAGES, LOCAL, None),
        (HALF.float(), PAGES.float(), PAGES.float(), LOCAL, "dtype torch.float32"),
        (HALF, PAGES, PAGES, dataclasses.replace(LOCAL, block_size=32), "block_size 32"),
        (HALF[..., :32], PAGES[..., :32], PAGES, LOCAL, "head sizes 32 and 64"),
        (HALF, PAGES[:, :, 1:], PAGES, LOCAL, "pages whose strides or addresses"),
    ],
)
def test_what_it_does_not_take_has_a_reason(q, k, v, pattern, reason):
    found = hopper.why_not_decode(q, k, v, pattern)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("programs", [2, 7, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_keys_are_read_once_the_kernel_before_has_written_them(case, programs):
    x, old = (make_paged(case, dtype=torch.float16, written=written) for written in (True, False))
    with gluon_emulator.emulated([(x.k_pages, old.k_pages), (x.v_pages, old.v_pages)]):
        got = attend(case, x, programs, after_write=True)
    assert_close(got, truth_of(case, x))


@pytest.mark.parametrize("programs", [1, 7, 40])
@pytest.mark.parametrize("pattern", [LOCAL, LARGE], ids=str)
def test_a_block_that_another_sequence_has_just_filled(pattern, programs):
    """vLLM's prefix cache: the second one goes on behind a block that the first one ends."""
    size = pattern.block_size
    case = PagedCase(pattern, (3 * size, 3 * size + 1), d=64)
    x, old = (make_paged(case, dtype=torch.float16, written=written) for written in (True, False))
    for y in (x, old):
        y.page_table[1, :, 2] = y.page_table[0, :, 2]
    for y in (x.k, x.v):
        y[1, 2 * size : 3 * size] = y[0, 2 * size : 3 * size]
    with gluon_emulator.emulated([(x.k_pages, old.k_pages), (x.v_pages, old.v_pages)]):
        got = attend(case, x, programs, after_write=True)
    assert_close(got, truth_of(case, x))
