"""A Llama out of a GGUF file, as Hugging Face folders and a tokenizer.

    python scripts/quality/pretrained.py SmolLM2-135M-Instruct.Q4_1.gguf DATA

DATA/hf            the model as it comes, in bf16
DATA/hf-32k        the same weights with --rotary-base and --positions of a longer context
DATA/tokenizer     its tokenizer; a document ends with --end

A GGUF file has the rows of the query and key projections in another order than transformers, and
weights of 4 bits: what is trained on here is the packed model, unpacked.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from gguf_file import GGUF
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3
"""The token type of tokens that no text makes."""


def config(file: GGUF) -> LlamaConfig:
    """Raises ValueError for another architecture than Llama's."""
    about = file.fields
    if about["general.architecture"] != "llama":
        raise ValueError(f"{file.path}: is a {about['general.architecture']}; only llama is known")
    heads = about["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=file.shapes["token_embd.weight"][0],
        hidden_size=about["llama.embedding_length"],
        intermediate_size=about["llama.feed_forward_length"],
        num_hidden_layers=about["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=about["llama.attention.head_count_kv"],
        head_dim=about["llama.embedding_length"] // heads,
        max_position_embeddings=about["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": about["llama.rope.freq_base"]},
        rms_norm_eps=round(about["llama.attention.layer_norm_rms_epsilon"], 9),
        tie_word_embeddings="output.weight" not in file.shapes,
        bos_token_id=about.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=about.get("tokenizer.ggml.eos_token_id"),
    )


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head [2 i], [2 i + 1], which GGUF rotates together, as transformers' two halves."""
    head = rows.shape[0] // heads
    return rows.view(heads, head // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def weights(file: GGUF, of: LlamaConfig) -> dict[str, torch.Tensor]:
    """transformers' names -> bf16 weights."""
    found = {}
    for name in file.shapes:
        *layer, part = name.removesuffix(".weight").removeprefix("blk.").split(".")
        tensor = torch.from_numpy(file.tensor(name))
        if part in ("attn_q", "attn_k"):
            heads = of.num_attention_heads if part == "attn_q" else of.num_key_value_heads
            tensor = in_halves(tensor, heads)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        found[f"{prefix}{NAMES[part]}.weight"] = tensor.to(torch.bfloat16)
    return found


def tokenizer(file: GGUF, end: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit by itself, as SmolLM's is.

    Raises:
        ValueError: another kind of tokenizer.
    """
    about = file.fields
    if (about["tokenizer.ggml.model"], about.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError(f"{file.path}: its tokenizer is not SmolLM's; only that one is known")
    tokens = about["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    kinds = about["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rotary-base", type=float, default=500_000)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--end", default="<|endoftext|>")
    a = parser.parse_args(argv)
    file = GGUF(a.file)
    of = config(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(of).to(torch.bfloat16)
    missing, unknown = model.load_state_dict(weights(file, of), strict=False, assign=True)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{a.file}: weights {missing} are missing, {unknown} have no place")
    model.tie_weights()
    model.save_pretrained(a.data / "hf")
    tokenizer(file, a.end).save_pretrained(a.data / "tokenizer")
    longer = a.data / "hf-32k"
    longer.mkdir(exist_ok=True)
    for path in (a.data / "hf").glob("*.safetensors"):
        (longer / path.name).unlink(missing_ok=True)
        os.link(path, longer / path.name)
    of.rope_parameters["rope_theta"] = a.rotary_base
    of.max_position_embeddings = a.positions
    of.architectures, of.dtype = model.config.architectures, torch.bfloat16
    of.save_pretrained(longer)
    for folder in (a.data / "hf", longer):
        shutil.copytree(a.data / "tokenizer", folder, dirs_exist_ok=True)
    print(f"{a.data}: {model.num_parameters():,} parameters, {of.vocab_size:,} tokens")


if __name__ == "__main__":
    main()
