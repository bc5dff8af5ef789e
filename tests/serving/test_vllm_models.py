"""vLLM on the CPU: every architecture that `convert to-hf` writes, and what is refused by name."""

import json

import pytest
import torch
from convert_models import MODELS
from safetensors.torch import save_file
from vllm_cases import (
    change_config,
    chosen_tokens,
    environment,
    make_folder,
    random_tokens,
    serve,
)

import s2megatron.hf as s2hf

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSITY = {"block_size": 16, "default": {"local_blocks": 2, "stride": 4}}
# Both KV heads keep the same blocks, and have page tables of their own all the same: one launch.
EQUAL_HEADS = {"block_size": 16, "default": {"local_blocks": 2, "stride": 4, "homogeneous": True}}
# The two heads of the dense layer share a page table, and lie in two tensors: two launches.
ONE_DENSE = {**SPARSITY, "layers": [{"layers": [1], "kind": "dense"}]}
SPARSITIES = {"qwen2": EQUAL_HEADS, "qwen3": ONE_DENSE}
MODEL_LEN = dict(max_model_len=256)
OTHERS = [name for name in MODELS if name != "llama"]  # which test_vllm.py serves at length
PROMPTS = random_tokens(130, 21)
NEW = 24


def changed_record(change):
    """From config.json, the field that holds its record, changed by `change(groups)`."""
    return lambda config: {"s2": config["s2"] | {"groups": change(config["s2"]["groups"])}}


def first_is(**fields):
    return changed_record(lambda groups: [groups[0] | fields, *groups[1:]])


def two_block_sizes(config):
    (group,) = config["s2"]["groups"]
    halves = [group | {"layers": [1, 2]}, group | {"layers": [3, 4], "block_size": 32}]
    return {"s2": config["s2"] | {"groups": halves}}


# name -> (config.json's changes, options, what the one line says)
REFUSED = {
    "layers": (first_is(layers=[1, 2, 3]), {}, "patterns of 3 layers, num_hidden_layers=4"),
    "heads": (first_is(heads=8), {}, "layer 1 is for 8 heads and 2 KV heads, the model has 4 and"),
    "block_sizes": (two_block_sizes, {}, "layer 3 has blocks of 32 tokens, layer 1 of 16"),
    "newer_record": (lambda c: {"s2": c["s2"] | {"version": 9}}, {}, "version 9: this one reads 1"),
    "damaged": (lambda c: {"s2": 7}, {}, "config.json: s2: s2_sparsity version None"),
    "window": (lambda c: {"sliding_window": 64}, {}, "sliding_window=64: not supported"),
    "architecture": (lambda c: {"architectures": ["OlmoForCausalLM"]}, {},
                     "OlmoForCausalLM with an 's2' key is not supported; one of Llama"),
    "block_size": (None, dict(block_size=32), "--block-size 32: a page holds one block of the"),
    "tp": (None, dict(tensor_parallel_size=3, distributed_executor_backend="mp"),
           "--tensor-parallel-size 3: 4 heads and 2 KV heads cannot be split over it; sizes that "
           "work: 1, 2, 4"),
    "pp": (None, dict(pipeline_parallel_size=2, distributed_executor_backend="mp"),
           "--pipeline-parallel-size: not supported"),
    "fp8": (None, dict(kv_cache_dtype="fp8"), "--kv-cache-dtype fp8: not supported"),
    "drafts": (None, dict(speculative_config=dict(method="ngram", num_speculative_tokens=2,
                                                  prompt_lookup_max=3)),
               "--speculative-config: not supported"),
    "transfer": (None, dict(kv_transfer_config=dict(kv_connector="ExampleConnector",
                                                    kv_role="kv_both")),
                 "--kv-transfer-config: not supported"),
    "hybrid": (None, dict(disable_hybrid_kv_cache_manager=True),
               "--disable-hybrid-kv-cache-manager: not supported"),
    "backend": (None, dict(attention_backend="FLASH_ATTN"),
                "--attention-backend FLASH_ATTN: not supported"),
    "transformers": (None, dict(model_impl="transformers"), "--model-impl transformers: not"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    environment(tmp_path_factory.mktemp("skipped"))
    places = {name: tmp_path_factory.mktemp(name) for name in OTHERS}
    # vLLM's CPU kernel takes experts in tiles of 32, gate and up by turns
    sizes = {"qwen3_moe": dict(moe_intermediate_size=64)}
    made = {
        name: make_folder(name, place, SPARSITIES.get(name, SPARSITY), **sizes.get(name, {}))
        for name, place in places.items()
    }
    for folder in made.values():
        change_config(folder, architectures=stock_names(folder))
    return made


def stock_names(folder):
    """As in folders converted before the names said S2; test_vllm.py has new ones."""
    names = json.loads((folder / "config.json").read_text())["architectures"]
    return [name.removeprefix("S2") for name in names]


@pytest.fixture(scope="module")
def adapted(folders, tmp_path_factory):
    """A LoRA adapter of the Mistral, and the model with its weights added."""
    adapter, whole = (tmp_path_factory.mktemp(name) for name in ("adapter", "whole"))
    config = dict(peft_type="LORA", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                  bias="none", task_type="CAUSAL_LM")  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model, tensors = s2hf.load(folders["mistral"]), {}
    random = torch.Generator().manual_seed(5)
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            a = torch.randn(8, layer.in_features, generator=random) / 8
            b = torch.randn(layer.out_features, 8, generator=random) / 8
            tensors |= {
                f"base_model.model.{name}.lora_{x}.weight": t
                for x, t in zip("AB", (a, b), strict=True)
            }
            layer.weight.data += 2 * b @ a
    save_file(tensors, adapter / "adapter_model.safetensors")
    model.save_pretrained(whole)
    return adapter, whole


@pytest.fixture(scope="module")
def reports(folders, adapted, tmp_path_factory):
    """Every model served, `folders["mistral"]` without its `s2` key as well, and every refusal."""
    rounds = [dict(prompts=PROMPTS, max_tokens=NEW)]
    options = dict(num_gpu_blocks_override=400, **MODEL_LEN)
    jobs = {
        name: dict(folder=str(folder), options=options, rounds=rounds)
        for name, folder in folders.items()
    }
    jobs["qwen3"]["graphs"] = True
    own = dict(prompts=PROMPTS, max_tokens=NEW)
    jobs["mistral"]["rounds"] = [own, own | dict(adapter=str(adapted[0])), own]
    jobs["mistral"]["options"] = options | dict(enable_lora=True, max_lora_rank=8)
    whole = json.loads((folders["mistral"] / "config.json").read_text())
    for name, (change, options, _) in REFUSED.items():
        folder = copy_of(folders["mistral"], tmp_path_factory.mktemp(name))
        change_config(folder, **(change(whole) if change else {}))
        jobs[name] = dict(folder=str(folder), options=MODEL_LEN | options)
    right = dict(folder=str(folders["mistral"]), options=dict(block_size=16, **MODEL_LEN))
    plain = copy_of(folders["mistral"], tmp_path_factory.mktemp("plain"))
    (plain / "config.json").write_text(json.dumps({k: whole[k] for k in whole if k != "s2"}))
    stock = copy_of(folders["mistral"], tmp_path_factory.mktemp("stock"))
    change_config(stock, architectures=["S2MistralForCausalLM"])
    stock = dict(folder=str(stock), options=MODEL_LEN)
    jobs |= {
        "named": stock,
        "right_block_size": right,
        "plain": dict(folder=str(plain), options=dict(block_size=32, **MODEL_LEN)),
        "without_plugin": stock | dict(without_plugin=True),
    }
    return dict(zip(jobs, serve(list(jobs.values()), tmp_path_factory.mktemp("served")),
                    strict=True))  # fmt: skip


def copy_of(folder, place):
    for file in folder.iterdir():
        if file.name != "config.json":
            (place / file.name).symlink_to(file)
    (place / "config.json").write_text((folder / "config.json").read_text())
    return place


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_gives_the_tokens_of_transformers(name, folders, reports):
    report = reports[name]
    assert report["model"].startswith("S2"), report
    tokens = report["rounds"][0]["tokens"]
    assert [len(new) for new in tokens] == [NEW] * len(PROMPTS)
    assert tokens == chosen_tokens(folders[name], PROMPTS, tokens)
    assert report["rounds"][0]["free_after"] == 399
    assert report["layers_of_groups"] == ([2, 2, 1, 2, 1] if name == "qwen3" else [4, 4])


def test_heads_in_several_tensors_take_a_launch_each(reports):
    """The groups of a dense layer's heads; in a CUDA graph, too (vllm_graphs.py)."""
    graphs = reports["qwen3"]["graphs"]
    assert graphs["pools"] == [2, 1, 1, 1] and all(graphs["replayed"])


def test_an_adapter_gives_the_tokens_of_the_model_with_its_weights(adapted, reports):
    """And what is in the prefix cache with an adapter is not found without."""
    plain, lora, again = (one["tokens"] for one in reports["mistral"]["rounds"])
    assert lora == chosen_tokens(adapted[1], PROMPTS, lora) != plain
    assert again == plain and reports["mistral"]["rounds"][1]["cached"] == [0, 0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(name, reports):
    error = reports[name]["error"]
    (line,) = [line for line in error.splitlines() if REFUSED[name][2] in line] or [error]
    assert REFUSED[name][2] in line


def test_the_pages_size_is_set_or_may_be_given(reports):
    assert reports["right_block_size"] == {
        "architectures": ["S2MistralForCausalLM"], "block_size": 16,
    }  # fmt: skip


def test_the_name_that_is_written_now_is_served_by_the_plugin_alone(reports):
    """A vLLM without it would serve the weights dense, if the name did not stop it."""
    assert reports["named"] == {"architectures": ["S2MistralForCausalLM"], "block_size": 16}
    assert "['S2MistralForCausalLM'] are not supported" in reports["without_plugin"]["error"]


def test_a_folder_without_the_key_is_served_as_vllm_would(reports):
    assert reports["plain"] == {"architectures": ["MistralForCausalLM"], "block_size": 32}
