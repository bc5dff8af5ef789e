"""What a recipe asks for beside the text: retrieval documents, and a little of both to watch.

    python scripts/quality/prepare.py DATA --recipe configs/quality/recipe.yaml

DATA holds tokenizer/ and the Megatron datasets text and valid. It gets a dataset of retrieval
documents for every phase, and a few held-out tokens of text and of records whose loss is taken
while an arm trains, and the same for the recipes that it goes on from. What is there is kept.
Several recipes may share a folder.
"""

import argparse
import json
from pathlib import Path

import documents
import numpy
from pieces import write_dataset
from recipe import Phase, Recipe, history


def write_retrieval(data: Path, phase: Phase, recipe: Recipe, processes: int | None) -> None:
    """The retrieval documents of a phase, and records of its length to watch."""
    name = phase.documents_name(recipe.documents_seed)
    kind = documents.DocumentMix(**phase.mix)
    watched = documents.DocumentMix(records=1.0, repeats=0.0)
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=Path, action="append", required=True)
    parser.add_argument("--processes", type=int)
    a = parser.parse_args(argv)
    valid = numpy.memmap(a.data / "valid.bin", numpy.uint16, "r")
    for recipe in (one for path in dict.fromkeys(a.recipe) for one in history(path)):
        watched = a.data / f"watch-text-of-{recipe.watch_tokens}"
        if not watched.with_suffix(".idx").is_file():
            write_dataset(watched, numpy.array(valid[: recipe.watch_tokens]))
        for phase in recipe.phases:
            write_retrieval(a.data, phase, recipe, a.processes)
    sizes = {path.stem: path.stat().st_size // 2 for path in sorted(a.data.glob("*.bin"))}
    (a.data / "tokens.json").write_text(json.dumps(sizes) + "\n")
    print("tokens:", ", ".join(f"{name} {count:,}" for name, count in sizes.items()))


if __name__ == "__main__":
    main()
