"""Fused steps compute what transformers does, for every kind of model, and leave nothing behind."""

import logging

import pytest
import torch
import transformers

from s2megatron.serving import fusing
from s2megatron.serving.fusing import Fusion, fusion_of, no_compiler

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
    """Compiled by inductor: a layer's end, with norm, gated MLP and both sums in it."""
    model = model_of(MODELS["Llama"][0])
    layer, (residual, attended) = model.model.layers[0], torch.randn(2, 2, 1, 64)
    expected = fusing._add_norm_mlp_add(layer, residual, attended)
    got = Fusion(model)._compile(fusing._add_norm_mlp_add)(layer, residual, attended)
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


def test_layers_of_another_kind_keep_their_sums():
    """Norms after attention, or a scaled residual: only what is in modules is fused."""
    model = model_of(MODELS["Llama"][0])
    layer = model.model.layers[0]
    assert fusing._is_prenorm(layer)

    class Scaled(type(layer)):
        def forward(self, hidden_states, **options):
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **options)
            hidden_states = hidden_states + 0.5 * attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    layer.__class__ = Scaled
    assert not fusing._is_prenorm(layer)
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
