"""Patterns against brute force: everything must follow from the lifetimes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import any_pattern, head_counts

from s2_kernels import FOREVER, LayerPattern, dense, local_stride, ranges, sliding_window
from s2_kernels.reference import token_mask


def dkernel_rule(heads, kv_heads, n, local_blocks, stride, offset, step=None):
    """The rule as s2-attention.md writes it, block by block."""
    step = max(1, stride // heads) if step is None else step
    mask = torch.zeros(kv_heads, n, n, dtype=torch.bool)
    for h in range(kv_heads):
        for i in range(n):
            for k in range(i + 1):
                mask[h, i, k] = i - k < local_blocks or (k + h * step + offset) % stride == 0
    return mask


@given(head_counts(), st.integers(1, 20), st.integers(1, 24), st.integers(0, 50))
def test_local_stride_is_dkernels_rule(counts, local_blocks, stride, offset):
    heads, kv_heads = counts
    pattern = local_stride(
        heads=heads,
        kv_heads=kv_heads,
        local_blocks=local_blocks,
        stride=stride,
        head_offset=offset,
    )
    expected = dkernel_rule(heads, kv_heads, 25, local_blocks, stride, offset)
    assert torch.equal(pattern.block_mask(25), expected)


@given(any_pattern())
def test_mask_is_lifetime(pattern):
    n = 20
    mask = pattern.block_mask(n)
    for h in range(pattern.kv_heads):
        for k in range(n):
            life = pattern.lifetime(h, k)
            assert mask[h, :, k].tolist() == [0 <= i - k < life for i in range(n)]


@given(any_pattern(), st.integers(1, 300))
def test_kept_pairs_and_density_count_the_mask(pattern, seq_len):
    group = pattern.heads // pattern.kv_heads
    expected = group * int(token_mask(pattern, seq_len, seq_len).sum())
    assert pattern.kept_pairs(seq_len) == expected
    full = pattern.heads * seq_len * (seq_len + 1) / 2
    assert pattern.density(seq_len) == pytest.approx(expected / full)


@given(any_pattern())
def test_uncovered_fraction_counts_blocks_nobody_keeps(pattern):
    n = 32 * 27  # a multiple of every period any_pattern can make
    lives = torch.stack([rule.lifetimes(n) for rule in pattern.rules])
    uncovered = (lives < FOREVER).all(0).double().mean().item()
    assert pattern.uncovered_fraction() == pytest.approx(uncovered)


@pytest.mark.parametrize("world", [1, 2, 4])
@given(data=st.data())
def test_tp_slices_equal_the_whole(world, data):
    kv_heads = data.draw(st.sampled_from([1, 2, 4, 8]))
    heads = max(kv_heads, world) * data.draw(st.integers(1, 3))
    heads = -(-heads // kv_heads) * kv_heads
    heads = heads * world if heads % world else heads
    pattern = local_stride(heads=heads, kv_heads=kv_heads, local_blocks=2, stride=5, head_offset=1)
    whole = pattern.block_mask(16).repeat_interleave(heads // kv_heads, 0)
    slices = [pattern.shard(rank, world) for rank in range(world)]
    parts = [p.block_mask(16).repeat_interleave(p.heads // p.kv_heads, 0) for p in slices]
    assert torch.equal(torch.cat(parts), whole)
    assert sum(p.kept_pairs(777) for p in slices) == pattern.kept_pairs(777)


@given(any_pattern())
def test_round_trip_through_plain_data(pattern):
    assert LayerPattern.from_dict(pattern.to_dict()) == pattern
    assert LayerPattern.from_key(pattern.key) == pattern


@given(any_pattern())
def test_table_gives_the_lifetimes(pattern):
    table = pattern.table().tolist()
    for head, (shift, *flat) in enumerate(table):
        bands = list(zip(flat[::2], flat[1::2], strict=True))
        for k in range(30):
            life = max(reach for reach, stride in bands if (k + shift) % stride == 0)
            assert life == pattern.lifetime(head, k)


def test_per_head_strides_and_dense_heads():
    pattern = local_stride(heads=8, kv_heads=4, local_blocks=1, stride=[2, 4, 8, 8], dense_heads=1)
    mask = pattern.block_mask(32)
    assert mask[0, 31, 0:31:2].all() and not mask[0, 31, 1:31:2].any()
    assert mask[1, 31].sum() == 8 and mask[1, 31, 3] and mask[1, 31, 31]
    assert mask[3].equal(torch.ones(32, 32).tril().bool())


def test_ranges_give_every_head_another_shard_unless_told():
    bands = [(2, 1), (8, 2), (None, 4)]
    assert [rule.shift for rule in ranges(heads=4, bands=bands).rules] == [0, 1, 2, 3]
    same = ranges(heads=4, bands=bands, homogeneous=True, head_offset=6)
    assert [rule.shift for rule in same.rules] == [2, 2, 2, 2]
    apart = ranges(heads=4, bands=bands, head_offset=1, head_step=2, dense_heads=1)
    assert [rule.shift for rule in apart.rules] == [1, 3, 1, 0] and apart.rules[3].is_dense


def test_named_kinds():
    assert dense(heads=4).is_dense and dense(heads=4).density(1000) == 1
    assert local_stride(heads=4, local_blocks=3, stride=1) == dense(heads=4)
    window = sliding_window(heads=2, local_blocks=3)
    assert window.uncovered_fraction() == 1 and window.block_mask(9)[0].sum(1).max() == 3
    same = local_stride(heads=4, local_blocks=1, stride=4, head_offset=2, homogeneous=True)
    assert {rule.shift for rule in same.rules} == {2} and same.uncovered_fraction() == 0.75


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: local_stride(heads=4, local_blocks=4, stride=0), "stride=0"),
        (lambda: local_stride(heads=4, local_blocks=0, stride=4), "reach=0"),
        (lambda: local_stride(heads=4, local_blocks=1, stride=4, block_size=48), "block_size=48"),
        (lambda: local_stride(heads=6, kv_heads=4, local_blocks=1, stride=4), "heads=6"),
        (lambda: local_stride(heads=4, local_blocks=1, stride=[2, 4]), "2 strides given for 4"),
        (lambda: local_stride(heads=4, local_blocks=1, stride=4, dense_heads=5), "dense_heads=5"),
        (lambda: ranges(heads=1, bands=[]), "at least one band"),
        (lambda: ranges(heads=1, bands=[(8, 2)]), "first band has stride 2"),
        (lambda: ranges(heads=1, bands=[(8, 1), (4, 2)]), "reach 4 after reach 8"),
        (lambda: ranges(heads=1, bands=[(8, 1), (16, 4), (None, 6)]), "stride 6 after stride 4"),
        (lambda: dense(heads=6).shard(0, 4), "TP size 4"),
        (lambda: dense(heads=12, kv_heads=3).shard(0, 4), "kv_heads=3"),
    ],
)
def test_errors_name_the_field(make, words):
    with pytest.raises(ValueError, match=words):
        make()
