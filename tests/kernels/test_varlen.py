"""Packed sequences against one float64 call per sequence: out, lse, dq, dk, dv."""

import itertools
import math

import pytest
import torch
from attention_cases import Case, _ls, assert_as_good_as_eager, run_with_grads

from s2_kernels import ranges, s2_attention_varlen
from s2_kernels.hopper.packed import packed_slots, term_rows
from s2_kernels.reference import masked_attention, token_mask
from s2_kernels.schedule import column_work, round_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [37, 1, 0, 50]
GQA = _ls(4, 2, 16, 1, 3)
RANGES = ranges(heads=2, block_size=16, bands=[(1, 1), (3, 2)])


def each_sequence(pattern, q_lengths, k_lengths):
    """The specification: `masked_attention` per sequence."""

    def attend(q, k, v):
        parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        outs, lses = [], []
        for q_i, k_i, v_i in parts:
            mask = token_mask(pattern, len(q_i), len(k_i), device=q.device)
            if len(k_i) == 0:
                out = q_i * 0
                lse = q_i.new_full((q_i.shape[1], len(q_i)), -math.inf)
            else:
                out, lse = (x[0] for x in masked_attention(q_i[None], k_i[None], v_i[None], mask))
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)

    return attend


def check(pattern, q_lengths, k_lengths, dtype=torch.float32, d=32, **options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype)

    rows = sum(q_lengths)
    q = draw(rows, pattern.heads, d).requires_grad_()
    k, v = (draw(sum(k_lengths), pattern.kv_heads, d).requires_grad_() for _ in range(2))
    inputs = (q, k, v, draw(*q.shape), draw(pattern.heads, rows))
    lengths = dict(cu_seqlens_q=starts(q_lengths), max_seqlen_q=max(q_lengths))
    if k_lengths != q_lengths:
        lengths |= dict(cu_seqlens_k=starts(k_lengths), max_seqlen_k=max(k_lengths))

    def attend(q, k, v):
        return s2_attention_varlen(q, k, v, pattern, return_lse=True, **lengths, **options)

    specification = each_sequence(pattern, q_lengths, k_lengths)
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    truth, eager = run_with_grads(specification, doubles), run_with_grads(specification, inputs)
    case = Case("packed", pattern, s=rows)
    assert_as_good_as_eager(run_with_grads(attend, inputs), truth, eager, case)


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", ["triton", "blocked", "reference"])
@pytest.mark.parametrize("pattern", [GQA, RANGES], ids=["gqa", "ranges"])
def test_packed_is_each_sequence(pattern, backend):
    check(pattern, LENGTHS, LENGTHS, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_queries_and_keys_of_different_lengths(backend):
    check(GQA, [20, 3, 33, 17], [33, 3, 20, 0], backend=backend)


def test_packed_float16():
    check(_ls(2, 2, 16, 1, 2), LENGTHS, LENGTHS, torch.float16, backend="triton")


def test_packed_adding_up_dq():
    check(GQA, LENGTHS, LENGTHS, backend="triton", deterministic=False)


def test_new_lengths_reuse_the_work_list():
    """A new work list is copied to the device, and the copy waits: not in every batch."""
    assert [round_up(n) for n in (1, 15, 16, 17, 31, 33, 1000)] == [1, 15, 16, 18, 32, 36, 1024]
    assert all(n <= round_up(n) <= n * 9 / 8 for n in range(1, 5000))
    for lengths in ([100, 28], [97, 31], [20, 104, 4]):
        check(GQA, lengths, lengths, backend="triton")
        if lengths == [100, 28]:
            before = column_work.cache_info().misses
    assert (
        column_work.cache_info().misses == before + 1
    )  # for three documents; 97 and 104 are 100's


@pytest.mark.skipif(DEVICE != "cpu", reason="in the interpreter, which is off with a GPU")
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("lengths", [[300, 1, 0, 128, 257], [5], [64] * 150])
def test_slots_of_packed_sequences(lengths, extra):
    """Every 128 tokens of every sequence once; row terms 16-byte aligned and apart."""
    tokens = sum(lengths)
    slots = packed_slots(starts(lengths), tokens, extra)
    expected, ends = [], [0]
    for i, (start, n) in enumerate(zip(starts(lengths).tolist(), lengths, strict=False)):
        terms = (start // 4 + i) * 4
        expected += [[u, start, n, terms] for u in range(-(-n // 128) + extra) if n]
        assert terms % 4 == 0 and terms >= ends[-1]
        ends.append(terms + n)
    assert slots.tolist() == expected + [[0] * 4] * (len(slots) - len(expected))
    assert ends[-1] <= term_rows(tokens, len(lengths))
