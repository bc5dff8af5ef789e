"""Trains one small model in every layout and compares the loss curves with the single-GPU ones.

    python scripts/bench/compare_layouts.py --gpus 2 --out runs/layouts [key.path=value ...]

Every run is the launcher's (`s2megatron.pretrain`); runs share GPUs and import ahead
(warm_ranks.py). All layouts of a model start from one checkpoint and train the same batches, with
S2 attention and with dense attention in every layer. OUT gets layouts.md (the table), and for each
run its run file, result.json, TensorBoard events and the ranks' logs. Run it again with the same
--out: runs that finished with the same options are not run again, runs that failed are. Overrides
(key.path=value) go to every run. Without a GPU it runs on the CPU over gloo, with a smaller model.
With --ranks-per-gpu the ranks of a run share GPUs (warm_ranks.py): on one GPU, what a layout
computes can be seen, and nothing of its speed.

The exit status is 1 if a run failed; the table says which, and why.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from layouts import ONE_GPU, TrainedLayout, base_run_file, layouts, run_file
from runs import ROOT
from warm_ranks import Pool, WarmRun

from s2megatron import provenance
from s2megatron.data import documents, find_files, write_dataset
from s2megatron.errors import hide_import_warnings
from s2megatron.plot import read_scalars
from s2megatron.training.backends import find_backends

MODULES = {"te": "transformer_engine", "local": "local"}
ATTENTIONS = ("s2", "dense")
CORPUS = ("asyncio", "email", "http", "json", "logging", "unittest", "xml")
STEP = 20  # where the losses must agree, by the issue that this tool answers


@dataclass(frozen=True)
class LayoutCase:
    """One run: a layout, its modules, its attention; `initial` runs write the weights."""

    layout: TrainedLayout
    modules: str
    attention: str
    initial: bool = False

    @property
    def name(self) -> str:
        words = [self.layout.variant, "initial weights" if self.initial else self.layout.name,
                 self.modules, self.attention]  # fmt: skip
        return "-".join(re.sub(r"[^\w=]+", "_", word) for word in words)

    @property
    def start(self) -> str:
        """The initial weights this run takes: the variant's, whatever the modules.

        (Megatron names the norms before experts differently in its local modules.)
        """
        variant = self.layout.variant
        return f"{variant}, {self.modules}" if "MoE" in variant else variant


def main() -> int:
    hide_import_warnings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit: end the ranks, too
    options = parse()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    backends = find_backends()
    found = ["te", "local"] if backends.transformer_engine and backends.cuda else ["local"]
    modules = [m for m in found if m in options.modules]
    if not modules:
        print(f"--modules {options.modules}: not installed here", file=sys.stderr)
        return 2
    wanted = [
        layout
        for layout in layouts(options.gpus)
        if not options.only or any(word in describe(layout) for word in options.only)
    ]
    corpus = out / "corpus"
    if not corpus.with_suffix(".idx").exists():
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = find_files([str(stdlib / part) for part in CORPUS], (".py",))
        paragraphs = (part for text in documents(files) for part in text.split("\n\n"))
        write_dataset(paragraphs, str(corpus))  # some documents per sequence, for packing
    base = base_run_file(small=not backends.cuda, corpus=str(corpus), steps=options.steps)
    cases = list_cases(wanted, modules, options.attention)
    trees = {case: tree_of(base, case, out) for case in cases}
    results = {
        case: result
        for case, tree in trees.items()
        if (result := finished(out / case.name, tree, options.overrides))
    }
    todo = [case for case in cases if case not in results]
    print(f"{len(cases)} runs, {len(results)} of them done before: {out}", flush=True)
    began = time.monotonic()
    try:
        train_all(todo, trees, results, options, out)
    finally:
        table = report(cases, results, options, backends, modules)
        (out / "layouts.md.part").write_text(table)
        os.replace(out / "layouts.md.part", out / "layouts.md")
    print(table)
    print(f"{len(todo)} runs in {time.monotonic() - began:.0f} s: {out / 'layouts.md'}")
    return int(any(result["error"] for result in results.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = torch.cuda.device_count()
    parser.add_argument("--gpus", type=int, help="GPUs (CPU: ranks) that a layout may have; "
                        "default: all, times --ranks-per-gpu")  # fmt: skip
    parser.add_argument("--ranks-per-gpu", type=int, default=1,
                        help="ranks that share each GPU, each as one of --gpus")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--modules", action="append", choices=MODULES,
                        help="only these (default: all that are installed)")  # fmt: skip
    parser.add_argument("--attention", action="append", choices=ATTENTIONS,
                        help="only this (default: both)")  # fmt: skip
    parser.add_argument("--only", action="append", metavar="WORDS",
                        help="only layouts whose 'model: layout' holds this")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=3 if count else 1,
                        help="runs that may share a GPU (of --gpus)")  # fmt: skip
    parser.add_argument("--ahead", type=int, default=max(1, (os.cpu_count() or 2) // 2),
                        help="processes that import ahead (default: half the cores)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args()
    options.modules = options.modules or list(MODULES)
    options.attention = options.attention or list(ATTENTIONS)
    if options.ranks_per_gpu < 1:
        parser.error(f"--ranks-per-gpu {options.ranks_per_gpu}: must be at least 1")
    options.gpus = options.gpus or count * options.ranks_per_gpu or 2
    if count and options.gpus > count * options.ranks_per_gpu:
        parser.error(f"--gpus {options.gpus}: this machine has {count}, times --ranks-per-gpu "
                     f"{options.ranks_per_gpu}")  # fmt: skip
    return options


def describe(layout: TrainedLayout) -> str:
    return f"{layout.variant}: {layout.name}"


def list_cases(
    wanted: list[TrainedLayout], modules: list[str], attentions: list[str]
) -> list[LayoutCase]:
    """All runs in the order in which they start: weights, then single GPUs, then the rest."""
    cases = []
    for layout in wanted:
        fitting = [m for m in modules if m == "te" or not layout.te_only]
        cases += [LayoutCase(layout, m, attention) for m in fitting for attention in attentions]
    starts = {}
    for case in cases:  # one GPU, the first modules named, S2: read by every run of the variant
        one_gpu = TrainedLayout(ONE_GPU, 1, {}, case.layout.variant)
        starts.setdefault(case.start, LayoutCase(one_gpu, case.modules, "s2", initial=True))
    # An attention at a time: what a time limit cuts off is whole tables of the later one.
    cases.sort(key=lambda c: (c.layout.name != ONE_GPU, attentions.index(c.attention)))
    return [*starts.values(), *cases]


def tree_of(base: dict, case: LayoutCase, out: Path) -> dict:
    """The whole run file of a run."""
    modules = MODULES[case.modules]
    tree = run_file(base, case.layout, modules=modules, dense=case.attention == "dense")
    steps = tree["megatron"]["train_iters"]
    tree["megatron"] |= {"tensorboard_dir": str(out / case.name / "tensorboard")}
    tree["megatron"] |= {"lr_decay_iters": steps}
    tree["data"]["cache"] = str(out / case.name / "cache")  # runs at one time share no files
    weights = str(out / ("weights-" + re.sub(r"\W+", "_", case.start)))
    if case.initial:
        tree["megatron"] |= {"train_iters": 1, "save": weights, "save_interval": 1,
                             "no_save_optim": True}  # fmt: skip
    else:
        tree["megatron"] |= {"load": weights, "finetune": True, "no_load_optim": True,
                             "no_load_rng": True}  # fmt: skip
    return tree


def finished(folder: Path, tree: dict, overrides: list[str]) -> dict | None:
    """The result of an earlier run that did not fail, had the same options, and left its weights.

    A run that takes its weights from another is done again with it.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    weights = Path(tree["megatron"].get("save") or tree["megatron"]["load"])
    same = result["run_file"] == tree and result["overrides"] == overrides
    return result if same and not result["error"] and weights.exists() else None


def train_all(todo, trees, results, options, out) -> None:
    """Starts each run as soon as its weights are there and its GPUs have room."""
    total = sum(case.layout.gpus for case in todo)
    pool = Pool(total=total, ahead=min(options.ahead, total), log=out / "importing.log")
    load, running = Counter(), {}
    pending = list(todo)
    try:
        while pending or running:
            for case in [case for case in running if running[case][0].poll() is not None]:
                run, gpus = running.pop(case)
                load.subtract(gpus)
                results[case] = collect(case, trees[case], run, options, out)
                done, seconds = len(results), results[case]["seconds"]
                what = results[case]["error"] or f"{len(results[case]['losses'])} steps"
                print(f"[{done}/{len(trees)}] {case.name} ({seconds:.0f} s): {what}", flush=True)
            for case in list(pending):
                weights = next((c for c in trees if c.initial and c.start == case.start), case)
                if weights is not case and weights not in results:
                    continue
                if weights is not case and results[weights]["error"]:
                    pending.remove(case)
                    error = f"no initial weights: {results[weights]['error']}"
                    results[case] = {"losses": {}, "error": error, "seconds": 0}
                    continue
                gpus = choose(case.layout.gpus, load, options.gpus, options.ranks_per_gpu)
                if all(load[gpu] < options.jobs for gpu in gpus):
                    pending.remove(case)
                    load.update(gpus)
                    running[case] = (start(case, trees[case], pool, gpus, options, out), gpus)
            pool.refill()
            time.sleep(0.1)
    finally:
        for run, _ in running.values():
            run.end()
        pool.close()


def choose(ranks: int, load: Counter, gpus: int, ranks_per_gpu: int) -> list[int]:
    """The least loaded of `gpus` for so many ranks, on as many devices as there are."""
    devices = {}
    for gpu in sorted(range(gpus), key=lambda gpu: load[gpu]):
        devices.setdefault(gpu // ranks_per_gpu, []).append(gpu)
    turns = [(turn, load[gpu], gpu) for slots in devices.values() for turn, gpu in enumerate(slots)]
    return [gpu for _, _, gpu in sorted(turns)][:ranks]


def start(case, tree, pool: Pool, gpus: list[int], options, out: Path) -> WarmRun:
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    if case.initial:
        shutil.rmtree(tree["megatron"]["save"], ignore_errors=True)
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    argv = ["--config", str(config), *options.overrides]
    devices = [gpu // options.ranks_per_gpu for gpu in gpus]
    return pool.launch(argv, devices, folder, options.timeout)


def collect(case, tree, run: WarmRun, options, out: Path) -> dict:
    """Reads a run that ended; writes result.json."""
    folder, error = out / case.name, run.poll()
    events = folder / "tensorboard"
    losses = dict(read_scalars(events).get("lm loss", [])) if events.is_dir() else {}
    expected = tree["megatron"]["train_iters"]
    if not error and len(losses) != expected:
        error = f"{len(losses)} losses of {expected} steps"
    result = {
        "layout": case.layout.name,
        "variant": case.layout.variant,
        "gpus": case.layout.gpus,
        "modules": case.modules,
        "attention": case.attention,
        "error": error,
        "losses": losses,
        "seconds": time.monotonic() - run.began,
        "run_file": tree,
        "overrides": options.overrides,
    }
    (folder / "result.json.part").write_text(json.dumps(result, indent=1))
    os.replace(folder / "result.json.part", folder / "result.json")
    return json.loads(json.dumps(result))


def report(cases, results, options, backends, modules) -> str:
    """The table, and every run that failed with its error."""
    gpu = provenance.machine("cuda" if backends.cuda else "cpu")
    packages = ["torch", "triton", "megatron-core"]
    packages += ["transformer-engine"] if "te" in modules else []
    at = f"difference at step {min(STEP, options.steps)}"
    kinds = ("loss at step 1", "last", at, "largest")
    columns = [f"{attention}: {kind}" for attention in options.attention for kind in kinds]
    machine, shared = f"{options.gpus}x {gpu}", []
    if options.ranks_per_gpu > 1:
        devices = -(-options.gpus // options.ranks_per_gpu)
        machine = f"{options.gpus} ranks on {devices}x {gpu}"
        shared = [f"**Ranks of a layout of more than {devices} GPUs share them**, up to "
                  f"{options.ranks_per_gpu} on each, with NCCL over sockets between them: losses "
                  "are shown, and no times.", ""]  # fmt: skip
    lines = [
        f"# Loss curves of every layout against one GPU: {machine}",
        "",
        *shared,
        f"{provenance.in_words(provenance.versions(packages))}; commit {provenance.commit(ROOT)}, "
        f"{provenance.now()}. {options.steps} steps from the same weights on the same batches; "
        "differences are relative to the run named, with the same attention.",
        "",
        "    " + shlex.join(["python", *sys.argv]),
        "",
        "| model | layout | GPUs | modules | against | steps | " + " | ".join(columns) + " |",
        "| " + "--- | " * (6 + len(columns)),
    ]
    shown = dict.fromkeys((case.layout, case.modules) for case in cases if not case.initial)
    order = list(dict.fromkeys(case.layout.variant for case in cases))
    for layout, kind in sorted(shown, key=lambda row: order.index(row[0].variant)):
        lines.append(row_of(layout, kind, cases, results, options))
    failed = [case for case in cases if case in results and results[case]["error"]]
    lines += ["", "Runs that failed:" if failed else "No run failed."]
    lines += [f"- {case.name}: {results[case]['error']}" for case in failed]
    missing = len(cases) - len(results)
    if missing:
        lines.append(f"- {missing} runs were not done: the tool was stopped")
    return "\n".join(lines) + "\n"


def row_of(layout: TrainedLayout, kind: str, cases, results, options) -> str:
    """One layout on one kind of modules, all attentions."""
    against, cells, steps = "", [], 0
    for attention in options.attention:
        case = LayoutCase(layout, kind, attention)
        reference, against = reference_of(case, cases)
        got, expected = (_losses(results, c) for c in (case, reference))
        steps = max(steps, len(got))
        if not got:
            cells += ["failed" if case in results else "-", "", "", ""]
            continue
        cells += [f"{got[min(got)]:.4f}", f"{got[max(got)]:.4f}"]
        if reference == case or not expected:
            cells += ["-", "-"]
            continue
        relative = {s: abs(got[s] - expected[s]) / abs(expected[s]) for s in got if s in expected}
        at = min(STEP, max(relative))
        cells += [f"{relative[at]:.3%}", f"{max(relative.values()):.3%}"]
    head = [layout.variant, layout.name, str(layout.gpus), kind, against, str(steps)]
    return "| " + " | ".join(head + cells) + " |"


def reference_of(case: LayoutCase, cases: list[LayoutCase]) -> tuple[LayoutCase, str]:
    """What a run is compared with: its single-GPU run; for that of local modules, TE's."""
    first = next((c for c in cases if c.initial and c.start == case.start), case).modules
    modules = first if case.layout.name == ONE_GPU else case.modules
    reference = next(
        (c for c in cases if not c.initial and c.layout.name == ONE_GPU
         and (c.layout.variant, c.modules, c.attention)
         == (case.layout.variant, modules, case.attention)),
        case,
    )  # fmt: skip
    return reference, "-" if reference == case else f"{ONE_GPU}, {modules}"


def _losses(results: dict, case: LayoutCase) -> dict[int, float]:
    result = results.get(case)
    if not result or result["error"]:
        return {}
    return {int(step): loss for step, loss in result["losses"].items()}


if __name__ == "__main__":
    sys.exit(main())
