"""Transformer Engine and Apex are found by what they bring; stand-ins take their places here."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import megatron.core
import pytest

from s2megatron.errors import ConfigError
from s2megatron.training.backends import default_options, find_backends
from s2megatron.training.machine_checks import check_machine

TE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch.py": "class TransformerLayer: pass",
    "transformer_engine-2.20.2.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.20.2\n",
}
APEX = {"apex/__init__.py": "", "apex/optimizers.py": "class FusedAdam: pass"}
APEX_ADAM = APEX | {"amp_C.py": "def multi_tensor_adam(): pass"}
APEX_FUSION = {"fused_weight_gradient_mlp_cuda.py": "def wgrad_gemm_accum_fp32(): pass"}
BROKEN_FUSION = {"fused_weight_gradient_mlp_cuda.py": "raise ImportError('undefined symbol')"}
NAMES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda",
         "nvidia_resiliency_ext")  # fmt: skip


def resiliency(version: str) -> dict:
    """NVIDIA's package that writes checkpoints in the background, by its name alone."""
    folder = f"nvidia_resiliency_ext-{version}.dist-info"
    metadata = f"Name: nvidia-resiliency-ext\nVersion: {version}\n"
    return {"nvidia_resiliency_ext/__init__.py": "", f"{folder}/METADATA": metadata}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts files on the path of this process, for one test."""

    def put(*packages: dict):
        for path, text in (item for package in packages for item in package.items()):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    forget()
    yield put
    forget()


def forget():
    for name in list(sys.modules):
        if name.split(".")[0] in NAMES:
            del sys.modules[name]


def lines(backends, **args):
    defaults = {"transformer_impl": "local", "optimizer": "adam", "fp8": None, "fp8_recipe": None,
                "apply_rope_fusion": False, "gradient_accumulation_fusion": False}  # fmt: skip
    return "\n".join(backends.lines(SimpleNamespace(**defaults | args)))


def test_without_either(install):
    found = find_backends()
    assert (found.transformer_engine, found.fused_adam) == (None, None)
    assert not found.gradient_accumulation_fusion and not found.te_fails
    table = lines(found)
    for words in (
        "linear layers    Megatron local modules (Transformer Engine: not found)",
        "norms            torch",
        "rotary           not fused",
        "dense attention  torch SDPA",
        "optimizer        torch AdamW",
        "gradient fusion  off (NVIDIA Apex not found)",
    ):
        assert words in table
    assert "optimizer        muon" in lines(found, optimizer="muon")
    options = default_options(found, {})
    assert options["transformer_impl"] == "local" and options["no_persist_layer_norm"]
    assert not options["gradient_accumulation_fusion"] and not options["apply_rope_fusion"]
    with pytest.raises(ConfigError, match="gradient_accumulation_fusion: true needs NVIDIA Apex"):
        default_options(found, {"gradient_accumulation_fusion": True})


def test_a_megatron_that_was_not_tried_is_told(install, monkeypatch):
    found, told = find_backends(), "NOT TRIED: s2megatron was tried with 0.19 only"
    assert f"megatron-core    {megatron.core.__version__}" in lines(found)
    assert told not in lines(found)
    monkeypatch.setattr(megatron.core, "__version__", "0.20.1rc0")
    assert f"megatron-core    0.20.1rc0, {told}" in lines(found)


def test_apex_of_pypi_brings_nothing(install):
    install({"apex/__init__.py": "'a web framework'"})
    found = find_backends()
    assert found.fused_adam is None and not found.gradient_accumulation_fusion


def test_apex_of_python_alone_is_refused(install):
    """Megatron would take its FusedAdam, which raises when it is made."""
    install(APEX)
    with pytest.raises(ConfigError, match=r"amp_C.*APEX_CUDA_EXT=1"):
        find_backends()


def test_apex_without_gradient_fusion(install):
    install(APEX_ADAM)
    found = find_backends()
    assert found.fused_adam == "Apex" and not found.gradient_accumulation_fusion
    assert "fused Adam (Apex)" in lines(found)


def test_apex_built_whole(install):
    install(APEX_ADAM, APEX_FUSION)
    found = find_backends()
    assert found.fused_adam == "Apex" and found.gradient_accumulation_fusion
    assert default_options(found, {})["gradient_accumulation_fusion"]
    assert "gradient fusion  on (NVIDIA Apex)" in lines(found, gradient_accumulation_fusion=True)
    assert "gradient fusion  off\n" in lines(found) + "\n"  # switched off by the run file


def test_extension_that_does_not_load_is_not_used(install):
    install(APEX_ADAM, BROKEN_FUSION)
    assert not find_backends().gradient_accumulation_fusion


def test_transformer_engine(install):
    install(TE, APEX, APEX_FUSION)
    found = find_backends()
    assert found.transformer_engine == "2.20.2"
    assert found.fused_adam == "Transformer Engine"  # Megatron asks it before Apex
    impl = {"transformer_impl": "transformer_engine"}
    table = lines(found, **impl, apply_rope_fusion=True, fp8="hybrid", fp8_recipe="delayed")
    for words in (
        "linear layers    Transformer Engine 2.20.2, FP8 (hybrid, delayed), attention in bf16",
        "norms            Transformer Engine 2.20.2, fused with the linear layer that follows",
        "rotary           fused (Transformer Engine)",
        "dense attention  Transformer Engine",
        "optimizer        fused Adam (Transformer Engine)",
    ):
        assert words in table
    assert "(Transformer Engine: installed, not used)" in lines(found)
    options = default_options(found, impl)
    assert "apply_rope_fusion" not in options and "no_persist_layer_norm" not in options


def test_transformer_engine_that_does_not_import_is_said(install):
    install({"transformer_engine/__init__.py": "raise ImportError('libtransformer_engine.so')"})
    found = find_backends()
    assert found.te_fails and found.transformer_engine is None
    assert "(Transformer Engine: installed, does not import)" in lines(found)


def test_half_removed_transformer_engine_is_named(install, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    install()
    with pytest.raises(ConfigError, match="half-removed") as error:
        find_backends()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("gpu", "strategy"), [(True, "nvrx"), (False, "mcore")])
def test_who_writes_checkpoints_in_the_background(install, gpu, strategy):
    """NVIDIA's writer asks for a GPU as it starts: on the CPU it would end with the first save."""
    install(resiliency("0.6.0"))
    found = replace(find_backends(), cuda=gpu)
    assert found.resiliency == "0.6.0"
    assert default_options(found, {})["async_strategy"] == strategy
    asked = {"async_save": True, "async_strategy": "nvrx"}
    assert default_options(found, asked | {"async_strategy": "mcore"})["async_strategy"] == "mcore"
    if gpu:
        assert default_options(found, asked)["async_strategy"] == "nvrx"
    else:
        with pytest.raises(ConfigError, match="'nvrx' needs nvidia-resiliency-ext and a GPU"):
            default_options(found, asked)
        default_options(found, asked | {"async_save": False})  # then Megatron does not look at it


def test_without_nvidias_writer(install):
    found = replace(find_backends(), cuda=True)
    assert found.resiliency is None and default_options(found, {})["async_strategy"] == "mcore"
    with pytest.raises(ConfigError, match="leave the option out"):
        default_options(found, {"async_save": True, "async_strategy": "nvrx"})


@pytest.mark.parametrize("version", ["0.4.1", "0.5.0"])
def test_a_writer_that_megatron_does_not_import_beside_is_refused(install, version):
    install(resiliency(version))
    with pytest.raises(ConfigError, match=f"{version} is installed, .*install 0.6 or newer"):
        find_backends()


NO_CAPTURE = dict(
    cuda_graph_impl="none", enable_cuda_graph=False, external_cuda_graph=False,
    te_rng_tracker=False, nccl_ub=False, optimizer_cuda_graph=False,
    wandb_project=None, optimizer="adam", enable_ft_package=False, adlr_autoresume=False,
    num_distributed_optimizer_instances=1, tp_comm_overlap=False, cpu_offloading_num_layers=0,
    recompute_modules=None, recompute_granularity=None, use_precision_aware_optimizer=False,
    optimizer_cpu_offload=False, distributed_backend="gloo", record_memory_history=False,
    profile=False, use_pytorch_profiler=False, num_experts=None, moe_latent_size=None,
)  # fmt: skip


@pytest.mark.parametrize("asked", [
    {"cuda_graph_impl": "local"}, {"cuda_graph_impl": "transformer_engine"},
    {"enable_cuda_graph": True}, {"te_rng_tracker": True},
], ids=str)  # fmt: skip
def test_cuda_graphs_need_a_gpu_and_transformer_engine(install, asked):
    """Seen: AttributeError, 'Tensor' object has no attribute 'manual_seed'."""
    ((name, value),) = asked.items()
    backends, args = find_backends(), SimpleNamespace(**NO_CAPTURE | asked)
    check_machine(backends, SimpleNamespace(**NO_CAPTURE))
    with pytest.raises(ConfigError, match=rf"megatron\.{name}={value}: needs a GPU, .* leave"):
        check_machine(replace(backends, cuda=False), args)
    with pytest.raises(ConfigError, match=rf"{name}={value}: needs Transformer Engine, .* leave"):
        check_machine(replace(backends, cuda=True), args)
    check_machine(replace(backends, cuda=True, transformer_engine="2.20.2"), args)


@pytest.mark.parametrize("name", ["nccl_ub", "optimizer_cuda_graph"])
def test_options_that_need_a_gpu(install, name):
    """Seen: ValueError, max() iterable argument is empty; AssertionError of torch's optimizer."""
    args = SimpleNamespace(**NO_CAPTURE | {name: True})
    with pytest.raises(ConfigError, match=rf"megatron\.{name}=True: needs a GPU"):
        check_machine(replace(find_backends(), cuda=False), args)
    check_machine(replace(find_backends(), cuda=True), args)
