"""S2 attention in plain PyTorch on any device: time and memory follow the kept blocks.

One *run* of query blocks at a time, of up to ROWS rows: the KV blocks that any of them keeps are,
per band, a strided slice of the blocks of K and V (a *view*, no index table), so each step is one
small dense attention with its softmax complete. The backward pass recomputes the probabilities from
the saved lse, as FlashAttention does. Accumulation is in float32 (float64 for float64 inputs).

Shapes: b batch, s query tokens, t KV tokens, h query heads, g KV heads, r = h / g heads per group,
d head size, B block size, n kept tokens of a run.
"""

import math
from collections.abc import Iterator

import torch

from s2_kernels.near import count_keys
from s2_kernels.pattern import HeadRule, LayerPattern

ROWS = 128
"""Of a run. Small blocks one by one would be all overhead: 512 tokens in blocks of 16 take 3 times
as long on a CPU. A run of L blocks keeps L - 1 blocks more than one of them does."""


def kept_slices(
    rule: HeadRule, query_block: int, n_blocks: int, last: int | None = None
) -> list[slice]:
    """The KV blocks that a query block attends to, as one slice per band, from far to near.

    What any block of a run attends to, where `last` is given, the run's last block: blocks only
    die, so that is what the first one does, and what comes after it.
    """
    last = query_block if last is None else last
    slices = []
    nearer = 0  # ages below this belong to a narrower band
    for reach, stride in rule.bands:
        oldest = max(0, query_block - reach + 1)
        start = oldest + -(oldest + rule.shift) % stride
        stop = min((query_block if nearer else last) - nearer + 1, n_blocks)
        if start < stop:
            slices.append(slice(start, stop, stride))
        nearer = reach
    return slices[::-1]


class _Tiles:
    """Walks over (KV head, run of query blocks) and hands out the tiles of that step."""

    def __init__(self, pattern: LayerPattern, s: int, k: torch.Tensor, q_offset: int, near):
        self.pattern, self.s, self.q_offset, self.near = pattern, s, q_offset, near
        self.block = pattern.block_size
        self.t = count_keys(k, near, pattern)
        self.n_blocks = -(-self.t // self.block)
        # Made once, and sliced for the mask of each tile.
        self.in_block = torch.arange(self.block, device=k.device)
        self.ids = torch.arange(self.n_blocks, device=k.device)
        self.positions = torch.arange(q_offset, q_offset + s, device=k.device)

    def blocks(self, x: torch.Tensor) -> torch.Tensor:
        """[b, t, g, d] -> [b, g, N/B, B, d], padded with zeros where B does not divide t."""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % self.block))
        return x.unflatten(1, (-1, self.block)).permute(0, 3, 1, 2, 4)

    def __iter__(self) -> Iterator[tuple[int, slice, list[slice], torch.Tensor | None]]:
        """Yields KV head, query rows, slices of K's blocks, and the mask [rows, n] where needed."""
        first, last = self.q_offset // self.block, (self.q_offset + self.s - 1) // self.block
        length = max(1, ROWS // self.block)
        for head, rule in enumerate(self.pattern.rules):
            life = rule.lifetimes(self.n_blocks).to(self.ids.device)
            # Runs begin at multiples of their length, wherever the queries begin.
            for begin in range(first // length * length, last + 1, length):
                i, j = max(begin, first), min(begin + length - 1, last)
                rows = slice(
                    max(i * self.block - self.q_offset, 0),
                    min((j + 1) * self.block - self.q_offset, self.s),
                )
                kept = kept_slices(rule, i, self.n_blocks, j)
                if kept:
                    mask = self._mask(i, j, rows, kept, life)
                    if self.near is not None:
                        kept = self.near.row_slices(rule, kept)
                    yield head, rows, kept, mask

    def _mask(
        self, i: int, j: int, rows: slice, kept: list[slice], life: torch.Tensor
    ) -> torch.Tensor | None:
        last_kept = range(*kept[-1].indices(self.n_blocks))[-1]
        if i == j and last_kept < i and (last_kept + 1) * self.block <= self.t:
            return None
        ids = torch.cat([self.ids[s] for s in kept])
        cols = (ids[:, None] * self.block + self.in_block).flatten()
        positions = self.positions[rows, None]
        mask = (cols <= positions) & (cols < self.t)
        if i < j:  # what the first block of the run keeps, the others may not
            alive = positions // self.block - ids < life[ids]
            mask = mask.unflatten(1, (-1, self.block)).logical_and_(alive[..., None]).flatten(1)
        return mask


def _gather(blocks: torch.Tensor, kept: list[slice]) -> torch.Tensor:
    """[b, N/B, B, d] and slices -> the kept tokens [b, n, d]."""
    return torch.cat([blocks[:, s] for s in kept], dim=1).flatten(1, 2)


def _scatter_add(blocks: torch.Tensor, kept: list[slice], grad: torch.Tensor) -> None:
    """Adds [b, n, d] onto the kept blocks of [b, N/B, B, d]."""
    grad = grad.unflatten(1, (-1, blocks.shape[2]))
    done = 0
    for s in kept:
        part = blocks[:, s]
        part += grad[:, done : done + part.shape[1]]
        done += part.shape[1]


def _grouped(x: torch.Tensor, head: int, group: int, rows: slice, dtype) -> torch.Tensor:
    """Rows of one group's query heads, [b, s, h, d] -> [b, r * rows, d]."""
    tile = x[:, rows, head * group : (head + 1) * group].to(dtype)
    return tile.transpose(1, 2).flatten(1, 2)


def _ungrouped(tile: torch.Tensor, group: int) -> torch.Tensor:
    """[b, r * rows, d] -> [b, rows, r, d]."""
    return tile.unflatten(1, (group, -1)).transpose(1, 2)


def _scores(q_tile, k_tile, mask, scale, group):
    """[b, r * rows, n], masked entries -inf."""
    scores = torch.baddbmm(
        q_tile.new_zeros(()), q_tile, k_tile.transpose(1, 2), beta=0, alpha=scale
    )
    if mask is not None:
        scores = scores.unflatten(1, (group, -1)).masked_fill(~mask, -math.inf).flatten(1, 2)
    return scores


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pattern, scale, q_offset, near):
        b, s, h, _ = q.shape
        group = h // k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        tiles = _Tiles(pattern, s, k, q_offset, near)
        k_blocks, v_blocks = tiles.blocks(k), tiles.blocks(v)
        out = q.new_zeros(b, s, h, v.shape[-1])
        lse = torch.full((b, h, s), -math.inf, dtype=dtype, device=q.device)
        for head, rows, kept, mask in tiles:
            heads = slice(head * group, (head + 1) * group)
            q_tile = _grouped(q, head, group, rows, dtype)
            k_tile = _gather(k_blocks[:, head], kept).to(dtype)
            v_tile = _gather(v_blocks[:, head], kept).to(dtype)
            scores = _scores(q_tile, k_tile, mask, scale, group)
            tile_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            probs = (scores - tile_lse).nan_to_num_(nan=-math.inf).exp_()  # a row may see nothing
            out[:, rows, heads] = _ungrouped(probs @ v_tile, group).to(out.dtype)
            lse[:, heads, rows] = tile_lse.unflatten(1, (group, -1)).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.numbers = (pattern, scale, q_offset, near)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return *blocked_backward(q, k, v, out, lse, dout, dlse, *ctx.numbers), *(None,) * 4


def blocked_backward(
    q, k, v, out, lse, dout, dlse, pattern: LayerPattern, scale, q_offset=0, near=None
):
    """dq, dk and dv of a forward pass that gave out and lse; dlse may be None."""
    b, s, h, _ = q.shape
    group = h // k.shape[2]
    # d loss / d score = p * (dp - delta), with the lse's own gradient folded into delta.
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse
    tiles = _Tiles(pattern, s, k, q_offset, near)
    k_blocks, v_blocks = tiles.blocks(k), tiles.blocks(v)
    dq = torch.zeros_like(q)
    dk = torch.zeros(k_blocks.shape, dtype=lse.dtype, device=q.device)
    dv = torch.zeros(v_blocks.shape, dtype=lse.dtype, device=q.device)
    for head, rows, kept, mask in tiles:
        heads = slice(head * group, (head + 1) * group)
        q_tile = _grouped(q, head, group, rows, lse.dtype)
        do_tile = _grouped(dout, head, group, rows, lse.dtype)
        k_tile = _gather(k_blocks[:, head], kept).to(lse.dtype)
        v_tile = _gather(v_blocks[:, head], kept).to(lse.dtype)
        tile_lse = lse[:, heads, rows].flatten(1, 2).unsqueeze(-1)
        tile_delta = delta[:, heads, rows].flatten(1, 2).unsqueeze(-1)
        probs = _scores(q_tile, k_tile, mask, scale, group)
        probs = probs.sub_(tile_lse).nan_to_num_(nan=-math.inf).exp_()
        _scatter_add(dv[:, head], kept, probs.transpose(1, 2) @ do_tile)
        dscores = (do_tile @ v_tile.transpose(1, 2)).sub_(tile_delta).mul_(probs)
        dscores *= scale
        _scatter_add(dk[:, head], kept, dscores.transpose(1, 2) @ q_tile)
        dq[:, rows, heads] = _ungrouped(dscores @ k_tile, group).to(dq.dtype)
    dk, dv = (x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : k.shape[1]].to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def blocked_attention(
    q, k, v, pattern: LayerPattern, *, softmax_scale: float, q_offset: int = 0, near=None
):
    """S2 attention; arguments as in `s2_attention`. Returns out [b, s, h, dv] and lse [b, h, s]."""
    return _BlockedAttention.apply(q, k, v, pattern, softmax_scale, q_offset, near)
