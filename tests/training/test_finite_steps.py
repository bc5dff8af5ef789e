"""A step with a gradient that is not a number changes no weight, whatever Megatron checks."""

import math
from argparse import Namespace

import pytest
from agents import make_corpus
from in_process import call
from launches import TINY, start, write_run_file

from s2megatron.training.checkpoint_folder import tracked
from s2megatron.training.finite_steps import must_stop, refusal

NEVER = math.inf
"""Megatron's default of grad_norm_skip_threshold."""


@pytest.mark.parametrize(
    "norm, skips_above, stops",
    [
        (None, NEVER, False),
        (0.0, NEVER, False),
        (3.5, NEVER, False),
        (3.5, 1.0, False),
        (math.nan, NEVER, True),
        (math.nan, 1.0, True),
        (math.inf, NEVER, True),
        (math.inf, 1.0, False),  # Megatron leaves that step out
    ],
)
def test_what_would_spoil_the_weights(norm, skips_above, stops):
    assert must_stop(norm, skips_above) is stops


def test_it_says_why_megatron_said_nothing():
    args = dict(curr_iteration=0, lr=0.1)
    first = refusal(math.nan, Namespace(**args, check_for_nan_in_loss_and_grad=True))
    assert "iteration 1:" in first and "second iteration" in first
    unchecked = refusal(math.inf, Namespace(**args, check_for_nan_in_loss_and_grad=False))
    assert "is inf" in unchecked and "check_for_nan_in_loss_and_grad=true names" in unchecked


def test_every_kind_of_optimizer_is_looked_at():
    """Muon's layer-wise one finds the norm by a method of its own."""
    stops = [True, False]
    assert call("norm_cases", "norms_that_stop") == {
        "ChainedOptimizer": stops,
        "LayerWiseDistributedOptimizer": stops,
    }


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_run_without_megatrons_check_ends_before_the_step(tmp_path, distributed):
    """A learning rate that makes weights of 1e30 in its first steps, on two ranks."""
    config = write_run_file(tmp_path / "run.yaml", TINY)
    done = start(
        config,
        f"data.train=[{make_corpus(tmp_path)}]",
        f"output.folder={tmp_path / 'out'}",
        f"megatron.use_distributed_optimizer={distributed}",
        "megatron.check_for_nan_in_loss_and_grad=false",
        "megatron.lr=1e30",
        "megatron.min_lr=1e29",
        "megatron.save_interval=1",
        "megatron.async_save=false",
        ranks=2,
    )
    assert done.returncode != 0
    told = "FloatingPointError: iteration 3: the norm of the gradients is nan. No weight"
    assert done.stderr.count(told) == 2 and "megatron.lr: 1e+30" in done.stderr
    assert tracked(tmp_path / "out/checkpoints") == 2
