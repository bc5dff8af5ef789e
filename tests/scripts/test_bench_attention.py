"""The attention benchmark's own part, without a GPU: rounds and their medians."""

import sys

import pytest
from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/bench"))
import attention as bench_attention


def row(forward_ms, peak_gib=1.0):
    times = dict(forward_ms=forward_ms, backward_ms=2 * forward_ms)
    return times | dict(forward_tf=6 / forward_ms, backward_tf=3 / forward_ms, peak_gib=peak_gib)


def test_providers_to_and_fro():
    turns = bench_attention.to_and_fro([("8:8", 64), ("8:8", 128)], ["a", "b", "c"], 2)
    assert [provider for _, _, provider in turns] == list("abccba" * 2)
    assert [tokens for _, tokens, _ in turns] == [64] * 6 + [128] * 6


def test_a_row_is_the_median_of_its_rounds():
    result = None
    for forward_ms in (3.0, 1.0, 2.0):
        result = bench_attention.in_rounds(result, row(forward_ms, peak_gib=forward_ms))
    assert (result["forward_ms"], result["backward_ms"]) == (2, 4)
    assert (result["forward_tf"], result["backward_tf"]) == (3, 1.5)
    assert result["peak_gib"] == 3
    assert [x["forward_ms"] for x in result["rounds"]] == [3, 1, 2]


def test_a_round_that_fails_shows():
    failed = bench_attention.in_rounds(bench_attention.in_rounds(None, row(1)), dict(error="no"))
    failed = bench_attention.in_rounds(failed, row(1))
    assert failed["error"] == "no" and "forward_ms" not in failed


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_attention.parse(["--rounds", "0"])
    assert "--rounds: 0" in capsys.readouterr().err
