"""The recipe: what every arm of the study is trained on, phase by phase, and how it is examined.

A recipe is a YAML file; configs/quality/recipe.yaml is the study's. All arms of a study take the
same one, so they see the same sequences in the same order.
"""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2megatron.errors import ConfigError


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Phase(_Checked):
    """A run of `s2megatron.pretrain` that goes on from the weights of the phase before it."""

    length: int
    """Tokens of a sequence."""
    tokens: int
    """To train on; rounded to whole steps."""
    batch_tokens: int
    """Of a step."""
    micro_batch_tokens: int = 65536
    """Of a forward pass, at most."""
    lr: float
    """At its highest."""
    final_lr: float
    """At the end, reached in a straight line from `lr`."""
    warmup_steps: int = 100
    retrieval: float = Field(ge=0, le=1)
    """Share of the sequences that are retrieval documents; the others are text."""
    records: float = Field(default=0.6, ge=0, le=1)
    """See documents.DocumentMix."""
    repeats: float = Field(default=0.5, ge=0, le=1)
    """See documents.DocumentMix."""
    seconds: float | None = None
    """Training stops after so many seconds of this phase, wherever it is: for trying a recipe, not
    for comparing arms. Left out: no limit."""

    @model_validator(mode="after")
    def _whole_sequences(self):
        for name in ("batch_tokens", "micro_batch_tokens"):
            if name == "batch_tokens" and self.batch_tokens % self.length:
                raise ValueError(
                    f"batch_tokens: {self.batch_tokens} is not a multiple of length={self.length}"
                )
        return self

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.batch_tokens // self.length

    def documents_name(self, seed: int) -> str:
        """Of the dataset of its retrieval documents; recipes that want the same ones share it."""
        wanted = int(self.steps * self.sequences * self.retrieval * 1.02) + 8
        kind = f"{self.records:g}-{self.repeats:g}"
        return f"retrieval-{self.length}-{kind}-seed-{seed}-of-{wanted}"

    def micro_batch(self, sequences: int) -> int:
        """Of so many sequences on one GPU, those of a forward pass: the largest divisor allowed."""
        most = max(1, self.micro_batch_tokens // self.length)
        return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= most)


class Probe(_Checked):
    """One run of `s2megatron evaluate` that asks for what was planted."""

    name: str
    style: str
    tasks: list[str] = ["single", "multi_key", "multi_value", "multi_query", "tracking"]
    queries: int | None = None
    """Answers a document; left out: the generator's."""
    records: int | None = None
    """Facts planted in a document; left out: the generator's."""


class Examination(_Checked):
    """What `s2megatron evaluate` is asked of every trained arm."""

    lengths: list[int]
    """Of retrieval documents."""
    probes: list[Probe] = [
        Probe(name="records", style="records", queries=8, records=32),
        Probe(name="sentences", style="sentences"),
    ]
    documents: int = 32
    """Per probe, task and length."""
    control: int = 4
    """More of them, without what is asked for."""
    grids: list[str] = Field(default_factory=list)
    """BLOCK:STRIDE that answers are counted by, beside a model's own shards."""
    loss_lengths: list[int]
    """Of the held-out sequences that the loss is taken over."""
    loss_tokens: int = 2_000_000
    """Held-out tokens per length."""


class Recipe(_Checked):
    seed: int = 1
    """Of weights and order."""
    documents_seed: int = 1
    """Of the retrieval documents: runs with other seeds see the same ones in another order."""
    phases: list[Phase] = Field(min_length=1)
    trunk: int = Field(default=0, ge=0)
    """The first so many phases are trained once, dense, and every arm goes on from their weights.
    Where a phase is no longer than an arm's window, nothing else would come of it."""
    examination: Examination | None = None
    """Left out: arms are only trained, to time them."""
    watch_tokens: int = 262_144
    """Held-out tokens, of text and of retrieval, whose loss is taken on the way."""
    megatron: dict = Field(default_factory=dict)
    """Options of Megatron for all phases, over those of the run file."""

    @model_validator(mode="after")
    def _a_phase_is_left(self):
        if self.trunk >= len(self.phases):
            raise ValueError(
                f"trunk: {self.trunk} of {len(self.phases)} phases leaves the arms none"
            )
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe. Raises ConfigError naming file, field and value."""
    try:
        return Recipe.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"--recipe {path}: there is no such file") from None
    except ValidationError as errors:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors.errors()]
        raise ConfigError(f"--recipe {path}:\n" + "\n".join(lines)) from None
