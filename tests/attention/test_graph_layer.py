"""What Transformer Engine captures of a layer of ours: no mask, neither made nor filled."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.transformer_layer import TransformerLayer

from s2megatron.attention.graph_layer import without_mask

CONFIG = SimpleNamespace(
    context_parallel_size=1, sequence_parallel=False, tensor_model_parallel_size=1, hidden_size=8,
    cuda_graph_modules=[], fine_grained_activation_offloading=False,
)  # fmt: skip


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))
    made = object.__new__(without_mask(TransformerLayer))
    torch.nn.Module.__init__(made)
    made.config, made.self_attention = CONFIG, torch.nn.Identity()
    return made


def test_a_capture_has_hidden_states_alone(layer):
    (name,) = layer.get_layer_static_inputs(16, 2)
    assert name == "hidden_states"
    assert "attention_mask" in TransformerLayer.get_layer_static_inputs(layer, 16, 2)


def test_a_replay_fills_no_mask(layer, monkeypatch):
    for name in ("transformer_engine", "transformer_engine.pytorch"):  # Megatron asks for it there
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(transformer_layer, "is_te_min_version", lambda version: True)
    x = torch.zeros(16, 2, 8)
    args, named = layer._get_te_cuda_graph_replay_args(x, attention_mask=None, rotary_pos_emb=x)
    assert args == (x,) and {*named} == {"rotary_pos_emb", "is_first_microbatch"}
    with pytest.raises(ValueError, match=r"attention_mask: .* takes no mask"):
        layer._get_te_cuda_graph_replay_args(x, attention_mask=torch.zeros(1))


def test_layers_that_share_a_spec_are_changed_once():
    changed = without_mask(TransformerLayer)
    assert without_mask(changed) is changed and issubclass(changed, TransformerLayer)
