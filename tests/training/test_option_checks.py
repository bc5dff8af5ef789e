"""Options that nothing would read, that fail in the first step, or that need what is not here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from in_process import call

from s2megatron.errors import ConfigError
from s2megatron.training.backends import Backends
from s2megatron.training.machine_checks import check_machine
from s2megatron.training.schedule import check_schedule

STAGES = (
    "megatron.pipeline_model_parallel_size=2 megatron.num_layers_per_virtual_pipeline_stage=1 "
    "megatron.global_batch_size"
)
STEPS = "megatron.global_batch_size=null megatron.step_batch_size_schedule=0:2"
SAMPLES = (
    f"{STEPS} megatron.train_iters=null megatron.lr_warmup_iters=0 megatron.train_samples=40 "
    "megatron.lr_warmup_samples=4"
)
LEARNED = "megatron.position_embedding_type=learned_absolute"
REFUSED = {
    "megatron.rampup_batch_size=[2,2,8]": "rampup_batch_size: [2, 2, 8]: Megatron 0.19 does not re",
    STEPS: "train_iters: 20 beside step_batch_size_schedule, '0:2': an iteration has no fixed ",
    f"{SAMPLES} megatron.lr_decay_iters=9": "lr_decay_iters: 9 beside step_batch_size_schedule",
    f"{SAMPLES} megatron.lr_warmup_iters=2": "lr_warmup_iters: 2 beside step_batch_size_schedule",
    f"{SAMPLES} megatron.lr_wsd_decay_iters=2": "lr_wsd_decay_iters: 2 beside step_batch_size_sch",
    "megatron.seq_length=0": "seq_length: 0: must be at least 1",
    "megatron.num_layers=0": "num_layers: 0: must be at least 1",
    "megatron.num_attention_heads=-4": "num_attention_heads: -4: must be at least 1",
    "megatron.use_flash_attn=true": "use_flash_attn: True: Megatron 0.19 does not read it",
    "megatron.apply_residual_connection_post_layernorm=true": "apply_residual_connection_post_lay",
    "megatron.swiglu=false megatron.openai_gelu=true": "openai_gelu: True: Megatron 0.19 does not",
    "megatron.head_lr_mult=10": "head_lr_mult: 10.0: Megatron 0.19 does not read it; leave it out",
    "megatron.window_attn_skip_freq=2": "window_attn_skip_freq: 2: give the windows of layers in",
    "megatron.inprocess_restart=true": "inprocess_restart: True: this launcher does not restart",
    "megatron.rerun_mode=report_stats": "rerun_mode: 'report_stats': Megatron 0.19 offers this va",
    f"{LEARNED} megatron.rotary_base=500000": "rotary_base: 500000 would not be read: position_em",
    f"{LEARNED} megatron.rotary_percent=0.5": "rotary_percent: 0.5 would not be read",
    f"{LEARNED} megatron.use_rope_scaling=true": "use_rope_scaling: True would not be read",
    "megatron.rope_scaling_factor=32": "rope_scaling_factor: 32.0 would not be read: use_rope_scal",
    "megatron.rotary_scaling_factor=4": "rotary_scaling_factor: 4.0 would not be read: position_em",
    "megatron.yarn_beta_fast=16": "yarn_beta_fast: 16.0 would not be read: position_embedding_type",
    "megatron.calc_ft_timeouts=true": "calc_ft_timeouts: True would not be read: enable_ft_package",
    "megatron.group_query_attention=false": "num_query_groups: 2 would not be read: group_query_a",
    "megatron.num_experts=4 megatron.moe_router_topk=5": "moe_router_topk: 5: is more than num_exp",
    "megatron.num_experts=4 megatron.moe_layer_freq='[0,1]'": "moe_layer_freq: [0, 1]: a list has",
    "megatron.seed=0": "seed: 0: must be at least 1",
    "megatron.num_experts=4 megatron.tensor_model_parallel_size=2": "num_experts: 4: experts under",
    "megatron.init_model_with_meta_device=true": "init_model_with_meta_device: True: without FSDP",
    "megatron.apply_layernorm_1p=true": "layernorm_zero_centered_gamma: True: needs Transformer En",
    f"{STAGES}=3": "global_batch_size: 3: 3 micro-batches a rank, and virtual pipeline stages take",
    f"{STAGES}=1": "global_batch_size: 1: 1 micro-batches a rank, and virtual pipeline stages take",
    f"{STAGES}=4 megatron.eval_iters=1 megatron.eval_global_batch_size=1": "eval_global_batch_size",
    f"{STAGES}=4 megatron.microbatch_group_size_per_vp_stage=1": "global_batch_size: 4: 4 micro-ba",
    "megatron.yaml_cfg=x.yaml": "yaml_cfg: 'x.yaml': is another file of Megatron's options",
    "megatron.tensorboard_log_interval=0": "tensorboard_log_interval: 0: must be at least 1",
    "megatron.save=x megatron.save_interval=1 megatron.ckpt_format=torch": "ckpt_format=torch is a",
    "megatron.phase_transition_iterations=2": "phase_transition_iterations: '2': Megatron counts p",
}
TAKEN = [
    SAMPLES,
    "megatron.group_query_attention=false megatron.num_query_groups=4",
    f"{STAGES}=4 megatron.eval_iters=1",
    f"{STAGES}=5 megatron.microbatch_group_size_per_vp_stage=3",
    f"{STAGES}=4 megatron.eval_global_batch_size=1",
    "megatron.position_embedding_type=yarn megatron.rotary_scaling_factor=4",
    "megatron.use_rope_scaling=true megatron.rope_scaling_factor=32 megatron.rotary_base=500000",
    "megatron.num_experts=4 megatron.tensor_model_parallel_size=2 megatron.sequence_parallel=true",
]


@pytest.fixture(scope="module")
def said():
    cases = {case: case.split() for case in (*REFUSED, *TAKEN)}
    return call("model_cases", "refusals", json.dumps(cases))


@pytest.mark.parametrize("case", REFUSED)
def test_option_that_would_make_another_run_is_refused(said, case):
    """Each of these trained, and left out what was asked for, or ended in its first step."""
    status, _, err = said[case]
    assert status == 2 and f"this run cannot start:\nmegatron.{REFUSED[case]}" in err


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_read_is_taken(said, case):
    assert said[case][0] == 0, said[case][2]


@pytest.mark.parametrize("length", [{}, {"train_iters": 7}, {"train_samples": 9}], ids=str)
def test_run_that_only_evaluates_needs_no_length(length):
    """Megatron's TypeError came after the model was built: None * global_batch_size."""
    none = {"train_iters": None, "train_samples": None}
    args = SimpleNamespace(skip_train=True, **none | length)
    check_schedule(args)
    assert vars(args) == {"skip_train": True} | none | (length or {"train_iters": 1})


NOTHING = Backends(cuda=False, transformer_engine=None, te_fails=False, fused_adam=None,
                   gradient_accumulation_fusion=False)  # fmt: skip
NEEDS = {
    "wandb_project": ("run", "the package wandb"),
    "optimizer": ("muon", "the package emerging_optimizers"),
    "enable_ft_package": (True, "the package nvidia_resiliency_ext"),
    "num_distributed_optimizer_instances": (2, "the package einops"),
    "adlr_autoresume": (True, "the package userlib"),
    "tp_comm_overlap": (True, "Transformer Engine"),
    "cpu_offloading_num_layers": (1, "Transformer Engine"),
    "moe_latent_size": (32, "Transformer Engine"),
    "recompute_modules": (["core_attn", "layernorm"], "Transformer Engine"),
    "use_precision_aware_optimizer": (True, "Transformer Engine"),
    "distributed_backend": ("nccl", "a GPU"),
    "record_memory_history": (True, "a GPU"),
    "profile": (True, "a GPU"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_an_option_needs_is_looked_for_before_the_start(monkeypatch, name):
    """Raw errors of Megatron's after the process groups, or after the first step."""
    value, missing = NEEDS[name]
    lookup = "s2megatron.training.machine_checks.importlib.util.find_spec"
    monkeypatch.setattr(lookup, lambda package: None)
    args = SimpleNamespace(
        **dict.fromkeys(NEEDS, None) | {"optimizer": "adam", "cpu_offloading_num_layers": 0},
        cuda_graph_impl="none", enable_cuda_graph=False, external_cuda_graph=False,
        te_rng_tracker=False, nccl_ub=False, optimizer_cuda_graph=False,
        optimizer_cpu_offload=False, recompute_granularity="selective", use_pytorch_profiler=False,
    )  # fmt: skip
    args.num_distributed_optimizer_instances, args.num_experts = 1, 8
    check_machine(NOTHING, args)
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"^megatron.{name}.*: needs {missing}, which is not"):
        check_machine(NOTHING, args)
    monkeypatch.setattr(lookup, lambda package: package)
    check_machine(replace(NOTHING, cuda=True, transformer_engine="2.20"), args)
