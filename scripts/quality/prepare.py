"""The datasets of a recipe, from token pieces: text, held-out text, retrieval documents per phase.

    python scripts/quality/prepare.py PIECES DATA --recipe configs/quality/recipe.yaml

PIECES holds what corpus.py made, train-*.u16 and valid.u16 or the same packed (`xz`), and
tokenizer/. DATA gets Megatron datasets: text, valid, retrieval documents for every phase, and a few
of each to watch in training. What is there is kept. Several recipes may share a folder.
"""

import argparse
import itertools
import json
import lzma
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import documents
import numpy
from recipe import Phase, Recipe, load_recipe
from transformers import PreTrainedTokenizerFast

from s2megatron.errors import ConfigError


def read_piece(path: Path) -> numpy.ndarray:
    """uint16 tokens of a piece, packed or not."""
    if path.suffix == ".xz":
        return numpy.frombuffer(lzma.decompress(path.read_bytes()), dtype=numpy.uint16)
    return numpy.fromfile(path, dtype=numpy.uint16)


def pieces(folder: Path, name: str) -> list[Path]:
    """NAME.u16 or NAME-*.u16, else the same with .xz, in order. Raises ConfigError."""
    for ending in ("u16", "xz"):
        found = sorted([*folder.glob(f"{name}.{ending}"), *folder.glob(f"{name}-*.{ending}")])
        if found:
            return found
    raise ConfigError(f"{folder}: holds no {name}*.u16 or {name}*.xz; corpus.py makes them")


def write_dataset(prefix: Path, tokens: numpy.ndarray, end: int) -> None:
    """Megatron's PREFIX.bin and .idx; documents end with the token `end`, and the last one may
    not."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if Path(f"{prefix}.idx").is_file():
        return
    ends = numpy.flatnonzero(tokens == end) + 1
    cuts = [0, *ends.tolist()]
    if cuts[-1] != len(tokens):
        cuts.append(len(tokens))
    part = f"{prefix}.part-{os.getpid()}"
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(16384))
    for first, last in itertools.pairwise(cuts):
        builder.add_document(tokens[first:last], [last - first])
    builder.finalize(f"{part}.idx")
    os.replace(f"{part}.bin", f"{prefix}.bin")
    os.replace(f"{part}.idx", f"{prefix}.idx")


def write_retrieval(data: Path, phase: Phase, recipe: Recipe, processes: int | None) -> None:
    """The retrieval documents of a phase, and records of its length to look at on the way."""
    name = phase.documents_name(recipe.documents_seed)
    kind = documents.Recipe(records=phase.records, repeats=phase.repeats)
    watched = documents.Recipe(records=1.0, repeats=0.0)
    few = max(1, recipe.watch_tokens // phase.length)
    jobs = (
        (name, int(name.split("-")[-1]), 2 * recipe.documents_seed, kind),
        (f"watch-{phase.length}-of-{few}", few, 1, watched),
    )
    for name, sequences, seed, kind in jobs:
        if not (data / f"{name}.idx").is_file():
            documents.write(
                str(data / name), sequences, str(data / "tokenizer"), str(data / "text"),
                phase.length, seed, kind, processes,
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=Path, action="append", required=True)
    parser.add_argument("--processes", type=int)
    a = parser.parse_args()
    recipes = [load_recipe(path) for path in a.recipe]
    a.data.mkdir(parents=True, exist_ok=True)
    if not (a.data / "tokenizer").is_dir():
        shutil.copytree(a.pieces / "tokenizer", a.data / "tokenizer")
    end = PreTrainedTokenizerFast.from_pretrained(a.data / "tokenizer").eos_token_id
    if not (a.data / "text.idx").is_file():
        with ThreadPoolExecutor() as pool:  # lzma lets go of the interpreter
            text = numpy.concatenate([*pool.map(read_piece, pieces(a.pieces, "train"))])
        write_dataset(a.data / "text", text, end)
    valid = read_piece(pieces(a.pieces, "valid")[0])
    write_dataset(a.data / "valid", valid, end)
    for recipe in recipes:
        few = recipe.watch_tokens
        write_dataset(a.data / f"watch-text-of-{few}", valid[:few], end)
        for phase in recipe.phases:
            write_retrieval(a.data, phase, recipe, a.processes)
    sizes = {p.stem: p.stat().st_size // 2 for p in sorted(a.data.glob("*.bin"))}
    (a.data / "tokens.json").write_text(json.dumps(sizes) + "\n")
    print("tokens:", ", ".join(f"{name} {count:,}" for name, count in sizes.items()))


if __name__ == "__main__":
    main()
