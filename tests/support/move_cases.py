"""Blocks that are copied and added up, by the kernel and by PyTorch: the same bits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2_kernels import moves, moves_kernel
from s2_kernels.moves import Blocks

STARTS = torch.tensor([0, 1, 4, 4, 6, 9])
"""Of nine rows, which go to each of five blocks: one, three, none, two, three."""


@dataclass(frozen=True)
class MoveCase:
    block: int
    d: int
    b: int = 1
    heads: int = 3
    slots: int = 5

    def __str__(self) -> str:
        return f"B{self.block}-D{self.d}-b{self.b}"


MOVE_CASES = [MoveCase(16, 32, b=2), MoveCase(64, 48), MoveCase(128, 128), MoveCase(32, 256, b=2)]


def moved(
    case: MoveCase, dtype, device: str, copy: Callable, add: Callable, clear: Callable
) -> list[Tensor]:
    """Tensors after a move each: rows from tokens and tokens from rows, copied and added; cleared.

    `copy`, `add` and `clear` as in moves.py. All lies in larger tensors, whose rest is NaN.
    """
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        whole = torch.full((shape[0] + 1, *shape[1:-1], shape[-1] + 16), torch.nan)
        whole[1:, ..., 8:-8] = torch.randn(*shape, generator=g)
        return whole.to(device, dtype)

    tokens = draw(case.slots * case.block, case.b, case.heads, case.d)  # as Megatron has it
    rows = draw(10, case.b, case.block, case.d)
    blocks = torch.randperm(case.slots * case.heads, generator=g).to(device)
    order, starts = torch.randperm(10, generator=g)[:9].to(device), STARTS.to(device)

    def blocks_of(whole: Tensor, which: Tensor) -> Blocks:
        inner = whole[1:, ..., 8:-8].transpose(0, 1)
        return moves.of_tokens(inner, case.block, which // case.heads, which % case.heads)

    def rows_of(whole: Tensor) -> Blocks:
        return moves.of_rows(whole[1:, ..., 8:-8], order)

    found = []
    for move in (copy, add):
        found += [rows.clone(), tokens.clone()]
        move(rows_of(found[-2]), blocks_of(tokens, blocks[:9]))
        move(blocks_of(found[-1], blocks[:9]), rows_of(rows))
    found.append(tokens.clone())
    clear(blocks_of(found[-1], blocks[3:7]))
    found.append(tokens.clone())
    add(blocks_of(found[-1], blocks[:5]), rows_of(rows), starts)
    return found


def by_kernel(add: bool) -> Callable:
    def move(to: Blocks, source: Blocks | None, starts: Tensor | None = None) -> None:
        moves_kernel.move_blocks(to, source, starts, add=add)

    return move


def check_moves(case: MoveCase, dtype, device: str = "cpu") -> None:
    """The kernel's results, on a device, beside PyTorch's on the CPU."""
    clear = functools.partial(by_kernel(False), source=None)
    got = moved(case, dtype, device, by_kernel(False), by_kernel(True), clear)
    by_torch = moves.copy_blocks, moves.add_blocks, moves.clear_blocks
    expected = moved(case, dtype, "cpu", *by_torch)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0, equal_nan=True)
