"""Parts merged by the last program that wrote one, where programs do run side by side."""

import dataclasses

import pytest
import torch
from paged_cases import PagedCase, make_paged

from s2_kernels import decode, launch, local_stride
from s2_kernels.launch import arrivals
from s2_kernels.paged import paged_attention

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


@pytest.fixture
def one_launch(monkeypatch):
    """What attends by itself merges in one launch."""
    config = decode.decode_config

    def merged(*args):
        return dataclasses.replace(config(*args), one_launch=True)

    monkeypatch.setattr(decode, "decode_config", merged)


def by_two_launches(x):
    s, group = x.q.shape[1], PATTERN.heads // PATTERN.kv_heads
    rows, _ = decode.tile_of(s, group)
    config = decode.decode_config(128, 128, rows, PATTERN.block_size, x.q.dtype, x.q.device)
    config = dataclasses.replace(config, one_launch=False)
    inputs = (x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, PATTERN)
    return decode.launch_decode(*inputs, 128**-0.5, config=config)


def attend(x):
    inputs = (x.q, x.k_pages, x.v_pages, x.page_table, x.lengths, PATTERN)
    return paged_attention(*inputs, return_lse=True)


def count_others(got, expected, others) -> None:
    """Adds to `others`, on the GPU, how many numbers have other bits."""
    for value, wanted in zip(got, expected, strict=True):
        others += (value != wanted).sum()


def test_whoever_ends_last_merges_the_same(pages, one_launch):
    """10,000 launches, whose parts lie at the same addresses again and again."""
    expected = by_two_launches(pages)
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


def test_launches_side_by_side_keep_to_themselves(one_launch):
    """Two streams and a graph on a third: none counts the parts of another."""
    xs = [make_paged(case, dtype=torch.bfloat16, device="cuda") for case in CASES]
    expected = [by_two_launches(x) for x in xs]
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


def test_a_graph_keeps_its_counters_when_the_reserve_is_filled_again(monkeypatch, one_launch):
    """Launches between captures fill it; what the first graph counts with must stay its own."""
    x = make_paged(CASES[1], dtype=torch.bfloat16, device="cuda")
    expected, others = by_two_launches(x), torch.zeros((), dtype=torch.int64, device="cuda")
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
