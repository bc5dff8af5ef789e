"""Held-out loss of a converted model, with the attention it was trained with and with a plain load.

    python3 scripts/quality/heldout_loss.py runs/quickstart/hf runs/quickstart/data/valid

HF_DIR comes from `s2megatron convert to-hf`, PREFIX.bin and PREFIX.idx from `s2megatron data`.
Prints cross entropy in nats per token over whole sequences and over their second halves, where the
two attentions differ most.
"""

import argparse

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import s2megatron.hf


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="HF_DIR")
    parser.add_argument("data", metavar="PREFIX")
    parser.add_argument("--tokens", type=int, help="of a sequence; default: the model's positions")
    parser.add_argument("--sequences", type=int, default=100)
    return parser.parse_args(argv)


def batches(prefix: str, tokens: int, count: int) -> torch.Tensor:
    """The first `count` sequences [count, tokens + 1] of all documents one after the other."""
    dataset, parts, found = IndexedDataset(prefix), [], 0
    for i in range(len(dataset)):
        parts.append(torch.from_numpy(dataset[i].astype("int64")))
        found += len(parts[-1])
        if found >= count * (tokens + 1):
            break
    text = torch.cat(parts)
    count = min(count, len(text) // (tokens + 1))
    return text[: count * (tokens + 1)].view(count, tokens + 1)


@torch.no_grad()
def loss_by_position(model, sequences: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy [tokens]."""
    total = torch.zeros(sequences.shape[1] - 1, dtype=torch.float64)
    for row in tqdm(sequences, desc=model.config._attn_implementation):
        logits = model(input_ids=row[None, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    return total / len(sequences)


def main():
    a = parse()
    models = [s2megatron.hf.load(a.folder), AutoModelForCausalLM.from_pretrained(a.folder)]
    tokens = a.tokens or models[0].config.max_position_embeddings
    sequences = batches(a.data, tokens, a.sequences)
    print(f"{len(sequences)} sequences of {tokens} tokens from {a.data}")
    for model in models:
        losses = loss_by_position(model, sequences)
        name, half = model.config._attn_implementation, losses[tokens // 2 :].mean()
        print(f"{name:<6} {losses.mean():.4f} nats/token, second half {half:.4f}")


if __name__ == "__main__":
    main()
