"""Decoding and paged prefill: Triton (under the interpreter without a GPU) against float64."""

import math
import types
import weakref
from dataclasses import replace

import pytest
import torch
from paged_cases import PagedCase, make_paged, truth_of
from torch.autograd import forward_ad
from triton.runtime import interpreter

from s2_kernels import dense, local_stride, ranges, sliding_window
from s2_kernels import launch as launchers
from s2_kernels.cache import alive_blocks
from s2_kernels.decode import DecodeConfig, launch_decode, tile_of
from s2_kernels.launch import arrivals
from s2_kernels.paged import paged_attention, write_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LOCAL = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4)
BANDS = ranges(heads=4, kv_heads=4, block_size=16, bands=[(2, 1), (5, 2), (None, 4)], head_offset=1)
MIXED = local_stride(
    heads=6, kv_heads=3, block_size=16, local_blocks=1, stride=[2, 4, 8], dense_heads=1
)
CASES = [
    PagedCase(LOCAL, (200, 1, 16, 17, 33)),  # ragged; one token; block edges
    PagedCase(BANDS, (190, 64)),
    PagedCase(MIXED, (177, 95)),
    PagedCase(dense(heads=4, kv_heads=1, block_size=16), (100, 7)),
    PagedCase(sliding_window(heads=2, block_size=16, local_blocks=40), (130, 5)),  # L > N
    PagedCase(LOCAL, (200, 35, 3), s=3),  # a draft to verify; queries in two blocks
    PagedCase(MIXED, (90, 20), s=20),  # paged prefill, also of a whole prompt
    PagedCase(LOCAL, (70, 30), s=50),  # padding in front
    PagedCase(LOCAL, (3, 90, 2), s=50),  # and a whole tile of it
    PagedCase(replace(LOCAL, block_size=64), (300, 70), d=48, dv=64),
    PagedCase(replace(LOCAL, block_size=64), (150,), s=100),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel forgets to write holds NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(-(2**31))

    monkeypatch.setattr(torch, "empty", poisoned)


def launch(x, pattern, block_n=16, programs=5, **options):
    config = DecodeConfig(block_n, 4, 2, 1, **options)
    return launch_decode(
        x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, pattern,
        1 / math.sqrt(x.q.shape[-1]), config=config, programs=programs,
    )  # fmt: skip


def assert_close(got, truth, tolerance=2e-5):
    for value, expected in zip(got, truth, strict=True):
        same = torch.isinf(expected) & (value == expected)
        assert torch.where(same, 0, value.double() - expected).abs().max() < tolerance


def assert_same_bits(got, expected):
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_is_the_definition(case):
    """Also where the last program merges, which leaves the counters at 0: it runs three times."""
    x = make_paged(case, device=DEVICE)
    got = launch(x, case.pattern)
    assert_close(got, truth_of(case, x))
    for _ in range(3):
        assert_same_bits(launch(x, case.pattern, one_launch=True, ahead=4), got)
    assert not arrivals(x.q.device, 1).any()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's programs end in an order of their own")
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=str)
@pytest.mark.parametrize("programs", [6, 40])
def test_whoever_ends_last_merges_the_same(monkeypatch, case, programs):
    """The interpreter runs one program after the other: here the last first, or any first."""
    x = make_paged(case)
    expected = launch(x, case.pattern, programs=programs)
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx
    for order in (range(programs)[::-1], torch.randperm(programs).tolist()):
        ran = []

        def permuted(i, *rest, order=order, ran=ran):
            ran.append(order[i])
            set_grid_idx(order[i], *rest)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", permuted)
            got = launch(x, case.pattern, programs=programs, one_launch=True)
        assert_same_bits(got, expected)
        assert ran == list(order)
    assert not arrivals(x.q.device, 1).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_definition(case):
    x = make_paged(case)
    got = paged_attention(
        x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, case.pattern,
        return_lse=True, backend="reference",
    )  # fmt: skip
    assert_close(got, truth_of(case, x))


@pytest.mark.parametrize(("block_n", "programs"), [(16, 1), (32, 7), (64, 2), (16, 9)])
def test_any_tile_and_any_split(block_n, programs):
    """Several pages a tile, part of a page, one program, more programs than tiles."""
    cases = [replace(CASES[0], lengths=(90, 1, 33)), replace(CASES[5], lengths=(70, 3)),
             replace(CASES[8], lengths=(140,))]  # fmt: skip
    if programs == 9:
        cases = [replace(CASES[0], lengths=(20,))]
    for case in cases:
        x = make_paged(case, device=DEVICE)
        got = launch(x, case.pattern, block_n, programs)
        assert_close(got, truth_of(case, x))
        one = launch(x, case.pattern, block_n, programs, one_launch=True, ahead=2)
        assert_same_bits(one, got)
    assert_same_bits(launch(x, case.pattern, block_n, programs), got)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[8]], ids=str)
def test_new_tokens_are_written_where_they_belong(case, backend):
    expected, x = make_paged(case, device=DEVICE), make_paged(case, device=DEVICE, written=False)
    b, s = x.q.shape[:2]
    k, v = (y.new_zeros(b, s, *y.shape[2:]) for y in (x.k, x.v))
    for i, length in enumerate(case.lengths):
        real = min(s, length)
        k[i, s - real :] = x.k[i, length - real : length]
        v[i, s - real :] = x.v[i, length - real : length]
    write_pages(k, v, x.k_pages, x.v_pages, x.page_table, x.lengths, case.pattern, backend=backend)
    for got, wanted in ((x.k_pages, expected.k_pages), (x.v_pages, expected.v_pages)):
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 100, 128])
def test_a_prompt_leaves_only_what_is_alive(tokens, backend):
    """Blocks that are dead after the prompt have no page and are not written."""
    pattern, size = BANDS, BANDS.block_size
    k = torch.randn(1, tokens, 4, 32, device=DEVICE)
    alive = [
        (h, b) for h, rule in enumerate(pattern.rules) for b in alive_blocks(rule, tokens, size)
    ]
    pool = torch.full((len(alive) + 1, size, 32), math.nan, device=DEVICE)
    table = torch.full((1, 4, 8), len(alive), dtype=torch.int32)  # the dead: a page to watch
    for page, (head, block) in enumerate(alive):
        table[0, head, block] = page
    lengths = torch.tensor([tokens], dtype=torch.int32, device=DEVICE)
    write_pages(
        k, k + 1, pool, pool_v := pool.clone(), table.to(DEVICE), lengths, pattern,
        alive_only=True, backend=backend,
    )  # fmt: skip
    for page, (head, block) in enumerate(alive):
        rows = k[0, block * size : (block + 1) * size, head]
        assert torch.equal(pool[page, : len(rows)], rows)
        assert torch.equal(pool_v[page, : len(rows)], rows + 1)
        assert pool[page, len(rows) :].isnan().all()
    assert pool[-1].isnan().all()


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 200, 0)])
def test_a_sequence_without_a_token_has_no_output(one, lengths):
    """As a CUDA graph has them for sequences that a step does not need."""
    x = make_paged(replace(CASES[0], lengths=(200, 200, 200)), device=DEVICE)
    whole = launch(x, LOCAL)
    x.lengths.copy_(torch.tensor(lengths))
    out, lse = launch(x, LOCAL, one_launch=one)
    for i, length in enumerate(lengths):
        if length:
            assert (out[i] - whole[0][i]).abs().max() < 2e-5
        else:
            assert not out[i].any() and (lse[i] == -math.inf).all()


def test_a_chunk_in_several_launches(monkeypatch):
    """More query tiles than a launch counts: the queries go in slices."""
    monkeypatch.setattr("s2_kernels.decode.MOST_UNITS", 2)
    case = PagedCase(LOCAL, (90,), s=80)
    x = make_paged(case, device=DEVICE)
    for one in (False, True):
        assert_close(launch(x, case.pattern, one_launch=one), truth_of(case, x))


def test_a_captured_launch_has_counters_of_its_own(monkeypatch):
    """Others share those of their stream; a graph may run beside any of them, on any stream."""
    device, stream, capturing = torch.device("cuda", 7), [1], [False]
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    active = types.SimpleNamespace(get_current_stream=lambda index: stream[0])
    monkeypatch.setattr("s2_kernels.launch.driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr("s2_kernels.launch._ARRIVALS", {})
    monkeypatch.setattr("s2_kernels.launch._RESERVES", {})

    def place(count=8):
        x = arrivals(device, count)
        assert len(x) >= count and not x.any() and x.data_ptr() % 16 == 0
        return x, range(x.data_ptr(), x.data_ptr() + 4 * len(x))

    mine, at = place()
    assert place()[1] == at and place(4096)[1] == at
    larger, _ = place(5000)
    stream[0] = 2
    other, elsewhere = place()
    capturing[0] = True
    taken = [place(count) for count in (8, 8, 4096)]
    ranges = [at, elsewhere, *(x[1] for x in taken)]
    assert all(not set(a) & set(b) for i, a in enumerate(ranges) for b in ranges[:i])
    reserve = launchers._RESERVES[device]
    while len(reserve.left) >= 4096:  # more than a reserve holds: the graph has a node more
        taken.append(place(4096))
    place(4096)
    memory, addresses = weakref.ref(taken[0][0]._base), [x[1] for x in taken]
    taken.clear()  # a graph knows their addresses only
    capturing[0] = False
    place()  # which fills it again
    assert len(reserve.left) == reserve.SIZE
    assert memory() is not None  # and gives nobody else the memory of a graph's counters
    capturing[0] = True
    assert not any(set(place()[1]) & set(at) for at in addresses)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_gradient_goes_through_pages(backend):
    """Neither of queries nor, by what is written, of the pool."""
    x = make_paged(CASES[0], device=DEVICE)
    pages = (x.k_pages, x.v_pages, x.page_table, x.lengths, LOCAL)
    q = x.q.clone().requires_grad_()
    out, lse = paged_attention(q, *pages, return_lse=True, backend=backend)
    assert not out.requires_grad and not lse.requires_grad
    new = torch.randn(*x.q.shape[:2], LOCAL.kv_heads, 32, device=DEVICE, requires_grad=True)
    write_pages(new, new, *pages, backend=backend)
    assert not x.k_pages.requires_grad and not x.v_pages.requires_grad
    with pytest.raises(RuntimeError, match=r"no transform.*no derivative goes through pages"):
        torch.func.grad(lambda y: paged_attention(y, *pages, backend=backend).sum())(x.q)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="in forward mode: no deriv"):
        paged_attention(forward_ad.make_dual(x.q, x.q), *pages, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_sequences_give_no_output(backend):
    x = make_paged(CASES[0], device=DEVICE)
    pages = (x.k_pages, x.v_pages, x.page_table[:0], x.lengths[:0], LOCAL)
    out, lse = paged_attention(x.q[:0], *pages, return_lse=True, backend=backend)
    assert out.shape == (0, *x.q.shape[1:3], 32) and out.dtype == x.q.dtype
    assert lse.shape == (0, *x.q.shape[2:0:-1]) and lse.dtype == torch.float32
    before = x.k_pages.clone()
    write_pages(x.k[:0, :1], x.v[:0, :1], *pages, backend=backend)
    assert torch.equal(x.k_pages.nan_to_num(7.0), before.nan_to_num(7.0))


def refusal(**changes) -> str:
    x = vars(make_paged(CASES[0])) | {"pattern": LOCAL, "backend": "reference"} | changes
    names = ("q", "k_pages", "v_pages", "page_table", "lengths", "pattern")
    with pytest.raises(ValueError) as error:
        paged_attention(*(x[name] for name in names), backend=x["backend"])
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name(monkeypatch):
    x = make_paged(CASES[0])
    assert "k_pages has shape" in refusal(pattern=replace(LOCAL, block_size=32))
    assert "4 heads" not in refusal(q=x.q[:, :, :2]) and "q has shape" in refusal(q=x.q[:, :, :2])
    assert "page_table has shape" in refusal(page_table=x.page_table[:, :1])
    assert "int32" in refusal(lengths=x.lengths.long())
    assert "13 blocks" not in refusal(lengths=x.lengths + 100)
    assert "give it more" in refusal(lengths=x.lengths + 100)
    assert "must be one of" in refusal(backend="hopper")
    assert "k_pages is torch.float16" in refusal(k_pages=x.k_pages.half())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a GPU" in refusal(backend="triton")
    with pytest.raises(ValueError, match="start=0: must be 1 or more"):
        DecodeConfig(64, 4, 4, 2, start=0)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 64, 96])
def test_few_tiles_serve_every_number_of_tokens(group):
    """A kernel is compiled for each tile, and a server meets every number of new tokens."""
    tiles = {tokens: tile_of(tokens, group) for tokens in range(1, 256)}
    assert len(set(tiles.values())) <= 7
    for tokens, (rows, held) in tiles.items():
        assert held * group <= rows and rows & (rows - 1) == 0
        assert tokens <= held < 2 * tokens or 2 * held * group > 64
