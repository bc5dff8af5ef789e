"""Is a sequence cut among the context-parallel ranks as the attention takes it to be?

A wrong cut makes every rank attend to the wrong blocks, and training goes on with silently wrong
results. So Megatron's own two cuts, of batches and of rotary embeddings, are asked for once the
model is built, and the first batch that comes is looked at.
"""

import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from s2_kernels.exchange import zigzag


def local_positions(ranks: int, rank: int, seq_len: int) -> Tensor:
    """The positions of a rank's tokens, int64 [seq_len / ranks], as the attention takes them."""
    return torch.cat([torch.arange(c.start, c.stop) for c in zigzag(ranks, seq_len)[rank]])


def check_cut(group, seq_len: int, device: torch.device) -> None:
    """Does Megatron hand out batches and rotary embeddings in this cut?

    Args:
        group: the context-parallel process group.
        seq_len: tokens per sequence.
        device: where batches are.

    Raises:
        RuntimeError: it does not.
    """
    everything = torch.arange(seq_len, device=device)
    batch = {"tokens": everything[None]}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    rotary = get_pos_emb_on_this_cp_rank(everything.view(-1, 1), 0, group)
    for what, found in (("batches", batch["tokens"]), ("rotary embeddings", rotary)):
        _require_cut(found.flatten(), group, seq_len, f"Megatron cuts {what}")


def watch_first_batch(model: torch.nn.Module, group, seq_len: int) -> None:
    """Has the position ids of the model's first batch compared with this cut, and no later ones.

    Not for runs whose positions begin again in every document (reset_position_ids).
    """
    for module in model.modules():
        if isinstance(module, GPTModel):
            _watch(module, group, seq_len)


def _watch(model: GPTModel, group, seq_len: int) -> None:
    def look(_, args, kwargs):
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if positions is not None:
            _require_cut(positions[0].flatten(), group, seq_len, "the first batch is cut")
            handle.remove()

    handle = model.register_forward_pre_hook(look, with_kwargs=True)


def _require_cut(found: Tensor, group, seq_len: int, what: str) -> None:
    wanted = local_positions(group.size(), group.rank(), seq_len).to(found.device)
    if not torch.equal(found, wanted):
        raise RuntimeError(
            f"{what} in another way than the attention takes it to be: context-parallel rank "
            f"{group.rank()} of {group.size()} got {len(found)} tokens, positions "
            f"{_ends(found)}, for chunks {group.rank()} and "
            f"{2 * group.size() - 1 - group.rank()} of {2 * group.size()}, {len(wanted)} tokens, "
            f"positions {_ends(wanted)}. Every batch goes through Megatron's "
            "get_batch_on_this_cp_rank"
        )


def _ends(positions: Tensor) -> str:
    """First and last position of both halves."""
    halves = positions.chunk(2)
    return " and ".join(f"{half[0].item()} to {half[-1].item()}" for half in halves)
