"""A sequence that is cut in another way than the attention takes it to be stops the run."""

from types import SimpleNamespace

import pytest
import torch

from s2_kernels import dense
from s2megatron.attention import positions
from s2megatron.attention.core_attention import build_core_attention

ZIGZAG = {0: [0, 1, 6, 7], 1: [2, 3, 4, 5]}


def group(rank):
    return SimpleNamespace(size=lambda: 2, rank=lambda: rank)


@pytest.mark.parametrize("rank", ZIGZAG)
def test_positions_of_a_rank(rank):
    assert positions.local_positions(2, rank, 8).tolist() == ZIGZAG[rank]


def contiguous(x, group):
    return x.chunk(group.size())[group.rank()]


@pytest.mark.parametrize("wrong", [None, "batches", "rotary embeddings"])
def test_what_megatron_cuts_is_compared_with_the_cut(monkeypatch, wrong):
    def zigzag(x, group):
        return x[ZIGZAG[group.rank()]]

    batch, rotary = (contiguous if wrong == name else zigzag
                     for name in ("batches", "rotary embeddings"))  # fmt: skip

    def cut_batch(samples, is_hybrid_cp, cp_group):
        return {"tokens": batch(samples["tokens"][0], cp_group)[None]}

    monkeypatch.setattr(positions, "get_batch_on_this_cp_rank", cut_batch)
    monkeypatch.setattr(
        positions, "get_pos_emb_on_this_cp_rank", lambda x, dim, group: rotary(x, group)
    )
    if wrong is None:
        return positions.check_cut(group(1), 8, torch.device("cpu"))
    with pytest.raises(RuntimeError) as error:
        positions.check_cut(group(1), 8, torch.device("cpu"))
    assert f"Megatron cuts {wrong} in another way" in str(error.value)
    assert "positions 4 to 5 and 6 to 7, for chunks 1 and 2 of 4" in str(error.value)


class Model(torch.nn.Module):
    def forward(self, input_ids, position_ids, attention_mask=None):
        return input_ids


def test_the_first_batch_is_looked_at_and_no_later_one():
    model, right = Model(), torch.tensor([ZIGZAG[0]] * 2)
    positions._watch(model, group(0), 8)
    model(None, None)  # a pipeline stage that is given no positions
    with pytest.raises(RuntimeError, match="the first batch is cut in another way"):
        model(right, right + 1)
    with pytest.raises(RuntimeError, match="got 8 tokens"):  # nobody has cut it
        model(None, position_ids=torch.arange(8)[None])
    model(right, right)
    model(right, right + 1)


def test_dense_layers_of_transformer_engine_exchange_as_they_are_told():
    contract = dict(config=None, layer_number=1, cp_comm_type="all_gather", pg_collection=object())
    given = build_core_attention(
        patterns=(dense(heads=2),), dense=lambda **given: given, keep_output=True, **contract
    )
    assert given == contract
