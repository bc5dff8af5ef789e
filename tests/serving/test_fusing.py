"""Fused steps compute what transformers does, for every kind of model, and leave nothing behind."""

import functools
import inspect
import logging

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as usual

from s2megatron.serving import fusing, recognition
from s2megatron.serving.fusing import Fusion, fusion_of, no_compiler
from s2megatron.serving.projections import moves

SIZE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=128,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2)
MODELS = {
    "Llama": (transformers.LlamaConfig(**SIZE), (2, 2, 2, 5)),
    "Mistral": (transformers.MistralConfig(**SIZE), (2, 2, 2, 5)),
    "Qwen2": (transformers.Qwen2Config(**SIZE), (2, 2, 2, 5)),
    "Qwen3": (transformers.Qwen3Config(**SIZE), (2, 2, 2, 9)),
    "Mixtral": (transformers.MixtralConfig(**SIZE, **EXPERTS, num_local_experts=4), (2, 2, 0, 5)),
    "Qwen3-MoE": (
        transformers.Qwen3MoeConfig(
            **SIZE, **EXPERTS, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2
        ),
        (2, 2, 1, 9),
    ),
}
"""Configuration; residual sums, rotary embeddings, gated MLPs and norms in it."""
IDS = torch.tensor([[5], [6]])


def test_an_attention_whose_forward_is_decorated_is_recognised():
    """As transformers 5.24 does; unseen, its steps ran with a dozen more kernels a layer."""
    forward = inspect.unwrap(transformers.models.llama.modeling_llama.LlamaAttention.forward)

    @functools.wraps(forward)
    def decorated(*args, **arguments):
        return forward(*args, **arguments)

    assert recognition.rotary_of(decorated) is recognition.rotary_of(forward) is usual


def products(model) -> list[int]:
    """The output sizes of the linear layers that a step computes, in order."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as trace:  # fmt: skip
        model(IDS)
    products = [x for x in trace.events() if x.name in ("aten::mm", "aten::addmm")]
    return [[shape for shape in x.input_shapes if len(shape) == 2][-1][1] for x in products]


def model_of(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_replaced_computes_the_same(name):
    """Traced, but run by PyTorch's own kernels: bit for bit."""
    config, counts = MODELS[name]
    model, other = model_of(config), model_of(config)
    fusion = Fusion(model, backend="eager")
    names = ("residual sums", "rotary embeddings", "gated MLPs", "RMSNorms")
    assert tuple(fusion.counts.get(name, 0) for name in names) == counts
    expected = model(IDS).logits
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with fusion.active():
        assert torch.equal(model(IDS).logits, expected)
        assert not any("forward" in vars(module) for module in other.modules())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > calls
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_compiled_kernels_are_as_close_as_rounding_tells(one_thread):
    """Compiled by inductor: a layer's end, with norms, gated MLP as merged, and both sums in it."""
    model = model_of(MODELS["Llama"][0])
    layer, (residual, attended) = model.model.layers[0], torch.randn(2, 2, 1, 64)
    norm = model.model.layers[1].input_layernorm
    expected = fusing._end(layer, norm, None, residual, attended)
    fusion = Fusion(model)
    weights = fusion._weights(layer.mlp)
    got = fusion._compile(fusing._end)(layer, norm, weights, residual, attended)
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() < 1e-6 * y.abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_q_k_v_are_one_product_and_gate_and_up_are_one(name):
    """Of seven products a layer four are left: q with k and v, o, gate with up, down."""
    model = model_of(MODELS[name][0])
    for bias in (x for key, x in model.named_parameters() if key.endswith("bias")):
        bias.normal_()
    mlps = MODELS[name][1][2]
    expected, fusion = model(IDS).logits, Fusion(model, backend="eager")
    assert fusion.counts["merged projections"] == 2 + mlps
    with fusion.active():
        assert (model(IDS).logits - expected).abs().max() < 1e-6 * expected.abs().max()
        left = products(model)
    if mlps == 2:
        assert left == [128, 64, 192, 64] * 2 + [128]
    else:  # experts are as transformers has them
        assert left.count(128) == 2 + 1 and 32 not in left and 96 not in left


def test_the_weights_are_still_the_model_s_and_not_held_twice():
    model = model_of(MODELS["Qwen2"][0])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    parameters, held = dict(model.named_parameters()), storage_bytes(model)
    fusions = [Fusion(model, backend="eager") for _ in range(2)]
    assert storage_bytes(model) == held
    after = model.state_dict()
    assert [*after] == [*before] and all(torch.equal(after[x], before[x]) for x in before)
    assert all(parameters[name] is x for name, x in model.named_parameters())
    assert all(x.requires_grad and x.is_contiguous() for x in model.parameters())
    attention = model.model.layers[0].self_attn
    for part in ("weight", "bias"):
        own = [getattr(getattr(attention, name), part) for name in ("q_proj", "k_proj", "v_proj")]
        assert len({x.untyped_storage().data_ptr() for x in own}) == 1
        shared = [getattr(x._merged[0], part) for x in fusions]
        assert {x.data_ptr() for x in shared} == {own[0].data_ptr()}
        assert torch.equal(shared[1], torch.cat(own))


def storage_bytes(model) -> int:
    storages = [x.untyped_storage() for x in model.parameters()]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def test_a_model_with_merged_weights_can_be_saved_and_loaded(tmp_path):
    model = model_of(MODELS["Llama"][0])
    Fusion(model, backend="eager")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


def hook(attention):
    attention.k_proj.register_forward_hook(lambda module, inputs, out: out)


def wrap(attention):
    attention.q_proj.forward = attention.q_proj.forward


def adapt(attention):
    attention.v_proj = torch.nn.Sequential(attention.v_proj)


def quantise(attention):
    attention.q_proj.__class__ = type("Linear8bit", (torch.nn.Linear,), {})


def parametrize(attention):
    torch.nn.utils.parametrizations.weight_norm(attention.k_proj)


def tie(attention):
    attention.k_proj.weight = attention.v_proj.weight


def freeze(attention):
    attention.q_proj.weight.requires_grad_(False)


def convert(attention):
    attention.q_proj.double()


def flatten(attention):
    """Parameters as views of somebody's buffer, which merging would take out of it."""
    attention.q_proj.weight.data = torch.zeros(3, 64, 64)[1].copy_(attention.q_proj.weight.data)


@pytest.mark.parametrize(
    "change", [hook, wrap, adapt, quantise, parametrize, tie, freeze, convert, flatten]
)
def test_projections_that_are_not_plain_are_left_alone(change):
    model = model_of(MODELS["Llama"][0])
    change(model.model.layers[0].self_attn)
    held = {x: x.data_ptr() for x in model.model.layers[0].self_attn.parameters()}
    fusion = Fusion(model, backend="eager")
    assert fusion.counts["merged projections"] == 3
    assert all(x.data_ptr() == pointer for x, pointer in held.items())
    if change is not convert:
        with torch.no_grad():
            expected = model(IDS).logits
            with fusion.active():
                assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_projections_of_another_input_compute_their_own():
    model = model_of(MODELS["Llama"][0])
    attention, fusion = model.model.layers[0].self_attn, Fusion(model, backend="eager")
    x, y = torch.randn(2, 2, 1, 64)
    expected = attention.k_proj(y), attention.v_proj(x), attention.v_proj(x)
    with fusion.active():
        attention.q_proj(x)
        got = attention.k_proj(y), attention.v_proj(x), attention.v_proj(x)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_weights_that_are_loaded_later_are_seen(assign, caplog):
    config = MODELS["Llama"][0]
    model, fusion = model_of(config), None
    fusion = Fusion(model, backend="eager")
    with fusion.active():
        old = model(IDS).logits
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(other.state_dict(), assign=assign)
    before = moves(model)
    with caplog.at_level(logging.INFO, "s2megatron"):
        fusion.renew()
    assert ("fused from now on: " in caplog.text) == assign == (moves(model) > before)
    with fusion.active():
        got = model(IDS).logits
    assert torch.equal(got, other(IDS).logits) and not torch.equal(got, old)


@torch.no_grad()
def test_a_model_that_moved_or_was_adapted_since_is_merged_anew():
    model = model_of(MODELS["Llama"][0])
    fusion = Fusion(model, backend="eager")
    model.double()
    adapt(model.model.layers[1].self_attn)
    expected = model(IDS).logits
    fusion.renew()
    assert fusion.counts["merged projections"] == 3
    assert fusion._merged[0].weight.dtype == torch.float64
    with fusion.active():
        assert torch.allclose(model(IDS).logits, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_two_compiled_calls_a_layer_are_left():
    """Rotary embedding, and the layer's end with the next norm; cos and sin and the first norm."""
    calls = []

    def count(graph, inputs):
        return lambda *given: calls.append(graph) or graph.forward(*given)

    model = model_of(MODELS["Llama"][0])
    model.layers = torch.nn.ModuleList()  # somebody's, with nothing in it
    with Fusion(model, backend=count).active():
        model(IDS)
    assert len(calls) == 2 * 2 + 2


@torch.no_grad()
def test_a_rotary_embedding_is_one_call_where_q_and_k_are_treated_alike(one_thread):
    def scaled(q, k, cos, sin):
        q, k = usual(q, k, cos, sin)
        return q, 2 * k

    def heads_later(q, k, cos, sin):
        return usual(q, k, cos, sin, 2)

    def of_one(x, cos, sin):
        return x * cos + x * sin

    known = [recognition.rotates_alike(x) for x in (usual, scaled, heads_later, of_one)]
    assert known == [True, False, False, False]
    projected, tables = torch.randn(2, 1, 10, 16).transpose(1, 2), torch.randn(2, 2, 1, 16)
    q, k = projected[:, :6], projected[:, 6:8]
    got = Fusion(model_of(MODELS["Llama"][0]))._rotary(usual)(q, k, *tables)
    for x, y in zip(got, usual(q, k, *tables), strict=True):
        assert x.shape == y.shape and (x - y).abs().max() < 1e-6 * y.abs().max()


def test_layers_of_another_kind_keep_their_sums():
    """Norms after attention, or a scaled residual: only what is in modules is fused."""
    model = model_of(MODELS["Llama"][0])
    layer = model.model.layers[0]
    assert recognition.is_prenorm(layer)

    class Scaled(type(layer)):
        def forward(self, hidden_states, **options):
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **options)
            hidden_states = hidden_states + 0.5 * attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.__class__ = Scaled
    assert not recognition.is_prenorm(layer)
    assert Fusion(model, backend="eager").counts["residual sums"] == 1


def test_modules_that_something_else_has_replaced_are_left_alone():
    model = model_of(MODELS["Llama"][0])
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    mlp.forward = mlp.forward
    norm.forward = norm.forward
    counts = Fusion(model, backend="eager").counts
    assert (counts["gated MLPs"], counts["RMSNorms"], counts["residual sums"]) == (1, 4, 1)


def test_it_is_said_what_is_fused_or_why_nothing_is(caplog, monkeypatch):
    model = model_of(MODELS["Llama"][0])
    monkeypatch.setattr(fusing, "no_compiler", lambda device: None)
    with caplog.at_level(logging.INFO, "s2megatron"):
        assert fusion_of(model, 2) is fusion_of(model, 2) is not fusion_of(model, 3)
        assert "2 residual sums, 2 rotary embeddings, 2 gated MLPs, 5 RMSNorms" in caplog.text
        assert len(caplog.records) == 2
        monkeypatch.setattr(fusing, "no_compiler", no_compiler)
        compile = torch.compile

        def broken(graph, inputs):
            raise RuntimeError("no C++ compiler was found")

        no_compiler.cache_clear()
        monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend=broken))
        assert fusion_of(model, 2) is None
        assert "are not fused: torch.compile: " in caplog.text and "no C++ compiler" in caplog.text
    no_compiler.cache_clear()
