"""A checkpoint that is asked for is there, and what a resume changes about the model is told."""

from argparse import Namespace

import pytest
from fake_checkpoints import checkpoint
from in_process import call
from launches import TINY, write_run_file

from s2megatron.errors import ConfigError
from s2megatron.training.changed_options import compare, refusal
from s2megatron.training.checkpoint_folder import write_tracker
from s2megatron.training.load_fixes import _replace_rates, gone_on_from, settle_schedule
from s2megatron.training.resume import check_load
from s2megatron.training.resume_layout import check_layout


def asked(**options) -> Namespace:
    none = dict.fromkeys(("load", "save", "ckpt_step", "pretrained_checkpoint"))
    return Namespace(**none | {"finetune": False, "non_persistent_ckpt_type": None} | options)


@pytest.fixture
def home(tmp_path):
    """An output folder with two checkpoints."""
    for number in (10, 20):
        checkpoint(tmp_path / "run/checkpoints", number)
    write_tracker(tmp_path / "run/checkpoints", 20)
    return tmp_path


NOTHING_TO_LOAD = {
    "no folder": (dict(load="D/typo"), "megatron.load: D/typo holds no checkpoint.*no such folder"),
    "to finetune": (dict(load="D/typo", finetune=True), "begin with random weights"),
    "another save": (dict(load="D/typo", save="D/new"), "begin with random weights"),
    "output folder": (dict(load="D/run"), "do you mean D/run/checkpoints?"),
    "one iteration": (
        dict(load="D/run/checkpoints/iter_0000010"),
        "name the folder it lies in: D/run/checkpoints, and megatron.ckpt_step=10",
    ),
    "pretrained": (dict(pretrained_checkpoint="D/typo"), "megatron.pretrained_checkpoint: D/typo"),
    "finetune": (dict(finetune=True), "megatron.finetune: True and nothing to load"),
    "step": (dict(ckpt_step=10), "megatron.ckpt_step: 10 and nothing to load"),
}


@pytest.mark.parametrize("case", NOTHING_TO_LOAD)
def test_nothing_to_load_is_refused(home, case):
    """Megatron says so in the middle of its log, and trains random weights."""
    options, words = NOTHING_TO_LOAD[case]
    here = {k: v.replace("D/", f"{home}/") if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=words.replace("D/", f"{home}/")):
        check_load(asked(**here))


def test_what_is_there_may_be_loaded_and_a_first_start_is_told(home):
    folder = str(home / "run/checkpoints")
    for options in (dict(load=folder), dict(load=folder, ckpt_step=10, finetune=True), {},
                    dict(load="x", pretrained_checkpoint=folder)):  # fmt: skip
        assert check_load(asked(**options)) == []
    (line,) = check_load(asked(load=f"{home}/new", save=f"{home}/run/../new"))
    assert line.endswith("holds no checkpoint yet: this run begins with random weights")


def test_both_routes_look_before_they_start(home):
    tree = TINY | {"data": {"mock": True}}
    tree["megatron"] = tree["megatron"] | {"load": f"{home}/typo"}
    config = write_run_file(home / "run.yaml", tree)
    launcher, stock = call("operating_cases", "load_that_is_not_there", str(config))
    assert launcher == stock and launcher.startswith(f"megatron.load: {home}/typo holds no checkp")


def test_run_goes_on_from_its_own_folder_alone(tmp_path):
    """Also without output.folder, where megatron.load is megatron.save."""
    own = {"load": f"{tmp_path}/a/../run", "save": f"{tmp_path}/run"}
    (tmp_path / "a").mkdir()
    assert gone_on_from(asked(**own)) is None  # a first start
    checkpoint(tmp_path / "run", 6)
    write_tracker(tmp_path / "run", 6)
    assert gone_on_from(asked(**own)) == 6
    assert gone_on_from(asked(**own, ckpt_step=4)) == 4
    others = [own | {"finetune": True}, {"save": own["save"]}, {"load": own["load"]},
              own | {"save": f"{tmp_path}/new"}]  # fmt: skip
    assert [gone_on_from(asked(**other)) for other in others] == [None] * 4


TOLD = {
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2,
    "rotary_scaling_factor": 4.0,
    "no_rope_freq": 4,
    "qk_l2_norm": True,
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": 2.5,
    "eod_mask_loss": True,
    "dataloader_inter_document_masking": True,
    "dataloader_type": "cyclic",
    "hidden_dropout": 0.1,
}


@pytest.mark.parametrize("name", TOLD)
def test_resume_tells_what_makes_another_model_or_other_samples(name):
    saved, now = Namespace(**{name: None}), Namespace(**{name: TOLD[name]})
    (told,) = compare(saved, now, optimizer=True).told
    assert told.startswith(f"megatron.{name}: None in the checkpoint, {TOLD[name]!r} now: ")


def test_experts_in_other_layers_are_another_model(tmp_path):
    """Megatron listed all keys of the checkpoint instead."""
    one = Namespace(num_layers=4, num_experts=8, moe_layer_freq=2)
    same = Namespace(num_layers=4, num_experts=8, moe_layer_freq=[1, 0, 1, 0])
    other = Namespace(num_layers=4, num_experts=8, moe_layer_freq=1)
    assert compare(one, same, optimizer=True).shape == []
    said = refusal(compare(one, other, optimizer=False), tmp_path / "iter_0000001", other)
    assert "megatron.moe_layer_freq: [1, 0, 1, 0] in the checkpoint, [1, 1, 1, 1] now" in said


def test_checkpoint_without_an_optimizer_is_no_run_to_resume(tmp_path):
    """Seen: KeyError: 'optimizer'."""
    common = {"args": Namespace(no_save_optim=True)}
    with pytest.raises(ConfigError, match=r"saved without its optimizer .*megatron.finetune=true"):
        check_layout(Namespace(), common, tmp_path / "iter_0000003")
    check_layout(Namespace(finetune=True), common, tmp_path / "iter_0000003")


def test_checkpoint_in_the_older_format_is_named_as_one(tmp_path):
    (tmp_path / "iter_0000003/mp_rank_00").mkdir(parents=True)
    said = call("operating_cases", "common_state", str(tmp_path / "iter_0000003"))
    assert "is in Megatron's older format 'torch'" in said and "--ckpt-convert-format" in said


def test_list_of_datasets_that_names_others_is_told():
    lists = dict(data_args_path="list.txt", per_split_data_args_path=None)
    saved = Namespace(**lists, s2_data={"a": "01", "b": "02"})
    now = Namespace(**lists, s2_data={"a": "01", "c": "03"})
    assert compare(saved, saved, optimizer=True).told == []
    (told,) = compare(saved, now, optimizer=True).told
    assert told == "megatron.data_args_path: list.txt names other datasets (b, c) from here on"


RATES = {
    "lr": 0.003, "min_lr": 0.0003, "decoupled_lr": 0.002, "decoupled_min_lr": 0.0002,
    "override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False,
}  # fmt: skip


def rates(**changes) -> Namespace:
    return Namespace(**RATES | changes)


@pytest.mark.parametrize("name", ["decoupled_lr", "decoupled_min_lr"])
def test_embeddings_learning_rate_is_part_of_the_schedule(tmp_path, name):
    """Megatron's KeyError of a parameter group came once the model was built."""
    now = rates(**{name: 0.001})
    found = compare(rates(), now, optimizer=True)
    said = refusal(found, tmp_path, now)
    assert f"megatron.{name}: {RATES[name]} in the checkpoint, 0.001 now" in said
    assert said.count(" in the checkpoint, ") == 1 and "override_opt_param_scheduler=true" in said
    now.use_checkpoint_opt_param_scheduler = True
    assert refusal(found, tmp_path, now) == ""
    (line,) = settle_schedule(found, rates(), now)
    assert line.endswith("the checkpoint's schedule goes on") and getattr(now, name) == RATES[name]


@pytest.mark.parametrize("comes", [True, False])
def test_embeddings_learning_rate_that_comes_or_goes_is_another_optimizer(tmp_path, comes):
    """Even with the override: it splits Megatron's parameter groups."""
    none = {"decoupled_lr": None, "decoupled_min_lr": None}
    saved, now = (rates(**none), rates()) if comes else (rates(), rates(**none))
    now.override_opt_param_scheduler = True
    said = refusal(compare(saved, now, optimizer=True), tmp_path, now)
    assert f"(megatron.decoupled_lr): {not comes} in the checkpoint, {comes} now" in said
    assert "megatron.finetune=true" in said and "another schedule" not in said


def test_new_rates_of_embeddings_reach_their_parameter_groups():
    """Also where they share a rate with all others: a group is known by both of its own."""
    saved, now = rates(decoupled_min_lr=None), rates(decoupled_lr=0.001, decoupled_min_lr=0.0001)
    groups = [
        {"max_lr": 0.003, "min_lr": 0.0003},
        {"max_lr": 0.002, "min_lr": 0.0003},
        {"max_lr": 0.5, "min_lr": 0.0003},  # an override of its own
    ]
    _replace_rates({"optimizer": {"param_groups": groups}}, saved, now)
    assert groups[:2] == [{"max_lr": 0.003, "min_lr": 0.0003}, {"max_lr": 0.001, "min_lr": 0.0001}]
    assert groups[2]["max_lr"] == 0.5


@pytest.mark.parametrize(
    "name, saved, now",
    [
        ("lr_warmup_init", 0.0, 0.001),
        ("lr_wsd_decay_iters", 2, 6),
        ("lr_wsd_decay_samples", 20, None),
        ("lr_wsd_decay_style", "exponential", "linear"),
    ],
)
def test_what_the_scheduler_does_not_keep_comes_from_the_checkpoints_options(name, saved, now):
    before, after = rates(**{name: saved}), rates(**{name: now})
    found = compare(before, after, optimizer=True)
    assert [change.name for change in found.schedule] == [f"megatron.{name}"]
    after.use_checkpoint_opt_param_scheduler = True
    settle_schedule(found, before, after)
    assert getattr(after, name) == saved


def test_batch_is_never_the_checkpoints():
    saved, now = rates(step_batch_size_schedule="0:2"), rates(step_batch_size_schedule="0:4")
    found = compare(saved, now, optimizer=True)
    (line,) = settle_schedule(found, saved, now)
    assert line.endswith("the checkpoint's schedule goes on, with the new batch")
    assert now.step_batch_size_schedule == "0:4"
