"""Folders of checkpoints without a run: what is complete, what is damaged, what is deleted."""

import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training import output
from s2megatron.training.checkpoint_choice import Ranks, choose_checkpoint
from s2megatron.training.checkpoint_folder import (
    TRACKER,
    CheckpointPruner,
    damage,
    iteration_dir,
    iterations,
    missing_parts,
    resume_point,
    tracked,
    way_back,
)
from s2megatron.training.train import _take_output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in torch's format, of two tensors in one file."""
    folder = tmp_path_factory.mktemp("saved") / "iter_0000001"
    dcp.save({"a": torch.zeros(100), "b": torch.ones(300)}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Checkpoints 10, 20 and 30, the tracker at 30."""
    for number in (10, 20, 30):
        target = iteration_dir(tmp_path / "checkpoints", number)
        target.mkdir(parents=True)
        for file in saved.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (tmp_path / "checkpoints" / TRACKER).write_text("30")
    return tmp_path / "checkpoints"


def cut(checkpoint, size: int) -> None:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:size])


def test_a_file_that_is_shorter_than_its_metadata_says(folder):
    checkpoint = iteration_dir(folder, 30)
    assert damage(checkpoint) == ""
    whole = (checkpoint / "__0_0.distcp").stat().st_size
    cut(checkpoint, whole - 1)
    assert damage(checkpoint) == f"__0_0.distcp has {whole - 1} bytes of {whole}"
    (checkpoint / "__0_0.distcp").write_bytes(bytes(whole + 1))
    assert damage(checkpoint) == ""  # longer is no harm: what it names is there
    (checkpoint / "__0_0.distcp").unlink()
    assert damage(checkpoint) == "__0_0.distcp is missing"


def test_the_part_that_ends_last_counts_wherever_it_stands(folder):
    checkpoint = iteration_dir(folder, 30)
    whole = (checkpoint / "__0_0.distcp").stat().st_size
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    parts = sorted(metadata.storage_data.items(), key=lambda item: item[1].offset)
    cut(checkpoint, whole - 1)
    for ordered in (parts, parts[::-1]):
        metadata.storage_data = dict(ordered)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        assert damage(checkpoint) == f"__0_0.distcp has {whole - 1} bytes of {whole}"


@pytest.mark.parametrize("text", [b"", b"garbage", b"\x80\x04."])
def test_metadata_that_cannot_be_read(folder, text):
    (iteration_dir(folder, 30) / ".metadata").write_bytes(text)
    assert ".metadata cannot be read" in damage(iteration_dir(folder, 30))
    assert missing_parts(iteration_dir(folder, 30)) == ""


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_save_that_was_not_finished(folder, name):
    (iteration_dir(folder, 30) / name).unlink()
    assert missing_parts(iteration_dir(folder, 30)) == f"{name} is missing"
    assert damage(iteration_dir(folder, 30)) == f"{name} is missing"
    iteration, notes = resume_point(folder)
    assert iteration == 20 and any(f"{name} is missing" in note for note in notes)


def test_iterations_are_numbers_in_order(folder):
    for name in ("iter_12345678", "iter_0000040-old", "iter_40", "iter_x000001", "release"):
        (folder / name).mkdir()
    assert iterations(folder) == [10, 20, 30, 12345678]
    assert iteration_dir(folder, 12345678).name == "iter_12345678"


def test_the_tracker(folder):
    assert tracked(folder) == 30
    (folder / TRACKER).write_text(" 20\n")
    assert tracked(folder) == 20
    for text in ("release", "", "-1", "1.5"):
        (folder / TRACKER).write_text(text)
        assert tracked(folder) is None
    (folder / TRACKER).unlink()
    assert tracked(folder) is None


def test_a_folder_without_checkpoints_is_a_first_start(tmp_path):
    assert resume_point(tmp_path / "nowhere") == (None, [])
    (tmp_path / TRACKER).write_text("30")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resume_point(tmp_path)


def names(folder) -> list[int]:
    return iterations(folder)


def test_the_keeper_keeps_the_newest(folder):
    pruner = CheckpointPruner(folder, keep=2, save_interval=10)
    pruner.close()
    assert names(folder) == [20, 30]
    assert sorted(path.name for path in folder.iterdir()) == [
        "iter_0000020", "iter_0000030", TRACKER,
    ]  # fmt: skip


def test_the_keeper_counts_only_what_the_tracker_names(folder):
    """A save in progress never pushes out the last good checkpoint."""
    (folder / TRACKER).write_text("20")
    pruner = CheckpointPruner(folder, keep=1, save_interval=10)
    pruner.prune()
    assert names(folder) == [20, 30]
    (folder / TRACKER).write_text("30")
    pruner.prune()
    assert names(folder) == [30]
    pruner.close()


def test_the_keeper_counts_only_what_is_complete(folder):
    """Seen: 10 and 20 deleted at keep=3, because of two saves that were cut off."""
    for half in (5, 25, 28):
        iteration_dir(folder, half).mkdir()
    CheckpointPruner(folder, keep=3, save_interval=10).close()
    assert names(folder) == [10, 20, 25, 28, 30]
    CheckpointPruner(folder, keep=1, save_interval=10).close()
    assert names(folder) == [30]


def test_the_keeper_leaves_what_megatron_is_to_retain(folder):
    """Seen: deleted without a word. A half-written folder is nothing to retain."""
    iteration_dir(folder, 0).mkdir()
    CheckpointPruner(folder, keep=1, save_interval=10, retain_interval=20).close()
    assert names(folder) == [20, 30]


def test_the_retained_interval_reaches_the_keeper(folder):
    args = SimpleNamespace(save_interval=10, save_retain_interval=20)
    section = OutputConfig(folder=str(folder.parent), keep=1)
    place = output.resolve(section, {})
    lock, pruner = _take_output(
        SimpleNamespace(output=place, args=args, run=SimpleNamespace(output=section))
    )
    pruner.close()
    lock.release()
    assert names(folder) == [20, 30]


@pytest.mark.parametrize("text", ["", "garbage", None])
def test_a_tracker_that_is_lost_while_training_deletes_nothing(folder, text):
    """Another program, or a full disk, may empty it after the first look."""
    pruner = CheckpointPruner(folder, keep=2, save_interval=10)
    pruner.prune()
    if text is None:
        (folder / TRACKER).unlink()
    else:
        (folder / TRACKER).write_text(text)
    pruner.after(40)
    pruner.close()
    assert names(folder) == [20, 30]


def test_the_keeper_looks_only_while_a_save_is_awaited(folder, monkeypatch):
    looks = []
    pruner = CheckpointPruner(folder, keep=3, save_interval=10)
    monkeypatch.setattr(pruner, "prune", lambda: looks.append(1))
    pruner.after(9)  # nothing was saved yet
    assert looks == []
    pruner.after(30)
    assert looks == [1]
    monkeypatch.undo()
    pruner.after(30)
    monkeypatch.setattr(pruner, "prune", lambda: looks.append(2))
    pruner.after(39)  # the save at 30 was seen
    assert looks == [1]
    pruner.after(40)
    assert looks == [1, 2]
    without = CheckpointPruner(folder, keep=3, save_interval=None)
    monkeypatch.setattr(without, "prune", lambda: looks.append(3))
    without.after(1000)
    assert looks == [1, 2]


def test_the_keeper_ends_deletions_that_were_cut_off(folder):
    leftover = folder / ".deleting-iter_0000005"
    leftover.mkdir()
    (leftover / "file").write_text("x")
    CheckpointPruner(folder, keep=3, save_interval=10).close()
    assert not leftover.exists() and names(folder) == [10, 20, 30]


def resolve(folder, **chosen) -> output.Output:
    return output.resolve(OutputConfig(folder=str(folder)), chosen)


def test_format_that_is_left_to_the_default_is_taken(tmp_path):
    assert resolve(tmp_path, ckpt_format=None).options["ckpt_format"] == "torch_dist"
    with pytest.raises(ConfigError, match=r"'torch_dcp' beside output\.folder"):
        resolve(tmp_path, ckpt_format="torch_dcp")


def test_options_of_an_output_folder(tmp_path):
    options = resolve(tmp_path).options
    checkpoints = str(tmp_path / "checkpoints")
    assert options == {
        "save": checkpoints, "save_interval": 1000, "ckpt_format": "torch_dist",
        "tensorboard_dir": str(tmp_path / "tensorboard"), "exit_signal_handler": True,
        "async_save": True, "use_persistent_ckpt_worker": True,
    }  # fmt: skip
    own = resolve(tmp_path, save_interval=5, use_persistent_ckpt_worker=False).options
    assert own["save_interval"] == 5 and own["use_persistent_ckpt_worker"] is False
    plain = resolve(tmp_path, async_save=False).options
    assert "use_persistent_ckpt_worker" not in plain
    assert output.resolve(OutputConfig(), {"save": "x"}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("ckpt_format", "torch"), ("save", "elsewhere"), ("non_persistent_save_interval", 5)],
)
def test_options_that_do_not_go_with_an_output_folder(tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"megatron\.{name}: {value!r} beside output\.folder"):
        resolve(tmp_path, **{name: value})
    assert resolve(tmp_path, ckpt_format="torch_dist").options["ckpt_format"] == "torch_dist"


def test_options_of_a_first_start_are_left_out_later(folder):
    chosen = {"finetune": True, "no_load_optim": True, "no_load_rng": False, "lr": 0.1,
              "load": "elsewhere", "pretrained_checkpoint": "base"}  # fmt: skip
    resumed = resolve(folder.parent, **chosen)
    assert not set(output.FIRST_START_ONLY) - {"ckpt_step"} & set(resumed.options)
    assert resumed.options["load"] == str(folder) and resumed.options["lr"] == 0.1
    told = " ".join(resumed.notes)
    assert "resuming from" in told and "iter_0000030" in told and "only for the first start" in told
    for name in ("finetune", "no_load_optim", "pretrained_checkpoint", "load"):
        assert f"megatron.{name}" in told
    assert "no_load_rng" not in told  # false is not asked for
    first = resolve(folder.parent / "new", **chosen)
    assert chosen.items() <= first.options.items() and first.notes == []


@pytest.mark.parametrize("read_all", [True, False])
def test_a_truncated_checkpoint_is_not_resumed_and_the_way_back_is_whole(folder, read_all):
    """The one before it is cut short too: the one before that is taken, and the way back is it."""
    for number in (20, 30):
        cut(iteration_dir(folder, number), 1000)
    iteration, notes = choose_checkpoint(folder, read_all, Ranks())
    assert iteration == 10
    assert f"{iteration_dir(folder, 30)} is damaged: __0_0.distcp has 1000 bytes" in notes[-3]
    assert f"{iteration_dir(folder, 20)} is damaged: __0_0.distcp has 1000 bytes" in notes[-2]
    assert way_back(folder, 30).endswith(f"echo 10 > {folder}/{TRACKER}")
    cut(iteration_dir(folder, 10), 1000)
    assert way_back(folder, 30) == "no earlier one is complete"
    with pytest.raises(
        ConfigError, match=r"no complete checkpoint is undamaged: .*iter_0000010 is"
    ):
        choose_checkpoint(folder, read_all, Ranks())


def test_the_way_back_leads_before_the_one_in_question(folder):
    """Which may be whole by its sizes, and damaged inside."""
    assert f"echo 20 > {folder}/{TRACKER}" in way_back(folder, 30)
    assert way_back(folder, 10) == "no earlier one is complete"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    place = resolve(tmp_path / "run")
    assert choose_checkpoint(place.checkpoints, True, Ranks()) == (None, [])
    with pytest.raises(ConfigError, match=rf"{place.checkpoints} cannot be written: Not a dir"):
        output.make_ready(place)


def test_a_first_start_makes_its_folder(tmp_path):
    assert output.make_ready(resolve(tmp_path / "new")) == []
    assert (tmp_path / "new" / "checkpoints").is_dir()
