"""Blocks copied and added up (moves.py): the specification by hand, the kernel by interpreter."""

import pytest
import torch
from move_cases import MOVE_CASES, STARTS, check_moves

from s2_kernels import moves, moves_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", MOVE_CASES, ids=str)
def test_the_kernel_gives_the_same_bits(case, dtype):
    """Without bfloat16, which the interpreter rounds otherwise than a GPU."""
    check_moves(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sums_are_made_in_order_and_rounded_once(dtype):
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, 4 * 8, 3, 16, generator=g).to(dtype)
    rows = torch.randn(9, 2, 8, 16, generator=g).to(dtype)
    slots, heads = torch.tensor([3, 0, 1, 2, 0]), torch.tensor([0, 2, 1, 1, 0])
    which = torch.tensor([8, 1, 4, 2, 0, 5, 7, 3, 6])
    expected = k.clone()
    for i, (slot, head) in enumerate(zip(slots, heads, strict=True)):
        at = (slice(None), slice(slot * 8, slot * 8 + 8), head)
        total = k[at].to(torch.promote_types(dtype, torch.float32))
        for row in which[STARTS[i] : STARTS[i + 1]]:
            total = total + rows[row]
        expected[at] = total.to(dtype)
    moves.add_blocks(moves.of_tokens(k, 8, slots, heads), moves.of_rows(rows, which), STARTS)
    assert torch.equal(k, expected)


def test_columns_that_are_apart_are_refused():
    x, one = torch.zeros(1, 8, 1, 64)[..., ::2], torch.zeros(1).long()
    blocks = moves.of_tokens(x, 8, one, one)
    with pytest.raises(ValueError, match=r"strides \(512, .*, 2\): its last dimension"):
        moves_kernel.move_blocks(blocks, blocks, None, add=False)


def test_nothing_to_move():
    k, rows, none = torch.ones(1, 8, 1, 16), torch.ones(0, 1, 8, 16), torch.zeros(0).long()
    for move in (moves.copy_blocks, moves.add_blocks):
        move(moves.of_tokens(k, 8, none, none), moves.of_rows(rows, none))
        move(moves.of_rows(rows, none), moves.of_tokens(k, 8, none, none))
    assert (k == 1).all()
