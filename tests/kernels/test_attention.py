"""The PyTorch backend against the float64 specification, and the checks of `s2_attention`."""

import subprocess
import sys

import pytest
import torch
from attention_cases import (
    CASES,
    assert_as_good_as_eager,
    make_inputs,
    reference_results,
    run_with_grads,
)

from s2_kernels import dense, local_stride, s2_attention
from s2_kernels.blocked import kept_slices


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocked_is_the_reference(case, dtype):
    inputs = make_inputs(case, dtype)

    def attend(q, k, v):
        return s2_attention(
            q, k, v, case.pattern, q_offset=case.q_offset, return_lse=True, backend="blocked"
        )

    truth, eager = reference_results(case, inputs)
    results = run_with_grads(attend, inputs)
    if dtype == torch.float64:  # exact but for the order of additions
        for name, true in truth.items():
            torch.testing.assert_close(results[name], true, rtol=1e-11, atol=1e-11, msg=name)
    else:
        assert_as_good_as_eager(results, truth, eager, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_are_the_mask(case):
    n = 23
    mask = case.pattern.block_mask(n)
    for head, rule in enumerate(case.pattern.rules):
        for i in range(n):
            kept = [k for s in kept_slices(rule, i, n) for k in range(n)[s]]
            assert sorted(kept) == mask[head, i].nonzero().flatten().tolist()
            assert len(set(kept)) == len(kept)


def test_backward_without_lse_gradient():
    case = CASES[1]
    inputs = make_inputs(case, torch.float32)

    def attend(q, k, v):
        return s2_attention(q, k, v, case.pattern, return_lse=True)

    truth, eager = reference_results(case, inputs, lse_gradient=False)
    assert_as_good_as_eager(run_with_grads(attend, inputs, lse_gradient=False), truth, eager, case)


def test_megatron_layout_goes_in_without_a_copy():
    pattern = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4)
    q, k, v = (torch.randn(90, 2, h, 16) for h in (4, 2, 2))  # [s, b, h, d]
    a = s2_attention(*(x.transpose(0, 1) for x in (q, k, v)), pattern)
    b = s2_attention(*(x.transpose(0, 1).contiguous() for x in (q, k, v)), pattern)
    assert torch.equal(a, b)


def test_infinite_lifetimes_are_dense_attention():
    q, k, v = (torch.randn(1, 200, 4, 32) for _ in range(3))
    out = s2_attention(q, k, v, local_stride(heads=4, local_blocks=2, stride=1))
    sparse = s2_attention(q, k, v, local_stride(heads=4, local_blocks=1, stride=3))
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, sdpa, rtol=1e-5, atol=1e-5)
    assert (sparse - sdpa).abs().max() > 0.1


MEMORY_PROBE = """
import torch
from s2_kernels import local_stride, s2_attention
pattern = local_stride(heads=8, local_blocks=8, stride=32)
n = 16384
assert pattern.density(n) < 0.10, pattern.density(n)
q, k, v = (torch.randn(1, n, 8, 64, requires_grad=True) for _ in range(3))
s2_attention(q[:, :512], k[:, :512], v[:, :512], pattern).sum().backward()
def highest():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the highest so far, which may be that of the process that forked
before = highest()
s2_attention(q, k, v, pattern).sum().backward()
print((highest() - before) * 1024)
"""


def test_peak_memory_at_16k_is_below_a_fifth_of_the_scores():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True
    )
    peak, scores = int(done.stdout), 8 * 16384**2 * 4
    print(f"peak {peak / 2**20:.0f} MiB, dense scores {scores / 2**20:.0f} MiB")
    assert 0 < peak < scores / 5


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(backend="tritn"), "tritn"),
        (dict(q_offset=-1), "q_offset=-1"),
        (dict(q=torch.randn(1, 8, 3, 16)), "q has 3 heads"),
        (dict(q=torch.randn(8, 4, 16)), r"q has shape \(8, 4, 16\)"),
        (dict(k=torch.randn(1, 8, 4, 32)), r"\(1, 8, 4, 32\)"),
        (dict(k=torch.randn(1, 8, 4, 16).half()), "float16"),
        (dict(v=torch.ones(1, 8, 4, 16, dtype=torch.int32)), "int32"),
    ],
)
def test_errors_name_the_argument(change, words):
    q, k, v = (torch.randn(1, 8, 4, 16) for _ in range(3))
    arguments = dict(q=q, k=k, v=v, pattern=dense(heads=4)) | change
    with pytest.raises(ValueError, match=words):
        s2_attention(**arguments)


def test_triton_on_cpu_tensors_names_blocked(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which conftest.py sets without a GPU
    q, k, v = (torch.randn(1, 8, 4, 32) for _ in range(3))
    with pytest.raises(ValueError, match="blocked"):
        s2_attention(q, k, v, dense(heads=4), backend="triton")
