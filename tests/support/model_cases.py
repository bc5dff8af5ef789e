"""Cases that need Megatron's CPU runtime; each function runs in an interpreter of its own."""

import copy
import os
import tempfile
from pathlib import Path

from in_process import build_model, forget_megatron, run_command_line
from launches import TINY, write_run_file

from s2megatron.planner.layout import Layout
from s2megatron.planner.memory import stage_parameters

MOCK = TINY | {"data": {"mock": True}}


def _run_file(tree) -> str:
    return str(write_run_file(Path(tempfile.mkdtemp()) / "run.yaml", tree))


def _said(function, *arguments) -> str:
    """'' or 'ErrorType: message'."""
    try:
        function(*arguments)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(cases: str) -> dict:
    """Each case's command line, launch-free: [status, stdout, stderr].

    NAME=VALUE in capitals is of the environment, what else stands there an override.
    """
    import json
    from unittest import mock

    from s2megatron import pretrain

    config, results = _run_file(MOCK), {}
    for name, words in json.loads(cases).items():
        variables = dict(word.split("=", 1) for word in words if word[0].isupper())
        overrides = [word for word in words if not word[0].isupper()]
        argv = ["--config", config, "--dry-run", *overrides]
        with mock.patch.dict(os.environ, variables):
            status, out, err = run_command_line(pretrain.main, argv)
        results[name] = [status, out, err]
        forget_megatron()
    return results


def options_refused() -> dict:
    """Options set on Megatron's model configuration itself, as the stock route could."""
    import dataclasses

    from megatron.core.transformer.enums import AttnBackend, CudaGraphModule

    from s2megatron.attention.checks import check_model_options
    from s2megatron.layer_spec import s2_layer_spec
    from s2megatron.training.prepare import prepare

    ready = prepare(_run_file(MOCK), [], writers=False)
    sound = ready.model_config.transformer
    assert dataclasses.is_dataclass(sound)
    sound.kv_channels = 32

    def check(config, on_gpu=True):
        return _said(lambda: check_model_options(config, ready.patterns, on_gpu=on_gpu))

    results = {"sound": check(sound)}
    results["sound_on_cpu"] = check(sound, on_gpu=False)
    changes = {
        "kv_channels": 24,
        "mtp_num_layers": 1,
        "attention_backend": AttnBackend.local,
        "flash_decode": True,
        "multi_latent_attention": True,
        "softmax_type": "learnable",
        "window_size": (8, 0),
        "qk_clip": True,
        "log_max_attention_logit": True,
        "apply_query_key_layer_scaling": True,
        "use_kitchen_attention": True,
        "heterogeneous_block_specs": True,
        "attention_dropout": 0.1,
        "experimental_attention_variant": "dsa",
        "cuda_graph_impl": "full_iteration",
        "transformer_impl": "inference_optimized",
    }
    for name, value in changes.items():
        config = copy.copy(sound)
        setattr(config, name, value)
        results[name] = check(config)
    graphs = copy.copy(sound)
    graphs.cuda_graph_impl, graphs.context_parallel_size = "transformer_engine", 2
    for name, modules in (("attn", ["attn", "mlp"]), ("layers", []), ("mlp", ["mlp"])):
        graphs.cuda_graph_modules = [CudaGraphModule[module] for module in modules]
        results[f"graphs_of_{name}"] = check(graphs)
    broken = Path(tempfile.mkdtemp()) / "run.yaml"
    broken.write_text("sparsity: {default: [")
    os.environ["S2MEGATRON_CONFIG"] = str(broken)
    results["broken_run_file"] = _said(s2_layer_spec, ready.model_config)
    return results


STOCK = {
    "packed": dict(
        dataloader_inter_document_masking=True, pipeline_model_parallel_size=2, micro_batch_size=2
    ),
    "mask": dict(reset_attention_mask=True),
    "fp8": dict(fp8="hybrid", fp8_recipe="tensorwise"),
    "fp4": dict(fp4="e2m1"),
    "precision": dict(te_precision_config_file="recipes.yaml"),
    "fp8_recipe": dict(
        fp8="hybrid", fp8_recipe="delayed", save="x", transformer_impl="transformer_engine"
    ),
    "hybrid": dict(hybrid_layer_pattern="M*"),
    "heterogeneous": dict(heterogeneous_layers_config_path="x.json"),
    "optimizer": dict(optimizer="sgd", save="x", use_distributed_optimizer=True),
    "graphs": dict(cuda_graph_impl="local"),
}
"""Of Megatron's arguments; each of these trained, and left out what was asked for."""


def refused_by_the_stock_route() -> dict:
    """What `--spec` says of Megatron's arguments, and of its model configuration."""
    from unittest import mock

    from megatron.training import global_vars

    from s2megatron.layer_spec import s2_layer_spec
    from s2megatron.training.prepare import prepare

    ready = prepare(_run_file(MOCK), [], writers=False)
    expands = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    os.environ.pop("NCCL_GRAPH_REGISTER", None)
    os.environ["S2MEGATRON_CONFIG"] = _run_file(MOCK)

    def said(args) -> str:
        with (
            mock.patch.object(global_vars, "_GLOBAL_ARGS", args),
            mock.patch.dict(os.environ, expands),
            mock.patch("s2megatron.layer_spec.layer_spec"),  # asks for process groups
        ):
            return _said(s2_layer_spec, ready.model_config)

    del ready.args.s2_data
    results = {"sound": said(ready.args), "documents": getattr(ready.args, "s2_data", None)}
    for name, changes in STOCK.items():
        args = copy.copy(ready.args)
        vars(args).update(changes)
        results[name] = said(args)
    for name in ("use_transformer_engine_op_fuser", "use_grouped_gemm_for_dense_mlp"):
        with mock.patch.object(ready.model_config.transformer, name, True):
            results[name] = said(ready.args)
    with mock.patch.object(ready.model_config, "restore_modelopt_state", True):
        results["restore_modelopt_state"] = said(ready.args)
    return results


def built_model() -> dict:
    """What the check says of a built model, sound and tampered with."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from s2megatron.attention.checks import check_built_model
    from s2megatron.attention.core_attention import S2CoreAttention
    from s2megatron.context_split import ContextSplit

    ready, models = build_model(_run_file(MOCK))
    config = ready.model_config.transformer

    def check(patterns=ready.patterns):
        split = ContextSplit.from_options(vars(ready.args))
        return _said(check_built_model, models, patterns, split)

    layers = {m.layer_number: m for m in models[0].modules() if isinstance(m, SelfAttention)}
    kinds = [type(layers[n].core_attention).__name__ for n in (1, 2, 3, 4)]
    results = {"kinds": kinds, "sound": check()}
    results["hooked"] = [name for name, part in models[0].decoder.layers.named_modules()
                         if part._forward_pre_hooks or part._forward_hooks]  # fmt: skip
    results["too_few"] = check(ready.patterns[:3])
    results["too_many"] = check(ready.patterns * 2)

    hidden = torch.randn(128, 1, config.hidden_size)
    results["inference"] = _said(
        lambda: layers[2](hidden, None, inference_context=object(), rotary_pos_emb=None)
    )
    core = layers[2].core_attention
    q, k = torch.randn(128, 1, 4, 16), torch.randn(128, 1, 2, 16)
    results["shape"] = list(core(q, k, k, None).shape)
    results["mask"] = _said(core, q, k, k, torch.ones(1, 1, 128, 128, dtype=torch.bool))
    other_layout = PackedSeqParams(qkv_format="sbhd")
    results["packed"] = _said(lambda: core(q, k, k, None, packed_seq_params=other_layout))
    ends, rows = (torch.tensor(x, dtype=torch.int32) for x in ([0, 60, 120], [0, 64, 128]))
    padded = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=60, max_seqlen_kv=60,
        cu_seqlens_q_padded=rows, cu_seqlens_kv_padded=rows,
    )  # fmt: skip
    q3, k3 = q.flatten(0, 1), k.flatten(0, 1)
    results["padded"] = _said(lambda: core(q3, k3, k3, None, packed_seq_params=padded))
    results["cache"] = _said(core, q[-1:], k, k, None)
    results["state"] = sorted(core.state_dict())
    results["kept"] = [kept_of_projection(core, rotated=rotated) for rotated in (True, False)]

    layers[3].core_attention = DotProductAttention(
        config=config, layer_number=3, attn_mask_type=core_mask(), attention_type="self"
    )
    results["replaced"] = check()
    layers[3].core_attention = S2CoreAttention(
        config=config, layer_number=3, pattern=ready.patterns[0]
    )
    results["other_pattern"] = check()
    return results


def kept_of_projection(core, *, rotated: bool) -> bool:
    """Whether the backward pass keeps the projection that v (q and k unrotated) is a view of."""
    import torch

    projection = torch.randn(128, 1, 8 * 16, requires_grad=True)
    mixed = (projection * 1).view(128, 1, 8, 16)
    q, k, v = mixed.split([4, 2, 2], dim=2)
    if rotated:
        q, k = q * 1, k * 1
    kept = set()

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        core(q, k, v, None)
    assert kept
    return mixed.untyped_storage().data_ptr() in kept


def core_mask():
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType.causal


SHAPES = {
    "swiglu_gqa": {},
    "tied_gelu_layernorm": {
        "swiglu": False,
        "normalization": "LayerNorm",
        "disable_bias_linear": False,
        "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
        "group_query_attention": False,
        "num_query_groups": None,
    },
    "qk_norm_wide_heads": {"qk_layernorm": True, "kv_channels": 24},
    "qkv_bias": {"add_qkv_bias": True},
    "output_gate": {"attention_output_gate": True, "add_qkv_bias": True},
    "moe": {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 80},
    "moe_shared_every_2nd": {
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_layer_freq": 2,
        "moe_shared_expert_intermediate_size": 48,
    },
    "moe_shared_gate": {
        "num_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
        "moe_shared_expert_gate": True,
    },
}


def model_sizes(name: str) -> dict:
    """Parameters and matrix weights of a built model, and what planning.py says of it."""
    tree = MOCK | {"megatron": MOCK["megatron"] | SHAPES[name]}
    ready, models = build_model(_run_file(tree))
    parameters = {n: p for m in models for n, p in m.named_parameters()}
    inputs = ("word_embeddings", "position_embeddings")
    share = {"experts.": 1}
    if ready.shape.experts:
        share["experts."] = ready.shape.experts_per_token / ready.shape.experts
    matrices = 0
    for n, p in parameters.items():
        tied = ready.shape.tied_embeddings and "word_embeddings" in n
        if p.dim() == 2 and (tied or not any(part in n for part in inputs)):
            routed = ".experts." in n and "shared_experts" not in n
            matrices += p.numel() * (share["experts."] if routed else 1)
    layers = {}
    for n, p in parameters.items():
        if ".layers." in n:
            number = int(n.split(".layers.")[1].split(".")[0])
            layers[number] = layers.get(number, 0) + p.numel()
    numbers = range(ready.shape.layers)
    return {
        "built_layers": [layers[n] for n in numbers],
        "planned_layers": [ready.shape.layer_parameters(n) for n in numbers],
        "planned_rank": stage_parameters(ready.shape, Layout(gpus=1), 0),
        "built": sum(p.numel() for p in parameters.values()),
        "planned": ready.shape.parameters(),
        "built_flops": 6 * matrices,
        "planned_flops": ready.shape.matmul_flops_per_token(),
    }


def plan_of_a_batch_schedule() -> list:
    """[status, standard output, errors] of the command."""
    from s2megatron import cli

    batch = ["megatron.global_batch_size=null", "megatron.step_batch_size_schedule=0:2 1280:8",
             "megatron.train_iters=null", "megatron.train_samples=4096",
             "megatron.lr_warmup_iters=0"]  # fmt: skip
    return run_command_line(cli.main, ["plan", _run_file(MOCK), "--gpus", "1", *batch])


def plans_with(cases: str) -> dict:
    """Each case's plan on two GPUs: [status, standard output, errors]. A case is words."""
    import json

    from s2megatron import cli

    config = _run_file(MOCK)
    return {
        words: run_command_line(cli.main, ["plan", config, "--gpus", "2", *words.split()])
        for words in json.loads(cases)
    }


def options_of_megatron() -> list[str]:
    """The names of all its arguments."""
    from s2megatron.training.megatron_options import megatron_parser

    return sorted(action.dest for action in megatron_parser()._actions)


def modules_of_plans() -> dict:
    """Whether a plan is of Transformer Engine's modules, by what the run file says of them."""
    from s2megatron.planner.report import read_run

    names = "local", "transformer_engine"
    said = {"": [], **{name: [f"megatron.transformer_impl={name}"] for name in names}}
    config = _run_file(MOCK)
    return {impl: read_run(config, x, 1, local=False)[1].fused for impl, x in said.items()}


def dry_run_configs() -> dict:
    """Every shipped run file's dry run: [status, stdout, stderr]."""
    from launches import ROOT

    from s2megatron import pretrain

    results = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        extra = ["data.train=[]", "data.valid=[]", "data.mock=true"]
        argv = ["--config", str(path), "--dry-run", *extra]
        results[path.name] = run_command_line(pretrain.main, argv)
        forget_megatron()
    return results
