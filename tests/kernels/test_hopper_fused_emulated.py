"""The backward pass with five products on the CPU (gluon_emulator), as good as eager."""

import functools

import pytest
import test_hopper_emulated
import test_varlen
import torch
from attention_cases import Case, _ls, make_inputs
from test_hopper_emulated import EDGES, OFFSETS, check, emulated  # noqa: F401 - a fixture

from s2_kernels import ranges, s2_attention
from s2_kernels.hopper import backward, backward_fused

pytestmark = test_hopper_emulated.pytestmark
GQA = Case("gqa", _ls(4, 2, 64, 2, 3), 393, d=128)
CASES = [
    GQA,
    Case("batch_of_one_block", _ls(2, 2, 64, 1, 3), 150, d=64, b=2),
    Case("block128", _ls(2, 1, 128, 1, 2), 391, d=128),
    Case("many_edges", ranges(heads=2, kv_heads=1, block_size=64, bands=EDGES), 1411, d=64),
    Case("one_token", _ls(2, 2, 64, 2, 3), 1, d=128),
    Case("head96", _ls(1, 1, 64, 2, 2), 200, d=96),
    *(case for case in OFFSETS if case.d <= 128),
]


@pytest.fixture(autouse=True)
def use(monkeypatch):
    """Says how dq is added up in a pass that nothing chooses by itself; columns are cut."""

    def choose(deterministic):
        run = functools.partial(
            backward_fused.launch_hopper_fused, deterministic=deterministic, longest=5
        )
        monkeypatch.setattr(backward, "launch_hopper_backward", run)

    choose(deterministic=False)
    return choose


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_reference(case):
    check(case)


def test_float16():
    check(Case("float16", _ls(2, 2, 64, 3, 4), 450, d=128), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_numbers_as_the_reference(use, dtype):
    use(deterministic=True)
    check(GQA, dtype)


@pytest.mark.parametrize("deterministic", [False, True], ids=["float32", "whole_numbers"])
def test_packed(use, deterministic):
    use(deterministic)
    pattern = _ls(2, 2, 128, 1, 2) if deterministic else _ls(2, 1, 64, 2, 3)
    lengths = [37, 1, 0, 299, 64]
    test_varlen.check(pattern, lengths, lengths, torch.bfloat16, d=64, backend="hopper")


def test_whole_numbers_give_the_same_bits_and_pass_nan_on(use):
    """Programs add up in another order every time; a row whose gradient is NaN has none."""
    use(deterministic=True)
    pattern = _ls(2, 1, 64, 2, 3)
    q, k, v, dout, _ = make_inputs(Case("bits", pattern, 700, d=64), torch.bfloat16)
    dout[0, 300, 1, 5] = float("nan")
    with torch.no_grad():
        out, lse = s2_attention(q, k, v, pattern, return_lse=True, backend="hopper")
        problem = (q, k, v, out, lse, dout, None, pattern, 0.125)
        first, second = (backward.launch_hopper_backward(*problem)[0] for _ in range(2))
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))
    assert first[0, 300, 1].isnan().all()
    first[0, 300, 1] = 0
    assert not first.isnan().any()


def test_larger_heads_are_refused():
    q = torch.zeros(1, 64, 2, 192)
    with pytest.raises(ValueError, match="head size 192 is above 128"):
        backward.launch_hopper_backward(q, q, q, q, q, q, None, _ls(2, 2, 64, 2, 3), 0.1)
