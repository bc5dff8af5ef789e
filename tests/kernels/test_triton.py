"""The Triton kernels against the float64 specification: on a GPU, or else under the interpreter."""

import math

import numpy as np
import pytest
import torch
from attention_cases import (
    CASES,
    Case,
    _ls,
    assert_as_good_as_eager,
    make_inputs,
    reference_results,
)

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


def check(case, dtype=torch.float32, inputs=None, **options):
    inputs = inputs or make_inputs(case, dtype, DEVICE)
    truth, eager = reference_results(case, inputs)
    assert_as_good_as_eager(results_of(case, inputs, **options), truth, eager, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_float16_in_tiles_of_several_blocks(case):
    check(case, torch.float16, config="64x64w4s2ptr")


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_float16_through_descriptors(case):
    check(case, torch.float16, config="32x32w4s2tma")


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_fused(case):
    check(case, config="32x32w4s2tma", deterministic=False)


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_cut_columns(case, monkeypatch):
    monkeypatch.setattr(schedule, "SHORTEST_PIECE", 2)
    check(case, config="32x16w4s2tma", slots=10**6)


@pytest.mark.parametrize("load", ["tma", "ptr"])
@pytest.mark.parametrize("d", [48, 80, 96, 160, 256])
def test_head_sizes_padded_in_tiles(d, load):
    check(Case("padded", _ls(2, 1, 16, 1, 2), 40, d=d), torch.float16, config=f"16x16w4s2{load}")


@pytest.mark.parametrize("config", ["64x64w4s2tma", "128x32w4s2ptr"])
def test_blocks_of_256(config):
    check(Case("block256", _ls(1, 1, 256, 1, 2), 700), torch.float16, config=config)


def test_values_of_another_size():
    case = Case("dv", _ls(4, 2, 16, 1, 2), 70)
    q, k, v, dout, dlse = make_inputs(case, torch.float32, DEVICE)
    wide = [torch.cat([x.detach(), x.detach().flip(1)[..., :16]], -1) for x in (v, dout)]
    check(case, inputs=(q, k, wide[0].requires_grad_(), wide[1], dlse))


@pytest.mark.parametrize("strides", [(2**26, 2**20), (64, 2**30)], ids=["rows", "heads"])
def test_offsets_are_64_bit(strides):
    """Offsets of rows or heads beyond 2^31, strides below it; only pages that are touched cost."""
    case = Case("far_apart", _ls(4, 4, 16, 1, 2), 40)
    q, k, v, dout, dlse = make_inputs(case, torch.float16, DEVICE)
    row, head = strides
    size = (case.s - 1) * row + 3 * head + 4 * 8192
    if DEVICE == "cuda":
        storage = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:
        storage = torch.from_numpy(np.empty(size, np.float16))
    far = []
    for i, x in enumerate((q, k, v, dout)):
        view = storage.as_strided(x.shape, (size, row, head, 1), i * 8192)
        far.append(view.copy_(x.detach()).requires_grad_(x.requires_grad))
    check(case, inputs=(*far, dlse), dtype=torch.float16)
