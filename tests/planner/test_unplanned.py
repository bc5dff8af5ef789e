"""A plan names every option of the run file that it leaves out, and what it plans instead."""

import json

import pytest
from in_process import call
from planner_cases import all_arguments

from s2megatron.planner.unplanned import unplanned

MOE = {"num_experts": 8, "expert_model_parallel_size": 4, "moe_token_dispatcher_type": "alltoall"}
NOTED = [
    ({"decoder_first_pipeline_num_layers": 5}, "decoder_first_pipeline_num_layers=5; planned: sta"),
    ({"decoder_last_pipeline_num_layers": 9}, "decoder_last_pipeline_num_layers=9; planned: stage"),
    ({"pipeline_model_parallel_layout": "Et|tL"}, "pipeline_model_parallel_layout=Et|tL; planned"),
    ({"use_megatron_fsdp": True},
     "use_megatron_fsdp=True (data_parallel_sharding_strategy=optim_grads_params); planned: weigh"),
    (MOE | {"expert_tensor_parallel_size": 1},
     "expert_tensor_parallel_size=1; planned: experts over TP 2"),
    (MOE | {"moe_token_dispatcher_type": "allgather"}, "moe_token_dispatcher_type=allgather; plan"),
    ({"moe_layer_recompute": True}, "moe_layer_recompute=True; planned: nothing of the experts"),
    ({"optimizer": "sgd"}, "optimizer=sgd; planned: Adam"),
    ({"use_precision_aware_optimizer": True}, "use_precision_aware_optimizer=True; planned: float"),
    ({"grad_reduce_in_bf16": True, "accumulate_allreduce_grads_in_fp32": False},
     "grad_reduce_in_bf16=True; planned: float32 gradients"),
    ({"accumulate_allreduce_grads_in_fp32": False},
     "accumulate_allreduce_grads_in_fp32=False; planned: float32 gradients"),
    ({"num_distributed_optimizer_instances": 4},
     "num_distributed_optimizer_instances=4; planned: the optimizer's states over all"),
    ({"distribute_saved_activations": True}, "distribute_saved_activations=True; planned: layer"),
    ({"bf16": False}, "bf16=False; planned: the rates of bf16"),
    ({"fp8": "hybrid"}, "fp8=hybrid; planned: rates and memory of bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), NOTED, ids=[said.split("=")[0] for _, said in NOTED])
def test_an_option_that_is_not_planned_is_named_once(changed, said):
    (line,) = unplanned(all_arguments(**changed))
    assert line.startswith(f"not in this plan: megatron.{said}")


@pytest.mark.parametrize(
    "changed",
    [{}, MOE, MOE | {"expert_tensor_parallel_size": None}, {"expert_tensor_parallel_size": 1},
     {"bf16": False, "fp16": True}, {"bf16": False, "fp16": True, "hidden_dropout": 0.0},
     {"cpu_offloading_num_layers": 0}],
    ids=str,
)  # fmt: skip
def test_what_is_planned_needs_no_note(changed):
    assert unplanned(all_arguments(**changed)) == []


def test_the_names_are_megatrons():
    """One that a later Megatron has not would be left out without a word."""
    made_by_megatron = {"virtual_pipeline_model_parallel_size"}
    names = {*vars(all_arguments())} - made_by_megatron
    assert names <= {*call("model_cases", "options_of_megatron")}


def test_the_command_prints_the_notes_of_a_plan_and_of_a_search():
    half = "megatron.bf16=true"
    options = f"{half} megatron.optimizer=sgd megatron.grad_reduce_in_bf16=true"
    cases = [half, options, f"{options} --search", "megatron.bf16=false"]
    for words, (status, out, err) in call("model_cases", "plans_with", json.dumps(cases)).items():
        assert status == 0, err
        notes = [line for line in out.splitlines() if line.startswith("not in this plan: ")]
        assert len(notes) == 2 * ("sgd" in words) + ("bf16=false" in words), out
