"""The Triton kernels against the float64 specification: on a GPU, or else under the interpreter."""

import math

import pytest
import torch
from attention_cases import CASES, assert_as_good_as_eager, make_inputs, reference_results

from s2_kernels import forward
from s2_kernels.configs import TileConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel forgets to write holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        return lambda *args, **kwargs: (
            x.fill_(math.nan)
            if (x := make(*args, **kwargs)).is_floating_point()
            else x.fill_(-(2**31))
        )

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))


def forward_results(case, inputs, **options):
    scale = 1 / math.sqrt(case.d)
    q, k, v = (x.detach() for x in inputs[:3])
    out, lse = forward.launch_forward(q, k, v, case.pattern, scale, case.q_offset, **options)
    return dict(out=out, lse=lse)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("config", ["64x16x2w4s2tma", "16x16w4s2tma", "64x64w4s2ptr"])
def test_forward_tilings(case, config):
    inputs = make_inputs(case, torch.float32, DEVICE)
    truth, eager = reference_results(case, inputs)
    results = forward_results(case, inputs, config=TileConfig.parse(config))
    truth = {name: truth[name] for name in results}
    assert_as_good_as_eager(results, truth, eager, case)
