"""Runs whose layers are captured in CUDA graphs, attention included: the losses of plain ones."""

import pytest
import torch
from graph_cases import ITERATIONS
from in_process import call_on_gpus

from s2megatron.training.backends import find_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not find_backends().transformer_engine,
        reason="Megatron's graphs need Transformer Engine's random number tracker",
    ),
]


def losses(folder, impl: str, modules: str = "") -> dict:
    (found,) = call_on_gpus("graph_cases", "train_losses", str(folder), impl, modules, ranks=1)
    assert len(found) == ITERATIONS
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("plain"), "none")


@pytest.mark.parametrize(
    "impl, modules", [("local", ""), ("transformer_engine", ""), ("transformer_engine", "attn")]
)
def test_captured_losses_are_the_plain_ones(tmp_path, plain, impl, modules):
    assert losses(tmp_path, impl, modules) == plain
