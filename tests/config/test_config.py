"""Run files: what they mean, and what each mistake says."""

import copy
from pathlib import Path

import pytest
import yaml
from launches import ROOT, TINY, write_run_file

from s2_kernels import dense, local_stride, ranges, sliding_window
from s2megatron.config import load_config, parse_config
from s2megatron.data import write_dataset
from s2megatron.errors import ConfigError
from s2megatron.training.data_options import check_dataset, resolve

EXAMPLE = """
sparsity:
  block_size: 64
  default: {local_blocks: 16, stride: 16}
  layers:
    - {layers: [1, 2], kind: dense}
    - {layers: "13-24", stride: [8, 8, 16, 16, 16, 16, 32, 32]}
    - {layers: [24], ranges: [{reach: 16, stride: 1}, {reach: 128, stride: 4}, {stride: 16}]}
megatron: {num_layers: 24}
"""
SIZES = {"num_layers": 24, "heads": 32, "kv_heads": 8}


def resolved(text=EXAMPLE, **sizes):
    return parse_config(yaml.safe_load(text)).sparsity.resolve(**(SIZES | sizes))


def test_the_documented_example():
    layers = resolved()
    heads = {"heads": 32, "kv_heads": 8}
    assert layers[0] == layers[1] == dense(**heads)
    assert layers[2] == layers[11] == local_stride(**heads, local_blocks=16, stride=16)
    per_head = local_stride(**heads, local_blocks=16, stride=[8, 8, 16, 16, 16, 16, 32, 32])
    assert layers[12] == layers[22] == per_head
    assert layers[23] == ranges(**heads, bands=[(16, 1), (128, 4), (None, 16)])


@pytest.mark.parametrize(
    "layers, numbers",
    [
        ("every 4", {4, 8, 12, 16, 20, 24}),
        ("every 8 from 1", {1, 9, 17}),
        ("all", set(range(1, 25))),
        ([3, "7-9"], {3, 7, 8, 9}),
        (5, {5}),
    ],
)
def test_repeating_forms(layers, numbers):
    tree = yaml.safe_load(EXAMPLE)
    tree["sparsity"]["layers"] = [{"layers": layers, "kind": "dense"}]
    patterns = parse_config(tree).sparsity.resolve(**SIZES)
    assert {n for n, p in enumerate(patterns, 1) if p.is_dense} == numbers


def test_sliding_window_takes_its_window_from_the_default():
    tree = yaml.safe_load(EXAMPLE)
    tree["sparsity"]["layers"] = [{"layers": [2], "kind": "sliding_window"}]
    patterns = parse_config(tree).sparsity.resolve(**SIZES)
    assert patterns[1] == sliding_window(heads=32, kv_heads=8, local_blocks=16)


def set_at(path, value):
    def change(tree):
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


LAYERS = ("sparsity", "layers")


@pytest.mark.parametrize(
    "change, words",
    [
        (set_at(("sparsity", "default", "strid"), 4), ["sparsity.default.strid", "'stride'"]),
        (set_at(("sparsity", "blocksize"), 4), ["sparsity.blocksize", "'block_size'"]),
        (set_at(("megatrn",), {}), ["megatrn", "'megatron'"]),
        (set_at(("sparsity", "default", "stride"), 0), ["sparsity.default", "stride=0"]),
        (set_at(("sparsity", "default", "stride"), "x"), ["sparsity.default.stride", "'x'"]),
        (set_at(("sparsity", "block_size"), 48), ["block_size=48", "16, 32, 64, 128, 256"]),
        (set_at((*LAYERS, 0, "layers"), [25]), ["sparsity.layers[0]", "layer 25 of 24"]),
        (set_at((*LAYERS, 0, "layers"), "5-3"), ["sparsity.layers[0]", "'5-3'", "every 4"]),
        (set_at((*LAYERS, 0, "stride"), 3), ["sparsity.layers[0]", "stride", "'dense'"]),
        (set_at((*LAYERS, 1, "stride"), [8, 8]), ["sparsity.layers[1]", "2 strides", "8 KV heads"]),
        (set_at((*LAYERS, 2, "stride"), 4), ["sparsity.layers[2]", "'ranges'"]),
        (
            set_at((*LAYERS, 2, "ranges"), [{"reach": 16, "stride": 1}, {"reach": 8, "stride": 4}]),
            ["sparsity.layers[2]", "reach 8 after reach 16"],
        ),
        (
            set_at((*LAYERS, 2, "ranges"), [{"stride": 1}, {"stride": 4}]),
            ["sparsity.layers[2]", "must reach further"],
        ),
        (set_at((*LAYERS, 2, "ranges", 0, "reech"), 3), ["ranges[0].reech", "'reach'"]),
        (set_at((*LAYERS, 0, "kind"), "dens"), ["sparsity.layers[0].kind", "'dens'"]),
        (set_at(("data",), {"tokenizer": "byte"}), ["data.tokenizer", "'byte'", "'bytes'"]),
        (lambda tree: tree["sparsity"].pop("default"), ["sparsity.default", "is missing"]),
    ],
)
def test_mistakes_name_field_value_and_way_out(change, words):
    tree = yaml.safe_load(EXAMPLE)
    change(tree)
    with pytest.raises(ConfigError) as error:
        parse_config(tree).sparsity.resolve(**SIZES)
    for word in words:
        assert word in str(error.value)


def test_overrides(tmp_path):
    file = write_run_file(tmp_path / "run.yaml", TINY)
    changes = ["megatron.lr=0.5", "sparsity.layers.0.layers=[2,3]", "data.mock=true"]
    run = load_config(file, changes)
    assert run.megatron["lr"] == 0.5 and run.data.mock and run.sparsity.layers[0].layers == [2, 3]
    for bad in ("megatron.lr", "sparsity.layers.7.kind=dense", "sparsity.block_size.x=1"):
        with pytest.raises(ConfigError, match=bad.split("=")[0].replace(".", r"\.")):
            load_config(file, [bad])


def test_unreadable_run_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(tmp_path / "list.yaml")


@pytest.fixture
def dataset(tmp_path):
    prefix = str(tmp_path / "corpus")
    report = write_dataset(["hello", "S2 attention", ""], prefix)
    assert (report.documents, report.tokens) == (2, 5 + 12 + 2)
    return prefix


def options(megatron=None, **data):
    tree = copy.deepcopy(TINY) | {"data": data}
    return resolve(parse_config(tree).data, megatron or {})


def test_a_sound_dataset_passes(dataset):
    check_dataset(dataset, "data.train")
    assert options(train=dataset)["train_data_path"] == [dataset]
    blend = options(train=[f"0.3 {dataset}", f"0.7 {dataset}"])["train_data_path"]
    assert blend == ["0.3", dataset, "0.7", dataset]


def test_written_dataset_reads_back(dataset):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    written = IndexedDataset(dataset)
    assert [bytes(d[:-1].astype("uint8")) for d in written] == [b"hello", b"S2 attention"]
    assert all(d[-1] == 256 for d in written)


def test_missing_data(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train: .*nothing\.bin does not exist"):
        options(train=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"data\.train: is missing"):
        options()


@pytest.mark.parametrize("megatron, data, words", [
    ({"mock_data": True}, {"train": "X"}, "mock_data: True beside data.train"),
    ({"train_data_path": ["a"]}, {"train": "X"}, "train_data_path: ['a'] beside data.train"),
    ({"data_path": ["a"]}, {"valid": "X"}, "data_path: ['a'] beside data.valid"),
    ({"train_data_path": ["a"]}, {"mock": True}, "train_data_path: ['a'] beside data.mock"),
    ({"data_cache_path": "a"}, {"mock": True, "cache": "b"}, "data_cache_path: 'a' beside data.ca"),
    ({"tokenizer_type": "NullTokenizer"}, {"mock": True, "tokenizer": "huggingface:d"},
     "tokenizer_type: 'NullTokenizer' beside data.tokenizer: 'huggingface:d'"),
    ({"tokenizer_model": "e"}, {"mock": True, "tokenizer": "huggingface:d"},
     "tokenizer_model: 'e' beside data.tokenizer: 'huggingface:d'"),
    ({"tokenizer_model": "e"}, {"mock": True, "tokenizer": "bytes"},
     "tokenizer_model: 'e' beside data.tokenizer: 'bytes'"),
    ({"vocab_size": 512}, {"mock": True}, "vocab_size: 512 beside data.tokenizer: 'bytes'"),
    ({"vocab_size": 512, "tokenizer_type": "NullTokenizer"}, {"mock": True, "tokenizer": "bytes"},
     "vocab_size: 512 beside data.tokenizer: 'bytes'"),
])  # fmt: skip
def test_two_sections_that_do_not_agree(dataset, megatron, data, words):
    """Megatron's options won, and what `data:` said was not read."""
    data = {name: dataset if value == "X" else value for name, value in data.items()}
    with pytest.raises(ConfigError) as error:
        options(megatron, **data)
    assert str(error.value).startswith(f"megatron.{words}")


def test_sections_that_agree(dataset):
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "d"}
    assert options(own, mock=True).items() >= own.items()  # no data.tokenizer is named
    assert options(own, mock=True, tokenizer="megatron").items() >= own.items()
    assert options(own, mock=True, tokenizer="huggingface:d").items() >= own.items()
    nothing = dict.fromkeys(("tokenizer_type", "train_data_path", "data_cache_path"))
    found = options(nothing, train=dataset, cache="c", tokenizer="huggingface:d")
    assert found["tokenizer_type"] == "HuggingFaceTokenizer"
    assert found["train_data_path"] == [dataset] and found["data_cache_path"] == "c"


def test_vocab_size_goes_to_who_reads_it(capsys):
    """It went into the checkpoint of a run that ignored it, and `convert to-hf` believed it."""
    hugging_face = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "d"}
    for data in ({}, {"tokenizer": "megatron"}, {"tokenizer": "huggingface:d"}):
        assert "vocab_size" not in options(hugging_face, mock=True, **data)
    assert capsys.readouterr().err == ""  # nobody gave one
    assert "vocab_size" not in options(hugging_face | {"vocab_size": 512}, mock=True)
    told = "megatron.vocab_size: 512 is not read: HuggingFaceTokenizer has a size of its own"
    assert told in capsys.readouterr().err
    for kind in ("NullTokenizer", "TikTokenizer"):
        given = {"tokenizer_type": kind, "vocab_size": 512}
        assert options(given, mock=True, tokenizer="megatron").items() >= given.items()
    assert options(mock=True)["vocab_size"] == 257
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("path", (ROOT / "configs").glob("*.yaml"), ids=lambda path: path.stem)
def test_own_tokenizer_in_a_shipped_run_file(path):
    """What its comment says to give; NullTokenizer won over it."""
    if "NullTokenizer" in path.read_text():
        said = "data.tokenizer=huggingface:DIR", "megatron.tokenizer_type=null"
        assert " ".join(said) in path.read_text()
        run = load_config(path, [*said, "data.train=[]", "data.valid=[]", "data.mock=true"])
        found = resolve(run.data, run.megatron)
        assert found["tokenizer_type"] == "HuggingFaceTokenizer"
        assert found["tokenizer_model"] == "DIR" and "vocab_size" not in found


@pytest.mark.parametrize("damage", ["header", "cut", "other"])
def test_corrupt_index(dataset, damage):
    index, data = Path(f"{dataset}.idx"), Path(f"{dataset}.bin")
    if damage == "header":
        index.write_bytes(b"x" + index.read_bytes()[1:])
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:-20])
    else:
        data.write_bytes(data.read_bytes() + b"12")
    with pytest.raises(ConfigError, match=r"data\.train: .*corpus\.idx.*`s2megatron data"):
        options(train=dataset)


def test_tokenizers_by_name(tmp_path):
    """A Hugging Face tokenizer folder and a SentencePiece model, both made here."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from s2megatron.data import make_tokenizer

    vocabulary = {"<eos>": 0, "sparse": 1, "shards": 2, "<unk>": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path)
    encode, end, size = make_tokenizer(f"huggingface:{tmp_path}")
    assert (encode("sparse shards"), end, size) == ([1, 2], 0, 4)

    text = tmp_path / "text.txt"
    text.write_text("every head keeps its own shard\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=20, minloglevel=2
    )
    encode, end, size = make_tokenizer(f"sentencepiece:{tmp_path}/sp.model")
    assert size == 20 and len(encode("own shard")) > 1 and end == 2
    for bad in (f"sentencepiece:{tmp_path}/gone.model", "word", f"huggingface:{tmp_path}/gone"):
        with pytest.raises(ConfigError, match="--tokenizer"):
            make_tokenizer(bad)


def test_dataset_input_mistakes(tmp_path):
    from s2megatron.data import documents, find_files

    with pytest.raises(ConfigError, match="no such file or folder"):
        find_files([str(tmp_path / "gone")])
    with pytest.raises(ConfigError, match="no files ending in"):
        find_files([str(tmp_path)])
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ConfigError, match=r"lines\.jsonl, line 2.*'text'"):
        list(documents(find_files([lines])))
    with pytest.raises(ConfigError, match="holds no text"):
        write_dataset([""], str(tmp_path / "empty"))
    assert not list(tmp_path.glob("empty*"))  # nothing half-written
