"""What describes a model on either side: every field counts, both ways."""

import copy
from argparse import Namespace
from dataclasses import replace

import pytest
import transformers
from convert_models import LLAMA3, MODELS, SMALL

from s2megatron.convert.architectures import (
    ARCHITECTURES,
    choose_architecture,
    from_hugging_face,
    from_megatron,
    to_config,
)
from s2megatron.convert.model import CheckpointModel, differences
from s2megatron.convert.to_hf import _class_names
from s2megatron.errors import ConfigError

PLAIN = CheckpointModel(
    layers=4, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=128,
    tied_embeddings=False, qkv_bias=False, qk_norm=False, norm_eps=1e-5, rope_theta=1e4,
    llama3_factor=None, max_positions=16384,
)  # fmt: skip
EXPERTS = replace(
    PLAIN, ffn=48, experts=4, experts_per_token=2, expert_ffn=48, moe_layers=(True,) * 4
)
DENSE_FIRST = replace(EXPERTS, ffn=96, qk_norm=True, moe_layers=(False, True, True, True))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (PLAIN, "llama"),
        (replace(PLAIN, head_dim=32), "llama"),
        (replace(PLAIN, qkv_bias=True), "qwen2"),
        (replace(PLAIN, qk_norm=True), "qwen3"),
        (EXPERTS, "mixtral"),
        (replace(EXPERTS, qk_norm=True), "qwen3_moe"),
        (DENSE_FIRST, "qwen3_moe"),
        (replace(EXPERTS, qk_norm=True, renormalized_router=False), "qwen3_moe"),
    ],
)
def test_the_plainest_architecture_that_fits(model, name):
    assert choose_architecture(model, None, "checkpoint X") == name
    assert choose_architecture(model, name, "checkpoint X") == name


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (EXPERTS, "llama", "llama: num_experts: it has no experts"),
        (PLAIN, "mixtral", "mixtral: num_experts: it has experts"),
        (PLAIN, "qwen2", "qwen2: add_qkv_bias: it has always QKV biases"),
        (replace(PLAIN, qkv_bias=True), "llama", "llama: add_qkv_bias: it has no QKV biases"),
        (PLAIN, "qwen3", "qwen3: qk_layernorm: it has always q and k norms"),
        (replace(PLAIN, qk_norm=True), "mistral", "qk_layernorm: it has no q and k norms"),
        (replace(PLAIN, qkv_bias=True, head_dim=32), None, "qwen2: kv_channels"),
        (replace(DENSE_FIRST, qk_norm=False), None, "mixtral: moe_layer_freq"),
        (replace(EXPERTS, renormalized_router=False), "mixtral", "moe_router_pre_softmax"),
        (PLAIN, "gpt2", "architecture 'gpt2' is not supported; one of llama, "),
    ],
)
def test_what_an_architecture_has_no_place_for(model, name, reason):
    with pytest.raises(ConfigError, match="checkpoint X: ") as error:
        choose_architecture(model, name, "checkpoint X")
    assert reason in str(error.value)


def written_and_read(model, name):
    config = transformers.AutoConfig.for_model(**to_config(model, name))
    assert type(config).__name__ == type(transformers.CONFIG_MAPPING[name]()).__name__
    return from_hugging_face(config, "config.json")


OTHER_SIZES = dict(
    layers=3, hidden=96, ffn=80, heads=6, kv_heads=3, vocab=100, tied_embeddings=True,
    norm_eps=1e-3, rope_theta=7e5, max_positions=77,
)  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_json_says_all_of_a_model(name):
    """Written and read by transformers: the same description, at sizes that are no defaults."""
    kind = ARCHITECTURES[name]
    fields = OTHER_SIZES | {"qkv_bias": kind.qkv_bias, "qk_norm": kind.qk_norm, "head_dim": 16}
    if name == "llama":
        fields["llama3_factor"] = 5.0
    if kind.head_dim:
        fields["head_dim"] = 24
    if kind.experts:
        fields |= {"experts": 6, "experts_per_token": 3, "expert_ffn": 80}
        fields |= {"moe_layers": (True,) * 3}
    model = replace(PLAIN, **fields)
    assert written_and_read(model, name) == model
    if name == "qwen3_moe":
        for own in (
            {"moe_layers": (True, False, True), "expert_ffn": 32},
            {"renormalized_router": False},
        ):
            assert written_and_read(replace(model, **own), name) == replace(model, **own)


def test_config_json_holds_what_other_readers_look_for():
    config = to_config(replace(DENSE_FIRST, llama3_factor=8.0), "qwen3_moe")
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["hidden_act"] == "silu"
    assert config["moe_intermediate_size"] == 48 and config["intermediate_size"] == 96
    assert config["decoder_sparse_step"] == 1 and config["mlp_only_layers"] == [0]
    assert config["norm_topk_prob"] is True and config["attention_dropout"] == 0.0
    assert config["rope_theta"] == 1e4 and config["rope_scaling"] == LLAMA3 | {"factor": 8.0}
    assert config["attention_bias"] is False and config["use_sliding_window"] is False
    assert to_config(PLAIN, "llama")["rope_scaling"] is None


def hugging_face(name, **changes):
    kind, fields, _ = MODELS[name]
    own = copy.deepcopy(fields)  # transformers writes into nested fields
    return from_hugging_face(kind(**{**SMALL, **own, **changes}), "config.json")


def test_qwen3_moe_layers_without_experts():
    model = hugging_face("qwen3_moe")
    assert model.moe_layers == (False, True, True, True) and model.ffn == 96
    assert (model.experts, model.experts_per_token, model.expert_ffn) == (4, 2, 48)
    assert not model.renormalized_router
    sparse = hugging_face("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=3)
    assert sparse.moe_layers == (False, False, True, False)
    all_of_them = hugging_face("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True)
    assert all_of_them.ffn == 48 and all_of_them.renormalized_router


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("mistral", {"sliding_window": 64}, "sliding_window=64"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window=True"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types=['sliding_attention']: only",
        ),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map={'AutoModel': 'x.Y'}: models with"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config='...': quantized"),
        ("llama", {"vocab_size": 0}, "vocab_size=0: must be a whole number of at least 1"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide num_att"),
    ],
)
def test_fields_without_a_place_in_megatron(name, changes, field):
    with pytest.raises(ConfigError, match=r"config\.json: ") as error:
        hugging_face(name, **changes)
    assert field in str(error.value)


def as_transformers_4_wrote_it(**fields):
    """A Llama's config with `rope_scaling` beside `rope_theta`, read without transformers 5."""
    plain = transformers.LlamaConfig(**SMALL).to_dict()
    plain |= {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}
    return from_hugging_face(Namespace(**plain | fields), "config.json")


def test_rope_as_transformers_4_wrote_it():
    assert as_transformers_4_wrote_it().rope_theta == 5e5
    assert as_transformers_4_wrote_it(rope_scaling={"type": "default"}).llama3_factor is None
    llama3 = {**LLAMA3, "rope_type": "llama3", "factor": 0.5}
    model = as_transformers_4_wrote_it(rope_scaling=llama3)
    assert (model.rope_theta, model.llama3_factor) == (5e5, 0.5)
    assert type(as_transformers_4_wrote_it(head_dim=None).head_dim) is int


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.rope_type='yarn': only 'default' and"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.rope_type='linear': only"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor=2.0: rope of type 'default' has"),
        ({"rope_theta": 0}, "rope_scaling.rope_theta=0: must be a number above 0"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": "8"}},
         "rope_scaling.factor='8': must be a number above 0"),
        ({"rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
         "rope_scaling.low_freq_factor=2.0: Megatron's is fixed at 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1.0 is supported"),
        ({"model_type": "gpt2"}, "model_type='gpt2': not supported; one of llama, mistral"),
    ],
)  # fmt: skip
def test_fields_that_transformers_4_wrote_and_megatron_has_no_place_for(fields, told):
    with pytest.raises(ConfigError, match=r"config\.json: ") as error:
        as_transformers_4_wrote_it(**fields)
    assert told in str(error.value)


ARGS = dict(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, kv_channels=16,
    group_query_attention=True, num_query_groups=2, num_experts=None, moe_ffn_hidden_size=None,
    moe_layer_freq=1, moe_router_topk=2, untie_embeddings_and_output_weights=True,
    layernorm_epsilon=1e-5, rotary_base=10000, max_position_embeddings=16384,
    normalization="RMSNorm", swiglu=True, add_bias_linear=False, position_embedding_type="rope",
)  # fmt: skip


def megatron(**changes):
    return from_megatron(Namespace(**ARGS | changes), "checkpoint X", vocab=128)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"group_query_attention": False}, {"kv_heads": 4}),
        ({"kv_channels": None}, {}),
        ({"kv_channels": 32}, {"head_dim": 32}),
        ({"untie_embeddings_and_output_weights": False}, {"tied_embeddings": True}),
        ({"add_qkv_bias": True}, {"qkv_bias": True}),
        ({"qk_layernorm": True}, {"qk_norm": True}),
        ({"use_rope_scaling": True}, {"llama3_factor": 8.0}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32}, {"llama3_factor": 32.0}),
        ({"rope_scaling_factor": 32}, {}),
        (
            {"num_experts": 4},
            {"experts": 4, "experts_per_token": 2, "expert_ffn": 96, "moe_layers": (True,) * 4},
        ),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_layer_freq": [0, 1, 0, 1],
             "moe_router_pre_softmax": True, "moe_router_topk": 3},
            {"experts": 4, "experts_per_token": 3, "expert_ffn": 48, "renormalized_router": False,
             "moe_layers": (False, True, False, True)},
        ),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_layer_freq": 2},
            {"experts": 4, "experts_per_token": 2, "expert_ffn": 48,
             "moe_layers": (True, False, True, False)},
        ),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 48},
            {"experts": 4, "experts_per_token": 2, "expert_ffn": 48, "ffn": 48,
             "moe_layers": (True,) * 4},
        ),
    ],
)  # fmt: skip
def test_megatrons_arguments_describe_a_model(changes, fields):
    assert megatron(**changes) == replace(PLAIN, **fields)
    assert differences(megatron(**changes), PLAIN) == [
        name for name in CheckpointModel.__dataclass_fields__ if name in fields
    ]


NO_PLACE = {
    "add_bias_linear": True, "normalization": "LayerNorm", "swiglu": False, "squared_relu": True,
    "quick_geglu": True, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0,
    "position_embedding_type": "none", "rotary_percent": 0.5, "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2, "no_rope_freq": 4,
    "layernorm_zero_centered_gamma": True, "apply_layernorm_1p": True,
    "apply_residual_connection_post_layernorm": True, "qk_l2_norm": True,
    "attention_output_gate": True, "softmax_type": "off-by-one", "window_size": (8, 0),
    "multi_latent_attention": True, "experimental_attention_variant": "dsa",
    "linear_attention_freq": 4, "mtp_num_layers": 1, "use_mup": True, "hybrid_layer_pattern": "M*",
    "heterogeneous_layers_config_path": "x.json", "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 16, "moe_apply_probs_on_input": True,
    "moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True, "moe_router_num_groups": 2, "moe_router_group_topk": 1,
    "moe_expert_capacity_factor": 1.0, "moe_mlp_glu_interleave_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PLACE)
def test_options_without_a_place_in_hugging_face(name):
    with pytest.raises(ConfigError, match=f"checkpoint X: megatron.{name}=") as error:
        megatron(**{name: NO_PLACE[name]})
    assert repr(NO_PLACE[name]) in str(error.value)


@pytest.mark.parametrize("config, names", [
    ({}, ["LlamaForCausalLM"]),
    ({"s2": {}}, ["S2LlamaForCausalLM"]),
    ({"s2": {}, "architectures": ["LlamaForCausalLM"]}, ["S2LlamaForCausalLM"]),
    ({"s2": {}, "architectures": ["S2LlamaForCausalLM"]}, ["S2LlamaForCausalLM"]),
    ({"architectures": ["S2LlamaForCausalLM"]}, ["LlamaForCausalLM"]),
])  # fmt: skip
def test_a_sparse_model_has_a_name_that_only_s2_servers_know(config, names):
    """Also one that goes on from a folder with the name, dense or sparse."""
    assert _class_names(config, "LlamaForCausalLM") == names


@pytest.mark.parametrize("value", ["sinkhorn", "quantile_balancing", ["aux_loss", "sinkhorn"]])
def test_routers_that_choose_other_experts_than_hugging_face(value):
    options = {"moe_router_load_balancing_type": value}
    with pytest.raises(ConfigError, match="router_load_balancing_type="):
        megatron(num_experts=4, **options)
    megatron(**options)  # without experts nothing is routed
    megatron(num_experts=4, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"])
