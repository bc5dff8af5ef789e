"""How the kernels run on a GPU: compiled, captured, by plan, the same bits, memory."""

from unittest import mock

import pytest
import torch
from attention_cases import _ls
from test_triton_gpu import poison  # noqa: F401 - a fixture

from s2_kernels import plans, s2_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
]


def tensors(n, heads=8, d=128, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, n, heads, d, device="cuda", dtype=dtype) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], dout


def test_torch_compile():
    pattern = _ls(8, 8, 64, 8, 8)

    def layer(q, k, v):
        return torch.nn.functional.silu(s2_attention(q * 0.5, k, v, pattern)).flatten(2)

    compiled = torch.compile(layer, fullgraph=True)
    for n in (2048, 3001):
        leaves, dout = tensors(n)
        dout = dout.flatten(2)
        got, want = (torch.autograd.grad(f(*leaves), leaves, dout) for f in (compiled, layer))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_cuda_graph(backend):
    """A captured call runs again with what its counters and descriptors were made of."""
    (q, k, v), dout = tensors(2000)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = s2_attention(*leaves, _ls(8, 8, 64, 4, 8), backend=backend)
        return out, *torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for x in (q, k, v, dout):
            x.data.normal_()
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def passes(leaves, dout, **options):
    """Results of a forward and a backward pass, and how many of the two ran by plan."""
    made, run = [], plans.Plan.run

    def counted(plan, *arguments):
        made.append(run(plan, *arguments))
        return made[-1]

    with mock.patch.object(plans.Plan, "run", counted):
        out = s2_attention(*leaves, _ls(8, 8, 64, 4, 8), **options)
        results = out, *torch.autograd.grad(out, leaves, dout)
    return results, sum(x is not None for x in made)


@pytest.mark.skipif(
    not plans.prepares_launches(plans.triton.__version__),
    reason="plans are made with Triton 3.6 only",
)
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_plan_computes_what_the_launchers_do(backend, d, monkeypatch):
    """On new tensors, another stream, the last GPU, and addresses that are no multiples of 16."""
    for device in {0, torch.cuda.device_count() - 1}:  # the current one stays 0
        for i in range(6):
            leaves, dout = tensors(2100 + 100 * device, d=d)
            if i == 5 and backend == "triton":
                store = leaves[0].new_empty(leaves[0].numel() + 1)
                moved = store[1:].view_as(leaves[0]).copy_(leaves[0].detach())
                leaves[0] = moved.detach().requires_grad_()
            leaves = [x.detach().to(f"cuda:{device}").requires_grad_() for x in leaves]
            dout = dout.to(f"cuda:{device}")
            torch.cuda.synchronize(device)
            monkeypatch.setattr(plans, "ON", False)
            with torch.cuda.device(device):
                want, by_plan = passes(leaves, dout, backend=backend)
            monkeypatch.setattr(plans, "ON", True)
            torch.cuda.synchronize(device)
            with torch.cuda.stream(torch.cuda.Stream(device) if i == 4 else None):
                got, by_plan = passes(leaves, dout, backend=backend)
            torch.cuda.synchronize(device)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            if 2 <= i < 5:
                assert by_plan == 2


@pytest.mark.parametrize("kv_heads", [8, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_the_same_bits_every_time(backend, kv_heads):
    pattern = _ls(8, kv_heads, 64, 4, 8)
    leaves, dout = tensors(20_000)
    leaves[1:] = [x[:, :, :kv_heads].detach().contiguous().requires_grad_() for x in leaves[1:]]

    def run():
        out, lse = s2_attention(*leaves, pattern, return_lse=True, backend=backend)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(
    "backend, deterministic", [("auto", True), ("triton", True), ("triton", False)]
)
def test_peak_memory(backend, deterministic):
    """Inputs, outputs, gradients, lse and delta, plus 5%."""
    pattern = _ls(32, 32, 64, 16, 32)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    leaves, dout = tensors(32_768, heads=32)
    torch.cuda.reset_peak_memory_stats()
    out, lse = s2_attention(
        *leaves, pattern, return_lse=True, backend=backend, deterministic=deterministic
    )
    grads = torch.autograd.grad(out, leaves, dout)
    peak = torch.cuda.max_memory_allocated() - before
    kept = (*leaves, dout, out, lse, *grads, lse)
    needed = sum(x.numel() * x.element_size() for x in kept)
    print(f"peak {peak / 2**20:.0f} MiB, needed {needed / 2**20:.0f} MiB: {peak / needed:.3f}")
    assert peak <= 1.05 * needed
