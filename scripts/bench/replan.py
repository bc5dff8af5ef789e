"""Predicts recorded runs again, with other constants: the planner held against what was measured.

    python scripts/bench/replan.py docs/benchmarks/raw/scaling-....json --gpu my.yaml

RUNS.json is scaling_test.py's; its command says which run file and layouts it is of. Prints the
largest errors; with --write the predictions in RUNS.json, its .md and its .png (where there is one)
are replaced.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import scaling_test

from s2megatron.errors import ConfigError, hide_import_warnings
from s2megatron.planner.measured import MeasuredRun, as_json, markdown
from s2megatron.provenance import MISSING


def predicted(recorded: Path, gpu: str) -> tuple[dict, list[MeasuredRun]]:
    """What the runs were made with, and the runs with predictions by `gpu`. Raises ConfigError."""
    try:
        data = json.loads(recorded.read_text())
        command = shlex.split(data["about"]["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"is no JSON of scaling_test.py ({error!r}); give its NAME.json"
        ) from None
    options = scaling_test.parse(command[2:])
    options.gpu = gpu
    planner = scaling_test.Planner(options)
    local = data["about"]["versions"]["transformer-engine"] == MISSING
    planner.layout = replace(planner.layout, fused=not local)
    cases = {(c.attention, c.sequence, c.name, c.gpus): c for c in scaling_test.cases(options)[0]}
    runs = []
    for row in data["runs"]:
        run = MeasuredRun(**{f.name: row[f.name] for f in fields(MeasuredRun)})
        run = replace(run, step_seconds=tuple(run.step_seconds))
        plan = planner.predict(cases[run.attention, run.sequence, run.layout, run.gpus])
        gib = plan.memory.total / 2**30
        runs.append(replace(run, predicted_seconds=plan.seconds, predicted_gib=gib))
    return data["about"] | {"constants": gpu}, runs


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)  # Megatron's parser takes sys.argv over
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recorded", type=Path, nargs="+", metavar="RUNS.json")
    parser.add_argument("--gpu", default="h200", help="constants of the prediction")
    parser.add_argument("--write", action="store_true", help="replace the predictions recorded")
    options = parser.parse_args(argv)
    sys.argv = sys.argv[:1]
    hide_import_warnings()
    for path in options.recorded:
        try:
            about, runs = predicted(path, options.gpu)
        except ConfigError as error:
            print(f"replan.py: {path}: {error}", file=sys.stderr)
            return 2
        step = max(runs, key=lambda run: abs(run.step_error))
        held = [run for run in runs if run.memory_error is not None]
        print(f"{path}: {len(runs)} runs; largest error of a step {step.step_error:+.1%} "
              f"({step.attention}, {step.sequence:,}, {step.layout}, {step.gpus} GPUs)"
              + (f", of memory {max((r.memory_error for r in held), key=abs):+.1%}" if held else "")
        )  # fmt: skip
        if options.write:
            for suffix, text in ((".json", as_json(about, runs)), (".md", markdown(about, runs))):
                beside = path.with_suffix(f"{suffix}.part")
                beside.write_text(text)
                os.replace(beside, path.with_suffix(suffix))
            if path.with_suffix(".png").exists():
                scaling_test.draw(about, runs, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
