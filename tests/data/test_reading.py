"""`s2megatron data`: which files are read, as what, and what each bad one says."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard

from s2megatron.data import ReadOptions, Tally, documents, find_files
from s2megatron.errors import ConfigError

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def read(path, tally=None, **options) -> list[str]:
    return list(documents(find_files([str(path)]), ReadOptions(**options), tally))


def error_of(path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **options)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files(file, tmp_path, ending):
    packed = PACKERS[ending](LINES)
    assert read(file(f"c.jsonl{ending}", packed)) == ["one", "two"]
    assert read(file("unnamed", packed)) == ["one", "two"]  # by its first bytes
    two_parts = PACKERS[ending](LINES[:16]) + PACKERS[ending](LINES[16:])
    assert read(file("parts", two_parts)) == ["one", "two"]
    assert read(tmp_path) == ["one", "two"]  # found in a folder, whatever packs it
    assert "cannot be read" in error_of(file(f"cut.txt{ending}", PACKERS[ending](b"a" * 99)[:-3]))
    assert f"is named {ending}" in error_of(file(f"plain.txt{ending}", b"text"))


def test_a_large_zstandard_file_comes_in_pieces(file):
    lines = b"".join(
        json.dumps({"text": os.urandom(300).hex()}).encode() + b"\n" for _ in range(900)
    )
    assert len(read(file("large.jsonl.zst", zstandard.compress(lines)))) == 900


@pytest.mark.parametrize("name", ["c.json", "c.ndjson", "c.JSONL", "c.txt", "c"])
def test_json_lines_under_any_name(file, name):
    assert read(file(name, LINES)) == ["one", "two"]
    assert read(file(name, b"\xef\xbb\xbf" + LINES)) == ["one", "two"]
    assert read(file(name, LINES), format="text") == [LINES.decode()]


def test_what_only_looks_like_json_lines_stays_text(file):
    for content in (b'{\n "text": "one"\n}\n', b'[{"text": "a"},\n{"text": "b"}]', b"{}\nfree text",
                    b'{"name": "s2", "version": 1}\n', b"{x}\n{y}\n"):  # fmt: skip
        assert read(file("a.json", content)) == [content.decode()]
    assert read(file("one.json", b'{"text": "a"}\n')) == ["a"]
    assert "not JSON" in error_of(file("b.txt", b"free text"), format="jsonl")


@pytest.mark.parametrize(
    "content, words",
    [
        ("täxt".encode("utf-16"), ["UTF-16", "--encoding utf-16"]),
        ("täxt".encode("utf-16-le"), ["NUL", "--encoding"]),
        ("täxt".encode("latin-1"), ["0xe4 at 1", "UTF-8", "--encoding", "latin-1"]),
        (b"text" * 300 + b"\0", ["NUL", "binary"]),
        (b"\x7fELF\x02\x01\x01\0\0", ["NUL", "binary"]),
        (b"PK\x03\x04abc", ["zip archive"]),
        (b"%PDF-1.7", ["PDF"]),
    ],
)
def test_other_encodings_and_binary_files_are_refused_by_name(file, content, words):
    path = file("odd.txt", content)
    text = error_of(path)
    for word in [str(path), *words, "--skip-bad"]:
        assert word in text
    tally = Tally()
    good = file("good.txt", b"good")
    assert list(documents(find_files([path, good]), ReadOptions(skip_bad=True), tally)) == ["good"]
    assert (tally.files, tally.skipped) == (1, 1) and "odd.txt" in tally.reasons[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "utf-8-sig", "cp1252"])
def test_a_named_encoding(file, encoding):
    assert read(file("a.txt", "täxt\r\nb".encode(encoding)), encoding=encoding) == ["täxt\nb"]
    lines = '{"text": "öne"}\n{"text": "two\u2028"}\n' if "utf" in encoding else '{"text": "öne"}'
    wanted = [json.loads(line)["text"] for line in lines.strip().split("\n")]
    assert read(file("a.jsonl", lines.encode(encoding)), encoding=encoding) == wanted


@pytest.mark.parametrize("encoding", [None, "utf-8", "utf8", "UTF-8", "utf_8", "U8"])
def test_the_mark_at_the_start_of_utf_8_is_no_text(file, encoding):
    assert read(file("a.txt", "\ufefftäxt".encode()), encoding=encoding) == ["täxt"]
    lines = '\ufeff{"text": "öne"}\n{"text": "\ufefftwo"}\n'.encode()
    assert read(file("a.jsonl", lines), encoding=encoding) == ["öne", "\ufefftwo"]


def test_an_unknown_encoding():
    for name in ("utf8x", "base64"):
        with pytest.raises(ConfigError, match="--encoding"):
            ReadOptions(encoding=name)


BAD_LINES = {
    b'{"text": "\xff"}': "byte 0xff at 10 is not UTF-8",
    b'{"text": "\\ud800"}': "\\ud800, half of a surrogate pair",
    b'{"text": null}': "'text' is null",
    b'{"text": 5}': "'text' is a number",
    b'{"text": ["a"]}': "'text' is a list",
    b'{"txt": "a", "id": 1}': "no 'text' field (it has 'txt', 'id')",
    b"[1, 2]": "is a list, not a JSON object",
    b'"text"': "is a string, not a JSON object",
    b'{"text": "a"': "is not JSON",
    b"[" * 200_000: "nested too deeply",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "is not JSON that can be read",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:24].decode(errors="replace"))
def test_a_bad_line_says_file_line_and_reason(file, line):
    path = file("lines.jsonl", LINES + line + b"\n" + LINES)
    text = error_of(path)
    for word in (f"{path}, line 3: ", BAD_LINES[line], "--skip-bad"):
        assert word in text


def test_bad_lines_are_skipped_and_counted(file):
    bad = b"\n".join(BAD_LINES)
    tally = Tally()
    assert read(file("lines.jsonl", LINES + bad + b"\n\n" + LINES), tally, skip_bad=True) == [
        "one", "two", "one", "two",
    ]  # fmt: skip
    assert (tally.files, tally.documents, tally.skipped) == (1, 4, len(BAD_LINES))
    assert len(tally.reasons) == 5 and ", line 3: " in tally.reasons[0]


def test_a_byte_order_mark_is_no_text(file):
    assert read(file("a.jsonl", b"\xef\xbb\xbf" + LINES)) == ["one", "two"]
    assert read(file("a.txt", b"\xef\xbb\xbftext")) == ["text"]


def test_links_are_followed_once(file, tmp_path):
    file("outside/far.txt", b"far")
    file("in/sub/a.txt", b"a")
    tree = tmp_path / "in"
    (tree / "a_link").symlink_to(tmp_path / "outside")
    (tree / "sub" / "circle").symlink_to(tree)
    (tree / "a_twice").symlink_to(tree / "sub")
    (tree / "again.txt").symlink_to(tree / "sub" / "a.txt")
    (tree / "dead.txt").symlink_to(tree / "nowhere")
    notes = []
    found = find_files([str(tree)], notes=notes)
    assert [source.name for source in found] == ["a_link/far.txt", "sub/a.txt"]
    assert len(notes) == 1 and "1 links lead nowhere" in notes[0] and "dead.txt" in notes[0]


def test_names_endings_and_patterns(file, tmp_path):
    for name in ("a.C", "b.txt.GZ", "gen/c.c", "Makefile"):
        file(f"in/{name}", gzip.compress(b"x") if "GZ" in name else b"x")
    tree = str(tmp_path / "in")

    def names(**options):
        return [source.name for source in find_files([tree], **options)]

    assert names() == ["a.C", "b.txt.GZ", "gen/c.c"]
    assert names(suffixes=["c"]) == ["a.C", "gen/c.c"]
    assert names(suffixes=["*"], exclude=["gen/*"]) == ["Makefile", "a.C", "b.txt.GZ"]
    with pytest.raises(ConfigError, match=r"no files ending in c there that --exclude"):
        names(suffixes=["c"], exclude=["*"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        find_files([str(tmp_path / "pipe")])


def test_home_and_spaces(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file("my texts/a b.txt", b"a b")
    assert read("~/my texts") == ["a b"]


def test_directories_as_documents(file, tmp_path):
    file("in/b/two.c", b"2;\n")
    file("in/b/one.c", b"1;")
    file("in/b/empty.c", b"")
    file("in/a.c", b"0;")
    texts = read(tmp_path / "in", group_by="directory")
    assert texts == ["==> a.c <==\n0;\n\n", "==> b/one.c <==\n1;\n\n==> b/two.c <==\n2;\n\n"]
    lines = file("in/b/zz.jsonl", LINES)
    assert f"{lines}: holds JSON lines" in error_of(tmp_path / "in", group_by="directory")
