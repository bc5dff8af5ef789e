"""Packed documents (THD): a micro-batch as one row of tokens in which attention ends at documents.

Megatron's dataset says where documents end when `dataloader_inter_document_masking` is set: per
sample, int32 [s + 1], from 0 to s, filled up with s. A document that a sample cuts goes on in the
next sample as a document of its own.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def document_ends(cu_seqlens: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Starts of all documents of a micro-batch, and the end: int32 [documents + 1], on the host.

    Args:
        cu_seqlens: [b, s + 1] on the host, as the dataset gives it.
        seq_length: s.
    """
    parts = [cu_seqlens.new_zeros(1)]
    for sample, ends in enumerate(cu_seqlens):
        inner = ends[(ends > 0) & (ends < seq_length)].unique_consecutive()
        parts += [inner + sample * seq_length, inner.new_tensor([(sample + 1) * seq_length])]
    return torch.cat(parts)


def flatten_samples(samples: dict) -> dict:
    """Tensors [b, s] -> [1, b * s]."""
    return {key: x if x is None else x.reshape(1, -1) for key, x in samples.items()}


def packed_seq_params(
    documents: torch.Tensor, *, tokens_per_sample: int, host_rope: bool
) -> PackedSeqParams:
    """What Megatron's layers want to know about the documents, made once per micro-batch.

    Args:
        documents: int32 [documents + 1] on the host (`document_ends`).
        tokens_per_sample: s, for experts, whose router works per sample.
        host_rope: rotary embeddings are not fused. Megatron's unfused ones read the lengths on the
            host in every layer, and take them from the `_padded` fields if these are set: there
            they find a copy on the host, and no layer waits for the GPU. (Fused ones and
            Transformer Engine's attention must not see it.)
    """
    on_device = documents.cuda(non_blocking=True)
    longest = int(documents.diff().max())
    host = documents if host_rope else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=host,
        cu_seqlens_kv_padded=host,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=tokens_per_sample,
        pad_between_seqs=False,  # else Transformer Engine would look, and wait
    )
