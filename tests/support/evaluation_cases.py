"""Oracles whose answers are known, and a small dataset of bytes."""

import numpy
import torch

from s2megatron.data import write_dataset
from s2megatron.evaluation.network import Network

VOCAB = 257


def by_byte(text: str) -> list[int]:
    return list(text.encode())


def oracle(predict) -> Network:
    """A network that is sure of predict(tokens [n], t), the token after position t."""

    def hidden(tokens):
        rows = [[predict(row, t) for t in range(len(row))] for row in tokens.tolist()]
        return torch.tensor(rows)[..., None]

    def head(hidden):
        return 20.0 * torch.nn.functional.one_hot(hidden[..., 0], VOCAB)

    return Network(hidden, head, VOCAB, torch.device("cpu"), "an oracle")


def reader(seen=lambda position: True):
    """Predicts what followed the longest match of the text so far, of places that are `seen`."""

    def predict(tokens, t):
        text, best, found = bytes(tokens[: t + 1]), 0, 0
        for size in (1, 4, 8, 16, 24):
            at = text.rfind(text[-size:], 0, len(text) - 1)
            if at < 0:
                break
            if seen(at + size):
                best, found = size, text[at + size]
        return found if best >= 8 else 0

    return predict


def write_repeating(folder) -> str:
    """Prefix of a dataset with documents of 120, 700 and 410 tokens.

    Tokens 300 to 600 of the second repeat its first 300; nothing else repeats for long.
    """
    prefix = f"{folder}/text"
    draw = numpy.random.default_rng(1)
    texts = ["".join(map(chr, draw.integers(97, 123, size))) for size in (119, 699, 409)]
    texts[1] = texts[1][:300] + texts[1][:300] + texts[1][600:]
    write_dataset(texts, prefix)
    return prefix
