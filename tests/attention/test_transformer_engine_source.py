"""What we take for granted of Megatron's and Transformer Engine's source, read and not imported.

Transformer Engine needs a GPU's libraries to be imported, and Megatron takes seconds; signatures
need neither. The tests of Transformer Engine run where it is installed; they were written with
2.20.2.
"""

import ast
import importlib.util
from enum import Enum
from pathlib import Path

import pytest
import torch

from s2_kernels.exchange import zigzag


def source(package: str, path: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return ast.parse(Path(spec.submodule_search_locations[0], path).read_text())


def found(tree: ast.AST, name: str):
    """The class or function of this name."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == name)


def parameters(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """Names, and defaults where they have one."""
    given = function.args
    names = [argument.arg for argument in given.args]
    defaults = [None] * (len(names) - len(given.defaults)) + given.defaults
    named = zip((argument.arg for argument in given.kwonlyargs), given.kw_defaults, strict=True)
    return dict(zip(names, defaults, strict=True)) | dict(named)


def keywords(tree: ast.AST, called: str) -> set[str]:
    """The keywords of the calls of this name; "x.y" by its end."""
    return {
        keyword.arg
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(called)
        for keyword in call.keywords
        if keyword.arg
    }


def constants(tree: ast.AST) -> set:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


@pytest.fixture(scope="module")
def adapter():
    """Megatron's class between its layers and Transformer Engine's attention."""
    tree = source("megatron", "core/extensions/transformer_engine.py")
    return found(tree, "TEDotProductAttention")


def test_megatrons_layer_calls_every_core_attention_alike(adapter):
    layer = found(source("megatron", "core/transformer/attention.py"), "Attention")
    built = keywords(found(layer, "__init__"), "submodules.core_attention")
    assert {"config", "layer_number", "cp_comm_type", "pg_collection"} < built
    called = keywords(found(layer, "_run_core_attention"), "(self.core_attention)")
    assert "packed_seq_params" in called
    ours = found(source("s2megatron", "attention/core_attention.py"), "_CausalCoreAttention")
    for kind in (adapter, ours):
        assert built <= set(parameters(found(kind, "__init__"))), kind.name
        assert called <= set(parameters(found(kind, "forward"))), kind.name


def test_a_layer_takes_its_own_cp_comm_type():
    """By its global number, which `build_core_attention` hands on."""
    layer = found(source("megatron", "core/transformer/transformer_layer.py"), "TransformerLayer")
    text = ast.unparse(found(layer, "__init__"))
    assert "config.cp_comm_type[self.layer_number - 1]" in text


def engine(name: str) -> ast.Module:
    return source("transformer_engine", f"pytorch/attention/dot_product_attention/{name}.py")


def test_transformer_engine_takes_what_megatron_gives(adapter):
    kind = found(engine("dot_product_attention"), "DotProductAttention")
    start = found(adapter, "__init__")
    given = keywords(start, "super().__init__") | {
        target.slice.value
        for node in ast.walk(start) if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "extra_kwargs"
    }  # fmt: skip
    assert {"cp_group", "cp_global_ranks", "cp_stream", "cp_comm_type", "tp_group"} < given
    assert given <= set(parameters(found(kind, "__init__")))
    called = {"attn_mask_type", "core_attention_bias_type", "core_attention_bias", "num_splits"}
    assert called <= set(parameters(found(kind, "forward")))


def test_transformer_engine_knows_these_ways_to_exchange():
    run = found(engine("context_parallel"), "attn_forward_func_with_cp")
    assert {"p2p", "all_gather", "a2a", "a2a+p2p"} <= constants(run)
    order = parameters(run)["load_balancing_strategy"]
    assert ast.unparse(order) == "CPLoadBalancingStrategy.DUAL_CHUNK_SWAP"
    heads = found(engine("context_parallel"), "AttnFuncWithCPAndQKVOA2A")
    assert "q.shape[-2] % cp_size == 0 and k.shape[-2] % cp_size == 0" in ast.unparse(heads)


def test_transformer_engine_has_no_plain_attention_under_context_parallelism():
    """`ContextSplit` refuses it, and 32 bits, for which there is nothing else."""
    choice = found(engine("utils"), "get_attention_backend")
    tests = {ast.unparse(node.test): node for node in ast.walk(choice) if isinstance(node, ast.If)}
    off = tests["context_parallel and use_unfused_attention"]
    assert "use_unfused_attention = False" in ast.unparse(off)
    half = [test for test in tests if test.startswith("qkv_dtype not in [torch.bfloat16, torch.fl")]
    assert len(half) >= 3  # FlashAttention 2 and 4, 3, fused
    assert not any("float32" in test for test in half)


@pytest.mark.parametrize("ranks", [2, 3])
def test_transformer_engine_cuts_sequences_as_the_exchange_does(monkeypatch, ranks):
    """Its own cut of a batch, run on the CPU: both take rank r's chunks r and 2c - 1 - r."""
    cut = found(engine("context_parallel"), "get_batch_on_this_cp_rank")
    strategy = Enum("CPLoadBalancingStrategy", ["DUAL_CHUNK_SWAP", "NO_LOAD_BALANCE"])
    names = {"torch": torch, "CPLoadBalancingStrategy": strategy}
    exec(compile(ast.Module([cut], []), cut.name, "exec"), names)
    everything = torch.arange(8 * 2 * ranks)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    for rank, chunks in enumerate(zigzag(ranks, len(everything))):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        ends = torch.tensor([0, len(everything)])
        tokens, *_ = names[cut.name](ends, everything[None], everything[None], everything)
        assert tokens[0].tolist() == [position for chunk in chunks for position in chunk]
