"""Which layers of a trained dense model to leave dense when it is made sparse.

    python scripts/quality/choose_dense.py HF_DIR DATA --arm smollm2-turned --layers 6 \
        --out chosen.json [--write configs/quality/smollm2-chosen.yaml]

Nothing is trained. All layers get the arm's pattern; then the layer whose dense attention closes
most of the gap to the dense model is made dense again, and the next one beside it, one a round (of
the better half of the first round). The gap has two parts of equal weight, each as a share of what
the pattern alone loses: the loss on text, beyond the first quarter of a window, and the loss on the
answers of retrieval documents.
DATA holds tokenizer/ and the Megatron dataset text, as smollm2.sh makes them.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import arms
import numpy
import torch
import yaml
from torch import Tensor

from s2_kernels import LayerPattern
from s2_kernels.pattern import dense as dense_pattern
from s2megatron import hf, provenance
from s2megatron.data import make_tokenizer
from s2megatron.evaluation.network import DTYPES, Network
from s2megatron.evaluation.retrieval import make_document
from s2megatron.evaluation.windows import Documents


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


def questions(documents: Documents, encode, length: int, count: int) -> Samples:
    """Retrieval documents of both styles, half with one fact each, planted in text."""
    rng = random.Random(1)
    tokens = torch.zeros(count, length, dtype=torch.int64)
    counted = torch.zeros(count, length - 1, dtype=torch.bool)
    filler = [window.tokens for window in documents.windows(length, count, packed=True)]
    for i in range(count):
        task = ("single", "multi_key")[i % 2]
        made = make_document(
            task, encode, length, rng, filler=filler[i % len(filler)],
            style=("sentences", "records")[i // 2 % 2], queries=None if task == "single" else 8,
            records=None if task == "single" else 16,
        )  # fmt: skip
        tokens[i] = torch.tensor(made.tokens)
        for answer in made.answers:
            counted[i, answer.start - 1 : answer.end - 1] = True
    return Samples(tokens, counted)


def as_dense(pattern: LayerPattern) -> LayerPattern:
    """Of the same heads and blocks."""
    size = pattern.block_size
    return dense_pattern(heads=pattern.heads, kv_heads=pattern.kv_heads, block_size=size)


class Judge:
    """The losses of a model under any patterns.

    Args:
        model: a transformers model of the "s2" attention.
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
            nats = torch.cat(
                [self.network.token_losses(part) for part in of.tokens.split(self.batch)]
            )
            found[name] = nats[of.counted].double().mean().item()
        return found


def choose(judge: Judge, sparse: tuple[LayerPattern, ...], count: int, say=print) -> dict:
    """Greedily, `count` layers.

    Returns:
        "layers": from 1, in order of choice; "dense" and "sparse": losses without and with the
        pattern; "rounds": of each, the losses of every layer that was tried, and its gap.
    """
    whole = tuple(map(as_dense, sparse))
    dense, alone = judge.losses(whole), judge.losses(sparse)
    say(f"dense {dense}, the pattern in every layer {alone}")

    def gap(losses: dict[str, float]) -> float:
        shares = [(losses[n] - dense[n]) / (alone[n] - dense[n]) for n in losses]
        return sum(shares) / len(shares)

    chosen, rounds, candidates = [], [], range(len(sparse))
    while len(chosen) < count:
        began, tried = time.time(), {}
        for layer in set(candidates) - set(chosen):
            keep = {*chosen, layer}
            losses = judge.losses(tuple(whole[i] if i in keep else p for i, p in enumerate(sparse)))
            tried[layer + 1] = {"gap": gap(losses), **losses}
        best = min(tried, key=lambda layer: tried[layer]["gap"])
        if not rounds:  # the worse half would not be chosen later either
            better = sorted(tried, key=lambda layer: tried[layer]["gap"])
            candidates = [layer - 1 for layer in better[: max(count, len(sparse) // 2)]]
        chosen.append(best - 1)
        rounds.append(tried)
        say(f"layer {best}: {tried[best]} ({time.time() - began:.0f} s)")
    layers = [layer + 1 for layer in chosen]
    return {"layers": layers, "dense": dense, "sparse": alone, "rounds": rounds}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="HF_DIR")
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--arm", required=True, help="of arms.py: its pattern, without dense layers"
    )
    parser.add_argument("--layers", type=int, required=True, help="to leave dense")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=6, help="of text, and as many of retrieval")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--write", type=Path, metavar="RUN.yaml", help="a run file with the choice")
    a = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES["bf16" if device == "cuda" else "fp32"]
    sparse = arms.patterns(a.arm)
    model = hf.load(a.folder, dtype=dtype).to(device)
    hf.use_patterns(model, sparse)
    documents = Documents(str(a.data / "text"), model.config.vocab_size)
    encode = make_tokenizer(f"huggingface:{a.data / 'tokenizer'}")[0]
    samples = {
        "text": text(documents, a.length, a.samples),
        "answers": questions(documents, encode, a.length, a.samples),
    }
    found = choose(Judge(model, samples, a.batch), sparse, a.layers)
    about = {
        "arm": a.arm, "length": a.length, "samples": a.samples,
        "machine": provenance.machine(model.device),
        "versions": provenance.in_words(provenance.versions(("torch", "transformers"))),
        "date": provenance.now(),
    }  # fmt: skip
    a.out.write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"{a.out}: layers {sorted(found['layers'])} dense")
    if a.write:
        tree = yaml.safe_load(arms.run_file(a.arm))
        tree["sparsity"]["layers"].append(arms.dense_layers(sorted(found["layers"])))
        a.write.write_text(yaml.safe_dump(tree, sort_keys=False, width=100))
        print(f"{a.write}: written")


if __name__ == "__main__":
    main()
