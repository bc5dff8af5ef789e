"""Attention of a sequence in parts, on 1 to 4 ranks over gloo: what one rank gives, in float64."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import zygote
from agents import two_nodes
from context_cases import CASES
from launches import ON_CPU, ROOT
from ports import free_port

from s2_kernels.exchange import Placement
from s2megatron.attention.context_parallel import ContextAttention, _add_to_rows, _row_gradients


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases in one start of four ranks: per case, what each rank found."""
    path = tmp_path_factory.mktemp("context") / "results.json"
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    done = zygote.run("context_cases:main", [str(path)], ranks=4, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank_and_receives_what_the_formula_says(results, name):
    ranks = results[name][: CASES[name].ranks]
    for rank, found in enumerate(ranks):
        for tensor in ("out", "dq", "dk", "dv"):
            assert found[tensor] < 1e-12, (rank, tensor)
        assert found["bytes"] == found["due"], rank
    if CASES[name].ranks > 1:
        assert any(found["bytes"] for found in ranks)
    assert results[name][len(ranks) :] == [None] * (4 - len(ranks))


def test_the_same_bits_each_time(results):
    assert results["same_bits"]


def test_across_two_network_namespaces(tmp_path):
    port, processes = free_port(), []
    with two_nodes() as nodes:
        for rank, node in enumerate(nodes):
            env = {**os.environ, **ON_CPU, **node.env, "RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": nodes[0].addr, "MASTER_PORT": str(port)}  # fmt: skip
            paths = [ROOT, ROOT / "kernels", ROOT / "tests/support"]
            env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
            script = ROOT / "tests/support/context_cases.py"
            command = [*node.prefix, sys.executable, str(script), str(tmp_path / "results.json")]
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name for name, case in CASES.items() if case.ranks <= 2} == set(found)
    for ranks in found.values():
        for rank in filter(None, ranks):
            assert max(rank[x] for x in ("out", "dq", "dk", "dv")) < 1e-12
            assert rank["bytes"] == rank["due"]


def test_the_benchmark_runs_without_gpus(tmp_path):
    sizes = ["--seqlens=256", "--heads=2", "--kv-heads=2", "--head-size=8", "--block=16",
             "--window=2", "--stride=4", "--repeats=1", f"--out={tmp_path}"]  # fmt: skip
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    done = zygote.run("context_cases:bench", sizes, ranks=2, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "context-parallel.json").read_text())["rows"]
    ways = ["two launches", "one launch", "2 groups", "2 groups, 0", "chosen: 2"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["tokens"] == 256 and row["received_mib"] > 0
        assert f"| 256 | {row['way']} |" in done.stdout


def test_a_part_that_no_block_divides_is_refused():
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    attention = ContextAttention(CASES["mha"].pattern, None, group)
    q = torch.zeros(1, 24, 4, 8)
    with pytest.raises(ValueError, match=r"24 tokens on a context-parallel rank.*of 16 tokens"):
        attention.attend(q, q, q)
    with pytest.raises(ValueError, match="2 blocks do not divide into 4 chunks"):
        attention.attend(*[torch.zeros(1, 16, 4, 8)] * 3)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_gradients_of_rows_are_added_up_over_chunks_and_rounded_once(chunks):
    g = torch.Generator().manual_seed(0)
    view = SimpleNamespace(came=Placement(*torch.tensor([[1, 0], [0, 2], [1, 0]])))
    received = torch.full((2, 1, 16, 12), float("nan"), dtype=torch.bfloat16)
    rows = _row_gradients(SimpleNamespace(chunks=[view] * chunks), received)
    total = torch.zeros(2, 1, 16, 12)
    for _ in range(chunks):
        dk, dv = (torch.randn(1, 64, 2, d, generator=g).bfloat16() for d in (8, 4))
        _add_to_rows(rows, view, dk, dv)
        both = torch.cat([dk, dv], dim=-1).float()
        total += torch.stack([both[:, 32:48, 0], both[:, :16, 1]])
    assert torch.equal(rows.to(received.dtype), total.bfloat16())
