"""The comparison of backward passes, as far as it goes without a GPU: options, what is wrong."""

import sys

import pytest
from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/bench"))
import backward_products as bench


def test_all_versions_by_default():
    assert bench.parse([]).versions == list(bench.VERSIONS)
    assert bench.parse(["--versions", "five", "seven"]).versions == ["five", "seven"]


@pytest.mark.parametrize("error, expected", [(2.4e-3, set()), (4e-3, {"five"}), (1e99, {"five"})])
def test_a_version_less_exact_than_todays_is_not_timed(error, expected):
    found = dict(small=dict(seven=2e-3, five=2e-3), other=dict(seven=2e-3, five=error))
    assert bench.wrong(found, ["seven", "five"]) == expected
    found["other"]["five"] = float("nan")
    assert bench.wrong(found, ["seven", "five"]) == {"five"}
