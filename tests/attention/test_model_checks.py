"""Nothing runs dense in silence: each way that Megatron has ends in an error."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from in_process import call
from launches import ON_CPU, ROOT, TINY, torchrun, write_run_file

from s2megatron import stock

CP2, LOCAL = "megatron.context_parallel_size=2", "megatron.cuda_graph_impl=local"
GRAPHS = ["megatron.cuda_graph_impl=transformer_engine", "megatron.cuda_graph_modules=[mlp]"]
CASES = {
    "unknown_option": (
        ["megatron.num_layer=4"],
        ["megatron.num_layer", "no such option", "'num_layers'"],
    ),
    "bad_value": (["megatron.num_layers=four"], ["megatron.num-layers", "four"]),
    "flag_with_value": (["megatron.swiglu=1"], ["megatron.swiglu", "true or false"]),
    "megatron_assert": (["megatron.hidden_size=66"], ["Megatron refuses"]),
    "missing": (["megatron.micro_batch_size=null"], ["megatron.micro_batch_size: is missing"]),
    "on_is_no_number": (["megatron.num-layers=on"], ["megatron.num_layers: True", "a value"]),
    "two_names": (
        ["megatron.no_rope_fusion=true", "megatron.apply_rope_fusion=true"],
        ["megatron.no_rope_fusion and megatron.apply_rope_fusion"],
    ),
    "long_warmup": (
        ["megatron.train_iters=2"],
        [
            "lr_warmup_iters: 2 is not less than megatron.train_iters, 2",
            "override_opt_param_scheduler",
        ],
    ),
    "long_warmup_of_samples": (
        [
            "megatron.train_iters=null",
            "megatron.train_samples=9",
            "megatron.lr_warmup_iters=0",
            "megatron.lr_warmup_samples=8",
            "megatron.lr_decay_samples=8",
        ],
        ["lr_warmup_samples: 8 is not less than megatron.lr_decay_samples, 8"],
    ),
    "warmup_is_all": (
        ["megatron.lr_warmup_iters=0", "megatron.lr_warmup_fraction=1"],
        ["lr_warmup_fraction: 1"],
    ),
    "no_end": (["megatron.train_iters=null"], ["megatron.train_iters: is missing"]),
    "no_rate": (["megatron.lr=null", "megatron.min_lr=0"], ["megatron.lr: is missing"]),
    "rate_rises": (
        ["megatron.min_lr=1"],
        ["megatron.min_lr: 1 is greater than megatron.lr, 0.003"],
    ),
    "rate_below_0": (["megatron.min_lr=-1"], ["megatron.min_lr: -1 is negative"]),
    "warm_start": (["megatron.lr_warmup_init=1"], ["megatron.lr_warmup_init: 1 is greater"]),
    "no_last_phase": (["megatron.lr_decay_style=WSD"], ["lr_wsd_decay_iters: is missing"]),
    "decay_falls": (
        [
            "megatron.weight_decay_incr_style=linear",
            "megatron.start_weight_decay=0.2",
            "megatron.end_weight_decay=0.1",
        ],
        ["start_weight_decay: 0.2 to end_weight_decay 0.1"],
    ),
    "two_schedules": (
        [
            "megatron.override_opt_param_scheduler=true",
            "megatron.use_checkpoint_opt_param_scheduler=true",
        ],
        ["override_opt_param_scheduler", "leave one of them out"],
    ),
    "layer_outside": (["sparsity.layers.0.layers=[5]"], ["layer 5 of 4"]),
    "heads_over_tp": (
        ["megatron.tensor_model_parallel_size=3"],
        ["tensor_model_parallel_size=3", "num_attention_heads=4"],
    ),
    "sequence_over_tp": (
        [
            "megatron.tensor_model_parallel_size=2",
            "megatron.sequence_parallel=true",
            "megatron.seq_length=127",
        ],
        ["megatron.seq_length=127", "tensor_model_parallel_size=2"],
    ),
    "context_parallel_blocks": (
        ["megatron.context_parallel_size=8"],
        ["megatron.seq_length=128", "a multiple of 256", "blocks of 16", "size of 1, 2, 4\n"],
    ),
    "context_parallel_chunks": (
        ["megatron.context_parallel_size=2", "megatron.seq_length=126"],
        ["megatron.seq_length=126", "a multiple of 4", "as 124 or 128"],
    ),
    "packed_context_parallel": (
        ["megatron.dataloader_inter_document_masking=true", "megatron.context_parallel_size=2"],
        ["dataloader_inter_document_masking", "context_parallel_size=2"],
    ),
    "packed_pipeline": (
        [
            "megatron.dataloader_inter_document_masking=true",
            "megatron.pipeline_model_parallel_size=2",
            "megatron.micro_batch_size=2",
        ],
        ["dataloader_inter_document_masking", "micro_batch_size to 1"],
    ),
    "sft": (["megatron.sft=true"], ["megatron.sft=True", "dataloader_inter_document_masking"]),
    "reset_mask": (["megatron.reset_attention_mask=true"], ["reset_attention_mask"]),
    "mask": (
        ["megatron.create_attention_mask_in_dataloader=true"],
        ["create_attention_mask_in_dataloader"],
    ),
    "mtp": (["megatron.mtp_num_layers=1"], ["mtp_num_layers=1"]),
    "local_backend": (["megatron.attention_backend=local"], ["attention_backend", "dense"]),
    "dropout": (["megatron.attention_dropout=0.1"], ["attention_dropout=0.1"]),
    "no_te": (
        ["megatron.transformer_impl=transformer_engine"],
        ["transformer_engine", "is not installed"],
    ),
    "fp8_delayed": (
        ["megatron.fp8_format=hybrid", "megatron.save=x"],
        ["megatron.fp8_recipe=delayed", "tensorwise", "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"],
    ),
    "spec": (["megatron.spec=[a,b]"], ["megatron.spec"]),
    "rl": (["megatron.perform_rl_step=true"], ["perform_rl_step"]),
    "fim": (["megatron.fim_data=true"], ["megatron.fim_data=True"]),
    "distillation": (["megatron.logits_load_dir=x"], ["megatron.logits_load_dir=x"]),
    "mamba": (["megatron.hybrid_layer_pattern=M*M*"], ["hybrid_layer_pattern", "GPTs"]),
    "heterogeneous": (
        ["megatron.heterogeneous_layers_config_path=x.json"],
        ["heterogeneous_layers_config_path"],
    ),
    "moe_overlap": (
        ["megatron.overlap_moe_expert_parallel_comm=true"],
        ["overlap_moe_expert_parallel_comm"],
    ),
    # Through the launcher too, before a process group starts; each is refused by its own words.
    "latent_attention": (["megatron.multi_latent_attention=true"], ["multi_latent_attention"]),
    "qk_clip": (["megatron.qk_clip=true"], ["qk_clip"]),
    "max_logit": (["megatron.log_max_attention_logit=true"], ["log_max_attention_logit"]),
    "flash_decode": (["megatron.flash_decode=true"], ["flash_decode"]),
    "softmax": (["megatron.softmax_type=learnable"], ["softmax_type"]),
    "window": (["megatron.window_size=(8,0)"], ["window_size"]),
    "layer_scaling": (
        ["megatron.apply_query_key_layer_scaling=true", "megatron.fp16=true"],
        ["apply_query_key_layer_scaling"],
    ),
    "cuda_graphs": ([LOCAL, CP2], [f"{LOCAL}: captures attention", "as [mlp]"]),
    "graphs_register": (
        ["NCCL_GRAPH_REGISTER=1", *GRAPHS],
        ["NCCL_GRAPH_REGISTER=1: ", "cuda_graph_impl=transformer_engine", "set it to 0"],
    ),
    "fsdp": (
        ["megatron.use_megatron_fsdp=true"],
        ["megatron.use_megatron_fsdp=True", "CUDA_DEVICE_MAX_CONNECTIONS=8 before the start"],
    ),
    "variable_of_megatron": (
        ["NCCL_ALGO=Tree", "megatron.deterministic_mode=true"],
        ["Megatron refuses", "environment variable NCCL_ALGO: is Tree here; change or unset it"],
    ),
    "other_attention": (
        ["megatron.experimental_attention_variant=dsa"],
        ["experimental_attention_variant"],
    ),
}


@pytest.fixture(scope="module")
def refused():
    overrides = {name: overrides for name, (overrides, _) in CASES.items()}
    sound = {"sound": [], "context": [CP2], "graphs": GRAPHS}
    return call("model_cases", "refusals", json.dumps(overrides | sound))


def test_dry_run_prints_table_parameters_and_flops(refused):
    status, out, err = refused["sound"]
    assert status == 0, err
    for words in ("2-4     local + stride", "parameters", "true model FLOPs", "TP 1"):
        assert words in out


def test_dry_run_says_what_context_parallel_ranks_exchange(refused):
    status, out, err = refused["context"]
    assert status == 0, err
    assert "CP 2, DP 1: 2 rank(s)" in out and "receives: K and V" in out
    # Dense: half of 8 blocks of 16 tokens x 2 heads x 2 x 16 numbers of 4 bytes on the last rank.
    row = next(line for line in out.splitlines() if line.startswith("1 "))
    assert "0.01562 MiB, 100.0%" in row or "0.01172 MiB, 75.0%" in row, row


def test_graphs_outside_of_attention_start_with_what_we_set_ourselves(refused):
    """Megatron refuses them where memory segments are expandable and NCCL may register memory."""
    status, out, err = refused["graphs"]
    assert status == 0, err
    assert "environment      NCCL_GRAPH_REGISTER=0" in out
    assert "NCCL_GRAPH_REGISTER" not in refused["sound"][1]


@pytest.mark.parametrize("name", CASES)
def test_run_is_refused_before_it_starts(refused, name):
    status, _, err = refused[name]
    assert status == 2
    for word in CASES[name][1]:
        assert word in err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def options():
    return call("model_cases", "options_refused")


def test_sound_options_pass(options):
    assert options["sound"] == options["sound_on_cpu"] == ""


def test_cuda_graphs_may_leave_attention_out(options):
    assert options["graphs_of_mlp"] == ""
    for captured in ("attn", "layers"):  # with two context-parallel ranks
        found = options[f"graphs_of_{captured}"]
        assert found.startswith("ConfigError: megatron.cuda_graph_impl=transformer_engine: ")


def test_broken_run_file_stops_the_stock_route(options):
    assert options["broken_run_file"].startswith("ConfigError: --config")
    assert "cannot be read as YAML" in options["broken_run_file"]


@pytest.mark.parametrize("name", [
    "kv_channels", "mtp_num_layers", "attention_backend", "flash_decode", "multi_latent_attention",
    "softmax_type", "window_size", "qk_clip", "log_max_attention_logit",
    "apply_query_key_layer_scaling", "use_kitchen_attention", "heterogeneous_block_specs",
    "attention_dropout", "experimental_attention_variant", "cuda_graph_impl", "transformer_impl",
])  # fmt: skip
def test_option_is_refused_by_name(options, name):
    assert options[name].startswith(f"ConfigError: megatron.{name}=")


@pytest.fixture(scope="module")
def built():
    return call("model_cases", "built_model")


def test_no_layer_has_a_hook(built):
    """Megatron's local CUDA graphs refuse modules with hooks, after the capture only."""
    assert built["hooked"] == []


def test_every_layer_holds_what_was_configured(built):
    assert built["kinds"] == ["TorchDenseAttention"] + ["S2CoreAttention"] * 3
    assert built["sound"] == ""
    assert built["state"] == []  # nothing of ours enters a checkpoint's weights
    assert built["shape"] == [128, 1, 64]


def test_a_view_of_v_does_not_keep_the_whole_projection(built):
    rotated, unrotated = built["kept"]
    assert not rotated and unrotated  # q and k hold it as well: a copy of v would come on top


@pytest.mark.parametrize(
    "name, words",
    [
        ("replaced", "RuntimeError: layer 3 is configured sparse and holds DotProductAttention"),
        ("other_pattern", "RuntimeError: layer 3 holds another pattern"),
        ("too_few", "RuntimeError: layer 4 is built"),
        ("too_many", "some layers do not hold"),
        ("inference", "RuntimeError: layer 2: Megatron's inference contexts do not run S2"),
        ("mask", "ValueError: S2CoreAttention, layer 2: attention_mask"),
        ("packed", "ValueError: S2CoreAttention, layer 2: qkv_format='sbhd'"),
        ("padded", "ValueError: S2CoreAttention, layer 2: cu_seqlens_q_padded"),
        ("cache", "ValueError: S2CoreAttention, layer 2: 1 queries against 128 keys"),
    ],
)
def test_what_would_run_dense_stops(built, name, words):
    assert words in built[name]


IMPORT_PROBE = """
import sys
from megatron.core.transformer.spec_utils import import_module
print("spec:", import_module(tuple(sys.argv[2:])))
"""


def import_spec(folder, module="layer_spec"):
    """What Megatron does with --spec, with `folder` before all else on the path."""
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE, "--spec", f"s2megatron.{module}", "s2_layer_spec"],
        capture_output=True,
        text=True,
        env={**os.environ, **ON_CPU, "PYTHONPATH": path},
    )


@pytest.mark.parametrize(
    "package, words",
    [
        ("s2_kernels", "RuntimeError: s2megatron.layer_spec cannot be imported (no such thing"),
        ("triton", "ImportError: no such thing here"),  # Megatron Core itself cannot do without
    ],
    ids=["s2_kernels", "triton"],
)
def test_failing_import_under_spec_stops_the_run(tmp_path, package, words):
    """Megatron's import_module turns an ImportError into None, and then trains dense."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('no such thing here')")
    done = import_spec(tmp_path)
    assert done.returncode != 0 and "spec:" not in done.stdout
    assert words in done.stderr


def test_misspelt_module_under_spec_stops_the_run(tmp_path):
    done = import_spec(tmp_path, "layer_specs")
    assert done.returncode != 0 and "spec:" not in done.stdout
    assert "RuntimeError: --spec: there is no module s2megatron.layer_specs" in done.stderr
    assert "s2megatron.layer_spec s2_layer_spec" in done.stderr


def test_missing_module_is_an_import_error_elsewhere():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("s2megatron.layer_specs")


def test_stock_launcher_runs_a_script_with_the_spec(tmp_path, monkeypatch, capsys):
    script = tmp_path / "pretrain_gpt.py"
    script.write_text("import sys, beside_it\nprint(__name__, *sys.argv[1:])")
    (tmp_path / "beside_it.py").write_text("")
    monkeypatch.setenv("S2MEGATRON_CONFIG", str(write_run_file(tmp_path / "run.yaml", TINY)))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert stock.main([str(script), "--num-layers", "2"]) == 0
    words = "__main__ --num-layers 2 --spec s2megatron.layer_spec s2_layer_spec\n"
    assert capsys.readouterr().out == words


@pytest.mark.parametrize(
    "argv, config, words",
    [
        (["script.py"], None, "S2MEGATRON_CONFIG is not set"),
        (["script.py"], "broken.yaml", "stried"),
        (["none.py"], "sound.yaml", "pretrain_gpt.py"),
        (["script.py", "--spec", "a", "b"], "sound.yaml", "--spec"),
    ],
    ids=["no_run_file", "broken_run_file", "no_script", "second_spec"],
)
def test_stock_launcher_stops_before_the_script(tmp_path, monkeypatch, capsys, argv, config, words):
    monkeypatch.chdir(tmp_path)
    write_run_file(tmp_path / "sound.yaml", TINY)
    (tmp_path / "broken.yaml").write_text("sparsity: {default: {stried: 4}}")
    (tmp_path / "script.py").write_text("print('ran')")
    monkeypatch.delenv("S2MEGATRON_CONFIG", raising=False)
    if config:
        monkeypatch.setenv("S2MEGATRON_CONFIG", config)
    assert stock.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and words in said.err


def test_pypi_apex_is_not_taken_for_nvidias(tmp_path):
    """PyPI's apex is an unrelated project that imports; a run goes on with torch's AdamW."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("'a web framework'")
    config = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    short = ["megatron.train_iters=2", "megatron.lr_decay_iters=20"]
    done = torchrun(config, *short, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-4000:]
    for words in ("torch AdamW", "off (NVIDIA Apex not found)", "(Transformer Engine: not found)"):
        assert words in done.stdout
    assert "iteration        2/" in done.stdout


@pytest.mark.parametrize(
    "name",
    ["swiglu_gqa", "tied_gelu_layernorm", "qk_norm_wide_heads", "qkv_bias", "output_gate", "moe",
     "moe_shared_every_2nd", "moe_shared_gate"],
)  # fmt: skip
def test_planned_sizes_are_those_of_the_built_model(name):
    sizes = call("model_cases", "model_sizes", name)
    assert sizes["planned"] == sizes["built"]
    assert sizes["planned_layers"] == sizes["built_layers"]
    assert sizes["planned_rank"] == sizes["built"]
    assert sizes["planned_flops"] == sizes["built_flops"]
