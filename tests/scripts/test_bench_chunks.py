"""The benchmark of chunks, without a GPU: what it measures are parts of one problem."""

import sys

import pytest
from launches import ROOT

from s2_kernels.reference import token_mask

sys.path.insert(0, str(ROOT / "scripts/bench"))
import chunks


def test_near_and_far_are_what_the_chunk_sees():
    options = dict(tokens=2048, chunk=512, heads=4, stride=4, local=256)
    a = chunks.parse([f"--{key}={value}" for key, value in options.items()])
    whole, near, far = chunks.problems(a)
    seen = token_mask(whole.pattern, a.chunk, whole.keys, whole.q_offset).sum(-1)  # [heads, chunk]
    parts = token_mask(near.pattern, a.chunk, near.keys, near.q_offset).sum(-1) + far.keys
    # Of each head a shard's block may lie on either side of the window's begin.
    assert ((seen - parts).abs() <= chunks.BLOCK).all()
    assert far.q_offset >= far.keys and far.pattern.is_dense


def test_a_chunk_without_a_window_before_it_is_refused():
    with pytest.raises(ValueError, match="--chunk 1920 of --tokens 2048"):
        chunks.problems(chunks.parse(["--tokens=2048", "--chunk=1920", "--stride=1"]))


def test_pages_give_the_same_both_ways():
    a = chunks.parse(["--pages", "--device=cpu", "--tokens=1024", "--chunk=256", "--heads=4",
                      "--kv-heads=2", "--stride=4", "--local=256", "--d=32"])  # fmt: skip
    sparse, whole = chunks.page_rows(a)
    assert sparse.startswith("| sparse | 1,024 |") and whole.count("|") == sparse.count("|") == 6
