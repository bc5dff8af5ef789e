"""Run files fit the GPUs that their comments name, and pages say what the planner says."""

import re
import sys
from types import SimpleNamespace

import pytest
from launches import ROOT
from planner_cases import PLAIN, make_model

from s2megatron.accounting import ModelShape
from s2megatron.config import load_config
from s2megatron.machine import load_machine
from s2megatron.planner import memory
from s2megatron.planner.layout import GATHER, RING, ULYSSES, Layout, Model, layout_of
from s2megatron.planner.step import plan

sys.path.insert(0, str(ROOT / "scripts/bench"))
import context_table

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


@pytest.mark.parametrize(
    ("name", "tokens", "gpus"), [("7B", 2**20, 8), ("70B", 2**20, 64)], ids=str
)
def test_the_documented_table_is_the_planners(name, tokens, gpus):
    """docs/scaling.md and scaling-context.md, made again: one row of each model."""
    config = dict(context_table.MODELS)[name]
    model, base = read(ROOT / "configs" / f"{config}.yaml", 8)
    machine = load_machine("h200")
    plans = context_table.best_plans(machine, model, base, tokens, gpus)
    row = context_table.summary_row(tokens, gpus, plans)
    assert row in (ROOT / "docs/scaling.md").read_text().splitlines(), row
    whole = (ROOT / "docs/scaling-context.md").read_text().splitlines()
    peak = max(machine.matmul_tflops.values())
    for line in (row, *context_table.layout_rows(tokens, gpus, plans, peak)):
        assert line in whole, line


PREDICTED = re.compile(r"\| (H\d00) \| (\d+)([kM]) \|(.*)\|$")


def test_what_is_to_be_measured_is_written_down_before():
    """The four-GPU predictions of docs/scaling.md: ms and GiB, by the planner of today."""
    rows = [PREDICTED.match(line) for line in (ROOT / "docs/scaling.md").read_text().splitlines()]
    found = [row.groups() for row in rows if row]
    assert len(found) == 4
    tp = {"tp": 4, "sequence_parallel": True}
    columns = [(0, {"cp": 4}), (0, tp), *((24, {"cp": 4, "cp_comm": way}) for way in
               (RING, GATHER, ULYSSES)), (24, tp)]  # fmt: skip
    for gpu, number, unit, cells in found:
        tokens = int(number) * {"k": 2**10, "M": 2**20}[unit]
        for cell, (dense_layers, sizes) in zip(cells.split("|"), columns, strict=True):
            if not cell.strip():
                continue
            layout = Layout(gpus=4, recompute="full", overlap_grad_reduce=True,
                            overlap_param_gather=True, **sizes)  # fmt: skip
            model = make_model(seq_len=tokens, dense_layers=dense_layers)
            result = plan(load_machine(gpu.lower()), model, layout)
            expected = f"{result.seconds * 1e3:,.0f} ({result.memory.total / 2**30:.1f})"
            assert cell.strip() == expected and result.fits
