"""Packed documents train as the documents on their own would."""

import pytest
import torch
from in_process import call_on_ranks

from s2_kernels import dense, local_stride, ranges, sliding_window
from s2megatron.accounting import KeptPairs


@pytest.mark.parametrize("tp", [1, 2])
def test_packed_loss_and_gradients_are_those_of_the_documents(tp):
    """The real model, a dense layer and three sparse ones, in float32."""
    overrides = [f"megatron.tensor_model_parallel_size={tp}"]
    results = call_on_ranks("packed_cases", "packed_is_separate", *overrides, ranks=tp)
    assert len(results) == tp
    for result in results:
        assert result["documents"] == [0, 37, 38, 86, 128, 133, 192, 256]
        assert result["kinds"] == ["TorchDenseAttention"] + ["S2CoreAttention"] * 3
        assert result["loss"] < 1e-6 and result["gradients"] < 1e-5, result
        assert result["one_document"] > 1e-2, result  # what the comparison can see


PATTERNS = (
    dense(heads=4, kv_heads=2, block_size=16),
    local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=[4, 2]),
    ranges(heads=4, kv_heads=2, block_size=32, bands=[(1, 1), (3, 2), (None, 4)]),
    sliding_window(heads=4, kv_heads=4, block_size=16, local_blocks=1),
    local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4, dense_heads=1),
)


@pytest.mark.parametrize("lengths", [[37, 1, 16, 300], [5], [15, 17, 32, 1000]], ids=str)
def test_pairs_of_documents_are_counted_exactly(lengths):
    counter = KeptPairs(PATTERNS)
    for some in (lengths[:1], lengths):  # the tables grow
        kept, all_pairs = counter.count(torch.tensor(some, dtype=torch.int32))
        assert kept == sum(p.kept_pairs(n) for p in PATTERNS for n in some)
        assert all_pairs == sum(p.heads * n * (n + 1) // 2 for p in PATTERNS for n in some)
