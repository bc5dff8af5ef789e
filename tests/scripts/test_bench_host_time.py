"""The benchmark of host time, tried out on the CPU: its rows, its ratios and its files."""

import json
import sys

from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/bench"))
import host_time


def test_a_row_for_every_provider(tmp_path, one_thread, capsys):
    options = "--device cpu --tokens 128 --heads 2 --d 32 --calls 3 --name tried --out"
    host_time.main([*options.split(), str(tmp_path)])
    result = json.loads((tmp_path / "tried.json").read_text())
    assert list(result["rows"]) == ["sdpa", "s2 blocked"] and not result["rounds"]
    for row in result["rows"].values():
        assert 0 < row["forward"] <= row["forward_p90"]
        assert 0 < row["backward"] <= row["backward_p90"]
    text = (tmp_path / "tried.md").read_text()
    assert capsys.readouterr().out.strip() in text
    assert "scripts/bench/host_time.py --device cpu" in text


def test_ratios_are_to_sdpa_and_rounds_are_told_apart():
    a = host_time.parse([])
    row = dict(forward=40.0, forward_p90=50.0, backward=200.0, backward_p90=300.0)
    rows = {"sdpa": row, "s2": row | dict(forward=50.0, backward=300.0)}
    rounds = {"s2": dict(forward=[(0.3, 0.31), (0.3, 1.23)])}
    result = dict(rows=rows, rounds=rounds, gpu="a GPU", versions={}, date="today", commit="c0")
    text = host_time.page(result, a)
    assert "| s2 | 50 (50) | 1.25 | 300 (300) | 1.50 |" in text
    assert "| s2 | forward | 0.300 / 0.310, 0.300 / 1.230 |" in text
