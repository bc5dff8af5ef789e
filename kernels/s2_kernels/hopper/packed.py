"""Packed sequences on Hopper: which sequence a slot of 128 tokens of a batch belongs to.

How long the sequences are stands on the device only. A batch of T tokens has at most
T / 128 + sequences slots of 128 tokens that begin where a sequence begins, and a small kernel says
of each what it is; what it leaves over is empty.
"""

import torch
import triton
import triton.language as tl

from s2_kernels.configs import FUSED
from s2_kernels.launch import on_grid


@triton.jit(do_not_specialize=["n_seqs", "n_slots"])
def s2_packed_slots_kernel(p_cu, p_slots, n_seqs, n_slots, EXTRA: tl.constexpr, M: tl.constexpr):
    """(number within the sequence, start, length, terms) of each slot. Grid: slots / M."""
    o_slot = tl.program_id(0) * M + tl.arange(0, M)
    b_number, b_start = tl.zeros([M], tl.int32), tl.zeros([M], tl.int32)
    b_length, b_terms, total = tl.zeros([M], tl.int32), tl.zeros([M], tl.int32), 0
    for first in range(0, n_seqs, 64):
        o_seq = first + tl.arange(0, 64)
        start = tl.load(p_cu + o_seq, mask=o_seq < n_seqs, other=0)
        length = tl.load(p_cu + o_seq + 1, mask=o_seq < n_seqs, other=0) - start
        slots = tl.where(length > 0, tl.cdiv(length, 128) + EXTRA, 0)
        ends = total + tl.cumsum(slots, 0)
        number = o_slot[:, None] - (ends - slots)[None, :]  # [M, 64]
        here = (number >= 0) & (number < slots[None, :])
        b_number += tl.sum(tl.where(here, number, 0), 1)
        b_start += tl.sum(tl.where(here, start[None, :], 0), 1)
        b_length += tl.sum(tl.where(here, length[None, :], 0), 1)
        terms = (start // 4 + o_seq) * 4
        b_terms += tl.sum(tl.where(here, terms[None, :], 0), 1)
        total += tl.sum(slots, 0)
    mask = o_slot < n_slots
    tl.store(p_slots + o_slot * 4, b_number, mask=mask)
    tl.store(p_slots + o_slot * 4 + 1, b_start, mask=mask)
    tl.store(p_slots + o_slot * 4 + 2, b_length, mask=mask)
    tl.store(p_slots + o_slot * 4 + 3, b_terms, mask=mask)


def term_rows(tokens: int, n_seqs: int) -> int:
    """Row terms of a head: those of each sequence start at a multiple of 4, as TMA wants it."""
    return (tokens // 4 + n_seqs + 1) * 4


def packed_slots(cu_seqlens: torch.Tensor, tokens: int, extra: int = 0) -> torch.Tensor:
    """Slots of a packed batch, int32 [n_slots, 4].

    A slot is (number, start, length, terms): the how-manieth of its sequence, where the sequence
    starts and how long it is (0: an empty slot), and where its row terms start (`term_rows`).

    Args:
        cu_seqlens: int32 [sequences + 1] on the device.
        tokens: rows of the batch; extra: slots more than ceil(length / 128) for every sequence.
    """
    n_seqs = len(cu_seqlens) - 1
    n_slots = tokens // 128 + n_seqs * (1 + extra)
    slots = cu_seqlens.new_empty((n_slots, 4))
    grid = (triton.cdiv(n_slots, 64),)
    on_grid(s2_packed_slots_kernel, grid)(
        cu_seqlens, slots, n_seqs, n_slots, EXTRA=extra, M=64, **FUSED
    )
    return slots
