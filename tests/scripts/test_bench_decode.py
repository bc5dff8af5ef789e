"""The benchmarks of decoding, tried out on the CPU: rows of every provider, files, names."""

import json
import sys

import pytest
import torch
from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/bench"))
import decode as bench
import decode_kernel
import decode_mixed

from s2_kernels import local_stride
from s2_kernels.decode import DecodeConfig, launch_decode
from s2_kernels.paged import paged_reference


def test_a_row_for_every_provider(tmp_path, one_thread):
    a = bench.parse(
        "--device cpu --layers 2 --heads 4 --kv-heads 2 --d 32 --lengths 128,2048 --batches 1,2 "
        f"--steps 2 --prefill --dense-layers 1 --name tried --out {tmp_path}".split()
    )
    result = bench.measure(a)
    bench.write(result, a)
    assert len(result["rows"]) == 2 * 2 * len(bench.PROVIDERS)
    for row in result["rows"]:
        assert row["ms"] > 0 and row["floor_ms"] > 0
        assert ("prefill_s" in row) == (row["batch"] == 1 and "graph" not in row["provider"])
    sparse, full = (
        next(r["kv_bytes"] for r in result["rows"][::-1] if r["provider"] == name)
        for name in ("s2", "dense sdpa")
    )
    assert full == 2 * 2 * 2 * 2048 * 32 * 2 * 4 > sparse > full / 2  # layer 1 is dense
    written = json.loads((tmp_path / "tried.json").read_text())
    assert written["rows"] == result["rows"]
    page = (tmp_path / "tried.md").read_text()
    assert f"commit {written['commit']};" in page and written["date"]
    assert "| 2,048 | 2 | s2 graph |" in page and (tmp_path / "tried.png").stat().st_size > 1000


def test_lengths_are_drawn_in_order(monkeypatch, tmp_path):
    import matplotlib.axes

    drawn, original = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda axis, x, *rest, **options: (
        drawn.append(x), original(axis, x, *rest, **options))[1])  # fmt: skip
    rows = [
        dict(tokens=n, batch=1, provider="s2", ms=1.0, floor_ms=1.0) for n in (4096, 1024, 2048)
    ]
    bench.plot(dict(rows=rows), tmp_path / "drawn.png")
    assert drawn == [[1024, 2048, 4096]] * 2


def test_what_does_not_fit_is_a_row_too():
    row = dict(tokens=8192, batch=64, provider="dense sdpa", kv_bytes=1 << 37, floor_ms=40.0)
    assert "| does not fit | 40.00 | 128.00 |" in bench.line(
        row | dict(ms=None, note="does not fit")
    )


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(64, 4, 3, 2),
        DecodeConfig(32, 2, 5, 4, pdl=False, start=8, maxnreg=168),
        DecodeConfig(64, 4, 4, 2, pdl=False, maxnreg=168, ahead=8, one_launch=True),
        DecodeConfig(64, 4, 4, 2, one_launch=True),
    ],
)
def test_configurations_have_names(config):
    assert decode_kernel.parse_config(str(config)) == config
    assert decode_kernel.parse_config("hopper") is None


def test_pools_of_the_kernels_benchmark_hold_what_is_alive(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    normal = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None: normal(*shape))
    pattern = local_stride(heads=4, kv_heads=2, block_size=16, local_blocks=2, stride=4)
    k, v, table, size = decode_kernel.fill(pattern, (100, 33), 32, torch.float32, poison=True)
    assert k.isnan().any() and size == (len(k) - 1) * 16 * 32 * 2 * 4
    q, lengths = normal(2, 1, 4, 32), torch.tensor((100, 33), dtype=torch.int32)
    out, _ = launch_decode(q, k, v, table, lengths, pattern, 0.1)
    exact, _ = paged_reference(q.double(), k.double(), v.double(), table, lengths, pattern, 0.1)
    assert (out - exact).abs().max() < 1e-5


def test_mixed_batches_walk_several_pools(monkeypatch):
    """So that no page comes from the L2 cache; either kernel is called with each of them."""
    called = []

    def launch(q, k, v, table, lengths, pattern, scale, config):
        called.append((k.data_ptr(), config is None))

    def run(calls):
        for call in calls:
            call()
        return float(len(calls))

    pattern = local_stride(heads=4, kv_heads=2, local_blocks=2, stride=4)
    pages = [torch.zeros(2, 64, 32) for _ in range(12)]
    filled = iter([(k, k, torch.zeros(2, 2, 4), int(1e7)) for k in pages])
    monkeypatch.setattr(decode_mixed, "DEVICE", "cpu")
    monkeypatch.setattr(decode_mixed, "fill", lambda *what: next(filled))
    monkeypatch.setattr(decode_mixed, "graph_time", run)
    monkeypatch.setattr(decode_mixed, "launch_decode", launch)
    row = decode_mixed.time_case(pattern, [200, 70], 1, 32)
    assert row == dict(portable=12.0, hopper=12.0, bytes=int(1e7))
    each = [k.data_ptr() for k in pages]
    assert called == [(k, False) for k in each] + [(k, True) for k in each]
