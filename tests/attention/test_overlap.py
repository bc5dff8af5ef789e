"""How many groups of heads an exchange is cut into."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.enums import AttnMaskType
from planner_cases import eight_groups

from s2_kernels import dense, local_stride
from s2_kernels.exchange import zigzag
from s2megatron.attention import overlap
from s2megatron.attention.context_parallel import ContextAttention
from s2megatron.attention.core_attention import S2CoreAttention
from s2megatron.attention.overlap import choose_groups
from s2megatron.machine import load_machine
from s2megatron.planner.context import context_traffic
from s2megatron.planner.costs import attention_seconds
from s2megatron.planner.layout import Layout

K = 1024
S2 = local_stride(heads=32, kv_heads=8, local_blocks=16, stride=16)
SIZES = dict(head_sizes=256, element_bytes=2)


def chosen(pattern, tokens, ranks, within):
    return choose_groups(pattern, zigzag, ranks, tokens // 64, **SIZES, within_a_node=within)


def test_as_few_groups_as_leave_little_exposed():
    """128k tokens on 4 ranks: 27.5 MiB in 4.7 ms of attention, 1.7% by NVLink, 14% by network."""
    assert chosen(S2, 128 * K, 4, True) == 1
    assert chosen(S2, 128 * K, 4, False) == 4
    assert chosen(S2, 4096 * K, 4, False) == 1  # attention grows with the square
    assert chosen(dense(heads=32, kv_heads=8), 128 * K, 4, True) == 1
    short = chosen(S2, 16 * K, 8, False)
    assert short == overlap.MOST_GROUPS  # too short to hide it all


@pytest.mark.parametrize("gpus_per_node", [8, 1], ids=["node", "network"])
@pytest.mark.parametrize("tokens,ranks", [(16 * K, 8), (128 * K, 4), (256 * K, 2), (512 * K, 8)])
def test_the_planner_predicts_what_is_chosen_by(tokens, ranks, gpus_per_node, monkeypatch):
    """Its times of the exchange and of attention, without latency, on both links of its H100."""
    model, layout = eight_groups(16, tokens), Layout(gpus=ranks, cp=ranks)
    known = load_machine("h100")
    links = {x: getattr(known, x).model_copy(update={"latency_us": 0}) for x in ("node", "cluster")}
    machine = known.model_copy(update=links | {"gpus_per_node": gpus_per_node})
    attention = attention_seconds(machine, model, layout, 0)
    share = context_traffic(machine, model, layout, 0, attention)[0].seconds / attention[0]
    for slower in (1, 1.01 * overlap.EXPOSED / share, 2.01 * overlap.EXPOSED / share):
        slow = {name: x.model_copy(update={"gb_s": x.gb_s / slower}) for name, x in links.items()}
        machines = {"h100": machine.model_copy(update=slow)}
        monkeypatch.setattr(overlap, "load_machine", machines.get)
        choose_groups.cache_clear()
        expected = next((n for n in (1, 2, 4) if share * slower / n <= overlap.EXPOSED), 4)
        assert chosen(model.patterns[0], tokens, ranks, gpus_per_node == 8) == expected
    choose_groups.cache_clear()


def test_groups_divide_the_kv_heads():
    three = local_stride(heads=6, kv_heads=3, local_blocks=16, stride=16)
    assert chosen(three, 16 * K, 8, False) == 3
    one = local_stride(heads=8, kv_heads=1, local_blocks=16, stride=16)
    assert chosen(one, 16 * K, 8, False) == 1
    for groups in (0, 2, 6):
        with pytest.raises(
            ValueError, match=rf"exchange_groups={groups}: must divide the 3 KV heads"
        ):
            ContextAttention(three, None, None, exchange_groups=groups)


def test_one_rank_exchanges_nothing():
    """Groups that do not divide its heads are nothing to refuse: no one reads them."""
    three = local_stride(heads=6, kv_heads=3, local_blocks=16, stride=16)
    config = SimpleNamespace(attention_dropout=0.0, recompute_granularity=None)

    def layer(ranks: int) -> S2CoreAttention:
        tp, cp = (SimpleNamespace(rank=lambda: 0, size=lambda n=n: n) for n in (1, ranks))
        groups = SimpleNamespace(tp=tp, cp=cp)
        return S2CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups,
                               pattern=three, exchange_groups=2)  # fmt: skip

    assert layer(1).context.exchange_groups is None
    with pytest.raises(ValueError, match="exchange_groups=2: must divide the 3 KV heads"):
        layer(2)
