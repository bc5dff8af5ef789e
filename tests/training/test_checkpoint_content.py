"""Damage inside the files of a checkpoint: found, told by file, and the one before it is taken."""

import io
import random
import shutil
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from s2megatron.cli import main
from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training import checkpoint_choice, output
from s2megatron.training.checkpoint_choice import Ranks, choose_checkpoint
from s2megatron.training.checkpoint_content import (
    CHECKSUMS,
    checksums_at_the_end_of_a_save,
    damaged_parts,
    share,
    stored_parts,
    write_checksums,
)
from s2megatron.training.checkpoint_folder import TRACKER, damage, iteration_dir, iterations

FILE = "__0_0.distcp"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint in torch's format, of tensors and an object in one file."""
    folder = tmp_path_factory.mktemp("written") / "iter_0000001"
    state = {f"w{n}": torch.arange(float(50 * n + 20)) for n in range(4)} | {"step": {"at": 3}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text("{}")
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """Checkpoints 10, 20 and 30, the tracker at 30."""
    for number in (10, 20, 30):
        shutil.copytree(written, iteration_dir(tmp_path / "checkpoints", number))
    (tmp_path / "checkpoints" / TRACKER).write_text("30")
    return tmp_path / "checkpoints"


def change(checkpoint, position: int, name: str = FILE) -> None:
    """A byte of a file; no size changes."""
    content = bytearray((checkpoint / name).read_bytes())
    content[position] ^= 255
    (checkpoint / name).write_bytes(content)


def inside(checkpoint, number: int = 0) -> int:
    """A byte of the tensor data of a part."""
    parts = [part for part in stored_parts(checkpoint) if part.length > 1000]
    content = (checkpoint / FILE).read_bytes()
    start = content.index(b"data/0FB", parts[number].offset)
    return start + 120


def test_bytes_that_torch_reads_without_complaint(folder):
    checkpoint = iteration_dir(folder, 30)
    parts = stored_parts(checkpoint)
    assert len(parts) == 5 and damaged_parts(checkpoint, parts, 2) == []
    change(checkpoint, inside(checkpoint))
    assert damage(checkpoint) == ""  # not to be seen by sizes
    state = {f"w{n}": torch.zeros(50 * n + 20) for n in range(4)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    as_written = [torch.equal(state[f"w{n}"], torch.arange(50.0 * n + 20)) for n in range(4)]
    assert as_written.count(False) == 1  # torch gives another weight, and says nothing
    (found,) = damaged_parts(checkpoint, parts, 2)
    assert found.startswith(f"{FILE} does not hold what was written in bytes ")
    assert found.endswith("(archive/data/0)")


def test_no_byte_that_torch_would_read_differently_is_overlooked(written, tmp_path):
    """Every byte of an archive's list of records, and some hundred of the rest."""
    checkpoint = tmp_path / "one"
    shutil.copytree(written, checkpoint)
    part = max(stored_parts(checkpoint), key=lambda part: part.length)
    whole = (checkpoint / FILE).read_bytes()
    tensor = torch.load(io.BytesIO(whole[part.offset : part.offset + part.length]))
    chance = random.Random(0)
    ends = range(part.offset + part.length - 600, part.offset + part.length)
    seen = 0
    for position in [*ends, *(part.offset + chance.randrange(part.length) for _ in range(200))]:
        content = bytearray(whole)
        content[position] ^= 1 << chance.randrange(8)
        (checkpoint / FILE).write_bytes(content)
        if damaged_parts(checkpoint, [part], 1):
            seen += 1
        else:
            read = torch.load(io.BytesIO(content[part.offset : part.offset + part.length]))
            assert torch.equal(read, tensor), position - part.offset
    assert seen > 400  # the rest is padding, and fields that nothing reads


def test_everything_that_torch_writes_is_as_written(tmp_path):
    """A tensor without elements has no sum behind it; a converted model holds some of these."""
    state = {
        "empty": torch.empty(0), "one": torch.tensor(1.0), "bf16": torch.ones(3).bfloat16(),
        "bytes": torch.ones(7, dtype=torch.uint8), "object": {"a": [1, "é"]}, "none": None,
        "mask": torch.ones(2, 2, dtype=torch.bool), "view": torch.arange(10.0)[::2],
        "large": torch.zeros(1 << 20),
    }  # fmt: skip
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    parts = stored_parts(tmp_path)
    assert len(parts) == len(state) and damaged_parts(tmp_path, parts, 2) == []


def test_damage_is_told_file_by_file(folder):
    checkpoint = iteration_dir(folder, 30)
    (checkpoint / FILE).rename(checkpoint / "elsewhere")
    (found,) = damaged_parts(checkpoint, stored_parts(checkpoint), 2)  # once, of five parts
    assert FILE in found and "No such file" in found


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_files_that_say_what_the_others_hold(folder, name):
    checkpoint = iteration_dir(folder, 30)
    change(checkpoint, 1, name)
    assert damage(checkpoint) == f"{name} does not hold what was written"
    write_checksums(checkpoint)
    assert "does not hold" not in damage(checkpoint)
    (checkpoint / CHECKSUMS).write_text("{")
    assert damage(checkpoint) == f"{CHECKSUMS} cannot be read"
    (checkpoint / CHECKSUMS).write_text("[]")
    assert "does not hold what was written" in damage(checkpoint)


def test_checksums_come_at_the_end_of_a_save(written, tmp_path, monkeypatch):
    """Of what Megatron has written last; a folder that is no torch_dist checkpoint gets none."""
    checkpoint, other = tmp_path / "iter_0000001", tmp_path / "other"
    shutil.copytree(written, checkpoint)
    (checkpoint / CHECKSUMS).unlink()
    other.mkdir()
    calls = []

    def save_config(config, folder):
        calls.append(config)
        (Path(folder) / "metadata.json").write_text(config)

    saving = SimpleNamespace(save_config=save_config)
    module = SimpleNamespace(serialization=saving)
    monkeypatch.setitem(sys.modules, "megatron.core.dist_checkpointing", module)
    for _ in range(2):  # a process may run twice
        checksums_at_the_end_of_a_save()
    for folder in (checkpoint, other):
        saving.save_config("{}", str(folder))
    assert calls == ["{}", "{}"] and damage(checkpoint) == ""
    assert (checkpoint / CHECKSUMS).exists() and not (other / CHECKSUMS).exists()
    saving.save_config("{ }", str(checkpoint))  # saved again
    assert damage(checkpoint) == ""


def test_random_bytes_in_metadata_never_raise_anything_else(written, tmp_path):
    checkpoint = tmp_path / "one"
    shutil.copytree(written, checkpoint)
    (checkpoint / CHECKSUMS).unlink()  # as older checkpoints are
    assert damage(checkpoint) == ""
    whole, chance = (checkpoint / ".metadata").read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        content[chance.randrange(len(whole))] = chance.randrange(256)
        (checkpoint / ".metadata").write_bytes(content)
        damage(checkpoint)


def test_ranks_share_the_bytes(folder):
    parts = stored_parts(iteration_dir(folder, 30))
    for ranks in (1, 2, 3, 8):
        shares = [share(parts, rank, ranks) for rank in range(ranks)]
        assert [part for mine in shares for part in mine] == parts
    sizes = [sum(part.length for part in share(parts, rank, 2)) for rank in (0, 1)]
    assert max(sizes) < 0.75 * sum(sizes)
    assert share([], 0, 2) == []


def on_ranks(folder, read_all: bool, ranks: int) -> list:
    """What every rank chooses, or its error; the ranks are threads."""
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=20))
    results: list = [None] * ranks

    def one(rank: int) -> None:
        try:
            results[rank] = choose_checkpoint(folder, read_all, Ranks(rank, ranks, 1, store))
        except ConfigError as error:
            results[rank] = str(error)

    threads = [
        threading.Thread(target=one, args=(rank,), name=f"rank {rank}") for rank in range(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_newest_undamaged_checkpoint_is_taken(folder, ranks):
    (first, notes), *others = on_ranks(folder, True, ranks)
    assert first == 30 and "are as they were written" in notes[0]
    assert others == [(30, [])] * (ranks - 1)
    for part in (0, -1):  # the last part is another rank's to read
        change(iteration_dir(folder, 30), inside(iteration_dir(folder, 30), part))
    change(iteration_dir(folder, 20), 0, ".metadata")
    (first, notes), *others = on_ranks(folder, True, ranks)
    assert first == 10 and others == [(10, [])] * (ranks - 1)
    told = "\n".join(notes)
    assert f"{iteration_dir(folder, 30)} is damaged: {FILE} does not hold" in told
    assert f"{iteration_dir(folder, 20)} is damaged: .metadata does not hold" in told
    assert notes[-1] == "the newest undamaged checkpoint before it is taken"
    assert all(f"(as rank {n} on " in told for n in {0, ranks - 1})


def test_every_rank_hears_that_nothing_is_undamaged(folder):
    for number in (10, 20, 30):
        change(iteration_dir(folder, number), inside(iteration_dir(folder, number)))
    refused = on_ranks(folder, True, 3)
    assert len(set(refused)) == 1
    assert "no complete checkpoint is undamaged" in refused[0]
    assert all(f"iter_00000{number} is damaged" in refused[0] for number in (10, 20, 30))


def test_what_one_rank_cannot_read_is_damage_to_all(folder, monkeypatch):
    """As where a node does not see what the others do."""
    whole = checkpoint_choice.stored_parts

    def on_some_node(checkpoint):
        if threading.current_thread().name == "rank 1" and checkpoint.name == "iter_0000030":
            raise ValueError(".metadata cannot be read (it is not there)")
        return whole(checkpoint)

    monkeypatch.setattr(checkpoint_choice, "stored_parts", on_some_node)
    (first, notes), other = on_ranks(folder, True, 2)
    assert first == 20 and other == (20, [])
    assert ".metadata cannot be read (it is not there) (as rank 1 on " in "".join(notes)


def test_without_verify_only_sizes_count(folder):
    change(iteration_dir(folder, 30), inside(iteration_dir(folder, 30)))
    assert on_ranks(folder, False, 2) == [(30, []), (30, [])]
    (iteration_dir(folder, 30) / FILE).write_bytes(b"short")
    assert [chosen for chosen, _ in on_ranks(folder, False, 2)] == [20, 20]


def test_no_checkpoint_and_no_complete_one(tmp_path):
    assert on_ranks(tmp_path, True, 2) == [(None, []), (None, [])]
    (tmp_path / TRACKER).write_text("30")
    assert all("no complete checkpoint" in refused for refused in on_ranks(tmp_path, True, 2))


def test_what_is_passed_over_is_kept_aside(folder):
    """And nothing is written over: training will come to 20 and 30 again."""
    for number in (20, 30):
        change(iteration_dir(folder, number), inside(iteration_dir(folder, number)))

    def choose(checkpoints, verify):
        assert verify
        return choose_checkpoint(checkpoints, verify, Ranks())

    place = output.resolve(OutputConfig(folder=str(folder.parent)), {}, choose)
    assert place.iteration == 10 == place.options["ckpt_step"]
    assert len(output.make_ready(place)) == 2
    assert iterations(folder) == [10] and (folder / TRACKER).read_text() == "10"
    assert (folder / "aside-iter_0000030" / FILE).exists()


def test_launch_names_the_ranks_and_the_start(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checkpoint_choice, "cores", lambda: 8)
    assert Ranks.of_launch() == Ranks(0, 1, 8, None)
    shared = torch.distributed.HashStore()
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda *args, **options: iter([(shared, 3, 4)])
    )
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    ranks = Ranks.of_launch()
    assert (ranks.rank, ranks.ranks, ranks.threads) == (3, 4, 4)
    ranks.store.set("x", "first start")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not Ranks.of_launch().store.check(["x"])  # the second reads nothing of the first


def test_verify_command(folder, capsys):
    assert main(["verify", str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("as written, " in line for line in lines)
    change(iteration_dir(folder, 20), inside(iteration_dir(folder, 20)))
    assert main(["verify", str(folder)]) == 2
    said = capsys.readouterr()
    assert f"iter_0000020: damaged: {FILE} does not hold" in said.out
    assert "1 of 3 checkpoints damaged" in said.err and said.out.count("as written, ") == 2
    assert main(["verify", str(iteration_dir(folder, 10))]) == 0
    assert main(["verify", str(folder.parent / "nowhere")]) == 2
    converted = folder.parent / "converted"
    iteration_dir(folder, 10).rename(converted.parent / "release")
    converted.mkdir()
    (converted.parent / "release").rename(converted / "release")
    assert main(["verify", str(converted)]) == 0
    assert f"{converted}/release: as written" in capsys.readouterr().out
