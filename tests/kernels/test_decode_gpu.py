"""Parts merged by the last program that wrote one, where programs do run side by side."""

import dataclasses

import pytest
import torch
from paged_cases import PagedCase, make_paged

from s2_kernels import decode, hopper, launch, local_stride, paged
from s2_kernels.launch import arrivals
from s2_kernels.paged import paged_attention, write_pages
from s2_kernels.plans import Plans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PATTERN = local_stride(heads=32, kv_heads=8, local_blocks=4, stride=4)
CASES = [
    PagedCase(PATTERN, (3000,), d=128),  # as many even pieces of each unit
    PagedCase(PATTERN, (2500, 64, 700, 1, 1800), d=128),  # a flat list
    PagedCase(PATTERN, (900, 40), s=100, d=128),
]


@pytest.fixture(params=CASES, ids=str)
def pages(request):
    return make_paged(request.param, dtype=torch.bfloat16, device="cuda")


@pytest.fixture(params=["portable", "hopper"])
def kernel(request, monkeypatch):
    """Which one attends; the portable one merges in one launch."""
    monkeypatch.setattr(paged, "_PLANS", Plans())
    if request.param == "portable":
        config = decode.decode_config

        def merged(*args):
            return dataclasses.replace(config(*args), one_launch=True)

        monkeypatch.setattr(decode, "decode_config", merged)
        monkeypatch.setattr(hopper, "takes_decode", lambda *problem: False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper")
    return request.param


def by_two_launches(x):
    s, group = x.q.shape[1], PATTERN.heads // PATTERN.kv_heads
    rows, _ = decode.tile_of(s, group)
    config = decode.decode_config(128, 128, rows, PATTERN.block_size, x.q.dtype, x.q.device)
    config = dataclasses.replace(config, one_launch=False)
    inputs = (x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, PATTERN)
    return decode.launch_decode(*inputs, 128**-0.5, config=config)


def expected_of(x, kernel):
    """What every launch must give, bit by bit: two launches', or one's that ran alone."""
    expected = by_two_launches(x)
    if kernel == "portable" or not hopper.takes_decode(x.q, x.k_pages, x.v_pages, PATTERN):
        return expected
    alone = attend(x)
    for got, near in zip(alone, expected, strict=True):
        torch.testing.assert_close(got, near, atol=8e-3, rtol=8e-3)
    return alone


def attend(x):
    inputs = (x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, PATTERN)
    return paged_attention(*inputs, return_lse=True)


def count_others(got, expected, others) -> None:
    """Adds to `others`, on the GPU, how many numbers have other bits."""
    for value, wanted in zip(got, expected, strict=True):
        others += (value != wanted).sum()


def test_whoever_ends_last_merges_the_same(pages, kernel):
    """10,000 launches, whose parts lie at the same addresses again and again."""
    expected = expected_of(pages, kernel)
    others = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(3):
        count_others(attend(pages), expected, others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            count_others(attend(pages), expected, others)
    for _ in range(500):
        graph.replay()
    assert others.item() == 0
    assert not arrivals(torch.device("cuda", torch.cuda.current_device()), 1).any()


def test_launches_side_by_side_keep_to_themselves(kernel):
    """Two streams and a graph on a third: none counts the parts of another."""
    xs = [make_paged(case, dtype=torch.bfloat16, device="cuda") for case in CASES]
    expected = [expected_of(x, kernel) for x in xs]
    others = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for x in xs:
        attend(x), attend(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            count_others(attend(xs[0]), expected[0], others[0])
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        for i in (1, 2):
            with torch.cuda.stream(streams[i]):
                count_others(attend(xs[i]), expected[i], others[i])
    torch.cuda.synchronize()
    assert [x.item() for x in others] == [0, 0, 0]


def test_a_graph_keeps_its_counters_when_the_reserve_is_filled_again(monkeypatch, kernel):
    """Launches between captures fill it; what the first graph counts with must stay its own."""
    x = make_paged(CASES[1], dtype=torch.bfloat16, device="cuda")
    expected, others = expected_of(x, kernel), torch.zeros((), dtype=torch.int64, device="cuda")
    monkeypatch.setattr(launch, "_RESERVES", {})
    monkeypatch.setattr(launch._Reserve, "SIZE", 64)
    graphs = [torch.cuda.CUDAGraph() for _ in range(4)]
    for graph in graphs:
        count_others(attend(x), expected, others)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            count_others(attend(x), expected, others)
    written = [torch.full((64,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    for graph in graphs * 5:
        graph.replay()
    assert others.item() == 0
    assert all((y == 7).all() for y in written)


def test_new_keys_are_those_that_the_launch_before_has_written(kernel):
    """Attention right behind `write_pages` may start before that has ended."""
    case = PagedCase(PATTERN, (3001,), d=128)
    x, old = (
        make_paged(case, torch.bfloat16, "cuda", written=written) for written in (True, False)
    )
    expected = attend(x)
    others = torch.zeros((), dtype=torch.int64, device="cuda")
    new, pages = (x.k[:, -1:], x.v[:, -1:]), (old.page_table, old.lengths, PATTERN)
    lost = old.k_pages.clone(), old.v_pages.clone()

    def step():
        old.k_pages.copy_(lost[0])
        old.v_pages.copy_(lost[1])
        write_pages(*new, old.k_pages, old.v_pages, *pages)
        inputs = (old.q, old.k_pages, old.v_pages, *pages)
        count_others(paged_attention(*inputs, return_lse=True, after_write=True), expected, others)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step()
    for _ in range(100):
        graph.replay()
    assert others.item() == 0
