"""`s2megatron data` from its command line: what is written, reported and refused."""

from pathlib import Path

import numpy
import pytest
from in_process import run_command_line

from s2megatron.cli import main
from s2megatron.data import find_files, hold_out, make_tokenizer, tokenizers, write_dataset, writer
from s2megatron.data.tokenizers import END_OF_TEXT, train_bpe
from s2megatron.errors import ConfigError


def build(*argv) -> str:
    status, out, err = run_command_line(main, ["data", *map(str, argv)])
    assert status == 0, err
    return out


def refused(*argv) -> str:
    status, out, err = run_command_line(main, ["data", *map(str, argv)])
    assert status == 2, out
    return err


def tokens(prefix) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(prefix))]


def texts(prefix) -> list[str]:
    return [bytes(document[:-1]).decode() for document in tokens(prefix)]


@pytest.fixture
def tree(tmp_path):
    """40 folders of 5 files, one of them much larger."""
    for number in range(40):
        folder = tmp_path / "tree" / f"part{number % 4}" / f"sub{number}"
        folder.mkdir(parents=True)
        for name in "abcde":
            size = 9000 if number == 7 else 90
            (folder / f"{name}.c").write_text(f"int {name}{number}; // {'x' * size}\n")
    return tmp_path / "tree"


def test_the_report_says_what_was_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n5\n{"text": ""}\n{"text": null}\n')
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.txt").write_bytes(b"\0")
    out = build(tmp_path, "--out", tmp_path / "out", "--skip-bad")
    assert "2 files, 2 documents, 8 tokens, vocabulary 257 (bytes), 1 empty documents" in out
    assert "skipped 3 lines or files" in out
    assert "a.jsonl, line 2: is a number" in out and "c.txt: holds NUL" in out
    assert texts(tmp_path / "out") == ["one", "two"]
    (tmp_path / "c.txt").unlink()
    assert "a.jsonl, line 2: is a number" in refused(tmp_path, "--out", tmp_path / "none")
    assert not list(tmp_path.glob("none*"))
    (tmp_path / "bad.jsonl").write_text("1\n2\n")
    nothing = refused(tmp_path / "bad.jsonl", "--out", tmp_path / "none", "--skip-bad")
    assert "holds no text" in nothing and "skipped 2 lines" in nothing


def test_one_meaning_of_a_path(tmp_path, monkeypatch):
    """What is written under a path with a blank or `~` is what a run file finds under it."""
    from s2megatron.config import DataConfig
    from s2megatron.training.data_options import resolve

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    for prefix in ("~/my data/x", "~/0.5", "b c"):
        build("~/a.txt", f"--out={prefix}")
    assert not (tmp_path / "~").exists() and (tmp_path / "my data" / "x.bin").is_file()

    def data_path(*entries):
        return resolve(DataConfig(train=list(entries)), {})["train_data_path"]

    home = str(tmp_path)
    assert data_path("~/my data/x", "b c") == [f"{home}/my data/x", "b c"]
    assert data_path("0.3 ~/my data/x", "0.7  b c") == ["0.3", f"{home}/my data/x", "0.7", "b c"]
    assert data_path("0.5") == ["./0.5"]  # a number alone would be a weight to Megatron
    with pytest.raises(ConfigError, match=r"data\.train: 'b c' has no weight and others have one"):
        data_path("0.3 ~/my data/x", "b c")
    with pytest.raises(ConfigError, match=r"--out 'd e'`"):
        data_path("d e")
    found = DataConfig(cache="~/c", tokenizer="huggingface:~/tok")
    assert (found.cache, found.tokenizer) == (f"{home}/c", f"huggingface:{home}/tok")


def test_prefixes_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for prefix in (tmp_path, f"{tmp_path}/", f"{tmp_path}/x "):
        assert "--out" in refused(tmp_path / "a.txt", "--out", prefix)


def word_level(folder: Path, vocabulary: dict[str, int], **special) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return f"huggingface:{folder}"


def test_a_tokenizer_without_an_end_is_refused_whatever_its_kind(tmp_path):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("every head keeps its own shard\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "sp"), vocab_size=19, eos_id=-1, minloglevel=2
    )
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"no model")
    for name in (
        f"sentencepiece:{tmp_path}/sp.model",
        word_level(tmp_path / "words", {"<unk>": 0, "head": 1}),
    ):
        message = refused(text, "--out", tmp_path / "out", "--tokenizer", name)
        assert "has no end-of-text token among its" in message and name in message
    assert "cannot be loaded" in refused(
        text, "--out", tmp_path / "out", "--tokenizer", f"sentencepiece:{bad}"
    )
    assert not list(tmp_path.glob("out*"))


def test_no_id_outside_the_vocabulary_is_written(tmp_path):
    """A vocabulary with a hole has a highest id beyond its size."""
    name = word_level(tmp_path / "holes", {"<eos>": 0, "<unk>": 1, "far": 9}, eos_token="<eos>")
    text = tmp_path / "text.txt"
    text.write_text("far")
    message = refused(text, "--out", tmp_path / "out", "--tokenizer", name)
    assert "gives token 9 in document 1, and has 3 tokens (0 to 2)" in message
    assert not list(tmp_path.glob("out*"))


def test_several_processes_write_what_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BATCH", 1000)
    documents = ["x" * (number * 37 % 500) + str(number) for number in range(60)]
    one = write_dataset(iter(documents), str(tmp_path / "one"))
    two = write_dataset(iter(documents), str(tmp_path / "two"), workers=2)
    assert (one.documents, one.tokens) == (two.documents, two.tokens)
    for ending in (".bin", ".idx"):
        written = [(tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "two")]
        assert written[0] == written[1]


def test_documents_are_streamed(tmp_path, monkeypatch):
    """Reading is never more than two batches ahead of writing."""
    monkeypatch.setattr(writer, "BATCH", 1000)
    given, taken = 0, []

    def produce():
        nonlocal given
        for _ in range(50):
            given += 1
            yield "x" * 500

    encode = writer._encode
    monkeypatch.setattr(writer, "_encode", lambda *args: taken.append(given) or encode(*args))
    write_dataset(produce(), str(tmp_path / "out"))
    assert taken[0] <= 4 and taken == sorted(taken) and len(taken) == 25


def test_whole_subtrees_are_held_out(tree, tmp_path):
    arguments = [tree, "--out", tmp_path / "train", "--hold-out", "0.1", "--hold-out-depth", "2",
                 "--hold-out-to", tmp_path / "held"]  # fmt: skip
    out = build(*arguments)
    train, held = texts(tmp_path / "train"), texts(tmp_path / "held")
    assert len(train) + len(held) == 200 and not set(train) & set(held)
    numbers = [{text.split(";")[0][5:] for text in part} for part in (train, held)]
    assert not numbers[0] & numbers[1] and len(held) % 5 == 0
    size = sum(map(len, train + held))
    assert 0.05 * size < sum(map(len, held)) <= 0.1 * size
    assert f"held out: {len(held)} files" in out and "part" in out
    build(*arguments)
    assert texts(tmp_path / "held") == held
    # another place on the disk, the same answer
    _, again, _ = hold_out(find_files([str(tree.rename(tmp_path / "moved"))]), 0.1, 2)
    assert [source.path.read_text() for source in again] == held


def test_what_cannot_be_held_out(tree, tmp_path):
    common = [tree, "--out", tmp_path / "a"]
    assert "raise --hold-out-depth" in refused(
        *common, "--hold-out", "0.01", "--hold-out-to", tmp_path / "b"
    )
    assert "give both" in refused(*common, "--hold-out", "0.1")
    assert "between 0 and 1" in refused(*common, "--hold-out", "2", "--hold-out-to", "b")
    assert "is --out as well" in refused(
        *common, "--hold-out", "0.1", "--hold-out-to", tmp_path / "a"
    )
    assert "name the folders" in refused(
        tree / "part0" / "sub0" / "a.c", "--out", tmp_path / "a", "--group-by", "directory"
    )


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tree, tmp_path):
    folder = tmp_path / "tokenizer"
    arguments = [
        tree, "--out", tmp_path / "train", "--group-by", "directory",
        "--hold-out", "0.2", "--hold-out-depth", "2", "--hold-out-to", tmp_path / "held",
        "--train-tokenizer", "bpe:300", "--tokenizer", f"huggingface:{folder}",
    ]  # fmt: skip
    out = build(*arguments)
    assert "BPE of 300 tokens, trained on" in out
    encode, end, size = make_tokenizer(f"huggingface:{folder}")
    assert (end, size) == (0, 300)
    ids = tokens(tmp_path / "train")
    assert len(ids) + len(tokens(tmp_path / "held")) == 40 and all(i[-1] == 0 for i in ids)

    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    text = "  int a_b = 1234567;\n\n\treturn täxt;  \r\n"
    assert loaded.decode(encode(text)) == text and loaded.eos_token == END_OF_TEXT
    assert loaded.decode(ids[0][:-1]).startswith("==> part")
    assert loaded(text, add_special_tokens=False)["input_ids"] == list(encode(text))
    assert "is there already" in refused(*arguments)
    assert "bpe:32768" in refused(*arguments[:-4], "--train-tokenizer", "wordpiece:9",
                                  "--tokenizer", f"huggingface:{folder}2")  # fmt: skip
    assert "--tokenizer huggingface:FOLDER" in refused(*arguments[:-2])


def test_a_tokenizer_of_less_text_than_asked_for(tmp_path):
    assert train_bpe(["ab ab ab"], 1000, tmp_path / "small") < 270
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(["ab"], 100, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    encode, _, size = make_tokenizer(f"huggingface:{tmp_path / 'small'}")
    assert numpy.asarray(encode(bytes(range(256)).decode("latin-1"))).max() < size


def test_a_long_document_is_not_cut_to_what_a_model_takes(tmp_path):
    from transformers import AutoTokenizer

    name = word_level(tmp_path / "short", {"<eos>": 0, "<unk>": 1, "a": 2}, eos_token="<eos>")
    short = AutoTokenizer.from_pretrained(tmp_path / "short")
    short.backend_tokenizer.enable_truncation(4)
    short.backend_tokenizer.enable_padding(length=4)
    short.save_pretrained(tmp_path / "short")
    encode, _, _ = make_tokenizer(name)
    assert encode("a " * 9) == [2] * 9 and encode("a") == [2]


def test_a_long_document_in_pieces_has_the_same_tokens(tmp_path, monkeypatch):
    source = Path(tokenizers.__file__).read_text()
    text = source + "x\n\n\ny\n  z\r\n\r\nw \n\t\nend \n#1\n'll" + "e\u0301\n\u0301a\n" * 3
    train_bpe([source], 400, tmp_path / "bpe")
    encode, _, _ = make_tokenizer(f"huggingface:{tmp_path / 'bpe'}")
    monkeypatch.setattr(tokenizers, "PIECE", len(text))
    whole = list(encode(text))
    for piece in (1, 50):
        monkeypatch.setattr(tokenizers, "PIECE", piece)
        assert len(list(tokenizers._pieces(text))) > len(text) // (piece + 400)
        assert "".join(tokenizers._pieces(text)) == text and list(encode(text)) == whole
    assert list(encode("")) == []
    words = word_level(tmp_path / "words", {"<eos>": 0, "<unk>": 1}, eos_token="<eos>")
    assert isinstance(make_tokenizer(words)[0]("a\nb"), list)  # another split: never cut
