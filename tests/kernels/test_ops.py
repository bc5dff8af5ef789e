"""The operators as torch sees them: fake kernels, autograd, compile, recompute, layout, errors."""

import functools

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from s2_kernels import (
    api,
    dense,
    hopper,
    local_stride,
    ops,
    plans,
    s2_attention,
    s2_attention_varlen,
    sliding_window,
)
from s2_kernels.api import check_triton
from s2_kernels.launch import takes_descriptor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERN = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=1, stride=2)
PROBLEM = ops.Problem(
    pattern=PATTERN.key, softmax_scale=0.2, max_seqlen_q=20, max_seqlen_k=20, backend="triton"
)
triton_attention = functools.partial(s2_attention, backend="triton")


def tensors(*shape, heads=(4, 2, 2), d=32):
    torch.manual_seed(0)
    return [torch.randn(*shape, h, d, device=DEVICE).requires_grad_() for h in heads]


def arguments(packed):
    """Of `ops.attention`: two sequences of 20 tokens, packed or as a batch in Megatron's layout."""
    fields = PROBLEM
    if packed:
        cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
        return (*tensors(40), cu_seqlens, cu_seqlens, *fields)
    q, k, v = (x.transpose(0, 1).detach().requires_grad_() for x in tensors(20, 2))
    return (q, k, v, None, None, *fields)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_operators_pass_opcheck(packed):
    q, k, v, *rest = arguments(packed)
    torch.library.opcheck(
        ops.attention,
        (q, k, v, *rest),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    inputs = [x.detach() for x in (q, k, v)]
    out, lse = ops.attention(*inputs, *rest)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            ops.attention_backward,
            (*inputs, out, lse, torch.randn_like(out), dlse, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )


def loss_of(q, k, v):
    """A layer's worth of tensor code around the operator, in Megatron's layout, with lse."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = triton_attention(q, k, v, PATTERN, return_lse=True)
    return (out.transpose(0, 1).flatten(2) * 2).pow(2).sum() + lse.sin().sum()


def packed_loss_of(q, k, v, cu_seqlens):
    out = s2_attention_varlen(
        q, k, v, PATTERN, cu_seqlens_q=cu_seqlens, max_seqlen_q=30, backend="triton"
    )
    return out.pow(2).sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_sees_one_operator(dynamic):
    cu_seqlens = torch.tensor([0, 10, 10, 33], device=DEVICE)
    for loss, inputs, more in (
        (loss_of, tensors(33, 1), ()),
        (packed_loss_of, tensors(33), (cu_seqlens,)),
    ):
        expected = torch.autograd.grad(loss(*inputs, *more), inputs)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for got, want in zip(
            torch.autograd.grad(compiled(*inputs, *more), inputs), expected, strict=True
        ):
            torch.testing.assert_close(got, want)


def test_activation_recompute():
    inputs = tensors(33, 1)
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    got = torch.autograd.grad(checkpoint(loss_of, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "again"])
def test_selective_recompute_sees_the_operators(keep, monkeypatch):
    """Eager mode takes a way of its own, on which dispatch modes must meet the operators.

    An output that is kept is not computed again: launches are counted, since torch 2.14 asks for
    the policy in the first pass only.
    """
    monkeypatch.setattr(plans, "ON", False)  # on a GPU a plan would not come to the launcher
    seen, launches, launch = [], [], ops.launch_forward
    monkeypatch.setattr(
        ops, "launch_forward", lambda *a, **options: launches.append(1) or launch(*a, **options)
    )

    def keep_attention(ctx, op, *args, **kwargs):
        seen.append(op)
        save = keep and op is ops.attention
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE

    inputs = tensors(33, 1)
    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    launches.clear()
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    loss = checkpoint(loss_of, *inputs, use_reentrant=False, context_fn=contexts)
    got = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert ops.attention in seen and len(launches) == (1 if keep else 2)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "operator"])
def test_second_derivatives_are_refused(eager):
    q, k, v, *rest = arguments(packed=False)
    run = ops.attend(q, k, v, None, None, PROBLEM) if eager else ops.attention(q, k, v, *rest)
    (dq,) = torch.autograd.grad(run[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return triton_attention(q, k, v, PATTERN)

    inputs = tuple(x.detach() for x in tensors(1, 33))
    program = torch.export.export(Layer(), inputs)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("s2_kernels.attention.default") == 1
    assert torch.equal(program.module()(*inputs), triton_attention(*inputs, PATTERN))


def test_megatron_layout_stays():
    q, k, v = (x.transpose(0, 1) for x in tensors(33, 2))
    out = triton_attention(q, k, v, PATTERN)
    assert out.transpose(0, 1).is_contiguous()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.transpose(0, 1).is_contiguous() for x in (dq, dk, dv))
    copies = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(out, triton_attention(*copies, PATTERN))


def test_slices_of_one_projection_go_in_without_a_copy():
    qkv = torch.randn(33, 2, 2, 4, 32, device=DEVICE)  # per group: 2 query heads, k, v
    q, k, v = qkv[:, :, :, :2].flatten(2, 3), qkv[:, :, :, 2], qkv[:, :, :, 3]
    out = triton_attention(*(x.transpose(0, 1) for x in (q, k, v)), PATTERN)
    copies = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
    assert torch.equal(out, triton_attention(*copies, PATTERN))


@pytest.mark.parametrize(
    "change, taken",
    [
        (lambda x: x, True),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[:, :, 1:2, 8:24], True),
        (lambda x: x[..., 4:20], False),  # the address
        (lambda x: x[..., ::2], False),
        (lambda x: x.transpose(2, 3), False),
        (lambda x: x[..., :1].expand(-1, -1, -1, 32), False),
        (lambda x: x[:1].expand(2, -1, -1, -1), False),
        (lambda x: x.flatten()[:-4].unfold(0, 36, 36)[None, None, :, :32], False),  # a stride
    ],
)
def test_what_tma_takes(change, taken):
    assert takes_descriptor(change(torch.zeros(2, 33, 4, 32, dtype=torch.bfloat16))) is taken


def test_no_nan_from_rows_that_see_nothing():
    """The gradient of an lse of -inf may well be NaN: it must not spread."""
    q, k, v = tensors(1, 40)
    window = sliding_window(heads=4, kv_heads=2, block_size=16, local_blocks=1)
    _, lse = out = triton_attention(q, k[:, :20], v[:, :20], window, return_lse=True)
    assert lse[..., 32:].isneginf().all() and lse[..., :32].isfinite().all()
    dlse = torch.zeros_like(lse).masked_fill(lse.isneginf(), torch.nan)
    grads = torch.autograd.grad(out, (q, k, v), (torch.ones_like(out[0]), dlse))
    assert all(x.isfinite().all() for x in grads)


def test_auto_follows_the_device(monkeypatch):
    called = []
    monkeypatch.setattr(ops, "attend", lambda *args: called.append(1) or (None, None))
    s2_attention(*tensors(1, 20), PATTERN)
    assert bool(called) == (DEVICE == "cuda")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q, k, v: [x.double() for x in (q, k, v)], "float64.*backend='blocked'"),
        (lambda q, k, v: [x[..., :24] for x in (q, k, v)], "q has head size 24.*'blocked'"),
        (lambda q, k, v: [q, k, v.repeat(1, 1, 1, 9)], "v has head size 288.*'blocked'"),
        (
            lambda q, k, v: [q, k.transpose(2, 3).contiguous().transpose(2, 3), v],
            r"k has strides .*k\.contiguous\(\).*'blocked'",
        ),
    ],
)
def test_what_triton_cannot_do_names_the_way_out(change, words):
    with pytest.raises(ValueError, match=words):
        triton_attention(*change(*tensors(1, 20)), PATTERN)


def test_old_gpu(monkeypatch):
    class OnOldGPU:
        is_cuda, device = True, torch.device("cuda")

    monkeypatch.setattr(api, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4, compute capability 7\.5.*'blocked'"):
        check_triton(OnOldGPU, None, None)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(cu_seqlens_q=torch.tensor([0, 5, 19])), r"\[0, 5, 19\]: must grow from 0 to 20"),
        (dict(cu_seqlens_q=torch.tensor([0.0, 20.0])), "cu_seqlens_q has dtype torch.float32"),
        (dict(max_seqlen_q=9), "max_seqlen_q=9: the longest sequence has 15"),
        (dict(cu_seqlens_k=torch.tensor([0, 20]), max_seqlen_k=20), "cu_seqlens_k 2"),
        (dict(cu_seqlens_k=torch.tensor([0, 5, 20])), "max_seqlen_k=None"),
        (dict(pattern=dense(heads=3)), "q has 4 heads"),
        (dict(q=torch.randn(1, 20, 4, 32)), r"\(1, 20, 4, 32\): must be \[tokens"),
    ],
)
def test_packing_errors_name_the_argument(change, words):
    q, k, v = (x.detach().cpu() for x in tensors(20))
    good = dict(q=q, k=k, v=v, pattern=PATTERN, max_seqlen_q=15)
    with pytest.raises(ValueError, match=words):
        s2_attention_varlen(**good | dict(cu_seqlens_q=torch.tensor([0, 5, 20])) | change)


class OnHopper(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU; the CPU counts as a Hopper."""

    is_cuda = True


def test_what_the_hopper_kernels_leave_to_the_portable_ones():
    """Queries past the keys would see zeros; few queries of many keys are no work for a tile."""
    pattern = local_stride(heads=4, kv_heads=2, local_blocks=2, stride=3)

    def on_hopper(n, heads, d=128):
        return torch.zeros(1, n, heads, d).bfloat16().as_subclass(OnHopper)

    def why(s, t, d=128, pattern=pattern, **options):
        q, k = on_hopper(s, 4, d), on_hopper(t, 2, d)
        return hopper.why_not(q, k, k, pattern, None, **options)

    assert why(200, 200) is None and why(200, 200, d=256) is None
    assert why(200, 328) is None and why(128, 328, q_offset=200) is None and why(3, 3) is None
    past = "queries at positions past the last key"
    assert why(200, 199) == why(200, 200, q_offset=1) == why(127, 328, q_offset=202) == past
    full = dense(heads=4, kv_heads=2)
    assert why(200, 128, pattern=full, q_offset=128) is None
    assert why(200, 128, pattern=full, q_offset=127) == past  # the first query sees 128 keys, too
    assert why(200, 100, pattern=full, q_offset=128) == why(200, 128, q_offset=128) == past
    few = "fewer than 128 queries of a longer sequence"
    assert why(127, 328) == why(1, 328, q_offset=327) == why(1, 2) == few
    assert "48 to 256" in why(200, 200, d=32)
    q, k = on_hopper(200, 4), on_hopper(328, 2)
    with pytest.raises(ValueError, match=r"past the last key.*200.*328.*129; choose 'auto'"):
        hopper.takes(q, k, k, pattern, None, 129, "hopper", "forward")
    for backend in ("hopper", "auto"):
        assert hopper.takes(q, k, k, pattern, None, 128, backend, "forward")
        assert hopper.takes(q, k, k, pattern, None, 0, backend, "forward")
    assert hopper.takes(q, q, q, dense(heads=4), None, 0, "auto", "forward")
