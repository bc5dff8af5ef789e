"""The backward pass with five products on a Hopper GPU, as good as eager; and its whole numbers."""

import functools
import math

import pytest
import test_triton_gpu
import test_varlen
import torch
from attention_cases import make_inputs
from test_triton_gpu import HALVES, REAL, check, check_sampled, needs_hopper

from s2_kernels import hopper, local_stride, plans, s2_attention

pytestmark = test_triton_gpu.pytestmark

TAKEN = [
    case
    for case in REAL
    if 48 <= case.d <= 128
    and case.pattern.block_size >= 64
    and case.q_offset == 0
    and case.kv_len == case.s
]


@pytest.fixture(autouse=True, params=[False, True], ids=["float32", "whole_numbers"])
def five_products(monkeypatch, request):
    """The backward pass is the one that nothing chooses by itself, with columns cut."""
    needs_hopper()
    from s2_kernels.hopper import backward, backward_fused  # import Gluon

    torch.full((2**28,), math.nan, device="cuda")  # what the allocator hands out next
    run = functools.partial(
        backward_fused.launch_hopper_fused, deterministic=request.param, longest=16
    )
    monkeypatch.setattr(backward, "launch_hopper_backward", run)
    monkeypatch.setattr(plans, "ON", False)  # or today's pass of such tensors is launched again
    return request.param


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_real_shapes(case, dtype):
    check(case, dtype, backend="hopper")


@pytest.mark.parametrize("kv_heads, d, block", [(16, 128, 64), (4, 128, 64), (16, 64, 128)])
def test_many_items(kv_heads, d, block):
    """Programs that work on dozens of items; sampled rows and columns."""
    pattern = local_stride(
        heads=16,
        kv_heads=kv_heads,
        block_size=block,
        local_blocks=4,
        stride=16,
        head_step=16 // kv_heads,
    )
    check_sampled(pattern, 16_000, d, torch.bfloat16, "cuda", backend="hopper")


def test_packed():
    lengths = [37, 1, 0, 299, 64, 1500]
    pattern = local_stride(heads=4, kv_heads=2, block_size=64, local_blocks=2, stride=3)
    test_varlen.check(pattern, lengths, lengths, torch.bfloat16, d=128, backend="hopper")


def test_the_same_bits_of_whole_numbers(five_products):
    """Float32 sums may come out the same or not; dk and dv always do."""
    case = next(case for case in TAKEN if case.name == "plain")
    q, k, v, dout, _ = make_inputs(case, torch.bfloat16, "cuda")
    assert hopper.why_not(q, k, v, case.pattern, None) is None
    out = s2_attention(q, k, v, case.pattern, backend="hopper")
    first, *others = (
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(5)
    )
    for other in others:
        for x, y in zip(first[not five_products :], other[not five_products :], strict=True):
            assert torch.equal(x, y)
