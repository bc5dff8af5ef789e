"""Converts a trained arm to Hugging Face and runs `s2megatron evaluate` on it.

    python scripts/quality/examine.py PHASE_FOLDER OUT --data DATA --recipe-json JSON

One process for all, since importing costs more than a small evaluation. Each style of retrieval is
an evaluation of its own: OUT/records, OUT/sentences (with the losses). OUT/examination.json holds
the summaries of those that are done.
"""

import argparse
import json
import sys
from pathlib import Path

from recipe import Examination
from s2megatron import cli


def evaluation(a, plan: Examination, style: str) -> list[str]:
    """Arguments of `s2megatron evaluate` for one style."""
    lengths = ",".join(map(str, plan.lengths))
    arguments = ["evaluate", str(a.out / "hf"), "--out", str(a.out / style), "--lengths", lengths]
    arguments += ["--style", style, "--filler", str(a.data / "valid")]
    arguments += ["--documents", str(plan.documents), "--control", str(plan.control)]
    arguments += ["--tasks", ",".join(plan.tasks)]
    for block_stride in plan.grids:
        arguments += ["--grid", block_stride]
    return arguments


def losses(a, plan: Examination, length: int) -> list[str]:
    windows = max(1, plan.loss_tokens // length)
    return ["evaluate", str(a.out / "hf"), "--out", str(a.out / f"loss-{length}"), "--tasks",
            "none", "--lengths", str(length), "--data", str(a.data / "valid"), "--packed",
            "--windows", str(windows)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phase", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe-json", required=True)
    a = parser.parse_args()
    plan = Examination.model_validate_json(a.recipe_json)
    steps = []
    if not (a.out / "hf" / "config.json").is_file():
        checkpoint = str(a.phase / "checkpoints")
        steps.append((None, ["convert", "to-hf", checkpoint, "--out", str(a.out / "hf")]))
    steps += [(style, evaluation(a, plan, style)) for style in plan.styles]
    steps += [(f"loss-{length}", losses(a, plan, length)) for length in plan.loss_lengths]
    found: dict = {}
    for name, arguments in steps:
        print(" ".join(["s2megatron", *arguments]), flush=True)
        if name and (a.out / name / "evaluation.json").is_file():
            status = 0
        else:
            status = cli.main(arguments)
        if status:
            return status
        if name:
            found[name] = json.loads((a.out / name / "evaluation.json").read_text())
            (a.out / "examination.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
