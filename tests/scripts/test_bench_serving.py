"""The benchmark of serving, tried out with vLLM on the CPU: the rows and the page."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launches import ROOT
from vllm_cases import environment

sys.path.insert(0, str(ROOT / "scripts/bench"))
import serving as bench
import serving_load

OPTIONS = (
    "--device cpu --shape tiny --lengths 128,512 --batches 1,3 --tokens 6 --block-size 16 "
    "--local-blocks 2 --stride 4 --chunk 64 --pages 120"
)
TINY = OPTIONS.split()


LOAD = "--load 200 --lengths 400 --batches 32 --tokens 12 --pages 260"
LOAD = [*TINY, *LOAD.split()]


def run(folder, options):
    """Of "s2" alone: another provider would start vLLM once more."""
    command = [sys.executable, str(ROOT / "scripts/bench/serving.py"), *options]
    command += ["--providers", "s2", "--in-this-process", str(folder / "out.json")]
    done = subprocess.run(command, env=environment(folder / "site"), text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text()) | {"printed": done.stdout}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("bench"), TINY)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return run(tmp_path_factory.mktemp("load"), LOAD)


def test_every_case_is_timed(result):
    rows = result["rows"]
    assert [(row["tokens"], row["batch"]) for row in rows] == [
        (128, 1), (128, 3), (512, 1), (512, 3),
    ]  # fmt: skip
    assert [row["running"] for row in rows] == [1, 3, 1, 3]
    assert all(row["step_ms"] > 0 and row["tokens_s"] > 0 and row["first_s"] > 0 for row in rows)
    # 2 KV heads: window of 2 blocks and every 4th; 33 blocks of 512 + 6 tokens
    assert rows[-1]["fits"] == 119 // (2 * (2 + 8) + 1)


def test_the_first_request_is_told_apart(result):
    """It pays for whatever the warm-up left; rows are of a warm engine."""
    first = result["first_request"]
    assert first["tokens"] == 128 and first["first_s"] > 0 and result["start_s"] > 0
    assert "the first token of its first request, 128 tokens: after" in result["printed"]


def test_cases_keep_their_order():
    assert bench.parse(["--cases", "512:1,128:3"]).cases == [(512, 1), (128, 3)]
    assert bench.parse(["--lengths", "8,9", "--batches", "1"]).cases == [(8, 1), (9, 1)]


def test_the_page_has_a_row_for_each(result, tmp_path):
    a = bench.parse([*TINY, "--out", str(tmp_path), "--name", "tried"])
    out_of_time = dict(result["rows"][0], provider="dense", first_s=None)
    for name in ("running", "step_ms", "tokens_s"):
        del out_of_time[name]
    page = bench.write([result, result | {"rows": [out_of_time]}], a).read_text()
    assert page.count("first tokens are of later requests") == 2
    assert page.count("| s2 |") == 4 and page.count("| dense |") == 1 and "vllm 0.26.0" in page
    assert f"commit {result['commit']};" in page
    assert len(json.loads((tmp_path / "tried.json").read_text())) == 2


def test_under_load_nothing_is_wrong_and_nothing_is_lost(load):
    """200 requests of 1 to 400 tokens, in a pool for a few of them; a fifth is taken back."""
    (row,) = load["rows"]
    assert row["requests"] == 200 == row["taken_back"] + row["finished"]
    assert row["out_of_time"] == 0 and row["compared"] == row["finished"]
    assert f"compared {row['finished']} of {row['finished']}, 0 wrong" in load["printed"]
    assert row["taken_back"] > 20 and row["together"] > 8
    assert row["wrong"] == row["ties"] == []
    assert row["free_before"] == row["free_after"] == 259
    assert row["host_late"] - row["host_early"] < 20


def test_the_page_of_a_load_has_a_line(load, tmp_path):
    a = bench.parse([*LOAD, "--out", str(tmp_path), "--name", "tried"])
    page = bench.write([load], a).read_text()
    assert page.splitlines()[-1].startswith("| 200 | ") and "float32" in page


def test_a_deadline_leaves_what_is_known(tmp_path, monkeypatch, capsys):
    """Nothing waits for the last answer: pages and memory are told, and how many were compared."""
    now = iter(range(10_000))
    monkeypatch.setattr(serving_load.time, "perf_counter", lambda: float(next(now)))
    load = serving_load.Load(FakeEngine(), 50, 64, 4, 100, seconds=90)
    monkeypatch.setattr(load, "_ask", lambda name, **_: load.engine.ask(name, load.new[name]))
    likely = [{1: 0.0}] * 4
    monkeypatch.setattr(load, "_alone", lambda name: ([1] * load.new[name], likely))
    row = load.run()
    assert 0 < row["compared"] < row["finished"] < 50 and row["out_of_time"] > 0
    assert row["taken_back"] + row["out_of_time"] + row["finished"] == 50
    assert row["wrong"] == [] and row["free_after"] == row["free_before"] == 7
    printed = capsys.readouterr().out
    assert "of 50 finished after" in printed
    assert f"compared {row['compared']} of {row['finished']}, 0 wrong" in printed
    assert f"| {row['compared']} |" in serving_load.line(row)


class FakeEngine:
    """Two requests at a time, a token a step; a stand-in for vLLM's engine and its core."""

    def __init__(self):
        self.left = {}
        blocks = SimpleNamespace(get_num_free_blocks=lambda: 7)
        scheduler = SimpleNamespace(
            running=[], has_requests=lambda: bool(self.left),
            kv_cache_manager=SimpleNamespace(block_pool=blocks),
        )  # fmt: skip
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))

    def ask(self, name, tokens):
        self.left[name] = [tokens, 0]

    def abort_request(self, names):
        for name in names:
            self.left.pop(name, None)

    def step(self):
        done = []
        for name in list(self.left)[:2]:
            self.left[name][1] += 1
            if self.left[name][1] == self.left[name][0]:
                tokens = [1] * self.left.pop(name)[0]
                outputs = [SimpleNamespace(token_ids=tokens)]
                done.append(SimpleNamespace(request_id=name, finished=True, outputs=outputs))
        return done


@pytest.mark.parametrize("under_load, verdict", [
    ([5, 6, 7], "same"), ([5, 9, 1], "tie"), ([5, 8, 7], "wrong"), ([4, 6, 7], "wrong"),
    ([5, 6], "wrong"),
])  # fmt: skip
def test_only_what_is_as_good_may_differ(under_load, verdict):
    likely = [{5: -0.1, 4: -2.4}, {6: -1.0, 9: -1.0005}, {7: -0.5, 3: -1.5}]
    assert serving_load.judge(under_load, [5, 6, 7], likely) == verdict
