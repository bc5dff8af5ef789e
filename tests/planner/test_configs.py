"""The shipped run files fit the GPUs that their comments name, by the planner; no Megatron."""

import re
from types import SimpleNamespace

import pytest
from launches import ROOT
from planner_cases import PLAIN

from s2megatron.accounting import ModelShape
from s2megatron.config import load_config
from s2megatron.planner import memory
from s2megatron.planner.constants import load_machine
from s2megatron.planner.layout import Layout, Model, layout_of
from s2megatron.planner.step import plan

CONFIGS = sorted((ROOT / "configs").glob("llama_*.yaml"))
MEGATRONS = {
    "sequence_parallel": False, "recompute_granularity": None, "recompute_modules": None,
    "context_parallel_size": 1, "cp_comm_type": ["p2p"], "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None, "expert_model_parallel_size": 1,
    "transformer_impl": "transformer_engine", "gradient_accumulation_fusion": False,
    "tensor_model_parallel_size": 1, "fp16": False,
}  # fmt: skip


def read(path, gpus: int) -> tuple[Model, Layout]:
    """What `read_run` makes of a run file through Megatron, from its options alone."""
    run = load_config(path)
    options = MEGATRONS | run.megatron
    heads, layers = options["num_attention_heads"], options["num_layers"]
    groups = options.get("num_query_groups", heads)
    shape = ModelShape(**PLAIN | {
        "layers": layers, "hidden": options["hidden_size"], "ffn": options["ffn_hidden_size"],
        "heads": heads, "kv_heads": groups, "head_dim": options["hidden_size"] // heads,
        "vocab": options["vocab_size"], "seq_len": options["seq_length"],
        "moe_layers": (False,) * layers,
    })  # fmt: skip
    if chunk := options.get("num_layers_per_virtual_pipeline_stage"):
        stage = layers // options["pipeline_model_parallel_size"]
        options["virtual_pipeline_model_parallel_size"] = stage // chunk
    patterns = run.sparsity.resolve(num_layers=layers, heads=heads, kv_heads=groups)
    return Model(shape, patterns), layout_of(SimpleNamespace(**options), gpus)


def about(path) -> str:
    """The comment at the top, as one line."""
    lines = path.read_text().split("sparsity:")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_run_file_fits_the_gpus_it_is_laid_out_for(path):
    gpus, size, sizes = re.search(
        r"[Ll]aid out for (\d+) GPUs of (\d+) GB: (.*?)[;.] ", about(path)
    ).groups()
    machine = load_machine({"80": "h100", "141": "h200"}[size])
    model, layout = read(path, int(gpus))
    assert layout.misfit(model) == ""
    stated = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", sizes)}
    found = {"TP": layout.tp, "CP": layout.cp, "PP": layout.pp, "DP": layout.dp}
    assert stated == {name: n for name, n in found.items() if name in stated}
    assert all(n == 1 for name, n in found.items() if name not in stated)
    assert layout.sequence_parallel == ("+ SP" in sizes)
    result = plan(machine, model, layout)
    assert result.fits, f"{result.memory.total / 2**30:.1f} GiB"


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.endswith("_cp")], ids=lambda path: path.stem
)
def test_memory_in_a_run_files_comment_is_the_planners(path):
    text = about(path)
    gpus, gpu = re.search(r"--gpus (\d+) --gpu (\w+)", text).groups()
    assert f"plan configs/{path.name} " in text
    model, layout = read(path, int(gpus))
    assert layout.cp > 1
    held = memory.peak(model, layout)
    stated = dict(re.findall(r"(weights|gradients|Adam|activations|logits) ([\d.]+)", text))
    whole, of = re.search(r"in all ([\d.]+) of (\d+)", text).groups()
    assert int(of) == load_machine(gpu).memory_gib
    for name, gib in {**stated, "total": whole}.items():
        found = getattr(held, {"Adam": "optimizer"}.get(name, name)) / 2**30
        assert f"{found:.1f}" == gib, name
    assert len(stated) >= 4
