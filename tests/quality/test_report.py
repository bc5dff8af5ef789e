"""The study's report: differences with paired errors, what is missing, what is drawn."""

import json
import sys

import pytest
from launches import ROOT

sys.path.insert(0, str(ROOT / "scripts/quality"))
import pictures
import report

PHASE = {"length": 4096, "tokens": 5_000_000, "batch_tokens": 4096, "seconds": None, "lr": 1e-3,
         "final_lr": 1e-4, "retrieval": 0.5, "repeats": 0.5, "records": 0.5}  # fmt: skip


def arm_result(arm, nats, right=(1, 0, 1), seed=1):
    """A result as examine.py leaves it, with two windows and three documents."""
    plan = {"lengths": [4096], "loss_lengths": [4096],
            "probes": [{"name": "records", "tasks": ["multi_key"]}]}  # fmt: skip
    answers = [[value, 1, value * far, far] for value, far in zip(right, (1, 0, 0), strict=True)]
    return {
        "arm": arm, "file": f"{arm}--{seed}", "status": "done", "gpu": "none", "commit": "0",
        "date": "today", "versions": {}, "command": "none", "arms_per_gpu": 1,
        "recipe": {"phases": [PHASE], "seed": seed, "examination": plan},
        "phases": [{"tokens": 5_000_000, "us_per_token": 2.0, "validation": {}, "length": 4096}],
        "examination": {
            "loss-4096": {"samples": {"loss": {"4096": [[n, 10, n / 5, 2] for n in nats]}}},
            "records": {"samples": {"right": {"multi_key": {"4096": answers}}}},
        },
    }  # fmt: skip


def test_arms_are_held_against_dense_window_by_window():
    found = [arm_result("dense", [20.0, 30.0]), arm_result("paper", [21.0, 32.0], (1, 0, 0))]
    dense, paper = report.loss_table(found)[2:]
    assert "| 2.5000 |  | 2.5000 |  |" in dense and "| 5M |" in dense and "| 2.00 | done |" in dense
    # 0.1 and 0.2 nats a token more: 0.15 of 2.5, and half of their distance is the error
    assert "| 2.6500 | +6.00% (se 2.00%) |" in paper
    right = report.retrieval_table(found, found[0]["recipe"]["examination"]["probes"][0])
    assert right[0] == "| arm | multi_key 4096 | multi_key 4096 far |"
    assert right[2] == "| dense | 67% | 100% |"
    # 0, 0 and 1 answers fewer in the three documents
    assert right[3] == "| paper | 33% (-33.3, se 33.3) | 100% (+0.0, se 0.0) |"


def test_a_claim_is_told_in_standard_errors_and_only_where_dense_answers():
    arms = [("dense", [20.0, 30.0], (1, 1, 1)), ("no-dense", [21.0, 31.5], (1, 1, 0)),
            ("homogeneous", [22.0, 32.0], (0, 0, 0))]  # fmt: skip
    table = report.claims_table([arm_result(*arm) for arm in arms])
    pair = "| `no-dense` - `homogeneous`: different shards against equal ones, no dense layers |"
    assert f"{pair} loss at 4096 | 2.6250 | 2.7000 | -0.0750 | 0.0250 | -3.0 | yes |" in table
    assert (
        f"{pair} records, multi_key 4096 | 0.6667 | 0.0000 | +0.6667 | 0.3333 | +2.0 | yes |"
        in table
    )
    arms[0] = ("dense", [20.0, 30.0], (1, 0, 1))  # 67%: the probe says nothing
    table = report.claims_table([arm_result(*arm) for arm in arms])
    assert all(line.endswith("| no |") for line in table if "multi_key 4096 |" in line)


def test_only_arms_that_began_alike_are_compared():
    one, other = (arm_result("dense", [20.0, 30.0]) | {"origin": x} for x in ("then", "now"))
    assert report.group(one) != report.group(other)  # as good as another seed
    own = [x | {"shared": False} for x in (one, other)]
    assert report.group(own[0]) == report.group(own[1])


def test_an_arm_that_went_on_is_one_line():
    """Two recipes of a chain, another chain of the same arm, and an arm by itself."""
    first = arm_result("dense", [20.0, 30.0]) | {"origin": "then", "file": "dense--trunk"}
    first["phases"][0] |= {"batch_tokens": 4096, "validation": {"text": [[100, 4.0], [200, 3.0]]}}
    longer = first | {"phases": first["phases"] * 2, "file": "dense--long"}
    again, paper = first | {"origin": "now"}, arm_result("paper", [21.0, 32.0])
    ends = pictures.chain_ends([first, again, longer, paper])
    assert ends == [longer, again, paper]
    # 4,096 tokens a step, and 5M in the first phase
    assert pictures.watched(longer, "text") == {0.4096: 4.0, 0.8192: 3.0, 5.4096: 4.0, 5.8192: 3.0}


def test_the_worst_places_are_named():
    def cell(value):
        return {"value": value, "error": None, "count": 50}

    result = arm_result("paper", [20.0, 30.0])
    result["examination"]["records"]["retrieval"] = {"multi_key": {
        "by length": {"4096": {"all": cell(0.9), "left out": cell(0.0),
                               "by depth": [cell(1.0), cell(0.5), cell(None)]}},
        "by distance": {"0 to 512": cell(1.0), "512 to 1024": cell(0.8)},
        "by shard": {"blocks of 64, 2 shards": {"0": cell(0.96), "1": cell(0.94)}},
    }}  # fmt: skip
    line = report.worst_table([result], {"name": "records"})[-1]
    assert line == (
        "| paper | multi_key 4096 | 45 of 50 | 10%: 25 of 50 | 512 to 1024: 40 of 50 | "
        "shard 1 (blocks of 64, 2 shards): 47 of 50 | 0 of 50 |"
    )


def test_seeds_show_the_noise():
    nats = {("dense", 1): [20.0, 30.0], ("paper", 1): [21.0, 31.5], ("dense", 2): [20.0, 20.0],
            ("paper", 2): [20.0, 21.2]}  # fmt: skip
    found = [arm_result(arm, of, seed=seed) for (arm, seed), of in nats.items()]
    found[0]["recipe"]["phases"] = [PHASE | {"shortest": None}]  # of a recipe that knows more
    line, far = report.seeds_table(found)[-2:]
    assert far.startswith("| paper | 4096, far repeats | 2.6250, 2.0600 | +5.00%, +3.00% |")
    assert line == "| paper | 4096 | 2.6250, 2.0600 | +5.00%, +3.00% | +4.00% | 1.41% |"


def test_an_arm_that_is_not_done_leaves_its_cells_empty(tmp_path):
    result = arm_result("paper", [1.0])
    del result["examination"]
    result |= {"phases": [], "status": "started"}
    (tmp_path / "paper.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert "| paper | 39.7% | 26.5% | 0M |  |  |  |  | started |" in text


def test_equal_time_is_drawn_by_seconds(tmp_path):
    result = arm_result("dense", [20.0, 30.0])
    result["recipe"]["phases"] = [PHASE | {"train_seconds": 60}]
    result["phases"] = [
        {"tokens": 8192, "batch_tokens": 4096, "length": 4096, "dense_kernel": "cudnn",
         "validation": {"text": [(1, 3.0), (2, 2.5)]}, "seconds": [(1, 30.0), (2, 60.0)]}
    ]  # fmt: skip
    (tmp_path / "dense.json").write_text(json.dumps(result))
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/equal-time.png").stat().st_size > 5000
    assert "](equal-time.png)" in (tmp_path / "out/report.md").read_text()


def test_a_probe_of_many_documents_has_a_picture_of_length_and_depth(tmp_path):
    """Needles by the hundred have one; a probe of few documents has too few a cell."""
    few, many = arm_result("dense", [20.0, 30.0]), arm_result("paper", [21.0, 32.0])
    cell = dict(value=1.0, error=0.0, count=10)
    found = {"single": {"by length": {"4096": {"all": cell, "by depth": [cell] * 10}}}}
    many["recipe"]["examination"]["probes"][0]["documents"] = 100
    for result in (few, many):
        result["examination"]["records"]["retrieval"] = found
    files = pictures.draw([few, many], {"dense--1": None, "paper--1": None}, {}, tmp_path)
    assert [path.name for path in files.values()] == ["curves.png", "paper--1-records.png"]
    assert files["paper--1, records"].stat().st_size > 5000


def test_curves_of_a_pretrained_model_are_held_against_its_own_dense_arm(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    phase = {"tokens": 8192, "batch_tokens": 4096}
    arms = [
        arm_result(name, [])
        | {"phases": [phase | {"validation": {"text": [(1, loss), (2, loss)]}}]}
        for name, loss in (("smollm2-dense", 2.0), ("smollm2-first", 2.1))
    ]
    pictures.draw_curves(arms, tmp_path / "curves.png")
    apart = [line.get_ydata().tolist() for line in figures[0].axes[2].lines]
    assert apart == [[0, 0], [pytest.approx(5), pytest.approx(5)]]
