"""Converts a trained arm to Hugging Face and runs `s2megatron evaluate` on it.

    python scripts/quality/examine.py PHASE_FOLDER OUT --data DATA --recipe-json JSON

One process for all, since importing costs more than a small evaluation. Each probe of the recipe
and each length of the losses is an evaluation of its own, OUT/NAME; OUT/examination.json holds the
summaries of those that are done.
"""

import argparse
import json
import sys
from pathlib import Path

from recipe import Examination, Probe

from s2megatron import cli
from s2megatron.evaluation.loss import FAR, REPEAT_EDGES
from s2megatron.evaluation.scoring import AnswerRow

FAR_ANSWER = 2048
"""Tokens from a planted value to its answer, from which it counts as far."""


def probing(a, plan: Examination, probe: Probe) -> list[str]:
    """Arguments of `s2megatron evaluate` for one probe."""
    lengths = ",".join(map(str, plan.lengths))
    arguments = ["evaluate", str(a.out / "hf"), "--out", str(a.out / probe.name), "--lengths",
                 lengths, "--style", probe.style, "--filler", str(a.data / "valid"),
                 "--documents", str(plan.documents), "--control", str(plan.control),
                 "--tasks", ",".join(probe.tasks)]  # fmt: skip
    for option in ("queries", "records"):
        if (value := getattr(probe, option)) is not None:
            arguments += [f"--{option}", str(value)]
    for grid in plan.grids:
        arguments += ["--grid", grid]
    return arguments


def losses(a, plan: Examination, length: int) -> list[str]:
    windows = max(1, plan.loss_tokens // length)
    return ["evaluate", str(a.out / "hf"), "--out", str(a.out / f"loss-{length}"), "--tasks",
            "none", "--lengths", str(length), "--data", str(a.data / "valid"), "--packed",
            "--windows", str(windows)]  # fmt: skip


def samples(rows: dict) -> dict:
    """What arms are compared by, sample by sample: all see the same windows and documents.

    Returns:
        "loss": length -> [[nats, tokens, nats of far repeats, their tokens], ...] of each window;
        "right": task -> length -> [right, answers, right from FAR_ANSWER and more, answers] of each
        document.
    """
    far = REPEAT_EDGES.index(FAR) + 1
    found: dict = {"loss": {}, "right": {}}
    for length, table in rows["loss"].items():
        columns = (table["by_position"], table["position_counts"], table["by_repeat"],
                   table["repeat_counts"])  # fmt: skip
        found["loss"][length] = [
            [round(sum(nats), 3), sum(count),
             round(sum(repeats[far:-1]), 3), sum(counts[far:-1])]
            for nats, count, repeats, counts in zip(*columns, strict=True)
        ]  # fmt: skip
    for row in map(AnswerRow._make, rows["answers"]):
        if row.needle:
            lengths = found["right"].setdefault(row.task, {})
            documents = lengths.setdefault(str(row.length), {})
            sums = documents.setdefault(row.document, [0, 0, 0, 0])
            far_away = row.start - row.source >= FAR_ANSWER
            for i, value in enumerate((row.right, 1, row.right * far_away, far_away)):
                sums[i] += int(value)
    for lengths in found["right"].values():
        for length, documents in lengths.items():
            lengths[length] = [documents[number] for number in sorted(documents)]
    return found


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
    steps += [(probe.name, probing(a, plan, probe)) for probe in plan.probes]
    steps += [(f"loss-{length}", losses(a, plan, length)) for length in plan.loss_lengths]
    found: dict = {}
    for name, arguments in steps:
        print(" ".join(["s2megatron", *arguments]), flush=True)
        done = name and (a.out / name / "evaluation.json").is_file()
        if not done and (status := cli.main(arguments)):
            return status
        if name:
            found[name] = json.loads((a.out / name / "evaluation.json").read_text())
            found[name]["samples"] = samples(json.loads((a.out / name / "rows.json").read_text()))
            (a.out / "examination.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
