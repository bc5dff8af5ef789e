"""The Hopper kernels on a GPU with queries at an offset: chunks of a prompt, a rank's near part.

python3 -m pytest tests/kernels/test_offsets_gpu.py
"""

import pytest
import torch
from attention_cases import Case, _ls
from near_cases import GPU_NEAR_CASES, check_into, check_near
from test_triton_gpu import EDGES, HALVES, check, needs_hopper, poison  # noqa: F401 - a fixture

from s2_kernels import dense, ranges, s2_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
]

OFFSETS = [
    *(Case(f"lead{n}", _ls(4, 2, 64, 4, 4), 777, t=2500, d=128, q_offset=1720 + n)
      for n in (0, 1, 2, 3)),
    Case("one_tile", _ls(8, 8, 64, 8, 8), 128, t=4096, d=128, q_offset=3968),
    Case("chunk", _ls(16, 4, 64, 4, 8, head_step=2), 1024, t=3072, d=128, b=2, q_offset=2048),
    Case("later_keys", _ls(4, 4, 64, 4, 8), 700, t=2999, d=128, q_offset=1111),
    Case("later_keys_only", _ls(4, 4, 64, 4, 8), 700, t=2000, d=64),
    Case("one_block_window", _ls(4, 2, 64, 1, 3), 500, t=1500, d=128, b=2, q_offset=1000),
    Case("block128", _ls(4, 4, 128, 2, 4), 1051, t=2051, d=96, q_offset=1000),
    Case("block256", _ls(4, 4, 256, 2, 3), 1051, t=2051, d=128, q_offset=1000),
    Case("dense_heads", _ls(8, 4, 64, 4, 8, dense_heads=1), 1222, t=2222, d=128, q_offset=1000),
    Case("many_edges", ranges(heads=4, kv_heads=2, block_size=64, bands=EDGES), 1011, t=3011,
         d=128, q_offset=2000),
    Case("dense", dense(heads=2), 4000, t=9001, d=128, q_offset=5001),  # columns in pieces
    Case("wide_dense", dense(heads=2), 4000, t=9001, d=256, q_offset=5001),
    Case("wide", _ls(4, 2, 64, 4, 4), 777, t=2500, d=256, q_offset=1723),
    Case("wide_192", _ls(4, 2, 64, 1, 3), 500, t=1501, d=192, b=2, q_offset=1000),
    Case("wide_later_keys", _ls(4, 2, 128, 2, 4), 500, t=2001, d=256, q_offset=1002),
    Case("wide_edges", ranges(heads=4, kv_heads=2, block_size=64, bands=EDGES), 1011, t=3011,
         d=256, q_offset=1999),
]  # fmt: skip


ALL_SEEN = [
    Case("all_seen", dense(heads=8, kv_heads=2), 1001, t=1024, d=128, b=2, q_offset=1024),
    Case("all_seen_further", dense(heads=4), 4096, t=64, d=64, q_offset=999),
    Case("all_seen_two", dense(heads=4, block_size=128), 777, t=128, d=96, q_offset=128),
    Case("all_seen_odd", dense(heads=1), 2000, t=4160, d=128, q_offset=4160),  # columns in pieces
    Case("wide_all_seen", dense(heads=4, kv_heads=2), 1001, t=1024, d=256, b=2, q_offset=1025),
    Case("wide_all_seen_one", dense(heads=2), 500, t=64, d=192, q_offset=64),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", OFFSETS + ALL_SEEN, ids=str)
def test_hopper_at_an_offset(case, dtype):
    """Queries that are the end, or the middle, of a longer sequence, or stand past all keys."""
    needs_hopper()
    check(case, dtype, backend="hopper")


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("case", GPU_NEAR_CASES, ids=str)
def test_results_where_they_belong(case, backend):
    """Into parts of larger tensors, by the launchers and by plans: thrice the same bits."""
    if backend == "hopper":
        needs_hopper()
    for _ in range(3):
        check_into(case, torch.bfloat16, backend, "cuda")


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", GPU_NEAR_CASES, ids=str)
def test_far_and_near_keys_in_one_launch(case, dtype, backend):
    """A rank's chunk of a sequence, whose far blocks alone are in memory (near.Near)."""
    if backend == "hopper":
        needs_hopper()
    check_near(case, dtype, "cuda", backend)


def test_spared_multiprocessors_change_nothing():
    needs_hopper()
    q, k, v = (torch.randn(1, 4096, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    pattern, at = _ls(4, 4, 64, 4, 8), dict(return_lse=True, backend="hopper")
    whole, spared = (s2_attention(q, k, v, pattern, **at, spare=n) for n in (0, 100))
    assert all(torch.equal(x, y) for x, y in zip(whole, spared, strict=True))
