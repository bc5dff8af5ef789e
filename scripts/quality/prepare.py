"""The datasets of a recipe, from token pieces: text, held-out text, retrieval documents per phase.

    python scripts/quality/prepare.py PIECES DATA --recipe configs/quality/recipe.yaml

PIECES holds what corpus.py made, train-*.u16 and valid.u16 or the same packed (`xz`), and
tokenizer/. DATA gets Megatron datasets: text, valid, valid-small, retrieval-N and
retrieval-valid-N for phase N. What is there is kept.
"""

import argparse
import json
import lzma
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import documents
import numpy
from recipe import Recipe, load_recipe
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
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        builder.add_document(tokens[first:last], [last - first])
    builder.finalize(f"{part}.idx")
    os.replace(f"{part}.bin", f"{prefix}.bin")
    os.replace(f"{part}.idx", f"{prefix}.idx")


def write_retrieval(data: Path, number: int, recipe: Recipe, processes: int | None) -> None:
    """The retrieval documents of a phase, and a few more to look at on the way."""
    phase, seed = recipe.phases[number], recipe.seed
    tokenizer, filler = str(data / "tokenizer"), str(data / "text")
    kind = documents.Recipe(records=phase.records, repeats=phase.repeats)
    wanted = int(phase.steps * phase.sequences * phase.retrieval * 1.02) + 8
    small = max(1, recipe.watch_tokens // phase.length)
    for name, sequences, salt in (("retrieval", wanted, 0), ("retrieval-valid", small, 1)):
        prefix = data / f"{name}-{number}"
        if not Path(f"{prefix}.idx").is_file():
            documents.write(
                str(prefix), sequences, tokenizer, filler, phase.length, 2 * seed + salt, kind,
                processes,
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--processes", type=int)
    a = parser.parse_args()
    recipe = load_recipe(a.recipe)
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
    write_dataset(a.data / "valid-small", valid[: recipe.watch_tokens], end)
    for number in range(len(recipe.phases)):
        write_retrieval(a.data, number, recipe, a.processes)
    sizes = {p.stem: p.stat().st_size // 2 for p in sorted(a.data.glob("*.bin"))}
    (a.data / "tokens.json").write_text(json.dumps(sizes) + "\n")
    print("tokens:", ", ".join(f"{name} {count:,}" for name, count in sizes.items()))


if __name__ == "__main__":
    main()
