"""Measured runs beside predicted ones: arithmetic and tables of scripts/bench/scaling_test.py."""

import gzip
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from s2megatron.provenance import in_words


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One measured run. Seconds are of training iterations after the warm-up."""

    attention: str
    """'s2' (the run file's) or 'dense'."""
    layout: str
    gpus: int
    sequence: int
    global_batch: int
    step_seconds: tuple[float, ...]
    peak_gib: float | None
    """Of the fullest rank; None on a CPU."""
    exposed: float | None
    """Share of a traced step on rank 0 in which only communication ran; None without a GPU."""
    predicted_seconds: float | None = None
    predicted_gib: float | None = None
    log: str = ""

    @property
    def seconds(self) -> float:
        """The median step: one slow step (a file system, a neighbour) does not move it."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """Of the middle 80% of the steps, over the median."""
        ordered = sorted(self.step_seconds)
        cut = len(ordered) // 10
        return (ordered[-1 - cut] - ordered[cut]) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.global_batch * self.sequence / self.seconds

    @property
    def per_gpu(self) -> float:
        return self.tokens_per_second / self.gpus

    @property
    def step_error(self) -> float | None:
        """Prediction over measurement, less one."""
        return None if self.predicted_seconds is None else self.predicted_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float | None:
        if self.predicted_gib is None or not self.peak_gib:
            return None
        return self.predicted_gib / self.peak_gib - 1


def efficiency(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> float:
    """Tokens per second and GPU over those of the smallest run of the same attention and length.

    Where several layouts are the smallest, the fastest of them is the measure. The same in weak and
    in strong scaling: only the batches differ.
    """
    family = [r for r in runs if (r.attention, r.sequence) == (run.attention, run.sequence)]
    least = min(r.gpus for r in family)
    return run.per_gpu / max(r.per_gpu for r in family if r.gpus == least)


def speedup(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> float | None:
    """Tokens per second over those of the dense run that is otherwise the same."""
    for other in runs:
        same = (other.layout, other.gpus, other.sequence, other.global_batch)
        if other.attention == "dense" and same == (
            run.layout, run.gpus, run.sequence, run.global_batch
        ):  # fmt: skip
            return run.tokens_per_second / other.tokens_per_second
    return None


def exposed_share(events: Sequence[dict]) -> float | None:
    """Share of the GPU's traced time in which NCCL kernels ran and no other kernel did.

    Waiting for a peer counts: NCCL's kernels wait on the GPU. From the first kernel's start to the
    last one's end; None where there are no GPU kernels.

    Args:
        events: `traceEvents` of a torch.profiler trace.
    """
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "kernel"]
    if not kernels:
        return None
    spans = [(e["ts"], e["ts"] + e["dur"], "nccl" in e["name"].lower()) for e in kernels]
    network = union([(a, b) for a, b, is_network in spans if is_network])
    compute = union([(a, b) for a, b, is_network in spans if not is_network])
    whole = max(b for _, b, _ in spans) - min(a for a, _, _ in spans)
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in network for c, d in compute)
    return (sum(b - a for a, b in network) - hidden) / whole


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The intervals that (start, end) spans cover together, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def read_trace(path: Path) -> list[dict]:
    """`traceEvents` of a torch.profiler trace, compressed or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as stream:
        return json.load(stream)["traceEvents"]


COLUMNS = (
    "attention", "tokens", "layout", "GPUs", "batch", "ms/step", "spread", "tokens/s",
    "tokens/s/GPU", "efficiency", "exposed comm.", "peak GiB", "x dense", "predicted ms",
    "predicted GiB",
)  # fmt: skip


def markdown(about: dict, runs: Sequence[MeasuredRun]) -> str:
    """The report: what was run on what, and one row per run."""

    def shown(value, text: str) -> str:
        return "-" if value is None else text.format(value)

    rows = []
    for run in runs:
        rows.append((
            run.attention, f"{run.sequence:,}", run.layout, str(run.gpus), str(run.global_batch),
            f"{run.seconds * 1e3:.1f}", f"{run.spread:.1%}", f"{run.tokens_per_second:,.0f}",
            f"{run.per_gpu:,.0f}", f"{efficiency(run, runs):.1%}", shown(run.exposed, "{:.1%}"),
            shown(run.peak_gib, "{:.2f}"), shown(speedup(run, runs), "{:.2f}"),
            _beside(run.predicted_seconds and run.predicted_seconds * 1e3, run.step_error, ".0f"),
            _beside(run.predicted_gib, run.memory_error, ".2f"),
        ))  # fmt: skip
    table = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    lines = [f"| {' | '.join(row)} |" for row in table]
    versions = in_words(about["versions"])
    return "\n".join([
        f"# Scaling ({about['mode']}) on {about['gpu']}, {about['date']}",
        "",
        f"{versions}; commit {about['commit']}. Medians of {about['steps']} steps after "
        f"{about['warmup']} for warm-up; spread: of the middle 80% of the steps, over the median; "
        "efficiency: tokens/s/GPU over the smallest run's of the same attention and length; "
        "exposed communication: share of one traced step on rank 0 in which NCCL kernels ran and "
        "no other (waiting for a peer counts); x dense: tokens/s over the dense run beside it; "
        f"predicted: `s2megatron plan` with {about['constants']}, and its error.",
        "",
        f"    {about['command']}",
        "",
        *lines,
        "",
        *[f"{note}" for note in about["notes"]],
    ])  # fmt: skip


def _beside(value: float | None, error: float | None, digits: str) -> str:
    if value is None:
        return "-"
    return f"{value:{digits}}" + ("" if error is None else f" ({error:+.1%})")


def as_json(about: dict, runs: Sequence[MeasuredRun]) -> str:
    rows = [
        asdict(run) | {
            "seconds": run.seconds, "tokens_per_second": run.tokens_per_second,
            "tokens_per_second_per_gpu": run.per_gpu, "efficiency": efficiency(run, runs),
            "spread": run.spread, "x_dense": speedup(run, runs), "step_error": run.step_error,
            "memory_error": run.memory_error,
        }
        for run in runs
    ]  # fmt: skip
    return json.dumps({"about": about, "runs": rows}, indent=1)
