"""Chunked prefill by the training kernels (under the interpreter without a GPU) against float64."""

import math
from dataclasses import replace

import pytest
import torch
from paged_cases import PagedCase, make_paged, truth_of

from s2_kernels import dense, local_stride, prefill, ranges, sliding_window
from s2_kernels.prefill import paged_prefill, scratch_bytes, takes_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LOCAL = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4)
BANDS = ranges(heads=4, kv_heads=4, block_size=16, bands=[(2, 1), (5, 2), (None, 4)], head_offset=1)
ENDING = ranges(heads=2, kv_heads=2, block_size=16, bands=[(2, 1), (6, 2)])
MIXED = local_stride(
    heads=6, kv_heads=3, block_size=16, local_blocks=1, stride=[2, 4, 8], dense_heads=1
)
CASES = [
    PagedCase(LOCAL, (64,), s=64),  # a whole prompt
    PagedCase(LOCAL, (50,), s=40),  # everything is near
    PagedCase(LOCAL, (256,), s=64),  # block edges
    PagedCase(LOCAL, (203, 64, 90), s=45),  # a last block in part, queries from within a block on
    PagedCase(BANDS, (235,), s=70),  # blocks between that are dead
    PagedCase(ENDING, (230,), s=33),  # no block is kept forever
    PagedCase(MIXED, (177, 47), s=36),  # a dense head: other heads have fewer rows
    PagedCase(dense(heads=4, kv_heads=2, block_size=16), (150,), s=40),
    PagedCase(sliding_window(heads=2, block_size=16, local_blocks=3), (130,), s=35),
    PagedCase(replace(LOCAL, block_size=64), (500,), s=130, d=48, dv=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_chunk_is_the_definition(case, backend):
    """Pages that died hold other heads' keys or NaN."""
    x = make_paged(case, device=DEVICE)
    pages = (x.k_pages, x.v_pages, x.page_table, case.pattern)
    out = paged_prefill(x.q, *pages, lengths=case.lengths, backend=backend)
    truth, _ = truth_of(case, x)
    assert (out.double() - truth).abs().max() < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("s", [1024, 1000])  # begins at a block, and within one
@pytest.mark.parametrize("stride", [16, 1])
def test_a_long_chunk_on_a_gpu(s, stride):
    """bfloat16 at the size that serving has, Hopper's own kernels where they are: the 2x rule."""
    shape = dict(heads=8, kv_heads=2, block_size=64)
    pattern = local_stride(**shape, local_blocks=16, stride=16) if stride > 1 else dense(**shape)
    case = PagedCase(pattern, (9000,), s=s, d=128)
    x = make_paged(case, torch.bfloat16, DEVICE)
    pages = (x.k_pages, x.v_pages, x.page_table, pattern)
    truth, _ = truth_of(case, x)
    limit = 2 * (truth_of(case, x, torch.bfloat16)[0].double() - truth).abs().max()
    for backend in ("auto", "reference"):
        out = paged_prefill(x.q, *pages, lengths=(9000,), backend=backend)
        assert (out.double() - truth).abs().max() < limit


def test_heads_are_taken_a_few_at_a_time(monkeypatch):
    """Copies of a long sequence's dense layer would not fit into what vLLM leaves."""
    case = PagedCase(MIXED, (177,), s=36)
    x = make_paged(case, device=DEVICE)
    row_bytes = 2 * 32 * 4
    needed = scratch_bytes(MIXED, row_bytes, 36, 177)
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", needed * 2 // 3)
    made = []
    rows = prefill._rows
    monkeypatch.setattr(prefill, "_rows", lambda *a: made.append(rows(*a)) or made[-1])
    place = torch.full_like(x.q, math.nan)
    pages = (x.k_pages, x.v_pages, x.page_table, MIXED)
    out = paged_prefill(x.q, *pages, lengths=(177,), backend="triton", into=place)
    assert out.data_ptr() == place.data_ptr()
    assert (out.double() - truth_of(case, x)[0]).abs().max() < 2e-5
    assert [k.shape[2] for k in made] == [2, 2, 1, 1]  # k and v of two heads, then of the last
    most = max(made[i].nbytes + made[i + 1].nbytes for i in (0, 2))
    assert most <= scratch_bytes(MIXED, row_bytes, 36, 177) <= needed * 2 // 3


def test_a_sparse_chunk_copies_little():
    """A window, and every 16th block, of 128k tokens."""
    pattern = local_stride(heads=32, kv_heads=8, block_size=64, local_blocks=16, stride=16)
    row_bytes = 2 * 128 * 2
    rows = scratch_bytes(pattern, row_bytes, 8192, 131072) / row_bytes / 8
    assert rows == (8192 + 15 * 64) + (131072 - 8192 - 15 * 64) // 16 // 64 * 64 + 64
    whole = dense(heads=32, kv_heads=8, block_size=64)
    assert scratch_bytes(whole, row_bytes, 8192, 131072) == prefill.SCRATCH_BYTES
    assert scratch_bytes(whole, row_bytes, 8192, 1 << 21) == row_bytes << 21  # a head's


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_gradient_goes_through_a_chunk(backend):
    case = PagedCase(LOCAL, (64,), s=64)
    x = make_paged(case, device=DEVICE)
    pages = (x.k_pages, x.v_pages, x.page_table, LOCAL)
    for place in (None, torch.empty_like(x.q)):
        q = x.q.clone().requires_grad_()
        out = paged_prefill(q, *pages, lengths=(64,), backend=backend, into=place)
        assert not out.requires_grad
    none = (x.k_pages, x.v_pages, x.page_table[:0], LOCAL)
    assert paged_prefill(x.q[:0], *none, lengths=(), backend=backend).shape == (0, 64, 4, 32)


def test_drafts_are_no_prefill():
    assert [takes_prefill(n, 64) for n in (1, 200, 256)] == [False, False, True]
    assert not takes_prefill(300, 256) and takes_prefill(512, 256)


def refusal(**changes) -> str:
    case = PagedCase(LOCAL, (100,), s=40)
    x = make_paged(case, device=DEVICE)
    given = dict(q=x.q, k_pages=x.k_pages, v_pages=x.v_pages, page_table=x.page_table,
                 pattern=LOCAL, lengths=(100,))  # fmt: skip
    with pytest.raises(ValueError) as error:
        paged_prefill(**{**given, **changes})
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name():
    q = torch.zeros(1, 40, 4, 32, device=DEVICE)
    assert "lengths=[30]: must be at least the 40 new tokens" in refusal(lengths=[30])
    assert "at most 128: page_table has 8 blocks" in refusal(lengths=[2000])
    assert "lengths=[90, 80]: must be 1" in refusal(lengths=[90, 80])
    assert "q has 20 tokens: must be at least 32" in refusal(q=q[:, :20])
    assert "must be [b, s, 4, 32]" in refusal(q=q[:, :, :3])
    table = torch.zeros(2, 2, 8, dtype=torch.int32, device=DEVICE)
    assert "page_table has shape (2, 2, 8)" in refusal(page_table=table)
    assert "backend='blocked'" in refusal(backend="blocked")
    assert "softmax_scale=-1" in refusal(softmax_scale=-1)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("check", [True, False])
def test_a_place_that_does_not_fit_is_refused_before_it_is_written(backend, check):
    """PyTorch would copy one sequence into many, and the kernel leave the others as they were."""
    place = torch.full((3, 40, 4, 32), math.nan, device=DEVICE)
    for into, words in (
        (place, r"into has a tensor (3, 40, 4, 32)"),
        (place[:1].half(), "must be (1, 40, 4, 32) of torch.float32"),
        (place[:1, :, :1], "(1, 40, 1, 32)"),
        (place[:1].mT.contiguous().mT, "last dimension must be contiguous"),
    ):
        assert words in refusal(into=into, backend=backend, check=check)
    assert place.isnan().all()
