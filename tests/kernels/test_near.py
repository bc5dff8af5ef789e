"""Keys of which, far back, only those that are kept forever are in memory: each backend, by cases.

What the whole sequence gives is the yardstick: `near` changes where keys lie, and nothing else.
"""

import contextlib
import math

import pytest
import torch
from attention_cases import _ls, assert_as_good_as_eager, make_inputs, reference_results
from hypothesis import given
from hypothesis import strategies as st
from near_cases import NEAR_CASES, NearCase, check_into
from pattern_cases import any_pattern
from torch.utils._python_dispatch import TorchDispatchMode

from s2_kernels import FOREVER, s2_attention, s2_attention_backward, schedule
from s2_kernels.backward import launch_backward
from s2_kernels.configs import TileConfig
from s2_kernels.forward import launch_forward
from s2_kernels.near import Near, forever_before

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both_ways(case: NearCase, dtype, fill=1e3):
    """Inputs of the whole sequence, and k and v of what is in memory."""
    inputs = make_inputs(case.case, dtype, DEVICE)
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    return inputs, (q, case.in_memory(k, fill), case.in_memory(v, fill), dout, dlse)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("case", NEAR_CASES, ids=str)
def test_as_with_all_keys_in_memory(case, backend):
    inputs, (q, k, v, dout, dlse) = both_ways(case, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    common = dict(q_offset=case.case.q_offset, return_lse=True, backend=backend)
    out, lse = s2_attention(*leaves, case.pattern, near=case.near, **common)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    whole = s2_attention(*inputs[:3], case.pattern, **common)
    expected = (*whole, *torch.autograd.grad(whole, inputs[:3], (dout, dlse)))
    got = out, lse, dq, case.at_positions(dk), case.at_positions(dv)
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() < 1e-12
    nowhere = (case.rows < 0).T
    assert not dk[:, nowhere].any() and not dv[:, nowhere].any()


def by_triton(case, x, config=None, **options):
    """out, lse, dq, dk and dv by the portable kernels, dk and dv at the keys' positions."""
    q, k, v, dout, dlse = x
    config = config and TileConfig.parse(config)
    common = (case.pattern, 1 / math.sqrt(case.d), case.case.q_offset)
    out, lse = launch_forward(q, k, v, *common, near=case.near, config=config)
    tiles = dict(dkdv_config=config, dq_config=config, near=case.near, tma_add=DEVICE == "cuda")
    grads = launch_backward(q, k, v, out, lse, dout, dlse.float(), *common, **tiles, **options)
    nowhere = (case.rows < 0).T
    assert not any(x[:, nowhere].any() for x in grads[1:])
    dk, dv = (case.at_positions(x) for x in grads[1:])
    return dict(out=out, lse=lse, dq=grads[0], dk=dk, dv=dv)


@pytest.mark.parametrize("case", NEAR_CASES[2::3], ids=str)
def test_portable_kernels_give_the_same_bits_as_with_all_keys(case):
    """Tiles are visited in the same order, wherever they lie. (Columns that nobody sees are cut
    otherwise, so that dk and dv may differ by the order of their sums.)"""
    inputs, x = both_ways(case, torch.float32)
    got = by_triton(case, x)
    assert_as_good_as_eager(got, *reference_results(case.case, inputs), case.case)
    q, k, v, dout, dlse = (t.detach() for t in inputs)
    common = (case.pattern, 1 / math.sqrt(case.d), case.case.q_offset)
    out, lse = launch_forward(q, k, v, *common)
    dq, *_ = launch_backward(q, k, v, out, lse, dout, dlse.float(), *common, tma_add=False)
    for name, expected in dict(out=out, lse=lse, dq=dq).items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize(("case", "config"), [
    *((case, "64x64w4s2ptr") for case in NEAR_CASES[::3]),
    *((case, "32x16w4s2tma") for case in NEAR_CASES[1::3]),
], ids=str)  # fmt: skip
def test_portable_kernels_in_other_tiles(case, config):
    """Tiles that gather several blocks, and parts of blocks through descriptors."""
    inputs, x = both_ways(case, torch.float16)
    results = by_triton(case, x, config)
    assert_as_good_as_eager(results, *reference_results(case.case, inputs), case.case)


@pytest.mark.parametrize("case", [NEAR_CASES[0], NEAR_CASES[3]], ids=str)
def test_portable_columns_in_pieces_and_dq_in_one_kernel(case, monkeypatch):
    monkeypatch.setattr(schedule, "SHORTEST_PIECE", 2)
    inputs, x = both_ways(case, torch.float32)
    truth, eager = reference_results(case.case, inputs)
    for options in (dict(slots=10**6), dict(deterministic=False)):
        results = by_triton(case, x, "32x16w4s2tma", **options)
        assert_as_good_as_eager(results, truth, eager, case.case)


@pytest.mark.parametrize(("case", "backend", "dtype"), [
    *((case, "blocked", torch.float64) for case in NEAR_CASES[:3]),
    (NEAR_CASES[1], "reference", torch.float64),
    *((case, "triton", torch.float16) for case in NEAR_CASES[1:9:3]),
], ids=str)  # fmt: skip
def test_results_where_they_belong(case, backend, dtype):
    if backend == "reference":
        q, k, v = (x.detach() for x in make_inputs(case.case, dtype)[:3])
        place = torch.full_like(q, math.nan)
        options = dict(q_offset=case.case.q_offset, backend=backend)
        assert s2_attention(q, k, v, case.pattern, into=place, **options) is place
        assert torch.equal(place, s2_attention(q, k, v, case.pattern, **options))
    else:
        check_into(case, dtype, backend, DEVICE)


class Looks(TorchDispatchMode):
    """Sees the operators; they change no argument."""

    seen = frozenset()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen |= {op.name()}
        return op(*args, **kwargs or {})


@pytest.mark.parametrize(("columns", "mode"), [(1, contextlib.nullcontext), (8, Looks)])
def test_places_that_tma_does_not_take_and_seen_ones_are_filled_by_a_copy(columns, mode):
    case = NEAR_CASES[1]
    q, k, v, dout, _ = (x.detach() for x in make_inputs(case.case, torch.float16, DEVICE))
    common = dict(q_offset=case.case.q_offset, backend="triton")
    out, lse = s2_attention(q, k, v, case.pattern, return_lse=True, **common)
    grads = s2_attention_backward(q, k, v, out, lse, dout, case.pattern, **common)
    size = case.d + columns
    places = [x.new_empty(*x.shape[:-1], size)[..., : case.d] for x in (q, k, v)]
    with mode() as looks:
        assert torch.equal(s2_attention(q, k, v, case.pattern, into=places[0], **common), out)
        options = dict(into=tuple(places), **common)
        got = s2_attention_backward(q, k, v, out, lse, dout, case.pattern, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, grads, strict=True))
    ours = {"s2_kernels::attention", "s2_kernels::attention_backward"}
    assert looks is None or ours <= looks.seen


def test_places_of_other_shapes_and_places_with_a_gradient_are_refused():
    pattern = _ls(2, 2, 16, 2, 4)
    q = torch.zeros(1, 32, 2, 32)
    out, lse = torch.zeros_like(q), torch.zeros(1, 2, 32)
    wrong = {
        r"into has a tensor \(1, 32, 2, 16\).*must be \(1, 32, 2, 32\)": out[..., :16],
        "into has a tensor .* of torch.float64": out.double(),
        "into has strides .*last dimension": torch.zeros(1, 32, 32, 2).transpose(2, 3),
    }
    for words, place in wrong.items():
        with pytest.raises(ValueError, match=words):
            s2_attention(q, q, q, pattern, into=place)
        with pytest.raises(ValueError, match=words):
            s2_attention_backward(q, q, q, out, lse, q, pattern, into=(out, place, out))
    leaf = q.clone().requires_grad_()
    with pytest.raises(ValueError, match="into takes no part in autograd"):
        s2_attention(leaf, q, q, pattern, into=out)
    with torch.no_grad():
        assert s2_attention(leaf, q, q, pattern, into=out) is out


@given(any_pattern(), st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_rows_and_blocks_are_inverse(pattern, start, length, gap):
    row = max(forever_before(rule, start) for rule in pattern.rules) + gap
    near, n_blocks = Near(start, row), start + length
    found = near.blocks(pattern, row + length)
    for head, rule in enumerate(pattern.rules):
        kept = [k for k in range(n_blocks) if k >= start or rule.lifetime(k) == FOREVER]
        assert found[head][found[head] >= 0].tolist() == kept
        blocks = torch.arange(n_blocks).numpy()
        assert [*blocks[near.is_there(rule, blocks)]] == kept
        rows = near.rows(rule, torch.tensor(kept).numpy())
        assert found[head][torch.tensor(rows)].tolist() == kept


WRONG = {
    "start": (Near(0, 0), "near.start=0: must be at least 1 block"),
    "row": (Near(8, 1), "near.row=1: a head keeps 2 blocks before near.start=8 forever"),
    "tokens": (Near(8, 99), "near.row=99: k has 160 tokens"),
    "window": (Near(9, 3), "near must begin at or before block 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name):
    near, words = WRONG[name]
    pattern = _ls(2, 2, 16, 2, 4)
    q, k = torch.zeros(1, 32, 2, 32), torch.zeros(1, 160, 2, 32)
    out, lse = torch.zeros_like(q), torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match=words):
        s2_attention(q, k, k, pattern, q_offset=9 * 16, near=near)
    with pytest.raises(ValueError, match=words):
        s2_attention_backward(q, k, k, out, lse, q, pattern, q_offset=9 * 16, near=near)
