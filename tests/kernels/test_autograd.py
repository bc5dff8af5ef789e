"""What autograd may ask of each backend: the reference has every mode, the others say what not."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

from s2_kernels import (
    block_sparse_attention,
    local_stride,
    s2_attention,
    s2_attention_backward,
    s2_attention_varlen,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 40
PATTERN = local_stride(heads=2, block_size=16, local_blocks=1, stride=2)
MASK = PATTERN.block_mask(3)
ENDS = torch.tensor([0, 20, N], device=DEVICE)


def backward_alone(q, k, v):
    out, lse = (x.detach() for x in s2_attention(v, v, v, PATTERN, return_lse=True))
    return s2_attention_backward(q, k, v, out, lse, out, PATTERN)[0]


CALLS = {
    "blocked": lambda *x: s2_attention(*x, PATTERN, backend="blocked"),
    "triton": lambda *x: s2_attention(*x, PATTERN, backend="triton"),
    "packed": lambda q, k, v: s2_attention_varlen(
        q[0], k[0], v[0], PATTERN, cu_seqlens_q=ENDS, max_seqlen_q=20, backend="triton"
    ),
    "block_sparse": lambda *x: block_sparse_attention(*x, MASK, block_size=16),
    "backward": backward_alone,
}


def tensors(requires_grad=False):
    torch.manual_seed(0)
    return [torch.randn(1, N, 2, 32, device=DEVICE, requires_grad=requires_grad) for _ in "qkv"]


def in_forward_mode(call, which=0, requires_grad=False):
    """The tangent of the output for one of q, k and v's, all ones."""
    inputs = tensors(requires_grad)
    with forward_ad.dual_level():
        x = inputs[which]
        inputs[which] = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(call(*inputs)).tangent


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_mode_is_refused(call, requires_grad):
    for which in range(3):
        with pytest.raises(RuntimeError, match=r"no derivative in forward mode.*'reference'"):
            in_forward_mode(call, which, requires_grad)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("place", [False, True], ids=["new", "into"])
def test_the_backward_pass_alone_has_no_graph(backend, place):
    """Its inputs are what a module holds; their graph would keep every tile of theirs."""
    inputs = tensors(requires_grad=True)
    out, lse = s2_attention(*inputs, PATTERN, return_lse=True, backend=backend)
    dout = torch.ones_like(out, requires_grad=True)
    want = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    into = tuple(torch.empty_like(x, requires_grad=True) for x in inputs) if place else None
    got = s2_attention_backward(*inputs, out, lse, dout, PATTERN, backend=backend, into=into)
    for x, y in zip(got, want, strict=True):
        assert x.grad_fn is None and x.requires_grad == place
        assert torch.equal(x, y)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_transforms_are_refused(call):
    q, k, v = tensors()
    ones = torch.ones_like(q)
    for transform in (
        lambda: torch.func.jvp(lambda q: call(q, k, v), (q,), (ones,)),
        lambda: torch.func.grad(lambda q: call(q, k, v).sum())(q),
        lambda: torch.func.vmap(lambda q: call(q, k, v))(torch.stack([q, q])),
    ):
        with pytest.raises(RuntimeError, match=r"no transform of torch\.func.*'reference'"):
            transform()


def test_under_compile_too():
    compiled = torch.compile(CALLS["triton"], backend="aot_eager")
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        in_forward_mode(compiled)
    torch.compiler.reset()


@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("name", ["triton", "packed", "block_sparse"])
def test_second_derivatives_are_refused(name, which):
    inputs = tensors(requires_grad=True)
    x = inputs[which]
    (grad,) = torch.autograd.grad(CALLS[name](*inputs).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*'reference'"):
        (grad * x).sum().backward()


def test_second_derivatives_of_blocked_are_the_reference_s():
    results = []
    for backend in ("reference", "blocked"):
        inputs = [x.double().detach().requires_grad_() for x in tensors()]
        out, lse = s2_attention(*inputs, PATTERN, backend=backend, return_lse=True)
        loss = out.pow(2).sum() + lse.sin().sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        second = sum((x.pow(2) * (i + 1)).sum() for i, x in enumerate(grads))
        results.append(torch.autograd.grad(second, inputs))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_reference_has_forward_mode():
    call = functools.partial(s2_attention, pattern=PATTERN, backend="reference")
    q, k, v = (x.double() for x in tensors())
    got = torch.func.jvp(lambda q: call(q, k, v), (q,), (torch.ones_like(q),))[1]
    step = 1e-6
    expected = (call(q + step, k, v) - call(q - step, k, v)) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton", "packed", "sparse"])
def test_scales_that_are_refused(backend, scale):
    x = tensors()
    with pytest.raises(ValueError, match=r"softmax_scale=.*above 0"):
        if backend == "sparse":
            block_sparse_attention(*x, MASK, block_size=16, softmax_scale=scale)
        elif backend == "packed":
            options = dict(cu_seqlens_q=ENDS, max_seqlen_q=20, softmax_scale=scale)
            s2_attention_varlen(*(y[0] for y in x), PATTERN, **options)
        else:
            s2_attention(*x, PATTERN, softmax_scale=scale, backend=backend)
