"""`s2megatron generate`: text from a model that convert wrote, with a cache that evicts."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from s2megatron import hf
from s2megatron.convert.hf_config import read_config
from s2megatron.convert.hf_folder import dtype_named
from s2megatron.convert.tokenizer import has_tokenizer
from s2megatron.data.tokenizers import load_hugging_face
from s2megatron.errors import ConfigError
from s2megatron.serving.cache import PagedCache


@dataclass(frozen=True)
class Sampling:
    """How many tokens, and how they are chosen. Raises ConfigError."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature}: must be at least 0, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1")

    def options(self) -> dict:
        """Of transformers' `generate`."""
        if self.temperature == 0:
            return dict(do_sample=False, max_new_tokens=self.max_new_tokens)
        chosen = dict(temperature=self.temperature, top_p=self.top_p, top_k=0)
        return dict(do_sample=True, max_new_tokens=self.max_new_tokens, **chosen)


@dataclass(frozen=True)
class GenerationReport:
    """What a generation took; `str` is what the command prints."""

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    """Until the first new token."""
    decode_s: float
    """Of all others."""
    kept_bytes: int
    """Keys and values that were alive at the end."""
    pool_bytes: int
    """Memory that the cache took."""
    dense_bytes: int
    """What a cache that keeps everything would have held at the end."""

    def __str__(self) -> str:
        later = self.new_tokens - 1
        speed = f"{later / self.decode_s:,.1f} tokens/s" if later else "no token after the first"
        return (
            f"prompt of {self.prompt_tokens:,} tokens in {self.prefill_s:.2f} s; "
            f"{self.new_tokens:,} new ones, {speed}\n"
            f"KV kept: {_size(self.kept_bytes)} (memory taken {_size(self.pool_bytes)}); dense "
            f"would have kept {_size(self.dense_bytes)}, "
            f"{self.dense_bytes / self.kept_bytes:.1f} times as much"
        )


class _TimedStreamer(TextStreamer):
    """Prints text as it comes, and notes when the first token and the last came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


def generate_text(
    folder: str | Path,
    prompt_file: str | Path,
    sampling: Sampling,
    *,
    device: str | None = None,
    dtype: str | None = None,
    graph: bool = False,
) -> GenerationReport:
    """Prints what a model makes of a prompt to stdout, as it comes.

    Args:
        folder: of a model with an `s2` key and a tokenizer.
        prompt_file: UTF-8 text; "-" is stdin.
        device: default: "cuda" where there is a GPU, else "cpu".
        dtype: "bf16", "fp16" or "fp32"; default: bf16 on a GPU, fp32 on the CPU.
        graph: run a step as one CUDA graph.

    Raises:
        ConfigError: no such file, folder, tokenizer or device; an empty prompt; a dense model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: no GPU is found here; choose cpu")
    if graph and device == "cpu":
        raise ConfigError("--graph: a CUDA graph runs on a GPU; leave it out off a GPU")
    dtype = dtype_named(dtype or ("fp32" if device == "cpu" else "bf16"))
    text, folder = _read(prompt_file), Path(folder)
    config = _config(folder)
    tokenizer = _tokenizer(folder)
    ids = _prompt(tokenizer, text, f"--prompt-file {prompt_file}", config.vocab_size).to(device)
    longest = ids.shape[1] + sampling.max_new_tokens
    if longest > (config.max_position_embeddings or longest):
        print(
            f"{ids.shape[1]} tokens of the prompt and {sampling.max_new_tokens} new ones are more "
            f"than the model's {config.max_position_embeddings} positions "
            "(max_position_embeddings in config.json): what comes beyond them it was not trained "
            "for",
            file=sys.stderr,
        )
    model = hf.load(folder, dtype=dtype).to(device).eval()
    model.generation_config = _ends(model.generation_config, tokenizer)
    cache = PagedCache(model, max_length=longest, graph=graph)
    if graph:
        print(f"a step is one CUDA graph; fused in it: {cache.graph.fused}", file=sys.stderr)
    streamer = _TimedStreamer(tokenizer)
    torch.manual_seed(sampling.seed)
    began = time.perf_counter()
    out = hf.generate(
        model, ids, cache=cache, streamer=streamer, attention_mask=torch.ones_like(ids),
        **sampling.options(),
    )  # fmt: skip
    return GenerationReport(
        prompt_tokens=ids.shape[1],
        new_tokens=out.shape[1] - ids.shape[1],
        prefill_s=streamer.times[0] - began,
        decode_s=streamer.times[-1] - streamer.times[0],
        kept_bytes=cache.kept_bytes,
        pool_bytes=cache.pool_bytes,
        dense_bytes=cache.dense_bytes,
    )


def _read(prompt_file: str | Path) -> str:
    try:
        if str(prompt_file) == "-":
            return sys.stdin.read()
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {prompt_file}: cannot be read: {error}") from None


def _config(folder: Path):
    """Of a model with S2 attention. Raises ConfigError."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: there is no config.json in it; name a Hugging Face folder, as "
            "`s2megatron convert to-hf` makes them"
        )
    config = read_config(folder)
    if getattr(config, hf.NAME, None) is None:
        raise ConfigError(
            f"{folder}: config.json has no 's2' key: the model is dense, and keeps everything; "
            "generate with transformers, or convert the checkpoint again if it was trained with S2"
        )
    return config


def _tokenizer(folder: Path):
    why = "there is no file of one"
    if has_tokenizer(folder):
        try:
            return load_hugging_face(folder)
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ConfigError(
        f"{folder}: its tokenizer cannot be loaded ({why}); copy the tokenizer's files there, or "
        "convert with --like DIR"
    )


def _prompt(tokenizer, text: str, where: str, vocab_size: int) -> Tensor:
    """int64 [1, s]: the prompt's tokens, as the tokenizer begins a text. Raises ConfigError."""
    if not text:
        raise ConfigError(f"{where}: holds no text to go on from")
    ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] > 1 and ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]  # some end every text: nothing of it would be left to go on with
    if ids.shape[1] == 0:
        raise ConfigError(f"{where}: the model's tokenizer makes no token of its text")
    if (highest := int(ids.max())) >= vocab_size:
        raise ConfigError(
            f"{where}: the tokenizer makes token {highest} of it, and the model's vocabulary has "
            f"{vocab_size}: it belongs to another model"
        )
    return ids.long()


def _ends(own: GenerationConfig, tokenizer) -> GenerationConfig:
    """What ends a text, by generation_config.json and by the tokenizer, and nothing else of them.

    Beams, penalties and temperatures that such a file asks for are options of this command, or not
    there.
    """
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [end for end in dict.fromkeys([*listed, tokenizer.eos_token_id]) if end is not None]
    return GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else None)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return f"{count:,.2f} GiB"
