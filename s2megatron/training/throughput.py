"""Tokens per second and true model FLOPs, beside Megatron's own line (of dense attention)."""

import time
from collections.abc import Callable

import torch

from s2_kernels import LayerPattern
from s2megatron.accounting import KeptPairs, ModelShape

PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "GB200": 2500,
    "B200": 2250,
}
"""Dense bf16 TFLOP/s that NVIDIA's data sheets give, by a part of the device's name."""


def peak_tflops(device_name: str) -> float | None:
    """What MFU is measured against; None for a device that `PEAKS` does not know."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


class ThroughputMeter:
    """Times training iterations from the moments at which the forward step is called.

    An iteration counts from its own first forward step to the next one's, the last one to the end
    of training (up to 80 ms more on H100s). Iterations next to an evaluation or a checkpoint are
    left out, so what is reported is training alone. On a GPU the host runs ahead within an
    iteration, but Megatron reads the loss at every log interval, which is where a report is made.

    Args:
        shape, patterns: what is trained.
        sequences: asked as an iteration begins: its sequences, all ranks together.
        gpus: ranks in all.
        log_interval: iterations per report.
        peak: TFLOP/s of one GPU in bf16, for MFU; None: unknown, and MFU is left out.
        save_interval: checkpoints are written after multiples of this (None: never).
        report: called with (iteration, text, scalars) on every rank.
        all_data: adds a number up over the data-parallel ranks; called by all of them at once, and
            only where documents are packed.
    """

    def __init__(
        self,
        shape: ModelShape,
        patterns: tuple[LayerPattern, ...],
        *,
        sequences: Callable[[], int],
        gpus: int,
        log_interval: int,
        save_interval: int | None,
        peak: float | None = None,
        report: Callable[[int, str, dict[str, float]], None],
        all_data: Callable[[float], float] = float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.sequences = sequences
        self.attention_flops = shape.attention_flops(patterns)
        self.dense_attention_flops = shape.dense_attention_flops()
        """Of a sequence that is one document."""
        self.shape, self.counter = shape, KeptPairs(patterns)
        self.gpus, self.log_interval, self.save_interval = gpus, log_interval, save_interval
        self.peak, self.report, self.all_data, self.clock = peak, report, all_data, clock
        self._kept = self._dense = self._counted = 0
        """Pairs of packed documents on this rank since the last report, and in how many steps."""
        self._of_documents: tuple[float, float] | None = None
        """FLOPs of attention per iteration, kept and dense, of the documents that were seen."""
        self._iteration: int | None = None
        self._began = 0.0
        self._interrupted = False
        self._seconds: list[float] = []
        self._batch = 0
        self._batches: list[int] = []
        """Of the iterations in `_seconds`."""

    def evaluating(self) -> None:
        """A forward step of an evaluation: the iteration before it has no clean end."""
        self._interrupted = True

    def documents(self, lengths: torch.Tensor) -> None:
        """A micro-batch of packed documents; the pairs they keep are counted, not assumed.

        Args:
            lengths: tokens of each document on this data-parallel rank, on the host.
        """
        kept, dense = self.counter.count(lengths)
        self._kept, self._dense = self._kept + kept, self._dense + dense

    def training(self, iteration: int) -> None:
        """A forward step of training; `iteration` is the number of finished iterations."""
        if iteration == self._iteration:
            return
        self._counted += self._iteration is not None
        now = self.clock()
        saved = self.save_interval and iteration % self.save_interval == 0
        if self._iteration is not None and not self._interrupted and not saved:
            self._seconds.append(now - self._began)
            self._batches.append(self._batch)
        self._iteration, self._began, self._interrupted = iteration, now, False
        self._batch = self.sequences()
        if iteration % self.log_interval == 0:
            self._make_report(iteration)

    def _count_documents(self) -> None:
        """FLOPs of attention per iteration from the documents seen since the last report."""
        if self._kept and self._counted:
            per_pair = 12 * self.shape.head_dim / self._counted
            kept, dense = (self.all_data(n * per_pair) for n in (self._kept, self._dense))
            self._of_documents = kept, dense
        self._kept = self._dense = self._counted = 0

    def _make_report(self, iteration: int) -> None:
        self._count_documents()
        if not self._seconds:
            return
        seconds = sum(self._seconds) / len(self._seconds)
        sequences = sum(self._batches) / len(self._batches)
        self._seconds, self._batches = [], []
        tokens = sequences * self.shape.seq_len / seconds
        matmuls = sequences * self.shape.seq_len * self.shape.matmul_flops_per_token()
        kept, dense = self._of_documents or (
            sequences * self.attention_flops,
            sequences * self.dense_attention_flops,
        )
        flops = matmuls + kept
        dense_ratio = (matmuls + dense) / flops
        tflops = flops / seconds / self.gpus / 1e12
        mfu = f"MFU {tflops / self.peak:.1%} of {self.peak:g}, bf16; " if self.peak else ""
        text = (
            f" s2megatron iteration {iteration:8d} | {seconds * 1e3:.1f} ms/iteration | "
            f"{tokens:.0f} tokens/s | {tokens / self.gpus:.0f} tokens/s/rank | "
            f"true model TFLOP/s/rank: {tflops:.4g} ({mfu}kept pairs; "
            f"dense attention would need {dense_ratio:.2f}x the FLOPs)"
        )
        scalars = {
            "s2/tokens-per-second": tokens,
            "s2/true-TFLOPs-per-rank": tflops,
            "s2/seconds-per-iteration": seconds,
            "s2/dense-over-true-FLOPs": dense_ratio,
        }
        if self.peak:
            scalars["s2/MFU"] = tflops / self.peak
        self.report(iteration, text, scalars)
