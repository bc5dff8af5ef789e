"""Packed documents through a real model, against each document on its own.

Runs on every rank of a torchrun launch (in_process.py).
"""

import itertools
import tempfile
from pathlib import Path

from in_process import build_model
from launches import TINY, write_run_file

# Two samples of 128 tokens, in blocks of 16.
LENGTHS = ([37, 1, 48, 42], [5, 59, 64])
PACKED = {"micro_batch_size": 2, "dataloader_inter_document_masking": True}


def packed_is_separate(*overrides: str) -> dict:
    """Relative differences in the loss and in the gradients of every parameter.

    Two samples in one micro-batch: 7 documents, forward and backward once packed and once per
    document.
    """
    import torch

    from s2megatron.training import cpu_runtime

    cpu_runtime.prepare_environment()

    from s2megatron.training.gpt_loop import flatten_samples
    from s2megatron.training.packing import document_ends, packed_seq_params

    tree = TINY | {"megatron": TINY["megatron"] | PACKED, "data": {"mock": True}}
    config = write_run_file(Path(tempfile.mkdtemp()) / "run.yaml", tree)
    ready, (model,) = build_model(str(config), *overrides)
    generator = torch.Generator().manual_seed(1)
    padded = torch.full((2, 129), 128, dtype=torch.int32)  # as Megatron's dataset gives it
    for row, lengths in zip(padded, LENGTHS, strict=True):
        row[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
    samples = {
        "tokens": torch.randint(257, (2, 128), generator=generator),
        "labels": torch.randint(257, (2, 128), generator=generator),
        "loss_mask": (torch.rand(2, 128, generator=generator) > 0.2).float(),
    }
    documents = document_ends(padded, 128)
    batch = flatten_samples(samples)

    def step(start, end, packing):
        """The sum of the token losses of these rows; their gradients add up in the model."""
        part = {name: x[:, start:end] for name, x in batch.items()}
        positions = torch.arange(end - start)[None]
        losses = model(part["tokens"], positions, None, labels=part["labels"],
                       packed_seq_params=packing)  # fmt: skip
        loss = (losses.float() * part["loss_mask"]).sum()
        loss.backward()
        return loss.item()

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return found

    def difference(some, others):
        """The largest, relative to the parameter's largest gradient."""
        return max(
            ((some[n] - others[n]).abs().max() / others[n].abs().max()).item() for n in others
        )

    packing = packed_seq_params(documents, tokens_per_sample=128, host_rope=True)
    packed_loss, packed = step(0, 256, packing), gradients()
    loss = sum(step(start, end, None) for start, end in itertools.pairwise(documents.tolist()))
    separate = gradients()
    step(0, 256, None)  # one document of 256 tokens: what losing cu_seqlens would give
    return {
        "documents": documents.tolist(),
        "loss": abs(packed_loss - loss) / loss,
        "gradients": difference(packed, separate),
        "one_document": difference(gradients(), separate),
        "kinds": [type(m.core_attention).__name__ for m in model.modules()
                  if hasattr(m, "core_attention")],
    }  # fmt: skip
