"""`s2megatron data`: from the inputs named to one dataset, or two where subtrees are held out."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from s2megatron.data.reading import KEPT_REASONS, ReadOptions, Tally, documents
from s2megatron.data.sources import TEXT_SUFFIXES, Source, by_hash, find_files, hold_out
from s2megatron.data.tokenizers import split_name, train_bpe
from s2megatron.data.writer import DataReport, check_prefix, write_dataset
from s2megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `s2megatron data` was asked for. Options that do not fit raise ConfigError."""

    inputs: Sequence[str]
    out: str
    tokenizer: str = "bytes"
    suffixes: Sequence[str] = TEXT_SUFFIXES
    exclude: Sequence[str] = ()
    reading: ReadOptions = field(default_factory=ReadOptions)
    hold_out: float | None = None
    """Share of the bytes."""
    hold_out_depth: int = 1
    """Folders below the input that a subtree's top lies."""
    hold_out_to: str | None = None
    train_tokenizer: str | None = None
    """"bpe:SIZE"."""
    tokenizer_mb: float = 256
    """Megabytes of text that a tokenizer is trained on, at most."""
    workers: int = 1

    def __post_init__(self):
        if (self.hold_out is None) != (self.hold_out_to is None):
            raise ConfigError("--hold-out SHARE and --hold-out-to PREFIX: give both, or none")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise ConfigError(f"--hold-out {self.hold_out:g}: must be a share between 0 and 1")
        if self.hold_out_to is not None and check_prefix(self.hold_out_to) == check_prefix(
            self.out
        ):
            raise ConfigError(f"--hold-out-to {self.hold_out_to}: is --out as well; name another")
        for option, value in (
            ("--hold-out-depth", self.hold_out_depth), ("--workers", self.workers),
            ("--tokenizer-mb", self.tokenizer_mb),
        ):  # fmt: skip
            if value <= 0:
                raise ConfigError(f"{option} {value:g}: must be greater than 0")
        if self.train_tokenizer is not None and split_name(self.tokenizer)[0] != "huggingface":
            raise ConfigError(
                f"--train-tokenizer {self.train_tokenizer}: needs the folder that it goes to, as "
                f"--tokenizer huggingface:FOLDER (it is {self.tokenizer!r})"
            )

    @property
    def bpe_size(self) -> int:
        match = re.fullmatch(r"bpe:(\d+)", self.train_tokenizer or "")
        if not match:
            raise ConfigError(
                f"--train-tokenizer {self.train_tokenizer!r}: must be bpe:SIZE, as bpe:32768"
            )
        return int(match[1])


def build(options: BuildOptions) -> Iterator[str]:
    """Writes the datasets, and gives the lines to print about each step. Raises ConfigError."""
    notes: list[str] = []
    sources = find_files(options.inputs, options.suffixes, options.exclude, notes)
    if options.reading.group_by == "directory":
        named = [source for source in sources if source.folder is None]
        if named:
            raise ConfigError(
                f"--group-by directory: {named[0].path} is a file; name the folders to join"
            )
    yield from notes
    held: list[Source] = []
    if options.hold_out is not None:
        sources, held, subtrees = hold_out(sources, options.hold_out, options.hold_out_depth)
        yield _held_out(sources, held, subtrees)
    if options.train_tokenizer is not None:
        yield _train_tokenizer(options, sources)
    for part, prefix in ((sources, options.out), (held, options.hold_out_to)):
        if part:
            yield from _write(options, part, prefix)


def _held_out(sources: list[Source], held: list[Source], subtrees: list[str]) -> str:
    size = sum(source.size for source in held)
    share = size / (size + sum(source.size for source in sources))
    more = f" and {len(subtrees) - 8} more" if len(subtrees) > 8 else ""
    return (
        f"held out: {len(held):,} files, {share:.2%} of the bytes, in {len(subtrees)} subtrees: "
        f"{', '.join(subtrees[:8])}{more}"
    )


def _write(options: BuildOptions, sources: list[Source], prefix: str) -> Iterator[str]:
    tally = Tally()
    with _progress(sources, f"data {prefix}") as bar:
        tally.advance = bar.update
        texts = documents(sources, options.reading, tally)
        try:
            report = write_dataset(texts, prefix, options.tokenizer, workers=options.workers)
        except ConfigError as error:
            if not tally.skipped:
                raise
            raise ConfigError("\n".join([str(error), *_skipped(tally)])) from None
    yield _summary(report, tally, options.tokenizer)
    yield from _skipped(tally)


def _summary(report: DataReport, tally: Tally, tokenizer: str) -> str:
    prefix = shlex.quote(report.prefix)
    empty = f", {report.empty:,} empty documents left out" if report.empty else ""
    return (
        f"{prefix}.bin, .idx: {tally.files:,} files, {report.documents:,} documents, "
        f"{report.tokens:,} tokens, vocabulary {report.vocab_size} ({tokenizer}){empty}"
    )


def _skipped(tally: Tally) -> list[str]:
    if not tally.skipped:
        return []
    more = tally.skipped - KEPT_REASONS
    return [
        f"skipped {tally.skipped:,} lines or files that could not be read:",
        *(f"  {reason}" for reason in tally.reasons),
        *([f"  and {more:,} more"] if more > 0 else []),
    ]


def _progress(sources: list[Source], title: str) -> tqdm:
    """A bar over the bytes of the files, on the error stream."""
    total = sum(source.size for source in sources)
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, mininterval=0.5)


def _train_tokenizer(options: BuildOptions, sources: list[Source]) -> str:
    """Trains it on files in a hashed order, so that a part of them is one of every kind."""
    folder = split_name(options.tokenizer)[1]
    limit = int(options.tokenizer_mb * 1e6)
    order = sorted(sources, key=lambda source: by_hash(source.name))
    reading = ReadOptions(
        field=options.reading.field,
        encoding=options.reading.encoding,
        format=options.reading.format,
        skip_bad=options.reading.skip_bad,
    )
    with tqdm(
        total=min(limit, sum(source.size for source in order)), unit="B", unit_scale=True,
        desc=f"tokenizer {folder}", mininterval=0.5,
    ) as bar:  # fmt: skip
        size = options.bpe_size
        found = train_bpe(_first(documents(order, reading), limit, bar), size, folder)
        read = bar.n
    fewer = f" (the text gives no more; {size:,} were asked for)" if found < size else ""
    return f"{Path(folder)}: BPE of {found:,} tokens{fewer}, trained on {read / 1e6:.1f} MB"


def _first(texts: Iterable[str], limit: int, bar: tqdm) -> Iterator[str]:
    """Texts until they make up `limit` characters."""
    for text in texts:
        yield text
        bar.update(len(text))
        if bar.n >= limit:
            return
