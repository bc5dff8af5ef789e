"""How an entry of `sparsity.layers` and `sparsity.default` become one pattern."""

import pytest

from s2_kernels import dense, local_stride, ranges, sliding_window
from s2megatron.config import parse_config
from s2megatron.errors import ConfigError

HEADS = {"heads": 8, "kv_heads": 4}
RANGES = [{"reach": 4, "stride": 1}, {"reach": 16, "stride": 2}, {"stride": 4}]
BANDS = [(4, 1), (16, 2), (None, 4)]
LOCAL = {"local_blocks": 3, "stride": 8}
SHIFTED = {"head_offset": 1, "head_step": 2, "dense_heads": 1}


def pattern(default: dict, entry: dict | None = None, **sparsity):
    """Of the one layer that an entry names, or of one that none does."""
    entries = [] if entry is None else [{"layers": [2]} | entry]
    tree = {"sparsity": {"default": default, "layers": entries} | sparsity}
    return parse_config(tree).sparsity.resolve(num_layers=2, **HEADS)[1]


@pytest.mark.parametrize(
    ("default", "entry", "expected"),
    [
        (LOCAL, {"stride": 4}, local_stride(**HEADS, local_blocks=3, stride=4)),
        (LOCAL, {"kind": "dense"}, dense(**HEADS)),
        (LOCAL | SHIFTED, {"kind": "dense"}, dense(**HEADS)),
        (LOCAL, {"kind": "sliding_window"}, sliding_window(**HEADS, local_blocks=3)),
        (LOCAL | SHIFTED, {"kind": "sliding_window", "local_blocks": 5},
         sliding_window(**HEADS, local_blocks=5)),
        (LOCAL, {"ranges": RANGES}, ranges(**HEADS, bands=BANDS)),
        (LOCAL | SHIFTED, {"ranges": RANGES}, ranges(**HEADS, bands=BANDS, **SHIFTED)),
        # Bands of the default do not go with a window and a stride of the entry's own.
        ({"ranges": RANGES}, LOCAL, local_stride(**HEADS, **LOCAL)),
        ({"ranges": RANGES} | SHIFTED, LOCAL, local_stride(**HEADS, **LOCAL, **SHIFTED)),
        ({"ranges": RANGES}, {"kind": "local_stride"} | LOCAL, local_stride(**HEADS, **LOCAL)),
        ({"ranges": RANGES}, {"kind": "sliding_window", "local_blocks": 2},
         sliding_window(**HEADS, local_blocks=2)),
        ({"ranges": RANGES}, {"ranges": RANGES[:1]}, sliding_window(**HEADS, local_blocks=4)),
        ({"kind": "dense"}, LOCAL, local_stride(**HEADS, **LOCAL)),
        (LOCAL | SHIFTED, {"homogeneous": True},
         local_stride(**HEADS, **LOCAL, homogeneous=True, head_offset=1, dense_heads=1)),
        (LOCAL, {"head_step": 3, "head_offset": 2},
         local_stride(**HEADS, **LOCAL, head_step=3, head_offset=2)),
    ],
)  # fmt: skip
def test_an_entry_over_the_default(default, entry, expected):
    assert pattern(default, entry) == expected


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (LOCAL, local_stride(**HEADS, **LOCAL)),
        ({"ranges": RANGES}, ranges(**HEADS, bands=BANDS)),
        ({"kind": "sliding_window", "local_blocks": 7}, sliding_window(**HEADS, local_blocks=7)),
        ({"kind": "dense"}, dense(**HEADS)),
    ],
)
def test_the_default_alone(default, expected):
    assert pattern(default) == expected


def test_block_sizes():
    """The layer's own, else the default's, else the run's, else 64."""
    sizes = {16: [{"block_size": 16}], 32: [{}, {"block_size": 32}], 128: [{}, {}]}
    for expected, (own, *default) in sizes.items():
        given = LOCAL | (default[0] if default else {"block_size": 32})
        for kind in ({}, {"kind": "dense"}, {"kind": "sliding_window"}, {"ranges": RANGES}):
            assert pattern(given, kind | own, block_size=128).block_size == expected
    assert pattern(LOCAL).block_size == 64


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"kind": "dense", "local_blocks": 2}, "local_blocks does not go with kind 'dense'"),
        ({"kind": "sliding_window", "stride": 2}, "stride does not go with kind 'sliding_window'"),
        ({"kind": "ranges", "ranges": RANGES, "local_blocks": 2, "stride": 2},
         "local_blocks, stride does not go with kind 'ranges'"),
        ({"kind": "local_stride", "ranges": RANGES}, "ranges does not go with kind 'local_stride'"),
        ({"kind": "ranges"}, "ranges is missing: kind 'ranges' needs it"),
        ({"kind": "sliding_window"}, "local_blocks is missing: kind 'sliding_window' needs it"),
        ({"kind": "local_stride", "local_blocks": 2}, "stride is missing"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(entry, told):
    """In the default, where nothing is filled in from elsewhere."""
    with pytest.raises(ConfigError) as error:
        pattern(entry)
    assert told in str(error.value) and "sparsity" in str(error.value)


@pytest.mark.parametrize(
    "layers", ["every 0", "every 2 from 0", "every 0 from 2", "all but 1", "1-", "2-1"]
)
def test_layers_that_are_not_understood(layers):
    with pytest.raises(ConfigError, match=rf"sparsity\.layers\[0\].*{layers!r} is not understood"):
        pattern(LOCAL, {"layers": layers, "kind": "dense"})


def test_layer_0_is_told():
    with pytest.raises(ConfigError, match=r"sparsity\.layers\[0\]"):
        pattern(LOCAL, {"layers": "0", "kind": "dense"})


@pytest.mark.parametrize(
    ("layers", "in_vain"),
    [("every 12", ["every 12"]), ("every 4 from 30", ["every 4 from 30"]),
     ([1, "every 12"], ["every 12"]), ("every 8", []), ([1, "5-8"], [])],
)  # fmt: skip
def test_what_names_no_layer_is_told(layers, in_vain):
    """A model that was made small to try it is without what the entry asks for."""
    sparsity = {"default": LOCAL, "layers": [{"layers": 1}, {"layers": layers, "kind": "dense"}]}
    found = parse_config({"sparsity": sparsity}).sparsity
    assert len(found.resolve(num_layers=8, **HEADS)) == 8
    assert found.in_vain(8) == [
        f"sparsity.layers[1]: {item!r} names none of the 8 layers: no layer has what it asks for"
        for item in in_vain
    ]
    assert found.in_vain(30) == []


def test_an_entry_without_layers_is_refused():
    with pytest.raises(ConfigError) as error:
        pattern(LOCAL, {"layers": [], "kind": "dense"})
    assert str(error.value) == (
        "sparsity.layers[0]: layers: [] names no layer; name some, or leave the entry out"
    )


def test_no_entries_at_all():
    sparse = parse_config({"sparsity": {"default": LOCAL, "layers": []}}).sparsity
    assert sparse.resolve(num_layers=2, **HEADS) == (local_stride(**HEADS, **LOCAL),) * 2


@pytest.mark.parametrize(
    ("layers", "dense_ones"),
    [("every 1", [1, 2, 3, 4]), ("every 1 from 3", [3, 4]), ("every 2", [2, 4]),
     ("every 2 from 1", [1, 3]), ("2-3", [2, 3]), ("all", [1, 2, 3, 4])],
)  # fmt: skip
def test_layers_by_words(layers, dense_ones):
    tree = {"sparsity": {"default": LOCAL, "layers": [{"layers": layers, "kind": "dense"}]}}
    found = parse_config(tree).sparsity.resolve(num_layers=4, **HEADS)
    assert [number for number, one in enumerate(found, 1) if one.is_dense] == dense_ones


def test_the_last_entry_that_names_a_layer_decides():
    tree = {"sparsity": {"default": LOCAL, "layers": [
        {"layers": "all", "kind": "dense"}, {"layers": "1-2", "stride": 4}, {"layers": 2},
    ]}}  # fmt: skip
    first, second, third = parse_config(tree).sparsity.resolve(num_layers=3, **HEADS)
    assert first == local_stride(**HEADS, local_blocks=3, stride=4)
    assert second == local_stride(**HEADS, **LOCAL) and third.is_dense


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"sparsity": {"default": LOCAL | {"stride": "x"}}},
         "sparsity.default.stride: 'x': Input should be a valid integer\n"
         "sparsity.default.stride: 'x': Input should be a valid list"),
        ({"sparsity": {"default": LOCAL | {"kind": "dense"}}},
         "sparsity.default: local_blocks, stride does not go with kind 'dense'; leave it out, or "
         "choose another kind"),
        ({"sparsity": {"default": LOCAL}, "output": {"keep": 0}},
         "output.keep: 0: Input should be greater than or equal to 1"),
        ({"sparsity": {"default": LOCAL}, "data": {"tokenizer": "byte"}},
         "data.tokenizer: 'byte': must be 'bytes', 'huggingface:NAME_OR_DIR', 'sentencepiece:FILE' "
         "or 'megatron'"),
        ({"sparsity": {"default": LOCAL, "layers": [{"stride": 4}]}},
         "sparsity.layers[0].layers: is missing"),
        ({"sparsity": {"default": {"ranges": [{"reach": 2}]}}},
         "sparsity.default.ranges[0].stride: is missing"),
        ({"sparsity": {"default": {"ranges": [{"reech": 2, "stride": 1}]}}},
         "sparsity.default.ranges[0].reech: unknown key; did you mean 'reach'?"),
        ({"sparsity": {"default": LOCAL, "layers": [{"layers": 1, "quux": 1}]}},
         "sparsity.layers[0].quux: unknown key; known here: kind, block_size, local_blocks, "
         "stride, ranges, head_offset, head_step, homogeneous, dense_heads, layers"),
        ({"sparsity": {"default": LOCAL}, "out": {}}, "out: unknown key; did you mean 'output'?"),
    ],
)  # fmt: skip
def test_each_error_in_full(tree, told):
    with pytest.raises(ConfigError) as error:
        parse_config(tree)
    assert str(error.value) == told
