"""Run files: keys twice, spellings, numbers that are none; and Megatron's options by any name."""

import pytest
from in_process import call, run_command_line
from launches import TINY, write_run_file

from s2megatron.cli import main
from s2megatron.config import load_config, parse_config
from s2megatron.errors import ConfigError
from s2megatron.training.megatron_options import (
    canonical,
    check_required,
    megatron_parser,
    to_argv,
)

MERGED = """
base: &base {num_layers: 2, lr: 1}
more: &more
  <<: *base
  num_layers: 3
sparsity: &same {default: {kind: dense}}
megatron:
  <<: [*more, {seq_length: 64}]
  lr: 2
"""


def load(tmp_path, text, *overrides):
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml", overrides)


@pytest.mark.parametrize(
    "text, words",
    [
        ("megatron: {lr: 1,\n  lr: 2}", ["megatron.lr stands", "line 1 ", "line 2;"]),
        ("data: {}\nsparsity: {}\ndata: {}", ["data stands", "line 1 ", "line 3;"]),
        ("megatron:\n  a_b: 2\n  a-b: 4", ["megatron.a-b stands", "line 2 ", "line 3;"]),
        ("sparsity:\n  layers:\n  - {layers: 1,\n     layers: 2}", ["sparsity.layers[0].layers"]),
        ("'data': {}\n\"data\": {}", ["data stands", "line 1 ", "line 2;"]),
    ],
)
def test_a_key_twice_is_an_error_that_names_both_lines(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    for word in [*words, "run.yaml", "keep one"]:
        assert word in str(error.value)


def test_merge_keys_work_and_what_stands_beside_them_wins(tmp_path):
    with pytest.raises(ConfigError, match="base: unknown key"):  # nothing else is wrong with it
        load(tmp_path, MERGED)
    from s2megatron.strict_yaml import load as load_yaml

    tree = load_yaml(MERGED, "here")
    assert tree["more"] == {"num_layers": 3, "lr": 1}
    assert tree["megatron"] == {"num_layers": 3, "lr": 2, "seq_length": 64}


def test_a_key_twice_in_an_override(tmp_path):
    text = "sparsity: {default: {kind: dense}}"
    with pytest.raises(ConfigError, match=r"override.*stride stands in line 1 and again"):
        load(tmp_path, text, "sparsity.default={stride: 1, stride: 2}")


def test_either_spelling_of_a_key(tmp_path):
    text = "sparsity: {block-size: 32, default: {local-blocks: 2, stride: 4}}\n"
    text += "megatron: {num-layers: 4, lr-warmup-iters: 3}"
    run = load(tmp_path, text, "megatron.num-layers=5", "output.keep=2")
    assert run.megatron == {"num_layers": 5, "lr_warmup_iters": 3}
    assert (run.sparsity.block_size, run.sparsity.default.local_blocks) == (32, 2)
    assert parse_config({"sparsity": {"default": {"kind": "dense"}}, "megatron": {"a-b": 1}})


def test_show_reads_the_other_spelling_and_takes_no_boolean_for_a_number(tmp_path):
    config = write_run_file(tmp_path / "run.yaml", TINY)
    status, out, _ = run_command_line(main, ["show", str(config), "megatron.num-layers=3"])
    assert status == 0 and "2-3" in out and "2-4" not in out
    for name in ("num_layers", "num_attention_heads", "seq_length", "num_query_groups"):
        status, _, err = run_command_line(main, ["show", str(config), f"megatron.{name}=on"])
        assert status == 2 and f"megatron.{name}: True: must be a number" in err


def test_show_knows_megatrons_options(tmp_path):
    config = write_run_file(tmp_path / "run.yaml", TINY)
    status, _, err = run_command_line(main, ["show", str(config), "megatron.hiden_size=8"])
    assert status == 2 and "megatron.hiden_size: Megatron has no such option" in err
    assert "hidden_size" in err


@pytest.mark.parametrize(
    "name, said",
    [
        ("nodir/x.png", "there is no folder"),
        ("x.foo", "must end in .png, .pdf, .svg"),
        ("x", "must end in .png, .pdf, .svg"),
        (".", "is a folder"),
    ],
)
def test_show_checks_where_a_picture_goes_first(tmp_path, name, said):
    config = write_run_file(tmp_path / "run.yaml", TINY)
    arguments = ["show", str(config), "--plot", str(tmp_path / name)]
    status, out, err = run_command_line(main, arguments)
    assert status == 2 and said in err and str(tmp_path) in err and not out
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"seq_length": 0}, "seq_length: 0: must be at least 1"),
     ({"context_parallel_size": -2}, "context_parallel_size: -2: must be at least 1"),
     ({"context_parallel_size": 2, "tensor_model_parallel_size": 3},
      "tensor_model_parallel_size=3: heads=")],
    ids=["no tokens", "negative CP", "TP that does not split the heads"],
)  # fmt: skip
def test_show_names_the_size_that_is_wrong(tmp_path, changed, said):
    """They were a ZeroDivisionError, a size of 1 and a bare ValueError."""
    tree = TINY | {"megatron": TINY["megatron"] | {"sequence_parallel": False} | changed}
    config = write_run_file(tmp_path / "run.yaml", tree)
    status, out, err = run_command_line(main, ["show", str(config)])
    assert status == 2 and f"megatron.{said}" in err and not out


def test_run_file_with_a_sparsity_alone(tmp_path):
    config = write_run_file(tmp_path / "run.yaml", {"sparsity": {"default": {"kind": "dense"}}})
    status, _, err = run_command_line(main, ["show", str(config)])
    assert status == 2 and "megatron.num_layers: is missing" in err
    said = call("operating_cases", "what_prepare_says", str(config))
    assert "megatron.num_layers: is missing" in said


def test_paths_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "sparsity: {default: {kind: dense}}\nmegatron: {load: ~/x, lr: 1}\noutput: {folder: ~/y}"
    run = load(tmp_path, text, "megatron.save=~/z")
    assert run.megatron == {"load": "/home/me/x", "lr": 1, "save": "/home/me/z"}
    assert run.output.folder == "/home/me/y"
    run = load(tmp_path, text, 'megatron.train_data_path=["1", "~/a", "b~"]')
    assert run.megatron["train_data_path"] == ["1", "/home/me/a", "b~"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/run.yaml").megatron["lr"] == 1


def test_options_have_one_name_inside():
    given = {"no-rope-fusion": True, "norm_epsilon": 1e-5, "disable_bias_linear": False, "lr": None}
    names = {"apply_rope_fusion": False, "layernorm_epsilon": 1e-5, "add_bias_linear": True,
             "lr": None}  # fmt: skip
    assert canonical(given) == names == canonical(names)
    argv, parsed = to_argv(given)
    assert argv == ["--no-rope-fusion", "--norm-epsilon=1e-05"]
    assert not parsed.apply_rope_fusion and parsed.add_bias_linear
    with pytest.raises(ConfigError, match=r"no-rope-fusion and megatron\.apply_rope_fusion are na"):
        canonical(given | {"apply_rope_fusion": False})
    assert not to_argv({"ckpt_fully_parallel_save": False})[1].ckpt_fully_parallel_save
    for value in (True, False):
        for name in ("yarn_correction_range_round_to_int", "rl_skip_bos_token"):
            assert getattr(to_argv({name: value})[1], name) is value
            off = name.replace("yarn", "no_yarn").replace("rl_", "no_rl_")
            assert getattr(to_argv({off: value})[1], name) is not value


@pytest.mark.parametrize("value", [True, [True, 1]])
def test_a_boolean_is_no_value(value):
    with pytest.raises(ConfigError, match=r"megatron\.num-layers: .*YAML reads on, off"):
        canonical({"num-layers": value})


def lists_of_megatron() -> list:
    return [action for action in megatron_parser()._actions if action.nargs not in (None, 0)]


def test_an_empty_list_is_the_default_where_that_names_nothing():
    assert len(lists_of_megatron()) >= 20
    refused = []
    for action in lists_of_megatron():
        try:
            argv, parsed = to_argv({action.dest: []})
        except ConfigError as error:
            refused.append(action.dest)
            assert str(error).startswith(f"megatron.{action.dest}: []: an empty list is no value")
            assert "leave it out" in str(error) and repr(action.default)[1:-1] in str(error)
            continue
        assert argv == [] and getattr(parsed, action.dest) in ([], None)
    few = ["cp_comm_type", "moe_aux_loss_coeff", "moe_router_load_balancing_type"]
    assert sorted(refused) == [*few, "recompute_modules"]


def test_an_empty_list_takes_back_what_the_run_file_names(tmp_path):
    text = "sparsity: {default: {kind: dense}}\nmegatron: {cuda_graph_modules: [mlp]}"
    run = load(tmp_path, text, "megatron.cuda-graph-modules=[]")
    assert to_argv(run.megatron)[1].cuda_graph_modules == []


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("lr", [], "lr: []: an empty list is no value"),
        ("lr", [1, 2], "lr: [1, 2]: this option takes 1 value(s)"),
        ("rampup_batch_size", [1, 2], "rampup_batch_size: [1, 2]: this option takes 3 value(s)"),
        ("recompute_modules", [], "Megatron's default, ['core_attn']"),
        ("cuda_graph_modules", ["mlp", "atn"], "cuda_graph_modules: 'atn': must be one of attn, "),
        ("attention_backend", "fast", "attention_backend: 'fast': must be one of flash, fused, "),
    ],
)
def test_values_that_do_not_fit_an_option(name, value, words):
    with pytest.raises(ConfigError) as error:
        to_argv({name: value})
    assert words in str(error.value)


def test_what_megatron_has_no_default_for():
    options = TINY["megatron"]
    check_required(options)
    for name in ("micro_batch_size", "num_layers", "seq_length"):
        with pytest.raises(ConfigError, match=rf"megatron\.{name}: is missing"):
            check_required(options | {name: None})


def test_override_of_an_element_and_of_a_value_with_an_equals_sign(tmp_path):
    text = "sparsity: {default: {kind: dense}}\ndata: {train: [a, b]}\n"
    run = load(tmp_path, text, "data.train.1=c=d", "data.tokenizer=huggingface:x=y")
    assert run.data.train == ["a", "c=d"] and run.data.tokenizer == "huggingface:x=y"
