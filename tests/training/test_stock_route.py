"""`pretrain_gpt.py --spec s2megatron.layer_spec s2_layer_spec`: the same losses as our launcher."""

import os
from pathlib import Path

import pytest
import zygote
from in_process import call
from launches import ON_CPU, TINY, losses, write_run_file

from s2megatron.plot import read_scalars
from s2megatron.training.backends import Backends, default_options
from s2megatron.training.megatron_options import to_argv

NO_BACKENDS = Backends(
    cuda=False,
    transformer_engine=None,
    te_fails=False,
    fused_adam=None,
    gradient_accumulation_fusion=False,
)


def stock(
    folder: Path,
    options: dict,
    config: Path | None,
    spec=("layer_spec", "s2_layer_spec"),
    ranks: int = 1,
):
    """A launch with Megatron's own command line; returns the finished process."""
    options = options | {"tensorboard_dir": str(folder)}
    argv, _ = to_argv(options)
    module, function = spec
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "2"}
    if config:
        env["S2MEGATRON_CONFIG"] = str(config)
    arguments = [*argv, "--spec", f"s2megatron.{module}", function]
    return zygote.run("stock_route:main", arguments, ranks=ranks, env=env)


@pytest.fixture(scope="module")
def route(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    tree = TINY | {"data": {"mock": True}}
    tree["megatron"] = tree["megatron"] | {"train_iters": 4, "lr_decay_iters": 20}
    config = write_run_file(folder / "run.yaml", tree)
    options = default_options(NO_BACKENDS, tree["megatron"])
    options |= {"mock_data": True, "tokenizer_type": "NullTokenizer", "vocab_size": 257}
    return folder, config, options


def test_stock_route_trains_as_the_launcher_does(route):
    folder, config, options = route
    done = stock(folder / "stock", options, config)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "S2CoreAttention" in done.stdout
    assert "its megatron: and data: sections are not used" in done.stdout
    ours = losses(config, folder / "ours")
    assert dict(read_scalars(folder / "stock")["lm loss"]) == pytest.approx(ours, abs=1e-6)
    apart = stock(folder / "cp2", options | {"context_parallel_size": 2}, config, ranks=2)
    assert apart.returncode == 0, apart.stderr[-4000:]
    assert dict(read_scalars(folder / "cp2")["lm loss"]) == pytest.approx(ours, abs=1e-5)


def test_stock_route_without_a_run_file_stops(route):
    folder, _, options = route
    done = stock(folder / "none", options, None)
    assert done.returncode != 0 and "S2MEGATRON_CONFIG is not set" in done.stderr


def test_stock_route_with_dropout_stops(route):
    folder, config, options = route
    done = stock(folder / "dropout", options | {"attention_dropout": 0.1}, config)
    assert done.returncode != 0 and "attention_dropout=0.1" in done.stderr


def test_wrong_function_name_stops(route):
    folder, config, options = route
    done = stock(folder / "name", options, config, ("layer_spec", "s2_layer_specs"))
    assert done.returncode != 0 and "KeyError: 's2_layer_specs'" in done.stderr


REFUSED = {
    "packed": "megatron.dataloader_inter_document_masking=True: ",
    "mask": "megatron.reset_attention_mask=True: ",
    "fp8": "megatron.fp8=hybrid: needs Transformer Engine's linear layers; ",
    "fp4": "megatron.fp4=e2m1: needs Transformer Engine's linear layers; ",
    "precision": "megatron.te_precision_config_file=recipes.yaml: needs Transformer Engine's",
    "fp8_recipe": "megatron.fp8_recipe=delayed: ",
    "hybrid": "megatron.hybrid_layer_pattern=M*: ",
    "heterogeneous": "megatron.heterogeneous_layers_config_path=x.json: ",
    "optimizer": "megatron.optimizer=sgd with use_distributed_optimizer: ",
    "graphs": "NCCL_GRAPH_REGISTER=(not set): does not go with megatron.cuda_graph_impl=local",
    "use_transformer_engine_op_fuser": "megatron.use_transformer_engine_op_fuser=True: ",
    "use_grouped_gemm_for_dense_mlp": "megatron.use_grouped_gemm_for_dense_mlp=True: ",
    "restore_modelopt_state": "megatron.restore_modelopt_state=True: ",
}


@pytest.fixture(scope="module")
def refused():
    return call("model_cases", "refused_by_the_stock_route")


def test_stock_route_records_which_documents_are_read(refused):
    assert refused["documents"] == {}  # none of mock data; a resume is told of others


@pytest.mark.parametrize("case", REFUSED)
def test_stock_route_refuses_what_it_would_ignore(refused, case):
    """What the launcher refuses, too, where nothing else of Megatron's own script would."""
    assert refused["sound"] == ""
    assert refused[case].startswith(f"ConfigError: {REFUSED[case]}")
