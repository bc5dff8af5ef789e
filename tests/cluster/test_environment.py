"""What Megatron's options ask of the environment, beyond what every run has."""

from argparse import Namespace

import pytest
import torch

from s2megatron.cluster import environment
from s2megatron.errors import ConfigError

PLAIN = dict(
    cuda_graph_impl="none", enable_cuda_graph=False, external_cuda_graph=False,
    use_torch_fsdp2=False, use_megatron_fsdp=False, nccl_ub=False,
    pipeline_model_parallel_comm_backend=None,
)  # fmt: skip
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
CAPTURES = [
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "transformer_engine"},
    {"enable_cuda_graph": True},
    {"external_cuda_graph": True},
]


def ask(environ: dict, **options) -> dict[str, str]:
    return environment.apply_for_options(Namespace(**PLAIN | options), environ)


@pytest.mark.parametrize("options", CAPTURES, ids=str)
def test_graphs_do_not_let_nccl_register_expandable_memory(options):
    environ: dict[str, str] = {}
    environment.apply(environ)
    assert ask(environ, **options) == {"NCCL_GRAPH_REGISTER": "0"}
    assert environ["NCCL_GRAPH_REGISTER"] == "0"
    assert ask(environ, **options) == {"NCCL_GRAPH_REGISTER": "0"}  # set, and so by the user too
    other_name = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}
    assert ask(other_name, **options) == {"NCCL_GRAPH_REGISTER": "0"}


@pytest.mark.parametrize("options", CAPTURES, ids=str)
def test_graphs_with_another_value_are_refused(options):
    ((name, value),) = options.items()
    words = rf"NCCL_GRAPH_REGISTER=1: .* megatron\.{name}={value} .* set it to 0, .*Segments:False"
    with pytest.raises(ConfigError, match=f"(?i){words}"):
        ask(EXPANDABLE | {"NCCL_GRAPH_REGISTER": "1"}, **options)


def test_nothing_is_set_without_need():
    for environ, options in [
        (EXPANDABLE, {}),
        (EXPANDABLE | {"NCCL_GRAPH_REGISTER": "1"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, CAPTURES[1]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {"use_megatron_fsdp": True}),
    ]:
        before = dict(environ)
        assert ask(environ, **options) == {} and environ == before


@pytest.mark.parametrize(
    "options",
    [
        {"use_torch_fsdp2": True},
        {"use_megatron_fsdp": True},
        {"pipeline_model_parallel_comm_backend": "ucc"},
    ],
    ids=str,
)
def test_options_that_one_hardware_queue_would_stop(options):
    environ: dict[str, str] = {}
    environment.apply(environ)
    ((name, value),) = options.items()
    words = rf"megatron\.{name}={value}: .*CUDA_DEVICE_MAX_CONNECTIONS=8 before the start"
    with pytest.raises(ConfigError, match=words):
        ask(environ, **options)


def test_memory_pools_of_nccl_before_torch_2_11(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(ConfigError, match=r"megatron\.nccl_ub=True: .*expandable_segments:False"):
        ask(EXPANDABLE, nccl_ub=True)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert ask(EXPANDABLE, nccl_ub=True) == {}


def test_variables_in_an_error_of_megatrons_are_explained():
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_FLASH_ATTN": "0"}
    text = "CUDA_DEVICE_MAX_CONNECTIONS > 1, NVTE_CPU_OFFLOAD_V1 or NVTE_FLASH_ATTN; a DP_CP group"
    queues, offload, flash = environment.named_in(text, environ)
    assert "CUDA_DEVICE_MAX_CONNECTIONS: is 1 here, as s2megatron sets it" in queues
    assert "NVTE_CPU_OFFLOAD_V1: is not set here; set it before the start" in offload
    assert "NVTE_FLASH_ATTN: is 0 here; change or unset it" in flash
    assert environment.named_in("hidden_size must be a multiple") == []


def test_a_process_that_nobody_launched_is_the_only_rank():
    environ = {"MASTER_PORT": "29500"}
    environment.be_the_only_rank(environ)
    assert environ == environment.ALONE | {"MASTER_PORT": "29500"}
    launched = {"RANK": "3", "SLURM_NTASKS": "8"}
    environment.be_the_only_rank(launched)
    assert launched == {"RANK": "3", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_one_of_several_tasks_does_not_train_by_itself(name):
    environment.be_the_only_rank({name: "1"})
    environ = {name: "8"}
    with pytest.raises(ConfigError, match=rf"{name}=8: .* start torchrun .* or unset {name}"):
        environment.be_the_only_rank(environ)
    assert environ == {name: "8"}
