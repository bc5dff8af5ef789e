"""`python -m s2megatron.stock SCRIPT ...`: how it ends, which is what torchrun and SLURM see."""

import multiprocessing
import runpy
import sys

import pytest
import torch
from launches import TINY, write_run_file

from s2megatron.stock import main


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script in pretrain_gpt.py's place; gives the status that stock.py ends with."""
    monkeypatch.setenv("S2MEGATRON_CONFIG", str(write_run_file(tmp_path / "run.yaml", TINY)))
    monkeypatch.setattr(sys, "argv", ["stock"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "pretrain_gpt.py"

    def run(text: str, *arguments: str) -> int:
        file.write_text(text)
        return main([str(file), *arguments])

    return run


@pytest.fixture
def barriers(monkeypatch):
    """How many times this rank has waited for the others before it left."""
    counted = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: counted.append(1))
    return counted


@pytest.mark.parametrize("end", ["", "import sys; sys.exit(0)"])
def test_end_of_training_waits_for_the_other_ranks(script, barriers, end):
    """Megatron leaves by exit status 0 after a signal, a duration or exit_interval."""
    assert script(end) == 0 and barriers == [1]


def test_end_without_a_process_group(script):
    assert script("") == 0


def test_megatron_that_gives_up_is_a_failure(script, barriers, capsys):
    """SystemExit without a code is status 0 to Python; the other ranks would wait for this one."""
    assert script("import sys; print('ERROR: Invalid metadata file'); sys.exit()") == 1
    assert capsys.readouterr().out.endswith("its reason is the last that it printed\n")
    assert barriers == []


@pytest.mark.parametrize("code", ["3", "'a reason'"])
def test_other_exit_statuses_stay(script, barriers, code):
    with pytest.raises(SystemExit) as stop:
        script(f"import sys; sys.exit({code})")
    assert repr(stop.value.code) == code and barriers == []


def test_errors_of_the_script_stay(script, barriers):
    with pytest.raises(ZeroDivisionError):
        script("1 / 0")
    assert barriers == []


WAITS = """
import threading
threading.Thread(target=threading.Event().wait).start()  # as NCCL's destructors, with a peer gone
1 / 0
"""


def test_rank_that_fails_waits_for_nothing(script, tmp_path, monkeypatch, capfd):
    """Left to the interpreter's own end it would stay, and torchrun would wait for it."""
    error = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error))
    script("")
    (tmp_path / "pretrain_gpt.py").write_text(WAITS)
    monkeypatch.setattr(sys, "argv", ["stock", str(tmp_path / "pretrain_gpt.py")])
    rank = multiprocessing.get_context("fork").Process(
        target=runpy.run_module, args=("s2megatron.stock",), kwargs={"run_name": "__main__"}
    )
    rank.start()
    rank.join(20)
    status = rank.exitcode
    rank.kill()
    assert status == 1 and "ZeroDivisionError" in error.read_text()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_script_finds_its_arguments_and_its_folder(script, tmp_path, capsys):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    assert script("import sys, beside; print(beside.name, sys.argv[1:])", "--lr", "1") == 0
    told = capsys.readouterr().out
    assert told == "beside ['--lr', '1', '--spec', 's2megatron.layer_spec', 's2_layer_spec']\n"


def test_what_cannot_start(script, tmp_path, capsys, monkeypatch):
    assert main([]) == 2 and main([str(tmp_path / "nowhere.py")]) == 2
    assert script("", "--spec", "other") == 2
    monkeypatch.delenv("S2MEGATRON_CONFIG")
    assert script("") == 2
    told = capsys.readouterr().err
    assert "no script: name" in told and "nowhere.py: name" in told
    assert "leave it out" in told and "S2MEGATRON_CONFIG is not set" in told
