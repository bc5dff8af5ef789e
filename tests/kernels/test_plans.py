"""Launches prepared once (plans.py): the same launches to the byte, and little work for the host.

On a stub CUDA driver (tests/support/host_path.py), with Triton's own launcher and without a GPU.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode

from s2_kernels import local_stride, plans, schedule
from s2_kernels.launch import device_table, empty_like
from s2_kernels.recording import Recorder
from s2_kernels.versions import prepares_launches

pytestmark = [
    pytest.mark.skipif(
        not prepares_launches(triton.__version__), reason="plans are made with Triton 3.6 only"
    ),
    pytest.mark.skipif(not shutil.which("gcc"), reason="Triton's launcher is compiled with gcc"),
]
SUPPORT = Path(__file__).parents[1] / "support"
MOST_ENTERED = dict(forward=60, backward=85)
"""Python functions that the host enters for a call whose shapes came before."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, SUPPORT / "host_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def kernels(launches) -> list[str]:
    return [launch[0] for launch in launches]


def test_a_plan_launches_what_the_launchers_do(report):
    for name, case in report["cases"].items():
        (direct, layouts), (planned, planned_layouts) = case["direct"], case["plan"]
        assert case["passes"] == 2, name
        assert kernels(direct) == kernels(planned) and len(direct) >= 3, name
        for one, other in zip(direct, planned, strict=True):
            assert one == other, (name, one[0])
        assert layouts == planned_layouts, name
        inputs = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}
        assert inputs <= {str(x[0] if isinstance(x, list) else x) for run in direct for x in run}
    for name in ("hopper-cut", "triton-cut", "hopper-d256-cut"):
        assert "s2_add_pieces_kernel" in kernels(report["cases"][name]["plan"][0])
    assert "s2_packed_slots_kernel" in kernels(report["cases"]["hopper-packed"]["plan"][0])


class NotAsked(TorchFunctionMode):
    """Tensors without memory would do, but the first imports 500 modules: 3 s of a second step."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was asked")


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_stand_in_is_laid_out_as_a_tensor(order, size):
    """launch.empty_like of both; strides of dimensions of size 1 mean nothing."""
    for shape in itertools.product((1, 2), (1, 5), (1, 4), (8,)):
        whole = torch.empty([*(shape[dim] for dim in order), shape[3]])
        x = whole.permute(*(order.index(dim) for dim in range(3)), 3)
        for tensor in (x, x[..., :1], x[:, :1], x[:, :, :1]):
            stand_in = Recorder((tensor,), tensor.device).inputs[0]
            with NotAsked():
                stand_in = empty_like(stand_in, size)
            like = empty_like(tensor, size)
            assert stand_in.shape == tuple(like.shape)
            for dim, n in enumerate(like.shape):
                assert n == 1 or stand_in.strides[dim] == like.stride(dim), (x.stride(), dim)


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_little_is_done_for_shapes_that_came_before(report, backend, which):
    """Counted, not timed: neither Triton's dispatch nor the launchers are entered again."""
    steady = report["steady"][backend]
    entered = steady[which]["entered"]
    ours = [name for name in entered if "s2_kernels" in name]
    for module in ("jit.py", "tensor_descriptor.py", "schedule.py", "pattern.py", "primitives.py"):
        assert not [name for name in entered if module in name], entered
    assert not [name for name in ours if "launch_" in name or "_check" in name], ours
    assert sum(entered.values()) <= MOST_ENTERED[which], entered
    assert steady["compiled"] == 0 and steady["launches"] == (3 if backend == "hopper" else 4)
    copies, launches = (steady[which]["in_c"][name] for name in ("copy", "launch"))
    assert copies == launches, "of lists of arguments, one a launch"


def test_what_may_differ_under_one_plan(report):
    found = report["changes"]
    assert found["other_addresses"] == dict(same=True, passes=2)
    assert found["unaligned"] == dict(same=True, passes=0, bits=2)
    assert found["stream"] == dict(same=True, passes=2) and found["streams"] == [18]
    assert found["one_tensor_thrice"] == 1
    assert found["hook"]["same"] and found["hook"]["passes"] == 0 and found["hook"]["told"] == 8
    assert found["expanded"] == 4


def test_descriptors_of_addresses_that_came_before_are_kept(report):
    made = report["descriptors"]
    assert made == dict(first=4, again=0, other=4)


def test_a_plan_sets_the_gradients_of_far_blocks_to_0(report):
    """Kernels write those that a head has; four rows of 64 tokens, from the first on."""
    assert len(report["zeroed"]) == 8
    for name, found in report["zeroed"].items():
        assert found == [[4 * 64, True]] * 2, name


def test_results_where_they_belong_have_plans_too(report):
    for name, found in report["in_place"].items():
        written = ["dk", "dq", "dv", "out"]
        assert found == dict(same=True, passes=2, written=written), name


def test_moves_of_blocks_have_plans_too(report):
    """Blocks that become 0, too: one launch, with no 0 to wait for from the host."""
    found = report["moved"]
    assert found["same"] and found["passes"] == 4
    assert kernels(found["launches"]) == ["s2_move_blocks_kernel"] * 4
    cleared, *addresses = [run[5:12] for run in found["launches"]]
    lists = ["slots", "heads", "slots"]
    assert cleared[:3] == ["x", "slots", "heads"]
    assert addresses[0][:5] == ["x", "rows", *lists]
    assert addresses[1][:5] == ["rows", "x", "slots", "slots", "heads"]
    assert addresses[2][:6] == ["x", "rows", *lists, "starts"]


def test_decoding_has_plans_too(report):
    token = ["s2_write_kernel", "s2_hopper_decode_kernel"]
    kernels = ["s2_write_kernel", "s2_decode_kernel", "s2_merge_kernel"]
    assert report["paged"]["token"] == dict(same=True, passes=2, kernels=token)
    assert report["paged"]["prompt"] == dict(same=True, passes=2, kernels=kernels)


def test_a_chunk_of_a_prompt_takes_the_hopper_kernel_as_it_is(report):
    """Keys are copies of pages, head after head; the result is written where vLLM wants it."""
    hopper = ["s2_hopper_forward_kernel"]
    assert report["paged"]["chunk"] == dict(passes=1, kernels=[hopper, hopper], written=True)


def test_a_pass_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever the addresses are."""
    current, entered = [0], []

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            entered.append(self.index)
            current[0] = self.index

        def __exit__(self, *error):
            current[0] = 0

    driver = types.SimpleNamespace(
        get_current_device=lambda: current[0], get_current_stream=lambda device: (device, current)
    )
    monkeypatch.setattr(plans, "driver", types.SimpleNamespace(active=driver))
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plans, "ON", True)
    launched = []
    launch = types.SimpleNamespace(run=lambda *given: launched.append((current[0], *given)))
    plan = plans.Plan((), (), 0, 0, (), (launch,))
    other = torch.device("cuda", 1)
    assert plan.run((), other) == () and launched == [(1, (1, current), [], [])]
    where = plans.Plans().run(("key",), lambda: (current[0],), (), other)
    assert where == (1,) and current == [0] and entered == [1, 1]
    assert plans.Plans().run(("key",), lambda: (current[0],), (), torch.device("cuda", 0)) == (0,)
    assert entered == [1, 1]


def test_a_captured_plan_stays(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    driver = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    monkeypatch.setattr(plans, "driver", types.SimpleNamespace(active=driver))
    monkeypatch.setattr(plans, "_CAPTURED", set())
    plan = plans.Plan((), (), 0, 0, (), ())
    plan.run((), torch.device("cuda", 0))
    assert {plan} == plans._CAPTURED


def test_lists_are_not_uploaded_into_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pattern, device = local_stride(heads=2, local_blocks=2, stride=2), torch.device("cuda", 0)
    for upload in (
        lambda: device_table(pattern, device),
        lambda: schedule.query_tiles(pattern, 256, 1, 4, device),
        lambda: schedule.column_pairs(pattern, 256, 1, 4, device),
    ):
        with pytest.raises(RuntimeError, match="once before the capture"):
            upload()


def test_the_oldest_plan_goes(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    monkeypatch.setattr(plans, "record", lambda launcher, tensors, device: f"plan of {launcher}")
    found = plans.Plans()
    for key in ((1,), (2,), (3,)):
        assert found.find(key, key, (), None) is None  # a pass that comes once gets no plan
        assert found.find(key, key, (), None) == f"plan of {key}" == found.get(key)
    assert found.get((1,)) is None and found.get((2,)) and found.get((3,))


def test_what_is_set_to_0_too_late_or_for_nobody_is_not_recorded():
    """A plan does it before all launches, and only to what it returns."""

    def late(x):
        made = x.new_empty(x.shape)
        x.recorder.note(None, (), (made,), {})
        made.zero_()

    def middle(x):
        x.new_empty(x.shape).narrow(0, 1, 1).zero_()

    for launcher, words in (
        (late, "after a launch"),
        (middle, "a part of a tensor from 1 on"),
        (lambda x: x.new_empty(x.shape).zero_(), "not returned"),
    ):
        with pytest.raises(plans.CannotRecordError, match=words):
            plans.record(launcher, (torch.zeros(4, 2),), torch.device("cpu"))


def test_what_cannot_be_recorded_is_not_tried_again(monkeypatch):
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise plans.CannotRecordError("more than launches")

    monkeypatch.setattr(plans, "record", refuse)
    found = plans.Plans()
    assert [found.find((1,), None, (), None) for _ in range(5)] == [None] * 5
    assert len(tried) == 1
