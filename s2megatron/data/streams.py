"""The bytes of a file: decompressed, and checked by the first of them to be text."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from s2megatron.data.sources import PACKED_SUFFIXES, Source

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""

_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"%PDF-": "a PDF",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HOLDS_NUL = (
    "holds NUL bytes: a binary file, or text in an encoding that --encoding has to name (utf-16-le)"
)


class Bad(Exception):
    """A line or a file that is no document; the message is the reason."""


class AsUtf8:
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self.text = io.TextIOWrapper(stream, encoding, newline="\n")

    def read(self) -> bytes:
        return self.text.read().encode("utf-8", "surrogatepass")

    def readline(self) -> bytes:
        return self.text.readline().encode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


class _Zstd(io.RawIOBase):
    """Zstandard frames, one after the other; a cut one is an error, which the library's is not."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise Bad("is packed with Zstandard: pip install zstandard") from None
        self.library = zstandard
        self.raw, self.ready = raw, b""
        self.frame, self.inside = None, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            chunk = self.raw.read(1 << 17)
            if not chunk:
                if self.inside:
                    raise EOFError("the file ends in the middle of a Zstandard frame")
                return 0
            try:
                self.ready = self._unpack(chunk)
            except self.library.ZstdError as error:
                raise OSError(f"Zstandard: {error}") from None
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def _unpack(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            if not self.inside:
                decompressor = self.library.ZstdDecompressor(max_window_size=2**31)
                self.frame, self.inside = decompressor.decompressobj(), True
            parts.append(self.frame.decompress(chunk))
            chunk = self.frame.unused_data if self.frame.eof else b""
            self.inside = not self.frame.eof
        return b"".join(parts)


def unpack(source: Source, raw: BinaryIO) -> io.BufferedReader:
    """The bytes in a packed file, found by its first ones. Raises Bad where its name says more."""
    head = raw.peek(16)
    if head[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return io.BufferedReader(bz2.BZ2File(raw))
    if head[:6] == b"\xfd7zXZ\x00":
        return io.BufferedReader(lzma.LZMAFile(raw))
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstd(raw))
    ending = source.path.suffix.lower()
    if ending in PACKED_SUFFIXES:
        raise Bad(f"is named {ending} and its content is not packed that way")
    return raw


def check_is_text(head: bytes) -> None:
    """Raises Bad where the first bytes say that this is not UTF-8 text."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            raise Bad(f"is {encoding.upper()} text; name it with --encoding {encoding}")
    for mark, kind in _BINARY.items():
        if head.startswith(mark):
            raise Bad(f"is {kind}, not text")
    if b"\0" in head:
        raise Bad(HOLDS_NUL)
