"""A small Llama in a GGUF file: it becomes the model that it was."""

import struct
import sys

import numpy
import pytest
import torch
from launches import ROOT
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(ROOT / "scripts/quality"))
import gguf_file
import pretrained

TOKENS = ["<|endoftext|>", "<|im_end|>", *"0123456789", "i", "n", "t", "Ġ", "in", "int"]
TYPES = [3, 3, *[1] * 16]
MERGES = ["i n", "in t"]
PARTS = {name: part for part, name in pretrained.NAMES.items()}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(item) -> bytes:
    """A value of the metadata with its type."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    of, one = (8, text) if isinstance(item[0], str) else (5, lambda i: struct.pack("<i", i))
    return struct.pack("<IIQ", 9, of, len(item)) + b"".join(map(one, item))


def q8_0(weights: numpy.ndarray) -> bytes:
    blocks = weights.reshape(-1, 32)
    scale = (abs(blocks).max(1, keepdims=True) / 127).astype(numpy.float16)
    whole = numpy.round(blocks / scale.astype(numpy.float32)).astype(numpy.int8)
    return b"".join(s.tobytes() + w.tobytes() for s, w in zip(scale, whole, strict=True))


def in_pairs(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of two halves as GGUF orders them: a row of the first, one of the second, and so on."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return numpy.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def write_gguf(path, model: LlamaForCausalLM) -> None:
    """F32 norms, Q8_0 matrices."""
    of = model.config
    fields = {
        "general.architecture": "llama",
        "llama.block_count": of.num_hidden_layers, "llama.context_length": 64,
        "llama.embedding_length": of.hidden_size,
        "llama.feed_forward_length": of.intermediate_size,
        "llama.attention.head_count": of.num_attention_heads,
        "llama.attention.head_count_kv": of.num_key_value_heads,
        "llama.rope.freq_base": 100000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
    }  # fmt: skip
    infos, data = b"", b""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        *layer, part = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        heads = {"self_attn.q_proj": of.num_attention_heads,
                 "self_attn.k_proj": of.num_key_value_heads}.get(part)  # fmt: skip
        if heads:
            array = in_pairs(array, heads)
        known = PARTS.get(part) or PARTS[name.removesuffix(".weight")]
        place = f"blk.{layer[0]}.{known}.weight" if part in PARTS else f"{known}.weight"
        kind, packed = (0, array.tobytes()) if array.ndim == 1 else (8, q8_0(array))
        infos += text(place) + struct.pack("<I", array.ndim)
        infos += struct.pack(f"<{array.ndim}Q", *reversed(array.shape))
        infos += struct.pack("<IQ", kind, len(data))
        data += packed + b"\0" * (-len(packed) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(model.state_dict()) - 1, len(fields))
    head += b"".join(text(name) + value(item) for name, item in fields.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def test_a_model_comes_out_of_its_file(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    write_gguf(tmp_path / "model.gguf", model)
    pretrained.main([str(tmp_path / "model.gguf"), str(tmp_path / "data"), "--positions", "256"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "data/hf", dtype=torch.float32)
    ids = torch.arange(len(TOKENS))[None]
    with torch.no_grad():
        wanted, got = model(ids).logits, found(ids).logits
    assert (wanted - got).abs().max() < 0.03 * wanted.abs().max()  # 8 bits, then bf16
    longer = AutoModelForCausalLM.from_pretrained(tmp_path / "data/hf-32k", dtype=torch.float32)
    assert longer.config.rope_parameters["rope_theta"] == 500000
    assert longer.config.max_position_embeddings == 256
    torch.testing.assert_close(longer.state_dict(), found.state_dict(), rtol=0, atol=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "data/tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("int 12").input_ids)
    assert tokens == ["int", "Ġ", "1", "2"] and tokenizer.eos_token_id == 0


def test_weights_of_four_bits_are_unpacked():
    block = numpy.array([0.5, -2.0], dtype=numpy.float16).tobytes()
    block += bytes(low | (15 - low) << 4 for low in range(16))
    found = gguf_file._q4_1(numpy.frombuffer(block * 2, numpy.uint8).reshape(2, 20))
    first = numpy.arange(16) * 0.5 - 2
    numpy.testing.assert_array_equal(found, [numpy.concatenate([first, first[::-1]])] * 2)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\x05")
    with pytest.raises(ValueError, match="cut short"):
        gguf_file.GGUF(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"PK" + bytes(30))
    with pytest.raises(ValueError, match="no GGUF file"):
        gguf_file.GGUF(tmp_path / "model.gguf")
