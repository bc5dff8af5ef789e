"""The shipped configurations once more, compiled by the newest Triton that setup.py allows.

scripts/test.sh installs it by itself beside the environment's torch (`make_newest_triton`).
"""

import sys
from pathlib import Path

import pytest
from shipped import assert_that_all_fit, compile_in_a_process
from shipped_figures import LOOPS, check_main_loops, check_stack

from s2_kernels.versions import TRITON, release

NEWEST = Path(sys.prefix) / "triton-newest"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if not (NEWEST / "triton").exists():
        pytest.skip(f"no second Triton in {NEWEST}: scripts/test.sh could not install it")
    return compile_in_a_process(tmp_path_factory.mktemp("triton"), NEWEST)


def test_it_is_the_last_one_before_the_bound(report):
    major, minor = TRITON[1]
    assert release(report["triton"]) == (major, minor - 1)


def test_all_compile_and_fit(report):
    assert_that_all_fit(report)
    assert report["recompiled"] == []


def test_stack_is_what_it_was(report):
    check_stack(report)


@pytest.mark.parametrize("kernel", LOOPS)
def test_hopper_main_loops(report, kernel):
    check_main_loops(report, kernel)
