"""Files -> documents: compressed or not, text or JSON lines, in an encoding that is checked.

What cannot be read is refused, naming file, line and reason. With `skip_bad` it is left out and
counted instead.
"""

import codecs
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from s2megatron.data.sources import LINE_SUFFIXES, Source, unpacked_name
from s2megatron.data.streams import DAMAGE, HOLDS_NUL, AsUtf8, Bad, check_is_text, unpack
from s2megatron.errors import ConfigError, did_you_mean

KEPT_REASONS = 5


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    field: str = "text"
    """Of a JSON line, the field that holds its document."""
    encoding: str | None = None
    """Of all files; None: UTF-8, and what looks like something else is refused."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """'text': a file is a document; 'jsonl': a line is one; 'auto': by its name and its start."""
    skip_bad: bool = False
    """Leave out lines and files that cannot be read, and count them."""
    group_by: Literal["file", "directory"] = "file"
    """'directory': the text files that lie directly in a folder are one document."""

    def __post_init__(self):
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except (LookupError, UnicodeError):
                near = did_you_mean(self.encoding, ["utf-8", "utf-16", "latin-1", "cp1252"])
                raise ConfigError(
                    f"--encoding {self.encoding!r}: Python knows no such text encoding{near}"
                ) from None


@dataclass
class Tally:
    """What was read so far."""

    files: int = 0
    documents: int = 0
    skipped: int = 0
    """Lines and files left out (`ReadOptions.skip_bad`)."""
    reasons: list[str] = field(default_factory=list)
    """The first of them, with file, line and reason."""
    advance: Callable[[int], object] = lambda count: None
    """Called with the bytes read from the disk, for a progress bar."""

    def skip(self, reason: str) -> None:
        self.skipped += 1
        if len(self.reasons) < KEPT_REASONS:
            self.reasons.append(reason)


def documents(
    sources: Iterable[Source], options: ReadOptions | None = None, tally: Tally | None = None
) -> Iterator[str]:
    """The documents of the files, in their order, one in memory at a time.

    Raises:
        ConfigError: a file or a line cannot be read, naming it and the reason.
    """
    options, tally = options or ReadOptions(), tally or Tally()
    if options.group_by == "directory":
        texts = _by_directory(sources, options, tally)
    else:
        texts = (text for source in sources for text in _read(source, options, tally))
    for text in texts:
        tally.documents += 1
        yield text


def _by_directory(sources: Iterable[Source], options: ReadOptions, tally: Tally) -> Iterator[str]:
    """Per folder, its files one after the other, each after a line that names it."""
    folders: dict[str, list[Source]] = {}
    for source in sources:
        folders.setdefault(os.fsencode(source.path.parent).decode(errors="replace"), []).append(
            source
        )
    for group in folders.values():
        parts = []
        for source in group:
            for text in _read(source, options, tally):
                if text:
                    shown = os.fsencode(source.name).decode(errors="replace")
                    parts.append(f"==> {shown} <==\n{text}{'' if text[-1] == '\n' else '\n'}\n")
        yield "".join(parts)


def _read(source: Source, options: ReadOptions, tally: Tally) -> Iterator[str]:
    """The documents of one file."""
    done = 0
    try:
        with source.path.open("rb") as raw:
            stream, lines = _open(source, raw, options)
            if lines is None:
                yield _whole(stream.read(), options.encoding)
            else:
                for number, line in enumerate(lines, 1):
                    if number % 1000 == 0:
                        tally.advance(raw.tell() - done)
                        done = raw.tell()
                    if not line.strip():
                        continue
                    try:
                        yield _text_of(line, options, first=number == 1)
                    except Bad as reason:
                        _refuse(f"{source.path}, line {number}: {reason}", options, tally)
    except Bad as reason:
        _refuse(f"{source.path}: {reason}", options, tally)
    except UnicodeDecodeError as error:
        _refuse(f"{source.path}: {_not_in(error)}", options, tally)
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        _refuse(f"{source.path}: cannot be read: {reason}", options, tally)
    else:
        tally.files += 1
    tally.advance(source.size - done)


def _refuse(reason: str, options: ReadOptions, tally: Tally) -> None:
    if not options.skip_bad:
        raise ConfigError(
            f"data {reason}\n--skip-bad leaves such lines and files out and counts them"
        ) from None
    tally.skip(reason)


# -- a file's bytes, and whether they are lines --------------------


def _open(source: Source, raw: BinaryIO, options: ReadOptions):
    """(its bytes, None), or for JSON lines (its bytes, an iterator over its lines).

    Bytes are in `options.encoding` where a line ends with the byte of a line feed in it, and in
    UTF-8 where it does not, as in UTF-16.
    """
    stream = unpack(source, raw)
    head = stream.peek(512)
    if options.encoding is None:
        check_is_text(head)
    elif "\n".encode(options.encoding) != b"\n":
        stream = AsUtf8(stream, options.encoding)
    if options.format == "text":
        return stream, None
    if options.format == "jsonl" or unpacked_name(source.path).endswith(LINE_SUFFIXES):
        start, is_lines = [], True
    else:
        start, is_lines = _starts_as_lines(stream, options)
    if is_lines and options.group_by == "directory":
        raise ConfigError(
            f"data {source.path}: holds JSON lines, which --group-by directory does not join; "
            "leave it out with --exclude, or read it as it stands with --format text"
        )
    if is_lines:
        return stream, itertools.chain(start, stream)
    return _Joined(start, stream), None


class _Joined:
    """What was read of a stream, and the rest of it."""

    def __init__(self, start: list[bytes], rest):
        self.start, self.rest = start, rest

    def read(self) -> bytes:
        return b"".join([*self.start, self.rest.read()])


def _starts_as_lines(stream, options: ReadOptions) -> tuple[list[bytes], bool]:
    """(what was read, whether it starts as JSON lines do).

    They start with an object on one line, and go on with a line that opens another one, or end
    there with an object that has the field.
    """
    start = [stream.readline()]
    while start[-1] and not start[-1].strip():
        start.append(stream.readline())
    first = start[-1].removeprefix(codecs.BOM_UTF8)
    if not first.lstrip().startswith(b"{"):
        return start, False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return start, False
    start.append(stream.readline())
    while start[-1] and not start[-1].strip():
        start.append(stream.readline())
    if not start[-1]:
        return start, options.field in value
    return start, start[-1].lstrip().startswith(b"{")


# -- bytes -> text --------------------


def _whole(data: bytes, encoding: str | None) -> str:
    """A file as one document, line ends as \\n. Raises Bad or UnicodeDecodeError."""
    text = _decoded(data, encoding, first=True)
    if encoding is None and "\0" in text:
        raise Bad(HOLDS_NUL)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decoded(data: bytes, encoding: str | None, *, first: bool) -> str:
    if encoding is None or "\n".encode(encoding) != b"\n":
        encoding = "utf-8"
    marked = first and codecs.lookup(encoding).name == "utf-8"  # however it is spelt
    return data.decode("utf-8-sig" if marked else encoding)


def _not_in(error: UnicodeDecodeError) -> str:
    name = "UTF-8" if error.encoding == "utf-8" else error.encoding
    return (
        f"byte {error.object[error.start]:#04x} at {error.start} is not {name} ({error.reason}); "
        "name the encoding with --encoding (latin-1, cp1252, utf-16)"
    )


def _text_of(line: bytes, options: ReadOptions, *, first: bool) -> str:
    """The document of a JSON line. Raises Bad with the reason why there is none."""
    try:
        value = json.loads(_decoded(line, options.encoding, first=first))
    except UnicodeDecodeError as error:
        raise Bad(_not_in(error)) from None
    except json.JSONDecodeError as error:
        raise Bad(f"is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise Bad("is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise Bad(f"is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise Bad(f"is {_kind(value)}, not a JSON object with a {options.field!r} field")
    if options.field not in value:
        raise Bad(
            f"has no {options.field!r} field (it has {', '.join(map(repr, value)) or 'none'}); "
            "name the right one with --field"
        )
    text = value[options.field]
    if not isinstance(text, str):
        raise Bad(f"its {options.field!r} is {_kind(text)}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise Bad(f"its {options.field!r} holds {half}, half of a surrogate pair") from None
    return text


def _kind(value) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
