"""A background writer of checkpoints that dies is noticed, whatever training waits for."""

import ast
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from s2megatron.training import writer_watch
from s2megatron.training.writer_watch import WriterWatch, current_writer, end_rank


@pytest.fixture
def writer():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join()


class Watched:
    """A watch, and what it told."""

    def __init__(self, find, monkeypatch):
        monkeypatch.setattr(writer_watch, "INTERVAL", 0.01)
        self.told, self.heard = [], threading.Event()
        self.watch = WriterWatch(self.fail, find)

    def fail(self, reason: str) -> None:
        self.told.append(reason)
        self.heard.set()


def test_killed_writer_is_told_once(writer, monkeypatch):
    watched = Watched(lambda: writer, monkeypatch)
    assert not watched.heard.wait(0.1)
    os.kill(writer.pid, signal.SIGKILL)
    assert watched.heard.wait(20)
    time.sleep(0.05)
    (reason,) = watched.told
    assert f"process {writer.pid}) has ended, killed by SIGKILL (out of host memory?" in reason
    watched.watch.close()


@pytest.mark.parametrize(
    "status, how",
    [(1, "with exit status 1; its reason is above"), (-15, "killed by SIGTERM: nothing")],
)
def test_other_ways_to_end(status, how, monkeypatch):
    watched = Watched(lambda: SimpleNamespace(pid=7, exitcode=status), monkeypatch)
    assert watched.heard.wait(20) and how in watched.told[0]


@pytest.mark.parametrize("found", [None, SimpleNamespace(pid=7, exitcode=0)])
def test_no_writer_and_one_that_was_told_to_end(found, monkeypatch):
    watched = Watched(lambda: found, monkeypatch)
    assert not watched.heard.wait(0.1)
    watched.watch.close()
    assert not watched.watch._thread.is_alive()


@pytest.mark.parametrize("name", ["_persistent_caller", "persistent_caller"])
def test_writer_of_megatrons_queue_and_of_nvidias(name, monkeypatch):
    saves = SimpleNamespace(_async_calls_queue=None)
    megatron = SimpleNamespace(async_utils=saves)  # importing the real one takes seconds
    monkeypatch.setitem(sys.modules, "megatron.training", megatron)
    assert current_writer() is None
    saves._async_calls_queue = SimpleNamespace(**{name: None})
    assert current_writer() is None
    setattr(saves._async_calls_queue, name, SimpleNamespace(process="the writer"))
    assert current_writer() == "the writer"


@pytest.mark.parametrize(
    ("queue", "why"),
    [
        (SimpleNamespace(caller=1), "has none of _persistent_caller, persistent_caller"),
        (SimpleNamespace(persistent_caller=SimpleNamespace(worker=1)), "has no 'process'"),
    ],
    ids=["another name", "another caller"],
)
def test_writer_that_cannot_be_found_is_told_once(queue, why, monkeypatch):
    """Of a version with other names: the run goes on, unwatched, and says so."""
    saves = SimpleNamespace(_async_calls_queue=queue)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(async_utils=saves))
    monkeypatch.setattr(writer_watch, "INTERVAL", 0.01)
    told = []
    watch = WriterWatch(lambda reason: pytest.fail(reason), tell=told.append)
    watch._thread.join(20)
    (line,) = told
    assert f"is not watched: types.SimpleNamespace {why}. Should it die" in line
    assert line.endswith("megatron.async_strategy=mcore is watched")
    watch.close()


@pytest.mark.parametrize(
    "module",
    [
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
    ],
)
def test_names_stand_in_the_packages_sources(module):
    """Read and not imported: the one takes seconds, the other needs a GPU's libraries."""
    package, _, rest = module.partition(".")
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py")
    kinds = {
        node.name: {attribute.attr for attribute in ast.walk(node)
                    if isinstance(attribute, ast.Attribute)}
        for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    assert kinds["AsyncCallsQueue"] & set(writer_watch.CALLERS)
    assert "process" in kinds["PersistentAsyncCaller"]


def test_rank_ends_with_the_reason_for_its_agent(tmp_path, monkeypatch, capfd):
    """In the file that torchrun's agent reads, and on stderr; no cleaning up."""
    error = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error))
    monkeypatch.setattr(writer_watch, "end_children", lambda: None)
    rank = multiprocessing.get_context("fork").Process(target=end_rank, args=("the reason",))
    rank.start()
    rank.join()
    assert rank.exitcode == 1 and "RuntimeError: the reason" in error.read_text()
    assert capfd.readouterr().err == "s2megatron: the reason\n"
