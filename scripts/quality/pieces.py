"""A dataset as packed pieces, and back: for machines that reach no network, or only by small files.

    python scripts/quality/pieces.py pack DATA/text PIECES --tokens 50000000 --count 2
    python scripts/quality/pieces.py unpack PIECES DATA
    python scripts/quality/pieces.py cut FILE PIECES --mb 13       # any file, and back:
    python scripts/quality/pieces.py join PIECES FOLDER
    python scripts/quality/pieces.py loads PIECES --mb 57          # into PIECES/1, PIECES/2, ...

`pack` takes whole documents in an order that a seed shuffles, so any first piece is a fair sample;
with no --tokens it packs all. PIECES/NAME-0.xz, ... hold uint16 tokens, half a byte each when
packed. Documents end with the end-of-text token, id 0 in the tokenizers that `s2megatron data`
trains. `unpack` makes a Megatron dataset DATA/NAME of each NAME that is not there yet.
"""

import argparse
import itertools
import lzma
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

END = 0


def pack(prefix: str, folder: Path, tokens: int | None, count: int, seed: int = 1) -> list[Path]:
    """Writes `count` pieces of about `tokens` tokens each; returns their paths."""
    dataset = IndexedDataset(prefix)
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    folder.mkdir(parents=True, exist_ok=True)
    written, waiting, held = [], [], 0
    for number in order:
        waiting.append(numpy.asarray(dataset[number], dtype=numpy.uint16))
        held += len(waiting[-1])
        if tokens is not None and held >= tokens:
            written.append(_write(prefix, folder, len(written), waiting))
            waiting, held = [], 0
        if len(written) == count:
            return written
    if waiting:
        written.append(_write(prefix, folder, len(written), waiting))
    return written


def _write(prefix: str, folder: Path, number: int, documents: list[numpy.ndarray]) -> Path:
    path = folder / f"{Path(prefix).name}-{number}.xz"
    part = path.with_suffix(".part")
    part.write_bytes(lzma.compress(numpy.concatenate(documents).tobytes()))
    return part.rename(path)


def unpack(folder: Path, data: Path) -> None:
    """Makes DATA/NAME.bin and .idx of the pieces of every NAME."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.xz")):
        names.setdefault(re.sub(r"-\d+$", "", path.stem), []).append(path)
    data.mkdir(parents=True, exist_ok=True)
    for name, paths in names.items():
        if not (data / f"{name}.idx").is_file():
            with ThreadPoolExecutor() as pool:  # lzma lets go of the interpreter
                parts = pool.map(lambda path: lzma.decompress(path.read_bytes()), paths)
                tokens = numpy.frombuffer(b"".join(parts), dtype=numpy.uint16)
            write_dataset(data / name, tokens)


def write_dataset(prefix: Path, tokens: numpy.ndarray) -> None:
    """Megatron's PREFIX.bin and .idx of uint16 tokens; the last document may lack its end."""
    cuts = [0, *(numpy.flatnonzero(tokens == END) + 1).tolist()]
    if cuts[-1] != len(tokens):
        cuts.append(len(tokens))
    part = f"{prefix}.part-{os.getpid()}"
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=numpy.uint16)
    for first, last in itertools.pairwise(cuts):
        builder.add_document(tokens[first:last], [last - first])
    builder.finalize(f"{part}.idx")
    os.replace(f"{part}.bin", f"{prefix}.bin")
    os.replace(f"{part}.idx", f"{prefix}.idx")


def cut(file: Path, folder: Path, mb: float) -> list[Path]:
    """Writes FOLDER/NAME.cut-000, ... of at most so many megabytes each; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written, size = [], int(mb * 1e6)
    with file.open("rb") as source:
        while part := source.read(size):
            written.append(folder / f"{file.name}.cut-{len(written):03d}")
            written[-1].write_bytes(part)
    return written


def join(folder: Path, out: Path) -> list[Path]:
    """Puts the files that were cut into `folder` together again, in `out`; returns their paths.

    Raises:
        ValueError: a piece is missing.
    """
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.cut-*")):
        names.setdefault(path.name.rpartition(".cut-")[0], []).append(path)
    for name, paths in names.items():
        if [int(path.name.rpartition("-")[2]) for path in paths] != list(range(len(paths))):
            raise ValueError(f"{folder}: pieces of {name} are missing; there are {len(paths)}")
        part = out / f"{name}.part"
        with part.open("wb") as target:
            for path in paths:
                target.write(path.read_bytes())
        part.replace(out / name)
    return [out / name for name in names]


def loads(folder: Path, mb: float) -> list[Path]:
    """Moves the files of a folder into FOLDER/1, FOLDER/2, ..., each of at most `mb` megabytes."""
    filled: list[float] = []
    for path in sorted(folder.glob("*.*"), key=lambda path: -path.stat().st_size):
        size = path.stat().st_size / 1e6
        number = next((i for i, held in enumerate(filled) if held + size <= mb), len(filled))
        if number == len(filled):
            filled.append(0.0)
        filled[number] += size
        (folder / str(number + 1)).mkdir(exist_ok=True)
        path.rename(folder / str(number + 1) / path.name)
    return [folder / str(i + 1) for i in range(len(filled))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    packing = ways.add_parser("pack")
    packing.add_argument("prefix")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--tokens", type=int, help="of a piece (default: all in one)")
    packing.add_argument("--count", type=int, default=1)
    unpacking = ways.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("data", type=Path)
    cutting = ways.add_parser("cut")
    cutting.add_argument("file", type=Path)
    cutting.add_argument("folder", type=Path)
    cutting.add_argument("--mb", type=float, default=13)
    joining = ways.add_parser("join")
    joining.add_argument("folder", type=Path)
    joining.add_argument("out", type=Path)
    loading = ways.add_parser("loads")
    loading.add_argument("folder", type=Path)
    loading.add_argument("--mb", type=float, default=57)
    a = parser.parse_args(argv)
    if a.way == "unpack":
        unpack(a.folder, a.data)
        return
    if a.way == "pack":
        written = pack(a.prefix, a.folder, a.tokens, a.count)
    elif a.way == "cut":
        written = cut(a.file, a.folder, a.mb)
    else:
        written = join(a.folder, a.out) if a.way == "join" else loads(a.folder, a.mb)
    for path in written:
        files = path.iterdir() if path.is_dir() else [path]
        print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
