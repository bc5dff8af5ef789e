"""Measures how a run file scales on this machine, beside the planner's prediction.

    python scripts/bench/scaling_test.py configs/llama_1.3b_32k.yaml --gpus 1,2,4 --mode weak \
        --layouts dp,tp2,pp2 --sequence 32768,131072 [key.path=value ...]

Each run goes through scripts/train.sh, trains on random tokens, drops its warm-up steps and, at the
end, traces one step with torch's profiler. On a machine without a GPU the ranks are CPU processes
over gloo (--gpus says how many). A layout is tpN, ppN, dpN or several of them joined (tp2pp2); data
parallelism takes the rest of the GPUs. Writes NAME.json, NAME.md and NAME.png into --out.

--warm takes ranks that have imported ahead (warm_ranks.py) instead: 10 to 20 s less a run.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from runs import ROOT, logged_steps, train, what_went_wrong
from warm_ranks import Pool, open_pool

from s2_kernels import dense
from s2megatron import provenance
from s2megatron.errors import ConfigError, hide_import_warnings
from s2megatron.machine import load_machine
from s2megatron.planner.layout import Layout, Model
from s2megatron.planner.measured import MeasuredRun, as_json, exposed_share, markdown, read_trace
from s2megatron.planner.step import Plan, plan
from s2megatron.plot import read_scalars

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSE = "sparsity={default: {kind: dense}}"


@dataclass(frozen=True)
class ScalingCase:
    """One run to make."""

    attention: str
    sequence: int
    layout: str
    gpus: int
    tp: int
    cp: int
    pp: int
    global_batch: int
    recompute: str | None = None
    """'none' or 'full'; None: what the run file says."""

    @property
    def name(self) -> str:
        """The layout, with the recompute that was asked for."""
        return f"{self.layout}, recompute {self.recompute}" if self.recompute else self.layout

    @property
    def folder(self) -> str:
        layout = f"{self.layout}-{self.recompute}" if self.recompute else self.layout
        return f"{self.attention}-{self.sequence}-{layout}-{self.gpus}"


def parse_layout(text: str) -> dict[str, int]:
    """'tp2cp2' -> sizes. Raises ConfigError."""
    if text == "dp":
        return {}
    found = re.findall(r"(tp|cp|pp|dp)(\d+)", text)
    if not found or "".join(a + n for a, n in found) != text:
        raise ConfigError(
            f"--layouts {text}: must be dp, tpN, cpN, ppN, dpN or several joined, as tp2cp2"
        )
    return {axis: int(size) for axis, size in found}


def cases(options) -> tuple[list[ScalingCase], list[str]]:
    """What to run, smallest first, and what was left out. Raises ConfigError when that is all."""
    found, left_out = [], []
    least, most = min(options.gpus), max(options.gpus)
    batch = options.batch or (least if options.mode == "weak" else most)
    for sequence in options.sequence:
        for gpus in sorted(options.gpus):
            for name in options.layouts:
                sizes = parse_layout(name)
                tp, cp, pp = (sizes.get(axis, 1) for axis in ("tp", "cp", "pp"))
                dp = gpus // (tp * cp * pp)
                total = batch * gpus // least if options.mode == "weak" else batch
                if gpus % (tp * cp * pp) or sizes.get("dp", dp) != dp or total % dp:
                    left_out.append(f"{name} on {gpus} GPUs with a batch of {total}")
                    continue
                for recompute, attention in itertools.product(options.recompute, options.attention):
                    found.append(
                        ScalingCase(attention, sequence, name, gpus, tp, cp, pp, total, recompute)
                    )
    if not found:
        raise ConfigError(f"nothing to run: {'; '.join(left_out)} do not divide")
    return found, left_out


RECOMPUTE = {
    None: [],
    "none": ["megatron.recompute_granularity=null", "megatron.recompute_method=null",
             "megatron.recompute_num_layers=null"],
    "full": ["megatron.recompute_granularity=full", "megatron.recompute_method=uniform",
             "megatron.recompute_num_layers=1"],
}  # fmt: skip


def overrides_of(case: ScalingCase, options, folder: Path) -> list[str]:
    last = options.warmup + options.steps
    trace = case.gpus > 1 and case.attention in options.traced  # one GPU does not communicate
    traced = [  # torch's profiler warms up one step before, and slows that one
        f"megatron.train_iters={last + 4}",
        "megatron.profile=true",
        "megatron.use_pytorch_profiler=true",
        "megatron.profile_ranks=[0]",
        f"megatron.profile_step_start={last + 2}",
        f"megatron.profile_step_end={last + 3}",
    ]
    return [
        *options.overrides,
        *([DENSE] if case.attention == "dense" else []),
        f"megatron.seq_length={case.sequence}",
        f"megatron.max_position_embeddings={case.sequence}",
        f"megatron.tensor_model_parallel_size={case.tp}",
        f"megatron.sequence_parallel={str(case.tp > 1).lower()}",
        f"megatron.context_parallel_size={case.cp}",
        f"megatron.pipeline_model_parallel_size={case.pp}",
        f"megatron.global_batch_size={case.global_batch}",
        "megatron.micro_batch_size=1",
        "data={mock: true, tokenizer: megatron}",
        "megatron.tokenizer_type=NullTokenizer",
        f"megatron.vocab_size={options.vocab}",
        *RECOMPUTE[case.recompute],
        "megatron.lr_warmup_iters=1",
        "megatron.lr_decay_iters=1000",
        "megatron.eval_iters=0",
        "megatron.log_interval=1",
        "megatron.tensorboard_log_interval=1",
        f"megatron.tensorboard_dir={folder}/tensorboard",
        # The last iteration ends with the run, which takes some 80 ms: only where it takes long.
        *(traced if trace else [f"megatron.train_iters={last + (options.steps > 1)}"]),
    ]


def train_warm(case: ScalingCase, options, folder: Path, pool: Pool) -> str:
    """A run of ranks that imported ahead: rank 0's log. Raises RuntimeError."""
    argv = ["--config", str(options.config), *overrides_of(case, options, folder)]
    run = pool.launch(argv, list(range(case.gpus)), folder, timeout=options.timeout)
    try:
        while (error := run.poll()) is None:
            pool.refill()
            time.sleep(0.1)
    finally:
        run.end()
    if error:
        raise RuntimeError(f"{error}; {folder}/rank*.log")
    return (folder / "rank0.log").read_text()


def train_cold(case: ScalingCase, options, folder: Path, pool: None) -> str:
    """A run of scripts/train.sh: its log. Raises RuntimeError."""
    log = folder / "log.txt"
    words = overrides_of(case, options, folder)
    _, status = train(options.config, words, gpus=case.gpus, log=log)
    if status:
        raise RuntimeError(f"{what_went_wrong(log, status)}; {log}")
    return log.read_text()


def measure(case: ScalingCase, options, folder: Path, pool: Pool | None, notes) -> MeasuredRun:
    """One run under the launcher. Raises RuntimeError with what went wrong.

    A run that had its steps timed before it failed, or before its time was up, counts, with a note.
    """
    folder.mkdir(parents=True)
    ended = summary = None
    try:
        text = (train_warm if pool else train_cold)(case, options, folder, pool)
    except RuntimeError as error:
        ended, steps = error, logged_steps(folder)
    else:
        # Not Megatron's iteration-time, whose second value is the mean of the first two iterations
        # (megatron-core 0.19 does not reset that timer after the first).
        steps = dict(read_scalars(folder / "tensorboard")["s2/seconds-per-iteration"])
        summary = json.loads(re.findall(r"^s2megatron summary (.*)$", text, re.MULTILINE)[-1])
    timed = [steps[n] for n in sorted(steps) if
             options.warmup < n <= options.warmup + options.steps]  # fmt: skip
    if len(timed) < options.steps:
        raise ended or RuntimeError(f"{len(timed)} of {options.steps} steps were timed; {folder}")
    if ended:
        notes.append(f"{case}: all steps were timed, then: {str(ended).splitlines()[0]}")
    peak = max(summary["peak_gib"]) if summary else None
    trace = folder / "torch_profile" / "rank-0.json.gz"
    return MeasuredRun(
        attention=case.attention,
        layout=case.name,
        gpus=case.gpus,
        sequence=case.sequence,
        global_batch=case.global_batch,
        step_seconds=tuple(timed),
        peak_gib=peak or None,
        exposed=exposed_share(read_trace(trace)) if trace.exists() else None,
        log=str(folder),
    )


class Planner:
    """Predictions for the cases; the run file is read once."""

    def __init__(self, options):
        from s2megatron.planner.report import read_run

        self.machine = load_machine(options.gpu)
        extra = [f"megatron.vocab_size={options.vocab}", "data={mock: true, tokenizer: megatron}",
                 "megatron.tokenizer_type=NullTokenizer"]  # fmt: skip
        local = importlib.util.find_spec("transformer_engine") is None
        self.model, self.layout = read_run(
            str(options.config), [*options.overrides, *extra], 1, local=local
        )

    def predict(self, case: ScalingCase) -> Plan:
        """What the planner says of a case, whether or not it fits."""
        shape = replace(self.model.shape, seq_len=case.sequence)
        patterns = self.model.patterns
        if case.attention == "dense":
            heads = {"heads": shape.heads, "kv_heads": shape.kv_heads}
            patterns = (dense(**heads, block_size=patterns[0].block_size),) * len(patterns)
        layout: Layout = replace(
            self.layout, gpus=case.gpus, tp=case.tp, cp=case.cp, pp=case.pp, vpp=1, micro_batch=1,
            sequence_parallel=case.tp > 1, global_batch=case.global_batch,
            recompute=case.recompute or self.layout.recompute,
        )  # fmt: skip
        return plan(self.machine, Model(shape, patterns), layout)


def draw(about: dict, runs: list[MeasuredRun], path: Path) -> None:
    """Tokens/s/GPU against GPUs, one panel per length; predictions dashed."""
    lengths = sorted({run.sequence for run in runs})
    figure, axes = plt.subplots(1, len(lengths), figsize=(5.5 * len(lengths), 4), squeeze=False,
                                layout="constrained")  # fmt: skip
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, length in zip(axes[0], lengths, strict=True):
        lines = sorted({(r.attention, r.layout) for r in runs if r.sequence == length})
        for colour, (attention, layout) in zip(colours * 3, lines, strict=False):
            points = [r for r in runs if (r.attention, r.layout, r.sequence) ==
                      (attention, layout, length)]  # fmt: skip
            gpus = [r.gpus for r in points]
            axis.plot(gpus, [r.per_gpu for r in points], "o-", color=colour,
                      label=f"{attention}, {layout}")  # fmt: skip
            if all(r.predicted_seconds for r in points):
                predicted = [r.global_batch * length / r.predicted_seconds / r.gpus for r in points]
                axis.plot(gpus, predicted, "x--", color=colour, linewidth=0.8)
        axis.set_title(f"{length:,} tokens", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({r.gpus for r in runs}), [str(n) for n in
                        sorted({r.gpus for r in runs})])  # fmt: skip
        axis.set_xlabel("GPUs")
        axis.set_ylabel("tokens/s/GPU")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{about['mode']} scaling on {about['gpu']} (crosses: predicted)", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe(options, argv: list[str], notes: list[str]) -> dict:
    """What was run on what."""
    made = provenance.describe(ROOT)
    if not torch.cuda.is_available():
        made["gpu"] += f" ({os.cpu_count()} cores, gloo)"
    return made | {
        "mode": options.mode,
        "steps": options.steps,
        "warmup": options.warmup,
        "constants": options.gpu,
        "command": shlex.join(["python", "scripts/bench/scaling_test.py", *argv]),
        "notes": notes,
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: list[str]):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--gpus", type=numbers, required=True, help="e.g. 1,2,4")
    parser.add_argument("--mode", choices=("weak", "strong"), required=True,
                        help="weak: the batch grows with the GPUs; strong: it stays")  # fmt: skip
    parser.add_argument("--layouts", type=lambda s: s.split(","), default=["dp"])
    parser.add_argument("--sequence", type=numbers, required=True, help="e.g. 32768,131072")
    parser.add_argument("--attention", type=lambda s: s.split(","), default=["s2", "dense"])
    parser.add_argument("--recompute", type=lambda s: s.split(","), default=[None],
                        help="none,full (default: what the run file says)")  # fmt: skip
    parser.add_argument("--fitting", action="store_true",
                        help="leave out what the planner says does not fit the GPU")  # fmt: skip
    parser.add_argument("--batch", type=int,
                        help="sequences per step, of all GPUs: weak, on the fewest GPUs (default: "
                        "one per GPU); strong, everywhere (default: the most GPUs)")  # fmt: skip
    parser.add_argument("--traced", type=lambda s: s.split(","), default=["s2", "dense"],
                        help="s2, dense, both (default) or none: one more step is traced, for the "
                        "exposed share of communication")  # fmt: skip
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--warmup", type=int, default=5, help="steps thrown away")
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--gpu", default="h200", help="constants of the prediction")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/raw")
    parser.add_argument("--name", help="default: scaling-MODE-DATE")
    parser.add_argument("--logs", type=Path, help="keep each run's log and trace here")
    parser.add_argument("--warm", action="store_true", help="ranks import ahead")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a --warm run")
    options = parser.parse_intermixed_args(argv)
    if unknown := set(options.recompute) - set(RECOMPUTE):
        parser.error(f"--recompute {','.join(sorted(unknown))}: must be none, full or both")
    if unknown := set(options.traced) - {"s2", "dense", "none"}:
        parser.error(f"--traced {','.join(sorted(unknown))}: must be s2, dense, both or none")
    return options


def fitting(chosen: list[ScalingCase], planner: "Planner") -> tuple[list[ScalingCase], list[str]]:
    """Those that fit by the planner, and the others in words."""
    plans = {case: planner.predict(case) for case in chosen}
    over = [
        f"{case.attention} at {case.sequence:,}, {case.name} on {case.gpus} GPUs "
        f"({plans[case].memory.total / 2**30:.0f} GiB)"
        for case in chosen
        if not plans[case].fits
    ]
    return [case for case in chosen if plans[case].fits], over


def attempt(
    case: ScalingCase, options, logs: Path, pool, planner: "Planner", notes
) -> MeasuredRun | None:
    """One run beside its prediction; None, and a note, where it failed."""
    began = time.perf_counter()
    try:
        run = measure(case, options, logs / case.folder, pool, notes)
    except RuntimeError as error:  # one layout that runs out of memory does not end the rest
        print(f"    failed: {error}", file=sys.stderr, flush=True)
        notes.append(f"Failed: {case}: {str(error).splitlines()[0]}")
        return None
    result = planner.predict(case)
    print(f"    {run.seconds * 1e3:.1f} ms/step, {run.tokens_per_second:,.0f} tokens/s; "
          f"predicted {result.seconds * 1e3:.1f} ms; the run took "
          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return replace(run, predicted_seconds=result.seconds, predicted_gib=result.memory.total / 2**30)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)  # Megatron's parser takes sys.argv over
    options = parse(argv)
    hide_import_warnings()
    try:
        chosen, left_out = cases(options)
        planner = Planner(options)
    except ConfigError as error:
        print(f"scaling_test.py: {error}", file=sys.stderr)
        return 2
    notes = [f"Left out, does not divide: {text}." for text in left_out]
    if options.fitting:
        chosen, over = fitting(chosen, planner)
        notes += [f"Left out, does not fit by the planner: {text}." for text in over]
    name = options.name or f"scaling-{options.mode}-{provenance.now()[:10]}"
    logs = options.logs or Path(tempfile.mkdtemp(prefix="scaling-"))
    options.out.mkdir(parents=True, exist_ok=True)
    about, runs = describe(options, argv, notes), []
    pool = open_pool([c.gpus for c in chosen], logs / "importing.log") if options.warm else None
    try:
        for number, case in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {case}", flush=True)
            if run := attempt(case, options, logs, pool, planner, notes):
                runs.append(run)
            if runs:  # after each run: what was measured is there whatever comes next
                (options.out / f"{name}.json").write_text(as_json(about, runs))
                (options.out / f"{name}.md").write_text(markdown(about, runs))
                draw(about, runs, options.out / f"{name}.png")
    finally:
        if pool:
            pool.close()
    print(f"{options.out / name}.json, .md, .png; logs and traces: {logs}")
    return 0 if len(runs) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
