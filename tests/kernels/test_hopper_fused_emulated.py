"""The backward pass with five products on the CPU (gluon_emulator), as good as the shipped one."""

import pytest
import test_hopper_emulated
import test_varlen
import torch
from attention_cases import Case, _ls
from test_hopper_emulated import EDGES, check, emulated  # noqa: F401 - a fixture

from s2_kernels import ranges
from s2_kernels.hopper import backward, backward_fused

pytestmark = test_hopper_emulated.pytestmark

CASES = [
    Case("gqa", _ls(4, 2, 64, 2, 3), 393, d=128),
    Case("batch_of_one_block", _ls(2, 2, 64, 1, 3), 150, d=64, b=2),
    Case("block128", _ls(2, 1, 128, 1, 2), 391, d=128),
    Case("many_edges", ranges(heads=2, kv_heads=1, block_size=64, bands=EDGES), 1411, d=64),
    Case("one_token", _ls(2, 2, 64, 2, 3), 1, d=128),
    Case("head96", _ls(1, 1, 64, 2, 2), 200, d=96),
]


@pytest.fixture(autouse=True)
def five_products(monkeypatch):
    """The backward pass is the one that nothing chooses by itself."""
    monkeypatch.setattr(backward, "launch_hopper_backward", backward_fused.launch_hopper_fused)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_reference(case):
    check(case)


def test_float16():
    check(Case("float16", _ls(2, 2, 64, 3, 4), 450, d=128), torch.float16)


@pytest.mark.parametrize("pattern", [_ls(2, 1, 64, 2, 3), _ls(2, 2, 128, 1, 2)], ids=str)
def test_packed(pattern):
    lengths = [37, 1, 0, 299, 64]
    test_varlen.check(pattern, lengths, lengths, torch.bfloat16, d=64, backend="hopper")
