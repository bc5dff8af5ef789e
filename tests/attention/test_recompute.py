"""Attention outputs kept under full recompute: the same gradients, one forward pass, in order."""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import _ls

from s2_kernels import s2_attention, s2_attention_backward
from s2megatron.attention import context_parallel, recompute
from s2megatron.attention.context_parallel import ContextAttention

PATTERN = _ls(4, 2, 16, 2, 4)
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
"""A context-parallel group of one."""


def microbatch(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, 70, 4, 8), (2, 70, 2, 8), (2, 70, 2, 8), (2, 70, 4, 8)]
    q, k, v, dout = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], dout


@pytest.fixture
def forward_passes(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return s2_attention(*args, **options)

    monkeypatch.setattr(context_parallel, "s2_attention", counted)
    return calls


def gradients(attend, inputs, dout):
    out = attend(*inputs)
    return out, *torch.autograd.grad(out, inputs, dout)


def test_microbatches_come_back_in_order_without_a_second_forward_pass(forward_passes):
    keeper = recompute.OutputKeeper(ContextAttention(PATTERN, None, ALONE))
    batches = [microbatch(seed) for seed in range(3)]
    with torch.no_grad():
        first = [keeper.attend(*inputs) for inputs, _ in batches]
    for (inputs, dout), out in zip(batches, first, strict=True):
        expected = gradients(lambda *x: s2_attention(*x, PATTERN), inputs, dout)
        got = gradients(keeper.attend, inputs, dout)
        assert torch.equal(got[0], out)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert len(forward_passes) == 3


def test_a_layer_that_is_not_checkpointed_computes(forward_passes):
    keeper = recompute.OutputKeeper(ContextAttention(PATTERN, None, ALONE))
    inputs, dout = microbatch(0)
    gradients(keeper.attend, inputs, dout)
    assert len(forward_passes) == 1


def test_another_order_stops_the_run():
    keeper = recompute.OutputKeeper(ContextAttention(PATTERN, None, ALONE))
    with torch.no_grad():
        keeper.attend(*microbatch(0)[0])
    with pytest.raises(RuntimeError, match="keep_attention_output"):
        keeper.attend(*microbatch(1)[0])


@pytest.mark.parametrize("name", ["out", "lse", "dout"])
def test_backward_refuses_other_shapes(name):
    inputs, dout = microbatch(0)
    out, lse = s2_attention(*inputs, PATTERN, return_lse=True)
    given = dict(out=out, lse=lse, dout=dout)
    given[name] = given[name][:, :3]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        s2_attention_backward(*inputs, **given, pattern=PATTERN)
