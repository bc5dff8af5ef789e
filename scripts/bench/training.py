"""Times training steps end to end, dense attention against S2, through the launcher.

    python3 scripts/bench/training.py configs/llama_1.3b_32k.yaml --gpus 2 --sequences 32768

Every run goes through scripts/train.sh, on random tokens (mock data), one sequence a step and model
copy. ATTENTION is dense (every layer) or s2 (the config's `sparsity:`); RECOMPUTE none or
full; a run is ATTENTION:RECOMPUTE@TOKENS, by default both attentions at every --sequences. Prints
ms a step (median after the warm-up) and its spread, the first step, tokens/s and memory; writes
OUT.json, OUT.md and the logs under OUT/. With --profile one more step is traced, and its
kernels' time is added up by kind (profile_kinds.py). key.path=value at the end goes to every run.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from profile_kinds import add_up, table
from runs import ROOT, train, what_went_wrong

from s2megatron import provenance
from s2megatron.planner.measured import read_trace

OPTIONS = dict(
    global_batch_size=1,
    micro_batch_size=1,
    log_interval=1,
    eval_interval=1000,
    eval_iters=0,
    lr_decay_iters=1000,
    lr_warmup_iters=0,
    save_interval=100000,
    gradient_accumulation_fusion=False,
)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--sequences", default="32768", help="tokens, comma-separated")
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--runs", help="e.g. dense:full@131072,s2:none@131072; default: both")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps not counted")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", default="runs/bench_training", help="OUT.json, OUT.md, OUT/")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(argv)
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile: adds up GPU kernels, and there is no GPU here")
    if not Path(options.config).is_file():
        parser.error(f"CONFIG {options.config}: there is no such file")
    if options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: must be 1 or more")
    # The last step is not counted: its time has the end of the run in it.
    if options.warmup < 0 or options.steps < options.warmup + 2:
        parser.error(
            f"--steps {options.steps} with --warmup {options.warmup}: no step is left to count; "
            f"--steps must be {max(0, options.warmup) + 2} or more"
        )
    runs_of(options)
    return options


def runs_of(a) -> list[tuple[str, str, int]]:
    """(attention, recompute, tokens) of every run."""
    if not a.runs:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", a.sequences):
            sys.exit(f"--sequences {a.sequences}: must be numbers of tokens with commas between")
        tokens = [int(x) for x in a.sequences.split(",")]
        return [(kind, a.recompute, n) for n in tokens for kind in ("dense", "s2")]
    found = [re.fullmatch(r"(dense|s2):(none|full)@(\d+)", x) for x in a.runs.split(",")]
    if not all(found):
        sys.exit(f"--runs {a.runs}: must be like dense:full@131072,s2:none@131072")
    return [
        (kind, recompute, int(tokens)) for kind, recompute, tokens in map(re.Match.groups, found)
    ]


def overrides(a, attention, recompute, tokens, folder) -> list[str]:
    options = OPTIONS | dict(seq_length=tokens, max_position_embeddings=tokens, train_iters=a.steps)
    if recompute == "full":
        options |= dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    if a.profile:  # one more step is traced, after one in which the profiler starts
        options |= dict(
            train_iters=a.steps + 2,
            profile=True,
            use_pytorch_profiler=True,
            profile_step_start=a.steps + 1,
            profile_step_end=a.steps + 2,
            tensorboard_dir=str(folder / "tensorboard"),
        )
    words = [f"megatron.{name}={json.dumps(value)}" for name, value in options.items()]
    words += ["data.mock=true", *a.overrides]
    if attention == "dense":
        words += ["sparsity.default={kind: dense}", "sparsity.layers=[]"]
    return words


def run(a, attention, recompute, tokens) -> dict:
    """One training run, read from its log."""
    name = f"{attention}-{recompute}-{tokens}"
    folder = Path(a.out) / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    print(f"== {name}: {log}", flush=True)
    began = time.time()
    words = overrides(a, attention, recompute, tokens, folder)
    command, status = train(a.config, words, gpus=a.gpus, log=log)
    row = dict(attention=attention, recompute=recompute, tokens=tokens, command=command)
    row |= dict(status=status, wall_s=round(time.time() - began, 1))
    if status == 0:
        row |= read_log(log.read_text(), a.warmup, a.steps - 1)
        traces = sorted(folder.rglob("*.pt.trace.json*"))
        if traces:
            row["profile"] = add_up(read_trace(traces[0]))
    else:
        row["error"] = what_went_wrong(log, status)
    return row


def read_log(text: str, warmup: int, last: int) -> dict:
    """ms of the counted steps, of the first, tokens/s, the most memory of rank 0; or `error`."""
    line = r"s2megatron iteration +(\d+) \| ([\d.]+) ms.*?true model TFLOP/s/rank: ([\d.e+]+)"
    own = [
        (float(ms), float(tf)) for i, ms, tf in re.findall(line, text) if warmup < int(i) <= last
    ]
    counted = [ms for ms, _ in own]
    if not counted:
        return dict(error=f"its log has no s2megatron line of steps {warmup + 1} to {last}")
    theirs = re.findall(r" iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+)", text)
    memory = re.findall(r"max allocated: ([\d.]+)", text)
    losses = re.findall(r"lm loss: ([\d.E+-]+)", text)
    return dict(
        ms=statistics.median(counted),
        spread_ms=max(counted) - min(counted),
        first_ms=float(theirs[0][1]) if theirs else None,
        memory_gib=max(map(float, memory)) / 1024 if memory else None,
        true_TFLOPs=statistics.median(tf for _, tf in own),
        loss=float(losses[-1]) if losses else None,
    )


def versions() -> dict:
    """Of what was measured with, and the GPU."""
    return provenance.versions() | dict(GPU=provenance.machine())


def report(a, rows) -> str:
    """The table, and each run's profile."""
    dense = {r["tokens"]: r["ms"] for r in rows if r["attention"] == "dense" and "ms" in r}
    lines = [
        f"`python3 scripts/bench/training.py {shlex.join(sys.argv[1:])}`",
        "",
        f"{provenance.in_words(versions())}, commit {provenance.commit(ROOT)}",
        "",
        "| sequence | attention | recompute | ms/step | spread | first step | tokens/s | "
        "true TFLOP/s/GPU | memory | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        head = f"| {r['tokens']:,} | {r['attention']} | {r['recompute']} |"
        if "ms" not in r:
            lines.append(f"{head} failed: {r['error']} | | | | | | |")
            continue
        ratio = f"{dense[r['tokens']] / r['ms']:.2f}x" if r["tokens"] in dense else ""
        memory = f"{r['memory_gib']:.1f} GiB" if r["memory_gib"] else ""
        first = f"{r['first_ms'] / 1e3:.1f} s" if r["first_ms"] else ""
        lines.append(
            f"{head} {r['ms']:,.0f} | {r['spread_ms']:.0f} | {first} | "
            f"{r['tokens'] / r['ms'] * 1e3:,.0f} | {r['true_TFLOPs']:.0f} | {memory} | {ratio} |"
        )
    for r in rows:
        if r.get("profile"):
            lines += ["", f"{r['tokens']:,} tokens, {r['attention']}, recompute {r['recompute']}: "
                      "GPU time of one step on rank 0", "", *table(r["profile"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    a = parse()
    rows = []
    for attention, recompute, tokens in runs_of(a):
        rows.append(run(a, attention, recompute, tokens))
        print({k: v for k, v in rows[-1].items() if k not in ("command", "profile")}, flush=True)
        out = Path(a.out)
        out.with_suffix(".json").write_text(
            json.dumps(provenance.describe(ROOT) | dict(rows=rows), indent=1)
        )
        out.with_suffix(".md").write_text(report(a, rows))
    print(report(a, rows))
    print(f"written: {a.out}.md, {a.out}.json, logs under {a.out}/")
    sys.exit(any(r["status"] for r in rows))


if __name__ == "__main__":
    main()
