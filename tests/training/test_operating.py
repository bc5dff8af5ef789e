"""What is decided before Megatron starts: what is resumed from, and what may have changed."""

import os
import sys
import time
from argparse import Namespace

import psutil
import pytest
import torch
import zygote
from fake_checkpoints import checkpoint
from in_process import call
from launches import ON_CPU, TINY, start, write_run_file

from s2megatron.config import OutputConfig
from s2megatron.errors import ConfigError
from s2megatron.training import output
from s2megatron.training.changed_options import compare, refusal
from s2megatron.training.checkpoint_content import stored_parts
from s2megatron.training.checkpoint_errors import explain
from s2megatron.training.checkpoint_folder import TRACKER, resume_point, set_aside_newer
from s2megatron.training.load_fixes import (
    _replace_rates,
    save_what_was_loaded_never_again,
    settle_schedule,
)
from s2megatron.training.train import end_communication

# --- which checkpoint is resumed from


@pytest.fixture
def three(tmp_path):
    """Three complete checkpoints and half of a fourth, and the run's folder."""
    for number in (10, 20, 30):
        checkpoint(tmp_path / "checkpoints", number)
    checkpoint(tmp_path / "checkpoints", 40, complete=False)
    return tmp_path


TRACKERS = {
    "missing": (None, "is missing"),
    "garbage": (b"\xff\x00 x", "is damaged"),
    "empty": (b"", "is damaged"),
    "names-none": (b"25", "names"),
    "names-half": (b"40", ".metadata is missing"),
}


@pytest.mark.parametrize("case", TRACKERS)
def test_broken_tracker_resumes_from_the_newest_complete_checkpoint(three, case):
    text, said = TRACKERS[case]
    tracker = three / "checkpoints" / TRACKER
    if text is not None:
        tracker.write_bytes(text)
    place = output.resolve(OutputConfig(folder=str(three)), {})
    assert place.options["load"] == str(three / "checkpoints") and place.iteration == 30
    assert place.options["ckpt_step"] == 30  # every rank knows it before the tracker is mended
    assert said in place.notes[0] and "iter_0000040 is incomplete" in place.notes[1]
    assert "newest complete checkpoint" in place.notes[2] and "iter_0000030" in place.notes[3]
    assert output.make_ready(place) == []
    assert tracker.read_text() == "30"  # Megatron leaves, or starts at 1, without it
    assert sorted(p.name for p in tracker.parent.iterdir()) == [
        "iter_0000010", "iter_0000020", "iter_0000030", "iter_0000040", TRACKER,
    ]  # fmt: skip


def test_going_back_keeps_the_newer_checkpoints(three):
    folder = three / "checkpoints"
    (folder / TRACKER).write_text("10")
    place = output.resolve(OutputConfig(folder=str(three)), {})
    said = output.make_ready(place)
    assert place.iteration == 10 and len(said) == 2 and "aside-iter_0000020" in said[0]
    assert (folder / "aside-iter_0000030" / ".metadata").exists()
    assert not (folder / "iter_0000030").exists()
    assert (folder / "iter_0000040").exists()  # half a save: written over
    checkpoint(folder, 30)
    assert "aside-iter_0000030-2" in set_aside_newer(folder, 10)[0]


def test_converted_model_is_no_run_to_resume(tmp_path):
    (tmp_path / "checkpoints" / "release").mkdir(parents=True)
    (tmp_path / "checkpoints" / TRACKER).write_text("release")
    with pytest.raises(ConfigError, match=r"converted model.*megatron.load="):
        output.resolve(OutputConfig(folder=str(tmp_path)), {})


def test_full_disk_at_start(tmp_path, monkeypatch):
    place = output.resolve(OutputConfig(folder=str(tmp_path)), {})
    full = Namespace(free=4096)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match="is full"):
        output.make_ready(place)


def test_start_in_a_folder_that_cannot_be_made(tmp_path):
    """TensorBoard's writer comes before the lock, and would end in a traceback."""
    config = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    (tmp_path / "file").touch()
    said = call("operating_cases", "what_a_start_says", str(config), str(tmp_path / "file" / "x"))
    assert said.startswith(f"{tmp_path}/file") and "Not a directory: make room, see who may" in said


# --- which options may have changed

OPTIONS = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "group_query_attention": True, "num_query_groups": 2, "num_experts": None,
    "position_embedding_type": "rope", "rotary_base": 10000, "seq_length": 128,
    "vocab_size": 257, "padded_vocab_size": 384, "seed": 1234, "split": None,
    "lr": 0.003, "min_lr": 0.0003, "train_iters": 20, "train_samples": None,
    "lr_decay_iters": None, "lr_warmup_iters": 2, "lr_decay_style": "cosine",
    "global_batch_size": 2, "micro_batch_size": 1, "start_weight_decay": 0.01,
    "optimizer": "adam", "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    "tensor_model_parallel_size": 1, "decoupled_lr": None, "decoupled_min_lr": None,
    "lr_wsd_decay_iters": 2, "lr_warmup_init": 0.0, "step_batch_size_schedule": None,
    "moe_router_load_balancing_type": "aux_loss", "openai_gelu": True,
    "save_interval": 5, "train_data_path": ["a"],
    "override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False,
}  # fmt: skip


def changed(**now):
    saved = Namespace(**OPTIONS | {"lr_decay_iters": 20})  # Megatron fills it in while it trains
    now = Namespace(**OPTIONS | now)
    return saved, now, compare(saved, now, optimizer=True)


@pytest.mark.parametrize(
    "name, value, way_out",
    [
        ("num_layers", 8, "run of its own"),
        ("hidden_size", 128, "run of its own"),
        ("num_query_groups", 1, "run of its own"),
        ("num_experts", 8, "run of its own"),
        ("bf16", True, "megatron.finetune=true"),
        ("use_distributed_optimizer", True, "megatron.finetune=true"),
        ("lr", 0.002, "override_opt_param_scheduler=true"),
        ("train_iters", 40, "override_opt_param_scheduler=true"),
        ("lr_decay_iters", 30, "override_opt_param_scheduler=true"),
        ("lr_warmup_iters", 4, "override_opt_param_scheduler=true"),
        ("global_batch_size", 4, "override_opt_param_scheduler=true"),
        ("start_weight_decay", 0.1, "override_opt_param_scheduler=true"),
        ("lr_wsd_decay_iters", 6, "override_opt_param_scheduler=true"),
        ("lr_warmup_init", 0.001, "override_opt_param_scheduler=true"),
        ("step_batch_size_schedule", "0:2 1K:4", "override_opt_param_scheduler=true"),
    ],
)
def test_option_that_must_stay_is_refused_with_both_values(tmp_path, name, value, way_out):
    saved, now, found = changed(**{name: value})
    said = refusal(found, tmp_path / "checkpoints" / "iter_0000004", now)
    old = getattr(saved, name)
    assert f"megatron.{name}: {old!r} in the checkpoint, {value!r} now" in said or (
        name == "lr_decay_iters" and "megatron.lr_decay_iters: None" in said
    )
    assert said.count(" in the checkpoint, ") == 1 and way_out in said


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", 7),
        ("padded_vocab_size", 512),
        ("seq_length", 256),
        ("rotary_base", 500000),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("train_data_path", ["b"]),
    ],
)
def test_option_that_changes_what_comes_next_is_told(tmp_path, name, value):
    _, now, found = changed(**{name: value})
    assert refusal(found, tmp_path, now) == ""
    (told,) = found.told
    assert f"megatron.{name}: {OPTIONS[name]!r} in the checkpoint, {value!r} now: " in told


@pytest.mark.parametrize(
    "name, value",
    [
        ("save_interval", 9),
        ("tensor_model_parallel_size", 2),
        ("micro_batch_size", 2),
        ("lr_decay_iters", 20),
        ("openai_gelu", False),  # it never chose the activation
    ],
)
def test_option_that_may_change_is_not_mentioned(tmp_path, name, value):
    _, now, found = changed(**{name: value})
    assert refusal(found, tmp_path, now) == "" and found.told == []


@pytest.mark.parametrize("kind, told", [("HuggingFaceTokenizer", 0), ("NullTokenizer", 1)])
def test_a_vocab_size_that_nobody_reads_is_not_compared(kind, told):
    """Checkpoints were saved with a run file's, beside a tokenizer with a size of its own."""
    saved = Namespace(**OPTIONS | {"tokenizer_type": kind, "vocab_size": 300})
    now = Namespace(**vars(saved) | {"vocab_size": None})
    assert len(compare(saved, now, optimizer=True).told) == told


@pytest.mark.parametrize("lengths", [{}, {"train_iters": None, "train_samples": 40}], ids=str)
def test_batch_that_grows_has_no_size_to_compare(tmp_path, lengths):
    """Seen: refused at another number of GPUs, because micro_batch_size x DP was another."""
    saved = Namespace(**OPTIONS | lengths | {"step_batch_size_schedule": "0:2 1K:4"})
    now = Namespace(**vars(saved) | {"global_batch_size": 4})
    found = compare(saved, now, optimizer=True)
    assert refusal(found, tmp_path, now) == "" and found.told == []


def test_weights_alone_need_only_their_shape(tmp_path):
    saved, now = Namespace(**OPTIONS), Namespace(**OPTIONS | {"lr": 1.0, "seed": 7, "bf16": True})
    found = compare(saved, now, optimizer=False)
    assert refusal(found, tmp_path, now) == "" and found.told == []
    now.num_layers = 8
    assert "num_layers" in refusal(compare(saved, now, optimizer=False), tmp_path, now)


def test_weights_alone_under_another_base_are_told(tmp_path):
    """A phase that forgets the RoPE base of the one before trains another model, in silence."""
    saved, now = Namespace(**OPTIONS), Namespace(**OPTIONS | {"rotary_base": 4_200_000})
    found = compare(saved, now, optimizer=False)
    assert refusal(found, tmp_path, now) == ""
    (told,) = found.told
    assert told.endswith("4200000 now: the same weights make another model")


def test_checkpoints_schedule_may_be_kept(tmp_path):
    saved, now, found = changed(lr=0.002, train_iters=40, use_checkpoint_opt_param_scheduler=True)
    assert refusal(found, tmp_path, now) == ""
    said = settle_schedule(found, saved, now)
    assert now.lr == 0.003 and len(said) == 2 and "the checkpoint's schedule goes on" in said[0]


def test_new_rates_reach_the_parameter_groups_of_a_checkpoint():
    """Megatron finds no group under another lr: it looks for the rates themselves."""
    group = {"max_lr": 0.003, "min_lr": 0.0003, "wd_mult": 0.0}
    state = {"optimizer": {0: {"optimizer": {"param_groups": [group, dict(group, max_lr=1.0)]}}}}
    _replace_rates(state, Namespace(lr=0.003, min_lr=0.0003), Namespace(lr=0.002, min_lr=0.0001))
    first, other = state["optimizer"][0]["optimizer"]["param_groups"]
    assert first == {"max_lr": 0.002, "min_lr": 0.0001, "wd_mult": 0.0}
    assert other["max_lr"] == 1.0  # an override of its own


def test_checkpoint_that_was_loaded_is_not_written_over_itself(monkeypatch):
    """By a run that had trained to its end and is started again."""
    saved = []
    megatron = Namespace(save_checkpoint_and_time=lambda now, *rest, **more: saved.append(now))
    monkeypatch.setitem(sys.modules, "megatron.training", Namespace(training=megatron))
    for loaded in (None, 7, 8):
        save_what_was_loaded_never_again(loaded)
        for now in (7, 8):
            megatron.save_checkpoint_and_time(now, "model", train_data_iterator=None)
    assert saved == [7, 8, 8, 7]


# --- data replaced under the same prefix


def test_cache_is_for_the_documents_it_was_made_from(tmp_path):
    first, again, replaced = call("operating_cases", "samples_of_replaced_data", str(tmp_path))
    assert first == again and len(replaced["files"]) == 2 * len(first["files"]) > 0
    assert first["tokens"] != replaced["tokens"] and replaced["most"] > first["most"]


def test_data_made_anew_is_told(tmp_path):
    _, now, found = changed(s2_data={"a": "01", "b": "02"})
    assert found.told == []  # the checkpoint is older than the record
    saved = Namespace(**OPTIONS, s2_data={"a": "01", "b": "03"})
    (told,) = compare(saved, now, optimizer=True).told
    assert told == "dataset b: was made anew, other documents from here on"


# --- errors in checkpoints


def test_errors_of_loading_and_of_saving_are_told_apart(tmp_path):
    """In an interpreter of its own: torch's reader is changed there."""
    loaded, saved = call("operating_cases", "load_and_save_errors", str(tmp_path))
    assert "could not be loaded: it is damaged" in loaded and "__0_0.distcp cannot be" in loaded
    assert f"echo 2 > {tmp_path}" in loaded
    assert "could not be written" in saved and "make room" in saved
    assert explain(ValueError("x"), load="a", step=None, save="b") is None


def test_optimizer_state_of_other_buckets_is_named(tmp_path):
    """As Megatron told it of one bucket where there had been several."""
    source, scope = "def load_checkpoint():\n    raise RuntimeError(text)\n", {
        "text": "Global shape mismatch for loaded (torch.Size([24576])) and expected ((43072,)) "
        "tensor for key optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32, "
        "torch.float32).bucket_idx_0.param"
    }  # fmt: skip
    exec(compile(source, "megatron/training/checkpointing.py", "exec"), scope)
    with pytest.raises(RuntimeError) as error:
        scope["load_checkpoint"]()
    told = explain(error.value, load=str(tmp_path), step=4, save=None)
    assert "iter_0000004: its optimizer's state was saved by bucket" in told
    assert "go on with the overlap_grad_reduce and ddp_bucket_size" in told


# --- a real run


def test_real_run_goes_on_from_a_broken_tracker_and_a_damaged_file(tmp_path):
    """Two ranks, and another rate. Before: a hang, no parameter group for the new rate, a hang in
    the last save; and with random bytes among its weights the newest checkpoint was trained on.
    """
    tree = TINY | {"data": {"mock": True}}
    tree["megatron"] = tree["megatron"] | {
        "train_iters": 2, "save_interval": 1, "lr_warmup_iters": 1,
    }  # fmt: skip
    config = write_run_file(tmp_path / "run.yaml", tree)
    folder = tmp_path / "run"
    first = start(config, f"output.folder={folder}", ranks=2)
    assert first.returncode == 0, first.stderr[-3000:]
    tracker, newest = folder / "checkpoints" / TRACKER, folder / "checkpoints" / "iter_0000002"
    assert (newest / "checksums.json").exists()
    tracker.write_text("garbage")
    longer = [f"output.folder={folder}", "megatron.train_iters=3", "megatron.lr=0.002"]
    refused = start(config, *longer, ranks=2)
    assert "megatron.lr: 0.003 in the checkpoint, 0.002 now" in refused.stderr
    assert tracker.read_text() == "garbage"  # nothing was touched
    file = newest / "__1_0.distcp"  # another rank's, of weights that torch reads
    file.write_bytes(damage_the_middle(newest, file.name))
    again = start(config, *longer, "megatron.override_opt_param_scheduler=true", ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is damaged ('garbage')" in again.stdout
    assert f"{newest} is damaged: __1_0.distcp does not hold what was written" in again.stdout
    assert f"resuming from {folder}/checkpoints/iter_0000001" in again.stdout
    assert (newest.with_name("aside-iter_0000002") / ".metadata").exists() and newest.exists()
    assert "megatron.lr: 0.003 in the checkpoint, 0.002 now: the new one from" in again.stdout
    assert tracker.read_text() == "3" and "consumed samples:            6" in again.stdout


def test_the_helper_of_saves_ends_with_its_rank():
    """The rank leaves without Python's finalizers, as one that is killed does."""
    helper = call("operating_cases", "start_save_helper")
    deadline = time.monotonic() + 10
    while psutil.pid_exists(helper) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(helper)


def damage_the_middle(checkpoint, name: str) -> bytes:
    """A file's bytes with eight of its largest tensor's changed."""
    part = max((p for p in stored_parts(checkpoint) if p.file == name), key=lambda p: p.length)
    content = bytearray((checkpoint / name).read_bytes())
    middle = part.offset + part.length // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    return bytes(content)


def test_killed_writer_of_checkpoints_ends_the_run(tmp_path):
    """Before: no save was ever finished again, and the last one was waited for without end."""
    tree = TINY | {"data": {"mock": True}}
    tree["megatron"] = tree["megatron"] | {"train_iters": 5000, "save_interval": 2}
    config = write_run_file(tmp_path / "run.yaml", tree)
    arguments = ["--config", str(config), f"output.folder={tmp_path / 'run'}"]
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    target = "operating_cases:train_until_the_writer_is_killed"
    done = zygote.run(target, arguments, ranks=2, env=env, timeout=60)
    assert done.returncode == 1
    assert "has ended, killed by SIGKILL (out of host memory? see dmesg)" in done.stderr
    assert "The last complete checkpoint stays as it is" in done.stderr
    assert not (tmp_path / "run" / "run.lock").exists()
    assert resume_point(tmp_path / "run" / "checkpoints")[0] >= 2


# --- how a run ends


@pytest.mark.parametrize("impl, ended_by", [
    ("none", "destroy_process_group"), ("local", "barrier"), ("transformer_engine", "barrier"),
])  # fmt: skip
def test_captured_collectives_are_not_waited_for(monkeypatch, impl, ended_by):
    """Seen on two GPUs with TP=2: all iterations done, the summary printed, and no end."""
    called = []
    for name in ("destroy_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda name=name: called.append(name))
    end_communication(impl)
    assert called == [ended_by]
