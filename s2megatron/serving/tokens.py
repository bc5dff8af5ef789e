"""New keys and values on their way from a model through a `PagedCache` to attention `"s2"`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2_kernels import LayerPattern

if TYPE_CHECKING:
    from s2megatron.serving.cache import PagedCache


@dataclass(frozen=True)
class Tokens:
    """New keys and values [b, g, s, d] of one layer, as `PagedCache.update` hands them on."""

    cache: "PagedCache"
    layer: int
    keys: Tensor
    values: Tensor

    def __getattr__(self, name: str):
        raise ValueError(
            f"PagedCache hands its keys to attention 's2' only, and something asked for .{name}: "
            "load the model with s2megatron.hf.load"
        )

    @property
    def begin(self) -> int:
        """Tokens before the new ones, padding included."""
        return self.cache.get_seq_length(self.layer)

    def first(self, given: Tensor | None) -> Tensor | None:
        """Where texts begin: as the mask says, else as the cache knows; None where all at 0."""
        if given is None and any(self.cache.starts):
            return torch.tensor(self.cache.starts)
        return given

    def refuse_another_model(self, pattern: LayerPattern) -> None:
        """Raises ValueError where the layer's pattern is not the cache's."""
        own = self.cache.patterns[self.layer]
        if pattern.key != own.key:
            raise ValueError(
                f"PagedCache was made for another model: layer {self.layer + 1} keeps "
                f"{pattern.rules[0]}, in the cache's model {own.rules[0]}"
            )

    def refuse_other_positions(self, positions: Tensor, first: Tensor | None) -> None:
        """Raises ValueError where position_ids do not go on from what the cache holds.

        Args:
            positions: [b or 1, s], of the new tokens.
            first: [b], where texts begin; None is 0. Padding in front has any position.
        """
        begin, new = self.begin, positions.shape[1]
        starts = [0] * self.cache.batch if first is None else first.tolist()
        real = [max(0, start - begin) for start in starts]  # the first new token that is none
        place = torch.tensor([[min(n, new - 1)] for n in real], device=positions.device)
        of_each = positions.expand(len(starts), -1).gather(1, place)[:, 0].tolist()
        for i, (start, row, position) in enumerate(zip(starts, real, of_each, strict=True)):
            if row >= new:
                continue
            row += begin
            if position not in (row, row - start):
                goes = "back" if position < row - start else "on"
                raise ValueError(
                    f"position_ids: sequence {i} goes {goes} to position {position}, and the cache "
                    f"holds {row - start} tokens of it: what died in between is gone, and nothing "
                    "may be left out; give the new tokens alone (with use_cache left as it is), or "
                    "make a new cache"
                )
            if start > 0:
                self.cache.count_by(rows=position == row)

    def attend(self, query: Tensor, first: Tensor | None, scaling, prompt) -> Tensor:
        """[b, s, h, d]: attention of the new tokens; stores them. See `PagedCache.attend`."""
        return self.cache.attend(self, query, first, scaling, prompt)


class _NoGradient(torch.autograd.Function):
    """Attention to pages as it is, in a forward pass; backward says that there is none."""

    @staticmethod
    def forward(ctx, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        raise ValueError(
            "PagedCache: no gradient goes through pages, which many tokens have had in turn; train "
            "with use_cache=False, or with a DynamicCache"
        )


def without_gradient(out: Tensor, query: Tensor) -> Tensor:
    """`out`, of queries that may ask for a gradient: theirs is refused in the backward pass."""
    if torch.is_grad_enabled() and query.requires_grad:
        return _NoGradient.apply(out, query)
    return out
