"""Nothing runs dense in silence: each way that Megatron has ends in an error."""

import json
import os
import subprocess
import sys

import pytest
from in_process import call
from launches import ROOT, TINY, start, write_run_file

CASES = {
    "unknown_option": (
        ["megatron.num_layer=4"],
        ["megatron.num_layer", "no such option", "'num_layers'"],
    ),
    "bad_value": (["megatron.num_layers=four"], ["megatron.num-layers", "four"]),
    "flag_with_value": (["megatron.swiglu=1"], ["megatron.swiglu", "true or false"]),
    "megatron_assert": (["megatron.micro_batch_size=null"], ["Megatron refuses"]),
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
    "context_parallel": (["megatron.context_parallel_size=2"], ["context_parallel_size=2"]),
    "packed": (["megatron.dataloader_inter_document_masking=true"], ["packed sequences"]),
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
    "spec": (["megatron.spec=[a,b]"], ["megatron.spec"]),
}


@pytest.fixture(scope="module")
def refused():
    overrides = {name: overrides for name, (overrides, _) in CASES.items()}
    return call("model_cases", "refusals", json.dumps(overrides | {"sound": []}))


def test_dry_run_prints_table_parameters_and_flops(refused):
    status, out, err = refused["sound"]
    assert status == 0, err
    for words in ("2-4     local + stride", "parameters", "true model FLOPs", "TP 1"):
        assert words in out


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


@pytest.mark.parametrize(
    "name",
    [
        "kv_channels",
        "mtp_num_layers",
        "attention_backend",
        "flash_decode",
        "multi_latent_attention",
        "softmax_type",
        "window_size",
        "qk_clip",
        "context_parallel_size",
        "attention_dropout",
        "experimental_attention_variant",
        "cuda_graph_impl",
        "transformer_impl",
    ],
)
def test_option_is_refused_by_name(options, name):
    assert options[name].startswith(f"ConfigError: megatron.{name}=")


@pytest.fixture(scope="module")
def built():
    return call("model_cases", "built_model")


def test_every_layer_holds_what_was_configured(built):
    assert built["kinds"] == ["TorchDenseAttention"] + ["S2CoreAttention"] * 3
    assert built["sound"] == ""
    assert built["state"] == []  # nothing of ours enters a checkpoint's weights
    assert built["shape"] == [128, 1, 64]


@pytest.mark.parametrize(
    "name, words",
    [
        ("replaced", "RuntimeError: layer 3 is configured sparse and holds DotProductAttention"),
        ("other_pattern", "RuntimeError: layer 3 holds another pattern"),
        ("too_few", "RuntimeError: layer 4 is built"),
        ("too_many", "some layers do not hold"),
        ("inference", "RuntimeError: layer 2: Megatron's inference contexts do not run S2"),
        ("mask", "ValueError: S2CoreAttention, layer 2: attention_mask"),
        ("packed", "ValueError: S2CoreAttention, layer 2: packed_seq_params"),
        ("cache", "ValueError: S2CoreAttention, layer 2: 1 queries against 128 keys"),
    ],
)
def test_what_would_run_dense_stops(built, name, words):
    assert words in built[name]


IMPORT_PROBE = """
from megatron.core.transformer.spec_utils import import_module
print("spec:", import_module(("s2megatron.layer_spec", "s2_layer_spec")))
"""


def test_failing_import_under_spec_stops_the_run(tmp_path):
    """Megatron's import_module turns an ImportError into None, and then trains dense."""
    (tmp_path / "s2_kernels").mkdir()
    (tmp_path / "s2_kernels" / "__init__.py").write_text("raise ImportError('no Triton here')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode != 0 and "spec:" not in done.stdout
    assert "RuntimeError: s2megatron.layer_spec cannot be imported (no Triton here)" in done.stderr


def test_pypi_apex_is_not_taken_for_nvidias(tmp_path):
    """PyPI's apex is an unrelated project that imports; a run goes on with torch's AdamW."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("'a web framework'")
    config = write_run_file(tmp_path / "run.yaml", TINY | {"data": {"mock": True}})
    short = ["megatron.train_iters=2", "megatron.lr_decay_iters=20"]
    done = start(config, *short, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "torch AdamW" in done.stdout and "off (NVIDIA Apex not found)" in done.stdout
    assert "iteration        2/" in done.stdout


def test_broken_transformer_engine_is_said(tmp_path):
    """Installed, and failing at import: the run goes on with local modules and says why."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libtransformer_engine.so')")
    code = (
        "from s2megatron.backends import find_backends\n"
        "print(*find_backends().lines('local'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "Transformer Engine is installed but does not import" in done.stdout, done.stderr


def test_half_removed_transformer_engine_is_named(tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "from s2megatron.backends import find_backends; find_backends()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "half-removed" in done.stderr and str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    "name",
    ["swiglu_gqa", "tied_gelu_layernorm", "qk_norm_wide_heads", "qkv_bias", "moe",
     "moe_shared_every_2nd"],
)  # fmt: skip
def test_planned_sizes_are_those_of_the_built_model(name):
    sizes = call("model_cases", "model_sizes", name)
    assert sizes["planned"] == sizes["built"]
    assert sizes["planned_layers"] == sizes["built_layers"]
    assert sizes["planned_rank"] == sizes["built"]
    assert sizes["planned_flops"] == sizes["built_flops"]
