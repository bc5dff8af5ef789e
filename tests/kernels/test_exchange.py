"""What crosses between context-parallel ranks, against the lifetimes block by block."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import any_pattern

from s2_kernels import dense, local_stride, sliding_window
from s2_kernels.exchange import (
    block_bytes,
    crossing_blocks,
    merged,
    plan_rank,
    received_blocks,
    sent_blocks,
    zigzag,
)


@st.composite
def any_chunks(draw):
    """Zigzag, or any cut of a sequence into chunks dealt out to 1 to 4 ranks."""
    ranks = draw(st.integers(1, 4))
    if draw(st.booleans()):
        return zigzag(ranks, 2 * ranks * draw(st.integers(1, 9)))
    sizes = draw(st.lists(st.integers(1, 9), min_size=ranks, max_size=2 * ranks + 1))
    owners = [*range(ranks), *(draw(st.integers(0, ranks - 1)) for _ in sizes[ranks:])]
    owners = draw(st.permutations(owners))
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    pieces = [range(*ends[i : i + 2]) for i in range(len(sizes))]
    return tuple(
        merged([piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank])
        for rank in range(ranks)
    )


def crossings(pattern, source, destination):
    """(head, block) pairs that the queries of one rank read of another's, in order of travel."""
    return [
        (head, k)
        for head in range(pattern.kv_heads)
        for chunk in source
        for k in chunk
        if any(
            k < later.start and any(0 <= i - k < pattern.lifetime(head, k) for i in later)
            for later in destination
        )
    ]


@given(any_pattern(), any_chunks())
def test_what_crosses_is_what_somebody_attends_to(pattern, chunks):
    plans = [plan_rank(pattern, chunks, rank) for rank in range(len(chunks))]
    for source, held in enumerate(chunks):
        own = [k for chunk in held for k in chunk]
        slots = [own[i] for i in plans[source].send.slots.tolist()]
        sent = list(zip(plans[source].send.heads.tolist(), slots, strict=True))
        for target, wanted in enumerate(chunks):
            expected = crossings(pattern, held, wanted)
            count = plans[source].send_counts[target]
            assert sent[:count] == expected, (source, target)
            assert plans[target].receive_counts[source] == count
            assert crossing_blocks(pattern, held, wanted) == count
            sent = sent[count:]
        assert not sent
    for rank, plan in enumerate(plans):
        assert plan.received_blocks == received_blocks(pattern, chunks, rank)
        assert plan.sent_blocks == sent_blocks(pattern, chunks, rank)


@given(any_pattern(), any_chunks())
def test_a_chunk_finds_what_its_pattern_asks_for(pattern, chunks):
    """What a query block keeps has come, and lies where `Near` says; and nothing else has."""
    n = sum(len(chunk) for held in chunks for chunk in held)
    mask = pattern.block_mask(n)
    for rank, held in enumerate(chunks):
        plan = plan_rank(pattern, chunks, rank)
        own = [k for chunk in held for k in chunk]
        rows = [(h, k) for source in chunks for h, k in crossings(pattern, source, held)]
        for view, chunk in zip(plan.chunks, held, strict=True):
            assert view.chunk == chunk and [own[i] for i in view.local] == [*chunk]
            n_rows = view.before + len(chunk)
            blocks = torch.arange(n_rows).expand(pattern.kv_heads, -1)
            if view.near is not None:
                view.near.check(
                    pattern, n_rows * pattern.block_size, chunk.start * pattern.block_size
                )
                blocks = view.near.blocks(pattern, n_rows)
            assert [*blocks[0, view.before :]] == [*chunk]
            has = torch.zeros(pattern.kv_heads, n, dtype=torch.bool)
            for row, slot, head in zip(
                *(x.tolist() for x in vars(view.came).values()), strict=True
            ):
                assert rows[row] == (head, blocks[head, slot]) and slot < view.before
                assert not has[head, blocks[head, slot]]
                has[head, blocks[head, slot]] = True
            has[:, chunk.start : chunk.stop] = True
            seen = mask[:, chunk.start : chunk.stop]
            assert not (seen & ~has[:, None]).any(), "a chunk sees a block that did not come"
            assert not (has[:, : chunk.start] & ~seen[:, 0, : chunk.start]).any(), "not asked for"


@given(any_pattern(), any_chunks())
def test_every_row_comes_home_and_every_block_of_a_buffer_is_known(pattern, chunks):
    for rank in range(len(chunks)):
        plan = plan_rank(pattern, chunks, rank)
        home, sent = plan.home, list(zip(plan.send.slots, plan.send.heads, strict=True))
        own = list(zip(home.slots.tolist(), home.heads.tolist(), strict=True))
        assert len(set(own)) == len(own) == len(home.starts) - 1
        assert sorted(home.rows.tolist()) == list(range(len(sent)))
        for i, block in enumerate(own):
            rows = home.rows[home.starts[i] : home.starts[i + 1]].tolist()
            assert rows == sorted(rows) and rows  # by rank
            assert all(sent[row] == block for row in rows)
        for view in plan.chunks:
            came, empty = (
                set(zip(x.slots.tolist(), x.heads.tolist(), strict=True))
                for x in (view.came, view.empty)
            )
            own = set(zip(view.own.slots.tolist(), view.own.heads.tolist(), strict=True))
            chunk = itertools.product(range(len(view.chunk)), range(pattern.kv_heads))
            assert own == set(chunk) and len(own) == len(view.own.slots)
            assert came.isdisjoint(empty)
            assert came | empty == set(
                itertools.product(range(view.before), range(pattern.kv_heads))
            )


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("stride", "local"), [(4, 5), (8, 4), (16, 9)])
def test_volume_of_local_and_stride_in_zigzag(ranks, stride, local):
    """The formula of the docstring, with shifts spread evenly over the stride."""
    heads, size = stride, 2 * stride
    pattern = local_stride(
        heads=heads, block_size=16, local_blocks=local, stride=stride, head_step=1
    )
    chunks = zigzag(ranks, 2 * ranks * size)
    for rank in range(ranks):
        halos = (rank > 0) + (rank < ranks - 1)
        shard = (2 * ranks - 2 - rank) * size // stride
        expected = heads * shard + halos * (local - 1) * (heads - heads // stride)
        assert received_blocks(pattern, chunks, rank) == expected


def test_volume_of_dense_and_of_a_window():
    chunks = zigzag(4, 64)
    everything = dense(heads=8, kv_heads=2, block_size=16)
    # Chunks 0 to 2c - 2 - r but the own one; c - 1 of c halves for rank 0, less for the last.
    assert [received_blocks(everything, chunks, r) for r in range(4)] == [96, 80, 64, 48]
    window = sliding_window(heads=4, kv_heads=2, block_size=16, local_blocks=5)
    assert [received_blocks(window, chunks, r) for r in range(4)] == [8, 16, 16, 8]
    assert received_blocks(everything, zigzag(1, 7), 0) == 0
    assert block_bytes(everything, batch=3, head_sizes=64 + 32, element_bytes=2) == 16 * 3 * 96 * 2


def test_one_rank_exchanges_nothing_and_its_pattern_is_the_pattern():
    pattern = local_stride(heads=4, block_size=16, local_blocks=3, stride=4)
    plan = plan_rank(pattern, zigzag(1, 13), 0)
    (view,) = plan.chunks
    assert plan.receive_counts == (0,)
    assert view.chunk == view.local == range(13) and view.before == 0 and view.near is None


def test_what_is_all_there_needs_no_map():
    """Dense heads, and chunks whose window reaches the start: every block in the row it has."""
    plan = plan_rank(dense(heads=2, block_size=16), zigzag(2, 8), 0)
    assert [(view.before, view.near) for view in plan.chunks] == [(0, None), (6, None)]
    wide = local_stride(heads=2, block_size=16, local_blocks=7, stride=8)
    assert [view.near for view in plan_rank(wide, zigzag(2, 8), 0).chunks] == [None, None]


def test_chunks_that_do_not_fit_are_refused():
    pattern = dense(heads=1, block_size=16)
    with pytest.raises(ValueError, match="10 blocks do not divide into 4 chunks"):
        zigzag(2, 10)
    for chunks in ([(range(2),), (range(3, 4),)], [(range(0, 3),), (range(2, 4),)], [(range(0),)]):
        with pytest.raises(ValueError, match="cover every block once"):
            plan_rank(pattern, chunks, 0)
    with pytest.raises(ValueError, match="take merged"):
        plan_rank(pattern, [(range(0, 2), range(2, 4))], 0)
