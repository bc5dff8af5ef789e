"""Tiny random Hugging Face models of every architecture, and the run files that train them."""

import copy

import torch
import transformers
from launches import TINY

SEQ = 128
S2 = {
    "block_size": 16,
    "default": {"local_blocks": 2, "stride": 4},
    "layers": [
        {"layers": [1], "kind": "dense"},
        {"layers": [3], "stride": [2, 4]},
        {"layers": [4], "ranges": [{"reach": 2, "stride": 1}, {"reach": 4, "stride": 2}]},
    ],
}
DENSE = {"block_size": 16, "default": {"kind": "dense"}}

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=16384,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> (config class, its own fields, the run file's own `megatron:` options)
MODELS = {
    "llama": (
        transformers.LlamaConfig,
        dict(head_dim=32, rope_theta=10000.0, rope_scaling=LLAMA3, rms_norm_eps=1e-6),
        dict(kv_channels=32, use_rope_scaling=True, rope_scaling_factor=32.0, norm_epsilon=1e-6),
    ),
    "mistral": (
        transformers.MistralConfig,
        dict(sliding_window=None, rope_theta=1e6, vocab_size=257),
        dict(rotary_base=1000000),
    ),
    "qwen2": (
        transformers.Qwen2Config,
        dict(tie_word_embeddings=True, vocab_size=257),
        dict(add_qkv_bias=True, untie_embeddings_and_output_weights=False),
    ),
    "qwen3": (
        transformers.Qwen3Config,
        dict(head_dim=32),
        dict(kv_channels=32, qk_layernorm=True),
    ),
    "mixtral": (
        transformers.MixtralConfig,
        dict(num_local_experts=4, num_experts_per_tok=2, rope_theta=10000.0),
        dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=96),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=False,
             head_dim=16, mlp_only_layers=[0]),
        dict(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48, qk_layernorm=True,
             moe_router_pre_softmax=True, moe_layer_freq="([0]+[1]*3)"),
    ),
}  # fmt: skip


def make_model(name: str, folder, dtype=torch.float32, **changes) -> transformers.PreTrainedModel:
    """A random model, no weight of which is 0 or 1, saved by transformers itself."""
    kind, fields, _ = MODELS[name]
    torch.manual_seed(1)
    config = kind(**{**SMALL, **copy.deepcopy(fields), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="150KB")
    return model


def run_tree(name: str, sparsity: dict) -> dict:
    """The run file of a model."""
    _, fields, options = MODELS[name]
    megatron = {
        **TINY["megatron"],
        "max_position_embeddings": SMALL["max_position_embeddings"],
        "norm_epsilon": SMALL["rms_norm_eps"],
        "tokenizer_type": "NullTokenizer",
        "vocab_size": fields.get("vocab_size", SMALL["vocab_size"]),
        **options,
    }
    return {
        "sparsity": sparsity,
        "megatron": megatron,
        "data": {"mock": True, "tokenizer": "megatron"},
    }


def tokens(vocab: int = 128) -> torch.Tensor:
    """[2, SEQ]"""
    return torch.randint(0, vocab, (2, SEQ), generator=torch.Generator().manual_seed(5))
