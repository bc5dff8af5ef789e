"""How sequences are cut among context-parallel ranks: what fits, and what is exchanged."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from s2_kernels import dense, local_stride
from s2megatron.config import parse_config
from s2megatron.context_split import ContextSplit, check_length, check_stock_loss
from s2megatron.errors import ConfigError
from s2megatron.layer_table import layer_table

OPTIONS = {"hidden_size": 4096, "num_attention_heads": 32, "seq_length": 131072, "bf16": True,
           "micro_batch_size": 1, "context_parallel_size": 8}  # fmt: skip
S2 = local_stride(heads=32, kv_heads=8, local_blocks=16, stride=16, head_step=2)
DENSE = dense(heads=32, kv_heads=8)


def test_bytes_of_a_layer():
    """The figures of docs/configuration.md: 32 / 8 heads of 128, 128k tokens, eight ranks."""
    split = ContextSplit.from_options(OPTIONS)
    size, share = split.received(S2)
    assert size / 2**20 == pytest.approx(33, rel=0.03) and share == pytest.approx(1 / 13, rel=0.1)
    size, share = split.received(DENSE)
    assert (size / 2**20, share) == (448, 1.0)
    apart = ContextSplit.from_options(OPTIONS | {"tensor_model_parallel_size": 4})
    assert apart.received(S2)[0] == pytest.approx(split.received(S2)[0] / 4, rel=0.05)
    assert ContextSplit.from_options(OPTIONS | {"context_parallel_size": 1}).received(S2) == (0, 0)


@pytest.mark.parametrize(
    ("groups", "heads", "options", "told"),
    [
        (3, {}, {}, "3: must divide the 2 KV heads of a rank"),
        (4, {}, {}, "4: must divide the 2 KV heads of a rank"),
        (2, {}, {"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2); choose 1,"),
        (2, {}, {"tensor_model_parallel_size": 4}, "2: must divide the 1 KV heads of a rank"),
        (3, {"group_query_attention": False}, {}, "the 4 KV heads of a rank (with tensor_model_para"
         "llel_size=1); choose 1, 2, 4, or leave it out"),
        (4, {"group_query_attention": False}, {}, None),
        (2, {}, {}, None),
        (None, {}, {}, None),
        (3, {}, {"context_parallel_size": 1}, None),  # nothing reads it
        (3, {}, {"context_parallel_size": None}, None),
        (3, {}, {"context_parallel_size": "two"}, None),  # Megatron's to refuse
    ],
)  # fmt: skip
def test_exchange_groups_divide_the_kv_heads_of_a_rank(groups, heads, options, told):
    given = {"num_attention_heads": 4, "num_query_groups": 2, "group_query_attention": True}
    megatron = given | heads | {"context_parallel_size": 2} | options
    sparsity = {"default": {"kind": "dense"}} | ({"exchange_groups": groups} if groups else {})
    tree = {"sparsity": sparsity, "megatron": megatron}
    if told is None:
        assert parse_config(tree).sparsity.exchange_groups == groups
        return
    with pytest.raises(ConfigError) as error:
        parse_config(tree)
    assert told in str(error.value) and str(error.value).startswith("sparsity.exchange_groups: ")


def test_sizes_are_read_off_the_options():
    least = {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 128}
    assert ContextSplit.from_options(least) == ContextSplit(
        ranks=1, tensor_ranks=1, sequence_parallel=False, seq_len=128, batch=1, head_sizes=32,
        element_bytes=4, comm_types=(),
    )  # fmt: skip
    given = least | TE | {
        "kv_channels": 24, "sequence_parallel": True, "micro_batch_size": 3, "fp16": True,
        "context_parallel_size": 2, "tensor_model_parallel_size": 4, "attention_backend": "unfused",
    }  # fmt: skip
    assert ContextSplit.from_options(given) == ContextSplit(
        ranks=2, tensor_ranks=4, sequence_parallel=True, seq_len=128, batch=3, head_sizes=48,
        element_bytes=2, comm_types=("p2p",), unfused=True,
    )  # fmt: skip


def test_share_of_one_kv_head_on_every_tp_rank():
    split = ContextSplit.from_options(OPTIONS | {"tensor_model_parallel_size": 16})
    size, share = split.received(DENSE)
    assert (size / 2**20, share) == (56, 1.0)


def test_layer_table_says_who_exchanges_for_dense_layers():
    te = OPTIONS | {"transformer_impl": "transformer_engine", "cp_comm_type": ["p2p"]}
    for options, words in ((te, "Transformer Engine, p2p"), (OPTIONS, "448 MiB, 100.0%")):
        split = ContextSplit.from_options(options)
        table = layer_table((DENSE, S2), split.seq_len, split=split)
        assert "receives" in table.splitlines()[0] and words in table.splitlines()[1]
        assert "MiB, 7." in table.splitlines()[2]
        assert "busiest of 8 context-parallel ranks" in table
    assert "receives" not in layer_table((DENSE, S2), 131072)


def test_lengths_that_do_not_fit_are_told_with_those_that_do():
    check_length(1024, 8, block=64)
    check_length(1000, 1, block=64)  # one rank takes any
    with pytest.raises(ConfigError) as error:
        check_length(1000, 2, block=64)
    assert "must be a multiple of 256" in str(error.value)
    assert "as 768 or 1024; or choose a context_parallel_size of 1" in str(error.value)
    with pytest.raises(ConfigError, match="context_parallel_size of 1, 2, 4"):
        check_length(512, 8, block=64)
    with pytest.raises(ConfigError, match=r"multiple of 12 .*sequence_parallel over 3"):
        check_length(8, 2, inner=3)
    split = ContextSplit.from_options(OPTIONS | {"seq_length": 1000, "context_parallel_size": 2})
    with pytest.raises(ConfigError, match="blocks of 64 tokens"):
        split.check([DENSE])
    with pytest.raises(ConfigError) as error:
        check_length(6 * 1001, 5)
    assert str(error.value).endswith(
        "a context_parallel_size of 1, 3, 7, 11, 13, 21, 33, ..., 3003"
    )
    with pytest.raises(ConfigError, match=r"multiple of 8 \(two chunks a rank\), as 8; or"):
        check_length(6, 4)
    apart = OPTIONS | {"context_parallel_size": 2, "tensor_model_parallel_size": 3}
    even = ContextSplit.from_options(apart | {"seq_length": 256})
    even.check([S2])  # TP ranks cut the tokens once more under sequence parallelism only
    with pytest.raises(ConfigError, match="sequence_parallel over 3 ranks"):
        replace(even, sequence_parallel=True).check([S2])
    te = {"transformer_impl": "transformer_engine", "context_parallel_size": 2}
    ContextSplit.from_options(OPTIONS | te | {"seq_length": 1000}).check([DENSE])


TE = {"transformer_impl": "transformer_engine"}


def te_split(**options) -> ContextSplit:
    return ContextSplit.from_options(OPTIONS | TE | options)


def test_dense_layers_under_a2a_need_heads_for_all_ranks():
    te_split(cp_comm_type=["a2a"]).check([DENSE, S2])
    two = {"tensor_model_parallel_size": 2}
    te_split(cp_comm_type="a2a", **two).check([S2])
    te_split(cp_comm_type=["p2p", "a2a"], **two).check([DENSE, S2])  # one per layer
    with pytest.raises(ConfigError, match="8 KV heads for 16 ranks"):
        te_split(cp_comm_type="a2a", tensor_model_parallel_size=8, context_parallel_size=2).check(
            [DENSE]
        )
    for kinds in ("a2a", ["a2a", "p2p"]):
        with pytest.raises(ConfigError, match="8 KV heads for 16 ranks"):
            te_split(cp_comm_type=kinds, **two).check([DENSE, S2])
    te_split(cp_comm_type="a2a", tensor_model_parallel_size=3, context_parallel_size=1).check(
        [DENSE]
    )


def test_cp_comm_types_are_one_or_one_per_layer():
    assert te_split(cp_comm_type=["p2p", "a2a", "p2p"]).dense_by == "Transformer Engine, p2p, a2a"
    with pytest.raises(ConfigError, match=r"\['p2p', 'a2a'\]: give one for all layers, or one for"):
        te_split(cp_comm_type=["p2p", "a2a"]).check([DENSE, S2, S2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_backend": "unfused"}, "attention_backend=unfused: .*choose auto, flash or"),
        ({"attention_backend": SimpleNamespace(name="unfused")}, "attention_backend=unfused"),
        ({"bf16": False}, "dense layers run in 16 bits only; set bf16"),
    ],
    ids=["unfused", "Megatron's enum", "float32"],
)
def test_attention_that_transformer_engine_has_not(options, said):
    """Without a word before: "No dot product attention backend is available" at the first step."""
    with pytest.raises(ConfigError, match=said):
        te_split(**options).check([S2, DENSE])
    te_split(**options).check([S2])  # no layer of Transformer Engine's attention
    te_split(**options, context_parallel_size=1).check([DENSE])
    ContextSplit.from_options(OPTIONS | options).check([DENSE])  # this package's exchange
    te_split(attention_backend="fused", bf16=False, fp16=True).check([DENSE])


def test_losses_of_the_stock_script_under_uneven_masks():
    options = {"context_parallel_size": 2, "eod_mask_loss": True}
    with pytest.raises(ConfigError, match="calculate-per-token-loss"):
        check_stock_loss(options)
    check_stock_loss(options | {"calculate_per_token_loss": True})
    check_stock_loss(options | {"context_parallel_size": 1})
    check_stock_loss({"eod_mask_loss": True})
