"""The Triton kernels against the float64 specification: on a GPU, or else under the interpreter."""

import math

import pytest
import torch
from attention_cases import CASES, assert_as_good_as_eager, make_inputs, reference_results

from s2_kernels import schedule
from s2_kernels.backward import launch_backward
from s2_kernels.configs import TileConfig
from s2_kernels.forward import launch_forward

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


def results_of(case, inputs, config=None, **options):
    """out, lse, dq, dk, dv by the launchers, every kernel with the same tiles."""
    config = config and TileConfig.parse(config)
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    common = (case.pattern, 1 / math.sqrt(case.d), case.q_offset)
    out, lse = launch_forward(q, k, v, *common, config=config)
    dlse = (dlse * lse.isfinite()).float()
    tiles = dict(dkdv_config=config, dq_config=config)
    if DEVICE == "cpu":
        options["tma_add"] = False  # the interpreter has no TMA reduction
    dq, dk, dv = launch_backward(q, k, v, out, lse, dout, dlse, *common, **tiles, **options)
    return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


def check(case, dtype=torch.float32, **options):
    inputs = make_inputs(case, dtype, DEVICE)
    truth, eager = reference_results(case, inputs)
    assert_as_good_as_eager(results_of(case, inputs, **options), truth, eager, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float16_in_tiles_of_several_blocks(case):
    check(case, torch.float16, config="64x64w4s2ptr")


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_fused(case):
    check(case, config="32x32x2w4s2tma", deterministic=False)


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_cut_columns(case, monkeypatch):
    monkeypatch.setattr(schedule, "SHORTEST_PIECE", 2)
    check(case, config="32x16w4s2tma", slots=10**6)
