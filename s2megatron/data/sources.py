"""Which files become a dataset: folders are walked, links followed once, subtrees held out."""

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from s2megatron.errors import ConfigError
from s2megatron.paths import user_path

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
"""Files of JSON lines: a document per line."""

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".cu", ".json", ".html", ".tex",
    *LINE_SUFFIXES,
)  # fmt: skip
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
EVERY_FILE = "*"


@dataclass(frozen=True)
class Source:
    """A file to read."""

    path: Path
    name: str
    """Its path below the input that it was found in; for a file that was named, its file name."""
    size: int
    """Bytes on the disk."""
    folder: Path | None = None
    """The input that it was found in; None for a file that was named."""


def find_files(
    inputs: Iterable[str | Path],
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    exclude: Sequence[str] = (),
    notes: list[str] | None = None,
) -> list[Source]:
    """The files named, and the text files under the folders named, in a stable order.

    Links are followed. Each real file and folder below an input is read once, however many links
    lead to it, so that a circle ends and no document is there twice.

    Args:
        suffixes: endings to look for in folders, whatever their case and also with a packer's
            ending behind them (.txt.gz); "*" is every file.
        exclude: patterns of names below an input to leave out, as "*/generated/*".
        notes: gets a line about the links that lead nowhere.

    Raises:
        ConfigError: an input does not exist or cannot be listed, or nothing is found.
    """
    endings = tuple(_ending(suffix) for suffix in suffixes)
    files: list[Source] = []
    for item in inputs:
        path = Path(user_path(str(item)))
        if path.is_dir():
            found = _below(path, endings, exclude, [] if notes is None else notes)
            if not found:
                raise ConfigError(
                    f"data {path}: no files ending in {', '.join(suffixes)} there"
                    f"{' that --exclude leaves in' if exclude else ''}; "
                    "name files, or other endings with --suffix ('*' is every file)"
                )
            files += found
        elif path.is_file():
            files.append(Source(path, path.name, path.stat().st_size))
        elif path.exists():
            raise ConfigError(f"data {path}: is neither a file nor a folder")
        else:
            raise ConfigError(f"data {path}: there is no such file or folder")
    return files


def unpacked_name(path: Path) -> str:
    """The file name in small letters, without a packer's ending."""
    name = path.name.lower()
    return name.rpartition(".")[0] if name.endswith(PACKED_SUFFIXES) else name


def _ending(suffix: str) -> str:
    return suffix if suffix == EVERY_FILE else f".{suffix.removeprefix('.')}".lower()


def _below(
    root: Path, endings: tuple[str, ...], exclude: Sequence[str], notes: list[str]
) -> list[Source]:
    found, dead = [], []
    for path in _walk(root, dead):
        name = path.relative_to(root).as_posix()
        wanted = EVERY_FILE in endings or path.name.lower().endswith(endings)
        if not wanted and not unpacked_name(path).endswith(endings):
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            found.append(Source(path, name, path.stat().st_size, root))
    if dead:
        notes.append(f"{root}: {len(dead)} links lead nowhere, the first is {dead[0]}")
    return sorted(found, key=lambda source: source.path)


def _walk(root: Path, dead: list[Path]) -> Iterator[Path]:
    """Every real file once; what is reached only by a link comes after what is not."""

    def fail(error: OSError):
        raise ConfigError(f"data {error.filename}: cannot be listed: {error.strerror}") from None

    seen: set[tuple[int, int]] = set()

    def is_new(path: Path) -> bool:
        status = path.stat()
        known = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        return not known

    tops, links = [root], []
    while tops:
        for folder, folders, names in os.walk(tops.pop(0), onerror=fail):
            here = Path(folder)
            if not is_new(here):
                folders.clear()
                continue
            tops += sorted(here / name for name in folders if (here / name).is_symlink())
            for path in sorted(here / name for name in names):
                if path.is_symlink():
                    links.append(path)
                elif path.is_file() and is_new(path):
                    yield path
    for path in links:
        if not path.exists():
            dead.append(path)
        elif path.is_file() and is_new(path):
            yield path


def hold_out(
    sources: Sequence[Source], share: float, depth: int
) -> tuple[list[Source], list[Source], list[str]]:
    """(files to train on, files held out, names of the subtrees held out).

    Whole subtrees of `depth` folders below the input are held out, in an order that a hash of their
    names decides, until they make up `share` of the bytes; the files that lie higher up count as a
    subtree per folder, and each file that was named by itself as one. The same tree gives the same
    answer on any machine. A subtree that would go past the share is passed over.

    Raises:
        ConfigError: every subtree is larger than the share.
    """
    sizes: dict[str, int] = {}
    for source in sources:
        unit = _subtree(source, depth)
        sizes[unit] = sizes.get(unit, 0) + source.size
    total = max(1, sum(sizes.values()))
    target = share * total
    chosen: set[str] = set()
    held = 0
    for unit in sorted(sizes, key=by_hash):
        if sizes[unit] and held + sizes[unit] <= target:
            chosen.add(unit)
            held += sizes[unit]
        if held >= 0.95 * target:
            break
    if not chosen:
        smallest = min(sizes, key=sizes.get)
        raise ConfigError(
            f"--hold-out {share:g}: of {len(sizes)} subtrees {depth} folders deep, the smallest "
            f"({smallest}) holds {sizes[smallest] / total:.1%} of the bytes; hold "
            "out more, or raise --hold-out-depth"
        )
    parts: dict[bool, list[Source]] = {True: [], False: []}
    for source in sources:
        parts[_subtree(source, depth) in chosen].append(source)
    return parts[False], parts[True], sorted(chosen)


def _subtree(source: Source, depth: int) -> str:
    folders = source.name.split("/")[:-1]
    if source.folder is None:
        return source.name
    return "/".join(folders[:depth] if len(folders) >= depth else [*folders, "*"])


def by_hash(name: str) -> str:
    """A place in a shuffled order that is the same everywhere."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()
