"""The machine's constants: a YAML that `s2megatron calibrate` writes, or one that is shipped.

Every rate is what one GPU was measured to do, not its peak, or a guess: `Machine.source` says
which. The planner predicts by them, and the plugin chooses by them (`attention/overlap.py`). The
planner's assumptions stand in the same file, though they are not the machine's, so that one can try
others.
"""

import itertools
import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from s2_kernels import LayerPattern
from s2megatron import strict_yaml
from s2megatron.errors import ConfigError, did_you_mean

SHIPPED = Path(__file__).with_name("gpus")


Rates = Annotated[dict[PositiveInt, Annotated[float, Field(gt=0)]], Field(min_length=1)]
"""TFLOP/s by a size; `interpolate` reads between."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Attention(_Checked):
    """Useful TFLOP/s of one attention at head size 128, kept pairs only, by tokens."""

    forward: Rates
    backward: Rates


class Link(_Checked):
    """One GPU's part of a link."""

    gb_s: float = Field(gt=0)
    """Bus bandwidth of a ring collective, per GPU and direction, in 1e9 bytes per second."""
    latency_us: float = Field(ge=0)
    """A small collective's time, per doubling of the ranks."""

    def seconds(self, size: float) -> float:
        """One GPU's `size` bytes, without latency."""
        return size / (self.gb_s * 1e9)


class Assumptions(_Checked):
    """What the model takes for granted."""

    tp_backward_overlap: float = Field(0.8, ge=0, le=1)
    """Share of the backward matmuls' time behind which TP/SP communication can hide: with
    CUDA_DEVICE_MAX_CONNECTIONS=1 the gather overlaps dgrad, the scatter wgrad. Forward: none."""
    exchange_groups: int = Field(1, ge=1)
    """Groups of KV heads in which context parallelism exchanges blocks: the first is waited for,
    the others hide behind attention of the group before. 1: nothing hides."""
    dp_overlap: float = Field(0.9, ge=0, le=1)
    """Share of the last backward (gradients) or first forward (parameters) that hides DP's."""
    elementwise_fused: float = Field(1.0, gt=0)
    """Times the least memory traffic of norms, SwiGLU, RoPE and residuals: Transformer Engine."""
    elementwise_local: float = Field(1.6, gt=0)
    """The same on Megatron's local modules and torch norms."""
    memory_reserve: float = Field(0.06, ge=0, lt=1)
    """Share of the GPU's memory that CUDA, NCCL and fragmentation take: a plan fits beside it."""


class Machine(_Checked):
    """A GPU and the network around it."""

    gpu: str
    source: str
    """Where the figures come from: measured (machine, command) or estimated (from what).
    In all that are shipped the links between nodes are guesses; in h100 and b200 all links."""
    memory_gib: float = Field(gt=0)
    gpus_per_node: int = Field(ge=1)
    matmul_tflops: Rates
    """By the edge n of an n x n x n product, bf16."""
    sustained: float = Field(1.0, gt=0, le=1)
    """Share of the rates of matrix products and attention, each measured alone, that holds through
    a step: the clock falls under load."""
    memory_tb_s: float = Field(gt=0)
    """Copy, read and write counted."""
    dense_attention: Attention
    s2_attention: Attention
    node: Link
    """Between GPUs of a node."""
    cluster: Link
    """Between nodes, per GPU (its own adapter)."""
    host_layer_us: float = Field(ge=0)
    """The host's time to launch one layer's forward: a lower bound of its time."""
    step_ms: float = Field(ge=0)
    """Per step, whatever its size: data, optimizer launches, logging."""
    assumptions: Assumptions = Assumptions()

    def matmul_seconds(self, m: float, n: float, k: float) -> float:
        """One m x k by k x n product."""
        if not m or not n or not k:
            return 0.0
        rate = interpolate(self.matmul_tflops, (m * n * k) ** (1 / 3))
        return 2 * m * n * k / (1e12 * rate * self.sustained)

    def attention_rates(self, pattern: LayerPattern) -> Attention:
        return self.dense_attention if pattern.is_dense else self.s2_attention

    def attention_seconds(self, flops: float, rates: dict[int, float], seq_len: int) -> float:
        """Forward's (4 per pair and head dimension) or backward's (10) useful FLOPs."""
        return flops / (1e12 * interpolate(rates, seq_len) * self.sustained)

    def memory_seconds(self, size: float) -> float:
        """Reading and writing so many bytes in all."""
        return size / (self.memory_tb_s * 1e12)


def interpolate(table: dict[int, float], at: float) -> float:
    """Between the table's points, linear in the logarithm; constant outside."""
    points = sorted(table.items())
    if at <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in itertools.pairwise(points):
        if at <= high:
            share = math.log(at / low) / math.log(high / low)
            return a + share * (b - a)
    return points[-1][1]


def load_machine(name: str) -> Machine:
    """A shipped one by name (h100, h200, b200), or a YAML file. Raises ConfigError."""
    shipped = {path.stem: path for path in SHIPPED.glob("*.yaml")}
    path = shipped.get(name.lower(), Path(name))
    if not path.is_file():
        near = did_you_mean(name, shipped)
        raise ConfigError(
            f"--gpu {name}: is neither a file nor one of {', '.join(sorted(shipped))}{near}; "
            "`s2megatron calibrate --out FILE.yaml` measures your own"
        )
    try:
        tree = strict_yaml.load(path.read_text(encoding="utf-8"), f"--gpu {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gpu {path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--gpu {path}: holds no machine's constants. {_MAKE}")
    if "sparsity" in tree or "megatron" in tree:
        raise ConfigError(
            f"--gpu {path}: is a run file, not a machine's constants; name the run file without "
            f"--gpu. {_MAKE}"
        )
    try:
        return Machine.model_validate(tree)
    except ValidationError as errors:
        wrong = [_explain(error) for error in errors.errors()]
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(f"--gpu {path}: {'; '.join(wrong[:4])}{more}. {_MAKE}") from None


_MAKE = "`s2megatron calibrate --out FILE.yaml` measures your own machine"


def _explain(error: dict) -> str:
    """One pydantic error in one line."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        return f"{where} is unknown{did_you_mean(where, Machine.model_fields)}"
    return f"{where}: {error['input']!r}: {error['msg']}"
