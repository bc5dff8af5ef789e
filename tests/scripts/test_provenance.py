"""What a result says of where it was made; one module for benchmarks, study and evaluation."""

import ast
import json
import subprocess
import sys

import torch
from launches import ROOT

from s2megatron import provenance


def test_it_needs_torch_and_the_standard_library_only():
    """scripts/bench/attention.py runs where no Megatron is installed."""
    tree = ast.parse((ROOT / "s2megatron/provenance.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {name.split(".")[0] for name in imported}
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_every_benchmark_that_writes_rows_says_its_commit():
    for script in (ROOT / "scripts/bench").glob("*.py"):
        text = script.read_text()
        if "json.dumps(" in text and "write_text(" in text:
            assert "describe(ROOT" in text or "commit(ROOT)" in text, script


def test_every_row_comes_from_a_known_commit():
    """Nor from files that differ from it. Older rows have no such field; a page says theirs."""

    def commits(node):
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        found = [node["commit"]] if isinstance(node, dict) and "commit" in node else []
        return found + [name for child in inner for name in commits(child)]

    for file in (ROOT / "docs/benchmarks/raw").glob("*.json"):
        for name in commits(json.loads(file.read_text())):
            assert name != provenance.UNKNOWN and not name.endswith("-dirty"), file


def test_what_a_result_was_made_with(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # no commit yet
    monkeypatch.setenv("COMMIT", "abc1234")
    made = provenance.describe(tmp_path, ["torch", "no-such-package"])
    assert made["commit"] == "abc1234"
    assert made["versions"] == {"torch": torch.__version__, "no-such-package": provenance.MISSING}
    words = provenance.in_words(made["versions"])
    assert words == f"torch {torch.__version__}, no-such-package not installed"
    commit = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", "commit"]
    file = tmp_path / "kernel.py"
    file.write_text("first")
    subprocess.run(["git", "-C", str(tmp_path), "add", "kernel.py"], check=True)
    subprocess.run([*commit, "-q", "-m", "x"], check=True)
    head = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    whole = subprocess.run(head, capture_output=True, text=True, check=True).stdout
    found = provenance.commit(tmp_path)
    assert len(found) >= 7 and whole.startswith(found)
    file.write_text("second")
    assert provenance.commit(tmp_path) == "abc1234"
    monkeypatch.delenv("COMMIT")
    assert provenance.commit(tmp_path) == f"{found}-dirty"


def test_no_git_and_no_name_is_unknown(tmp_path, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit(tmp_path) == "unknown"


def test_the_machine_is_the_one_that_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    assert provenance.machine("cuda:1") == "GPU of cuda:1"
    assert provenance.machine(torch.device("cpu")) == "CPU"
    for there, name in ((True, "GPU of cuda"), (False, "CPU")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert provenance.machine() == name
