"""scripts/bench/compare_layouts.py: real runs on the CPU, and what its table says of failures."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from launches import ON_CPU, ROOT

sys.path.insert(0, str(ROOT / "scripts/bench"))
import compare_layouts
from layouts import LAYOUTS, ONE_GPU, VARIANTS, TrainedLayout, base_run_file, layouts, run_file
from runs import what_went_wrong
from warm_ranks import rank_environment

from s2megatron.training.backends import Backends
from s2megatron.training.megatron_options import to_argv


def test_packed_documents_over_two_ranks_have_the_losses_of_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/bench/compare_layouts.py", "--gpus", "2", "--out", str(tmp_path),
         "--steps", "3", "--attention", "s2", "--only", "packed"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, **ON_CPU},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("*/result.json")}
    one, two = found["packed-1_GPU-local-s2"], found["packed-TP=2_SP-local-s2"]
    assert list(one["losses"]) == ["1", "2", "3"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    table = (tmp_path / "layouts.md").read_text()
    assert "| packed | TP=2 + SP | 2 | local | 1 GPU, local | 3 |" in table
    assert "No run failed." in table
    # The same command again finds them, and another model does not.
    folder = tmp_path / "packed-TP=2_SP-local-s2"
    assert compare_layouts.finished(folder, two["run_file"], []) == two
    assert compare_layouts.finished(folder, two["run_file"], ["megatron.lr=1"]) is None


def test_layouts_fit_the_gpus_and_each_has_its_own_single_gpu_run():
    assert {layout.gpus for layout in layouts(2)} == {1, 2}
    assert set(LAYOUTS) < set(layouts(4))
    for gpus in (1, 2, 4):
        singles = [layout.variant for layout in layouts(gpus) if layout.name == ONE_GPU]
        assert sorted(singles) == sorted({layout.variant for layout in layouts(gpus)})
    assert {layout.variant for layout in layouts(4)} == set(VARIANTS)


def test_every_layout_is_made_of_megatrons_options():
    for small in (False, True):
        base = base_run_file(small=small, corpus="corpus", steps=24)
        for layout in layouts(4):
            tree = run_file(base, layout, modules="transformer_engine", dense=False)
            _, parsed = to_argv(tree["megatron"])
            assert parsed.micro_batch_size == 1 and parsed.train_iters == 24
            if layout.variant == "FP8 linears":
                assert parsed.fp8 == "hybrid"


def test_dense_runs_differ_in_the_sparsity_alone():
    base = base_run_file(small=False, corpus="corpus", steps=24)
    layout = TrainedLayout("PP=2", 2, {"pipeline_model_parallel_size": 2}, "MoE, 8 experts")
    sparse = run_file(base, layout, modules="local", dense=False)
    dense = run_file(base, layout, modules="local", dense=True)
    assert sparse.pop("sparsity") != dense.pop("sparsity") and sparse == dense
    assert dense["megatron"]["num_experts"] == 8 and "num_experts" not in base["megatron"]


def test_a_failed_run_is_in_the_table_with_its_error():
    wanted = [TrainedLayout(ONE_GPU, 1, {}), TrainedLayout("TP=2 + SP", 2, {})]
    cases = compare_layouts.list_cases(wanted, ["local"], ["s2"])
    initial, one, two = cases
    assert initial.initial and not one.initial
    losses = {str(step): 2.0 for step in range(1, 25)}
    results = {
        initial: {"error": "", "losses": {"1": 2.0}},
        one: {"error": "", "losses": losses},
        two: {"error": "RuntimeError: no NCCL", "losses": losses},
    }
    options = argparse.Namespace(attention=["s2"], steps=24, gpus=2, ranks_per_gpu=1)
    backends = Backends(False, None, False, None, False)

    def table():
        return compare_layouts.report(cases, results, options, backends, ["local"])

    assert "| base | TP=2 + SP | 2 | local | 1 GPU, local | 0 | failed |" in table()
    assert "- base-TP=2_SP-local-s2: RuntimeError: no NCCL" in table()
    results[two] = {"error": "", "losses": losses | {"3": 2.1, "20": 2.01}}
    assert "| 24 | 2.0000 | 2.0000 | 0.500% | 5.000% |" in table()
    del results[two]
    assert "1 runs were not done" in table()
    assert "share them" not in table()
    options.ranks_per_gpu = 2
    assert "against one GPU: 2 ranks on 1x CPU" in table()
    assert "**Ranks of a layout of more than 1 GPUs share them**" in table()


@pytest.mark.parametrize(
    "ranks, load, per_gpu, chosen",
    [
        (2, {}, 2, [0, 2]),  # a GPU each, where there are two
        (4, {}, 2, [0, 2, 1, 3]),
        (2, {0: 1}, 2, [1, 2]),
        (1, {0: 1, 1: 1}, 2, [2]),
        (2, {}, 1, [0, 1]),
        (3, {}, 4, [0, 1, 2]),  # one GPU for all
    ],
)
def test_ranks_share_a_gpu_only_where_there_are_too_few(ranks, load, per_gpu, chosen):
    gpus = 2 if per_gpu == 1 else 4
    assert sorted(compare_layouts.choose(ranks, Counter(load), gpus, per_gpu)) == sorted(chosen)


def test_ranks_that_share_a_gpu_are_nodes_of_their_own_to_nccl():
    alone = rank_environment(1, [0, 1], 20001)
    assert alone["LOCAL_RANK"] == "1" and not any(name.startswith("NCCL") for name in alone)
    first, second = (rank_environment(rank, [0, 0], 20001) for rank in (0, 1))
    assert first["LOCAL_RANK"] == second["LOCAL_RANK"] == "0"
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert second["NCCL_SOCKET_IFNAME"] == "lo" and second["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize(
    "log, words",
    [
        ("[rank1]:   File x\n[rank1]: ValueError: head 3\n", "ValueError: head 3"),
        ("s2megatron: this run cannot start:\nmegatron.lr: bad\n", "megatron.lr: bad"),
        ("torch.OutOfMemoryError: CUDA out of memory\nbye\n", "torch.OutOfMemoryError: CUDA"),
        ("Killed\n", "status -9; its log ends: Killed"),
        (  # its traceback is above; what a peer saw of it comes later
            "[rank1]: KeyError: 'head'\n[rank1]: ValueError: head 3\n[rank0]: RuntimeError: peer\n",
            "ValueError: head 3",
        ),
        (
            "RuntimeError: closed by peer\ns2megatron: the job failed on node 0 (host): "
            "rank 1 failed: ValueError: head 3\ns2megatron: nothing was saved\n",
            "rank 1 failed: ValueError: head 3",
        ),
    ],
)
def test_error_of_a_log(tmp_path, log, words):
    (tmp_path / "rank0.log").write_text(log)
    assert what_went_wrong(tmp_path / "rank0.log", -9).startswith(words)
