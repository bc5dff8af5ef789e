"""The forward kernel's other ways from item to item (SEAMS), on the CPU: right, and in time."""

import dataclasses
import functools
import math

import gluon_emulator
import pytest
import test_hopper_emulated
import torch
from attention_cases import assert_as_good_as_eager, double, make_inputs
from test_hopper_emulated import CASES, OFFSETS, emulated  # noqa: F401 - a fixture

from s2_kernels import local_stride
from s2_kernels.hopper import forward, primitives
from s2_kernels.launch import Packing
from s2_kernels.reference import masked_attention, token_mask

pytestmark = test_hopper_emulated.pytestmark
SEAMS = [seam for seam in forward.SEAMS if seam != "today"]
NARROW = [case for case in CASES + OFFSETS if case.d <= 128]
PATTERN = local_stride(heads=2, block_size=64, local_blocks=2, stride=3)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """One program has many items, so that it comes to a seam again and again."""
    monkeypatch.setattr(primitives, "concurrent_programs", lambda *_, **__: 2)
    primitives.query_tiles.cache_clear()
    yield
    primitives.query_tiles.cache_clear()


def attend(seam, q, k, v, pattern, **where):
    with torch.no_grad():
        scale = 1 / math.sqrt(q.shape[-1])
        return forward.launch_hopper_forward(q, k, v, pattern, scale, seam=seam, **where)


@functools.cache
def expected(case, dtype):
    """q, k, v; out and lse of the float64 reference, and of eager."""
    inputs = [x.detach() for x in make_inputs(case, dtype)[:3]]
    mask = token_mask(case.pattern, case.s, case.kv_len, case.q_offset, inputs[0].device)
    results = masked_attention(*double(inputs), mask), masked_attention(*inputs, mask)
    return inputs, *(dict(zip(("out", "lse"), pair, strict=True)) for pair in results)


def check(seam, case, dtype=torch.bfloat16):
    inputs, truth, eager = expected(case, dtype)
    out, lse = attend(seam, *inputs, case.pattern, q_offset=case.q_offset)
    assert_as_good_as_eager(dict(out=out, lse=lse), truth, eager, case)


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_as_the_reference(case, seam):
    check(seam, case)


@pytest.mark.parametrize("seam", SEAMS)
def test_the_same_bits_as_today(seam):
    """The same products of the same tiles, in the same order for every row."""
    case = dataclasses.replace(CASES[0], pattern=PATTERN, s=1100)
    inputs = expected(case, torch.float16)[0]
    for x, y in zip(attend(seam, *inputs, PATTERN), attend("today", *inputs, PATTERN), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("seam", SEAMS)
def test_packed(seam):
    lengths = [37, 1, 0, 299, 64, 600]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packing = Packing(ends, ends, max(lengths), max(lengths))
    case = dataclasses.replace(CASES[0], pattern=PATTERN, s=sum(lengths))
    q, k, v = (x[0] for x in expected(case, torch.bfloat16)[0])
    results = [attend(name, q, k, v, PATTERN, packing=packing) for name in (seam, "today")]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("broken", ["no_wait", "no_arrival", "store_not_waited_for"])
def test_what_is_broken_is_found(seam, broken, monkeypatch):
    where, name, function = test_hopper_emulated.BROKEN[broken]
    monkeypatch.setattr(where, name, staticmethod(function))
    monkeypatch.setattr(gluon_emulator, "SECONDS", 1)
    with pytest.raises((AssertionError, TimeoutError)):
        check(seam, dataclasses.replace(CASES[0], pattern=PATTERN, s=1100))
