"""Figures that users read: tokens/s, true FLOPs, the layer table, the recorded sparsity."""

import pytest
import torch

from s2_kernels import dense, local_stride, ranges
from s2_kernels.record import describe_difference, read_record, record
from s2megatron.accounting import ModelShape
from s2megatron.layer_table import layer_table
from s2megatron.training.throughput import ThroughputMeter, peak_tflops

HEADS = {"heads": 4, "kv_heads": 2, "block_size": 16}
SPARSE = local_stride(**HEADS, local_blocks=2, stride=2)
PATTERNS = (dense(**HEADS), SPARSE, SPARSE)
SHAPE = ModelShape(
    layers=3,
    hidden=64,
    ffn=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=256,
    seq_len=100,
    gated=True,
    bias=False,
    qkv_bias=False,
    norm_bias=False,
    qk_norm=False,
    output_gate=False,
    tied_embeddings=False,
    position_embeddings=0,
    experts=0,
    experts_per_token=0,
    expert_ffn=0,
    shared_expert_ffn=0,
    shared_expert_gate=False,
    moe_layers=(False,) * 3,
)


def test_flops_count_kept_pairs_and_weights():
    pairs = 4 * 100 * 101 // 2 + 2 * SPARSE.kept_pairs(100)
    assert SHAPE.attention_flops(PATTERNS) == 12 * 16 * pairs
    per_layer = 64 * 16 * (4 + 2 + 2) + 64 * 16 * 4 + 3 * 64 * 96  # qkv, projection, SwiGLU
    assert SHAPE.matmul_flops_per_token() == 6 * (3 * per_layer + 64 * 256)
    total = SHAPE.flops_per_sequence(PATTERNS)
    assert total == 100 * SHAPE.matmul_flops_per_token() + SHAPE.attention_flops(PATTERNS)
    assert total < SHAPE.flops_per_sequence((PATTERNS[0],) * 3)


def test_meter_times_training_alone():
    """Steps of 2 s; those before an evaluation (at 3) and before a save (at 6) drop out."""
    now, reports = [0.0], []
    meter = ThroughputMeter(
        SHAPE,
        PATTERNS,
        sequences=lambda: 8,
        gpus=2,
        peak=989,
        log_interval=4,
        save_interval=6,
        report=lambda *report: reports.append(report),
        clock=lambda: now[0],
    )
    for iteration in range(9):
        for _ in range(3):  # micro-batches
            meter.training(iteration)
        now[0] += 2.0
        if iteration == 2:
            meter.evaluating()
            now[0] += 50.0
        if iteration == 5:
            now[0] += 70.0  # a checkpoint
    assert [iteration for iteration, _, _ in reports] == [4, 8]
    for _, text, scalars in reports:
        assert scalars["s2/seconds-per-iteration"] == 2.0
        assert scalars["s2/tokens-per-second"] == 8 * 100 / 2.0
        true = 8 * SHAPE.flops_per_sequence(PATTERNS) / 2.0 / 2 / 1e12
        assert scalars["s2/true-TFLOPs-per-rank"] == pytest.approx(true)
        assert scalars["s2/MFU"] == pytest.approx(true / 989)
        assert "400 tokens/s" in text and f"MFU {true / 989:.1%} of 989, bf16" in text


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_mfu_is_of_the_device_at_hand(name, peak):
    assert peak_tflops(name) == peak


def test_meter_counts_the_pairs_of_packed_documents():
    """Two steps of two micro-batches on one of two data-parallel ranks that see the same."""
    now, reports, lengths = [0.0], [], [60, 30, 10]
    meter = ThroughputMeter(
        SHAPE,
        PATTERNS,
        sequences=lambda: 4,
        gpus=2,
        log_interval=2,
        save_interval=None,
        report=lambda *report: reports.append(report),
        all_data=lambda number: 2 * number,
        clock=lambda: now[0],
    )
    for iteration in range(5):
        for _ in range(2):
            meter.training(iteration)
            meter.documents(torch.tensor(lengths))
        now[0] += 1.0
    pairs = 4 * sum(p.kept_pairs(n) for p in PATTERNS for n in lengths)  # 2 micro-batches, 2 ranks
    every = 4 * 4 * 3 * sum(n * (n + 1) // 2 for n in lengths)  # 4 heads, 3 layers
    matmuls = 4 * 100 * SHAPE.matmul_flops_per_token()
    true = matmuls + 12 * 16 * pairs
    assert [iteration for iteration, _, _ in reports] == [2, 4]
    for _, text, scalars in reports:
        assert scalars["s2/true-TFLOPs-per-rank"] == pytest.approx(true / 2 / 1e12)
        assert "MFU" not in text and "s2/MFU" not in scalars
        assert f"need {(matmuls + 12 * 16 * every) / true:.2f}x" in text


def test_meter_counts_the_sequences_of_each_step():
    """step_batch_size_schedule: tokens/s were those of one batch, here 1 of 4 and 16 of 4."""
    now, reports, batches = [0.0], [], iter((1, 1, 4, 16, 16))
    meter = ThroughputMeter(
        SHAPE,
        PATTERNS,
        sequences=lambda: next(batches),
        gpus=1,
        log_interval=2,
        save_interval=None,
        report=lambda *report: reports.append(report),
        clock=lambda: now[0],
    )
    for iteration in range(5):
        for _ in range(2):
            meter.training(iteration)
        now[0] += 2.0
    for (_, _, scalars), sequences in zip(reports, (2, 20), strict=True):
        assert scalars["s2/tokens-per-second"] == sequences * 100 / 4.0
        true = sequences * SHAPE.flops_per_sequence(PATTERNS) / 4.0 / 1e12
        assert scalars["s2/true-TFLOPs-per-rank"] == pytest.approx(true)


def test_table_groups_layers_and_names_what_is_uncovered():
    wide = local_stride(**HEADS, local_blocks=2, stride=8)
    bands = ranges(**HEADS, bands=[(2, 1), (6, 2), (None, 4)])
    table = layer_table((*PATTERNS, wide, bands), 100)
    assert "1       dense" in table and "2-3     local + stride" in table and "ranges" in table
    assert "4 of 5 layers sparse" in table
    assert "layer(s) 4, 5 leave blocks uncovered" in table and "75%" in table
    assert "note:" not in layer_table(PATTERNS, 100)


def test_recorded_sparsity_reads_back_and_shows_differences():
    assert read_record(record(PATTERNS)) == PATTERNS
    other = (*PATTERNS[:2], local_stride(**HEADS, local_blocks=3, stride=2))
    difference = describe_difference(PATTERNS, other)
    assert "layer 3" in difference and "to 2" in difference and "to 3" in difference
    assert "layer 2" not in difference
    assert "3 layers, the configuration 2" in describe_difference(PATTERNS, PATTERNS[:2])
    with pytest.raises(ValueError, match="version 99"):
        read_record(record(PATTERNS) | {"version": 99})
