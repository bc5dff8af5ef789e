"""Any block mask against the float64 specification, and what is said about odd masks."""

import math
import warnings

import numpy as np
import pytest
import torch
from attention_cases import Case, _ls, assert_as_good_as_eager, make_inputs, run_with_grads

from s2_kernels import block_sparse_attention, s2_attention
from s2_kernels.block_sparse import api
from s2_kernels.reference import masked_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def any_mask(heads, nq, nk, kept=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, nq, nk, generator=generator) < kept


def token_mask(mask, s, t, block, device):
    """Bool [heads, s, t] of a block mask and causality."""
    rows, cols = torch.arange(s), torch.arange(t)
    kept = mask[:, rows // block][:, :, cols // block] & (rows[:, None] >= cols)
    return kept.to(device)


def check(case, mask, dtype=torch.float32):
    inputs = make_inputs(case, dtype, DEVICE)
    block = case.pattern.block_size
    tokens = token_mask(mask, case.s, case.kv_len, block, DEVICE)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, block_size=block, return_lse=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = run_with_grads(attend, inputs)
    truth = run_with_grads(lambda *x: masked_attention(*x, tokens), doubles)
    eager = run_with_grads(lambda *x: masked_attention(*x, tokens), inputs)
    assert_as_good_as_eager(results, truth, eager, case)


CASES = [
    (Case("gqa", _ls(4, 2, 16, 1, 2), 75, b=2), any_mask(2, 5, 5)),
    (Case("per_query_head", _ls(4, 2, 16, 1, 2), 70), any_mask(4, 5, 5)),
    (Case("sparse", _ls(2, 2, 16, 1, 2), 70), any_mask(2, 5, 5, kept=0.15)),
    (Case("q_longer_than_k", _ls(2, 2, 16, 1, 2), 70, t=37), any_mask(2, 5, 3)),
    (Case("block64", _ls(2, 2, 64, 1, 2), 150, d=48), any_mask(2, 3, 3)),
    (Case("block128", _ls(1, 1, 128, 1, 2), 200), any_mask(1, 2, 2, kept=0.7)),
]


@pytest.mark.parametrize("case, mask", CASES, ids=lambda x: str(x) if isinstance(x, Case) else "")
def test_is_the_reference(case, mask):
    check(case, mask)


def test_float16():
    check(Case("fp16", _ls(2, 1, 32, 1, 2), 120, d=64), any_mask(2, 4, 4), torch.float16)


def test_a_lifetime_mask_is_s2_attention():
    pattern = _ls(4, 2, 16, 2, 3)
    inputs = make_inputs(Case("plain", pattern, 100), torch.float32, DEVICE)
    mask = pattern.block_mask(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is KV-efficient and leaves nobody blind
        got = run_with_grads(
            lambda *x: block_sparse_attention(*x, mask, block_size=16, return_lse=True), inputs
        )
    want = run_with_grads(
        lambda *x: s2_attention(*x, pattern, return_lse=True, backend="triton"), inputs
    )
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5, msg=name)


def test_blind_queries_give_zero_and_no_nan():
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 2] = True
    q, k, v, *_ = make_inputs(Case("blind", _ls(2, 2, 16, 1, 2), 48), torch.float32, DEVICE)
    with pytest.warns(UserWarning, match=r"4 query blocks see nothing \(first: head 0, query"):
        _, lse = out = block_sparse_attention(q, k, v, mask, block_size=16, return_lse=True)
    assert (out[0][:, :32] == 0).all() and lse[..., :32].isneginf().all()
    assert lse[..., 32:].isfinite().all()
    dlse = torch.full_like(lse, math.nan).masked_fill(lse.isfinite(), 1)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), (torch.ones_like(out[0]), dlse))
    assert all(x.isfinite().all() for x in (dq, dk, dv)) and (dq[:, :32] == 0).all()


def test_warns_once_of_blocks_picked_up_again():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 2, 0] = False  # query block 3 sees KV block 0 again
    mask[0, 0, 3] = False  # above the diagonal: not read
    q, k, v, *_ = make_inputs(Case("again", _ls(1, 1, 16, 1, 2), 64), torch.float32, DEVICE)
    with pytest.warns(UserWarning, match=r"not KV-efficient: 1 KV blocks.*KV block 0 at query b"):
        block_sparse_attention(q, k, v, mask, block_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = block_sparse_attention(q, k, v, mask.clone(), block_size=16)
    mask[0, 2, 0] = True  # the tables follow a mask that is changed in place
    assert not torch.equal(block_sparse_attention(q, k, v, mask, block_size=16), out)


def make_qkv(s=32):
    torch.manual_seed(s)
    return [torch.randn(1, s, heads, 32, device=DEVICE) for heads in (4, 2, 2)]


@pytest.mark.filterwarnings("ignore:block_mask")
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_behind_the_mask_is_followed(order):
    """numpy changes a tensor that shares its memory without a count."""
    q, k, v = make_qkv()
    array = np.array(np.tril(np.ones((2, 2, 2), dtype=bool)), order=order)
    mask = torch.from_numpy(array)
    before = block_sparse_attention(q, k, v, mask, block_size=16)
    assert torch.equal(block_sparse_attention(q, k, v, mask, block_size=16), before)
    array[:, 1, 0] = False
    after = block_sparse_attention(q, k, v, mask, block_size=16)
    assert torch.equal(after, block_sparse_attention(q, k, v, mask.clone(), block_size=16))
    assert not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:block_mask")
@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_a_mask_made_under_inference_mode(device):
    """It has no count of changes at all."""
    q, k, v = make_qkv()
    with torch.inference_mode():
        mask = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
        before = block_sparse_attention(q, k, v, mask, block_size=16)
        mask[:, 1, 0] = False
        after = block_sparse_attention(q, k, v, mask, block_size=16)
    again = block_sparse_attention(q, k, v, mask, block_size=16)
    want = block_sparse_attention(q, k, v, mask.clone(), block_size=16)
    assert torch.equal(after, want) and torch.equal(again, want) and not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:block_mask")
def test_tables_are_built_once_for_a_mask_that_stays(monkeypatch):
    built, stock = [], api._lists
    monkeypatch.setattr(api, "_lists", lambda *x: built.append(x) or stock(*x))
    q, k, v = make_qkv()
    mask = any_mask(2, 2, 2)
    for _ in range(3):
        block_sparse_attention(q, k, v, mask, block_size=16)
    assert len(built) == 2  # by query block and by KV block
    mask.logical_not_()
    block_sparse_attention(q, k, v, mask, block_size=16)
    assert len(built) == 4


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(block_mask=torch.ones(3, 2, 2, dtype=torch.bool)), r"\[4 \(or 2\), 2, 2\]"),
        (dict(block_mask=torch.ones(4, 2, 2)), "block_mask is torch.float32"),
        (dict(block_size=24), "block_size=24"),
        (dict(q=torch.randn(1, 20, 3, 32)), "q has 3 heads"),
        (dict(q=torch.randn(20, 4, 32)), r"q has shape \(20, 4, 32\)"),
        (dict(k=torch.randn(1, 20, 2, 32).half()), "float16"),
        (dict(v=torch.randn(1, 20, 2, 24)), "head size 24.*masked_attention"),
    ],
)
def test_errors_name_the_argument(change, words):
    q, k, v = (torch.randn(1, 20, h, 32) for h in (4, 2, 2))
    good = dict(q=q, k=k, v=v, block_mask=torch.ones(4, 2, 2, dtype=torch.bool), block_size=16)
    arguments = good | change
    arguments |= {name: arguments[name].to(DEVICE) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**arguments)
