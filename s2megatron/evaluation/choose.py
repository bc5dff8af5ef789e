"""`s2megatron choose-dense`: which layers of a trained dense model to leave dense.

Nothing is trained. All layers get the run file's pattern; then the layer whose dense attention
closes most of the gap to the dense model is made dense again, and the next one beside it, one a
round (of the better half of the first round). The gap has two parts of equal weight, each as a
share of what the pattern alone loses: the loss on text, beyond the first quarter of a window, and
the loss on the answers of retrieval documents.
"""

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from s2_kernels import LayerPattern, dense
from s2megatron import hf, provenance
from s2megatron.config import load_config
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.evaluation.command import find_tokenizer
from s2megatron.evaluation.evaluate import BATCH_TOKENS
from s2megatron.evaluation.network import Network, load_model, load_model_config
from s2megatron.evaluation.progress import Say
from s2megatron.evaluation.result import writable, write_json
from s2megatron.evaluation.retrieval import RetrievalDocument, make_document
from s2megatron.evaluation.windows import Documents
from s2megatron.evaluation.words import Encode

MOST_QUESTIONS = 8
"""Of a document that has more than one, and twice as many facts; fewer where they do not fit."""


@dataclass(frozen=True)
class Samples:
    """What a choice is judged by. Shape letters: b samples, n tokens."""

    tokens: Tensor
    """int64 [b, n]"""
    counted: Tensor
    """bool [b, n - 1]: whose loss counts, from the second token on."""


def text(documents: Documents, length: int, count: int) -> Samples:
    """Windows spread over the dataset; what stands in their first quarter does not count."""
    windows = documents.windows(length - 1, count, packed=True)
    tokens = torch.from_numpy(numpy.stack([window.tokens for window in windows]))
    counted = torch.zeros(len(tokens), length - 1, dtype=torch.bool)
    counted[:, length // 4 :] = True
    return Samples(tokens, counted)


def questions(documents: Documents, encode: Encode, length: int, count: int) -> Samples:
    """Retrieval documents of both styles, half of them with one fact, planted in text.

    Raises:
        ConfigError: the length is too small for two questions.
    """
    rng = random.Random(1)
    tokens = torch.zeros(count, length, dtype=torch.int64)
    counted = torch.zeros(count, length - 1, dtype=torch.bool)
    filler = [window.tokens for window in documents.windows(length, count, packed=True)]
    for i in range(count):
        task = ("single", "multi_key")[i % 2]
        style = ("sentences", "records")[i // 2 % 2]
        made = _document(task, style, encode, length, rng, filler[i % len(filler)])
        tokens[i] = torch.tensor(made.tokens)
        for answer in made.answers:
            counted[i, answer.start - 1 : answer.end - 1] = True
    return Samples(tokens, counted)


def _document(task, style, encode: Encode, length: int, rng, filler) -> RetrievalDocument:
    """With as many questions as fit, at most MOST_QUESTIONS."""
    many = 1 if task == "single" else MOST_QUESTIONS
    while True:
        counts = {} if task == "single" else {"queries": many, "records": 2 * many}
        try:
            return make_document(task, encode, length, rng, filler=filler, style=style, **counts)
        except ValueError as error:
            if many <= 2:
                raise ConfigError(f"--length {length}: holds no two questions: {error}") from None
            many //= 2


class Judge:
    """The losses of a model under any patterns.

    Args:
        model: of transformers.
        samples: name -> what it is judged by.
        batch: samples of a forward pass.
    """

    def __init__(self, model, samples: dict[str, Samples], batch: int):
        self.model, self.samples, self.batch = model, samples, batch
        self.network = Network.of(model)

    def losses(self, patterns: tuple[LayerPattern, ...]) -> dict[str, float]:
        """Name -> nats a counted token."""
        hf.use_patterns(self.model, patterns)
        found = {}
        for name, of in self.samples.items():
            parts = of.tokens.split(self.batch)
            nats = torch.cat([self.network.token_losses(part) for part in parts])
            found[name] = nats[of.counted].double().mean().item()
        return found


def as_dense(pattern: LayerPattern) -> LayerPattern:
    """Of the same heads and blocks."""
    return dense(heads=pattern.heads, kv_heads=pattern.kv_heads, block_size=pattern.block_size)


def choose(
    judge: Judge,
    patterns: tuple[LayerPattern, ...],
    count: int,
    say: Say = print,
    keep: Callable[[dict], None] = lambda part: None,
) -> dict:
    """Greedily, `count` of the layers that are not dense.

    Args:
        patterns: one a layer; those that are dense stay so.
        keep: is given what there is so far after every round.

    Returns:
        "layers": from 1, in order of choice; "dense" and "pattern": losses of the dense model and
        of the patterns alone; "rounds": of each, the losses of every layer that was tried, and the
        gap that is left: 0 is dense, 1 the patterns alone.

    Raises:
        ConfigError: the patterns alone lose nothing, so there is nothing to judge by.
    """
    whole = tuple(map(as_dense, patterns))
    least, most = judge.losses(whole), judge.losses(patterns)
    say(f"dense: {_in_words(least)}; the pattern in every layer: {_in_words(most)}")
    judged = [name for name in least if most[name] > least[name]]
    if not judged:
        raise ConfigError(
            f"the pattern loses nothing on {' and '.join(least)}, so no layer needs to stay dense "
            "by this; give longer samples (--length), or leave none dense"
        )
    for name in least.keys() - judged:
        say(f"the pattern loses nothing on {name}: judged by {', '.join(judged)} alone")

    def gap(losses: dict[str, float]) -> float:
        shares = [(losses[n] - least[n]) / (most[n] - least[n]) for n in judged]
        return sum(shares) / len(shares)

    candidates = [i for i, pattern in enumerate(patterns) if not pattern.is_dense]
    found: dict = {"layers": [], "dense": least, "pattern": most, "rounds": []}
    while len(found["layers"]) < count:
        began, tried = time.time(), {}
        left = [i for i in candidates if i + 1 not in found["layers"]]
        for layer in tqdm(left, f"round {len(found['rounds']) + 1} of {count}", leave=False):
            kept = {*found["layers"], layer + 1}
            losses = judge.losses(
                tuple(whole[i] if i + 1 in kept else p for i, p in enumerate(patterns))
            )
            tried[layer + 1] = {"gap": gap(losses), **losses}
        ranked = sorted(tried, key=lambda layer: tried[layer]["gap"])
        if not found["rounds"]:  # what is worse alone is not tried beside others
            candidates = [layer - 1 for layer in ranked[: max(count, len(ranked) // 2)]]
        best = ranked[0]
        found["layers"].append(best)
        found["rounds"].append(tried)
        say(f"layer {best}: {tried[best]['gap']:.1%} of the gap left, {_in_words(tried[best])} "
            f"({time.time() - began:.0f} s)")  # fmt: skip
        keep(found)
    return found


def _in_words(losses: dict[str, float]) -> str:
    return ", ".join(f"{n} {value:.4f}" for n, value in losses.items() if n != "gap")


def run(options: argparse.Namespace, say: Say = print) -> dict:
    """Does what the command line says; returns what it wrote. Raises ConfigError."""
    for name, least in (("samples", 1), ("length", 256), ("dense_layers", 1), ("batch_tokens", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} {value}: must be at least {least}")
    config = load_config(options.config, options.overrides)
    out = writable(Path(options.out))
    encode, tokenizer = find_tokenizer(options.folder, options.tokenizer)
    of = load_model_config(options.folder)
    patterns = config.sparsity.resolve(**_shape(of, options.folder))
    sparse = sum(not pattern.is_dense for pattern in patterns)
    if options.dense_layers >= sparse:
        raise ConfigError(
            f"--dense-layers {options.dense_layers}: {options.config} makes {sparse} of "
            f"{len(patterns)} layers sparse; choose fewer"
        )
    positions = getattr(of, "max_position_embeddings", None)
    if positions is not None and options.length > positions:
        raise ConfigError(
            f"--length {options.length}: the model has {positions} positions; choose at most that"
        )
    documents = Documents(options.data, of.vocab_size)
    samples = {
        "text": text(documents, options.length, options.samples),
        "answers": questions(documents, encode, options.length, options.samples),
    }
    highest = int(samples["answers"].tokens.max())
    if highest >= of.vocab_size:
        raise ConfigError(
            f"--tokenizer: makes token {highest}, the model's vocabulary has {of.vocab_size}: it "
            "belongs to another model"
        )
    model = load_model(options.folder, "dense", device=options.device, dtype=options.dtype)
    about = {
        "command": shlex.join(["s2megatron", *sys.argv[1:]]), "model": str(options.folder),
        "config": str(options.config), "tokenizer": tokenizer, "length": options.length,
        "samples": {name: len(one.tokens) for name, one in samples.items()},
        "counted_tokens": {name: int(one.counted.sum()) for name, one in samples.items()},
        "machine": provenance.machine(model.device),
        "versions": provenance.in_words(provenance.versions(("torch", "transformers"))),
        "date": provenance.now(),
    }  # fmt: skip

    for name, one in samples.items():
        say(f"{name}: {len(one.tokens)} samples of {options.length:,} tokens, of which "
            f"{about['counted_tokens'][name]:,} count")  # fmt: skip

    def keep(part: dict) -> None:
        write_json(out, about | part)

    size = options.batch_tokens or BATCH_TOKENS[model.device.type]
    batch = max(1, size // options.length)
    with as_config_error(str(options.folder)):  # what S2 attention does not compute, by name
        found = choose(Judge(model, samples, batch), patterns, options.dense_layers, say, keep)
    say(f"{out}: every loss. For the run file, as the last entry of its sparsity.layers:\n"
        f"  - layers: {sorted(found['layers'])}\n    kind: dense")  # fmt: skip
    return about | found


def _shape(of, folder: str) -> dict[str, int]:
    """Of a transformers config: the arguments of `SparsityConfig.resolve`. Raises ConfigError."""
    if getattr(of, hf.NAME, None) is not None:
        raise ConfigError(
            f"{folder}: was trained sparse (its config.json has an 's2' key); this asks which "
            "layers of a dense model matter: name one"
        )
    names = {"num_layers": "num_hidden_layers", "heads": "num_attention_heads",
             "kv_heads": "num_key_value_heads"}  # fmt: skip
    if missing := [name for name in names.values() if getattr(of, name, None) is None]:
        raise ConfigError(
            f"{folder}: config.json of a {of.model_type} has no {missing[0]}; a decoder in "
            "the manner of Llama is needed"
        )
    return {size: getattr(of, name) for size, name in names.items()}
