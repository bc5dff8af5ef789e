"""The recipe: what every arm of the study is trained on, phase by phase, and how it is examined.

A recipe is a YAML file; configs/quality/recipe.yaml is the study's. All arms of a study take the
same one, so they see the same sequences in the same order. A recipe may go on where another one
ended (`after`): short sequences once for all arms, then 8k, then 32k, each a file of its own.
"""

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2megatron.errors import ConfigError
from s2megatron.evaluation.retrieval import TASKS
from s2megatron.evaluation.words import LETTER_KEYS

MIX = ("records", "repeats", "shortest", "styles", "tasks", "facts", "asked")
"""What a phase may say of its retrieval documents: documents.DocumentMix has them, too."""


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
    shortest: int | None = Field(default=None, ge=32)
    """Tokens of the shortest retrieval document; left out: documents.SHORTEST, which is the least
    that holds a record and its question."""
    styles: list[Literal["records", "sentences"]] | None = Field(default=None, min_length=1)
    """See documents.DocumentMix; left out: its own."""
    tasks: list[Literal[TASKS]] | None = Field(default=None, min_length=1)
    """See documents.DocumentMix; left out: all."""
    facts: int | None = Field(default=None, ge=4, le=len(LETTER_KEYS))
    """See documents.DocumentMix; left out: its own."""
    asked: float | None = Field(default=None, gt=0, le=1)
    """See documents.DocumentMix; left out: its own."""
    seconds: float | None = None
    """Training stops after so many seconds of this phase, wherever it is: for trying a recipe, not
    for comparing arms. Left out: no limit."""
    train_seconds: float | None = None
    """For comparing arms at equal time: a few steps are timed first, and the phase then has as many
    steps as fit into so many seconds of training (start, evaluations and checkpoints not counted),
    `tokens` at most. The rate falls to `final_lr` over just these steps."""
    block_size: int | None = None
    """Tokens of a block, in place of the arm's: blocks of a quarter of the size, on sequences of a
    quarter of the length, are the arm's own pattern at a quarter of its scale."""
    us_per_token: float | None = None
    """Microseconds a token, measured as jobs.py says: for planning alone."""

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

    @property
    def mix(self) -> dict:
        """What it says of its retrieval documents, as arguments of documents.DocumentMix."""
        given = {name: getattr(self, name) for name in MIX}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }

    def documents_name(self, seed: int) -> str:
        """Of the dataset of its retrieval documents; recipes that want the same ones share it."""
        wanted = int(self.steps * self.sequences * self.retrieval * 1.02) + 8
        kind = f"{self.records:g}-{self.repeats:g}"
        if self.shortest is not None:
            kind += f"-from-{self.shortest}"
        if self.styles is not None:
            kind += f"-{''.join(style[0] for style in self.styles)}"
        if self.tasks is not None:
            kind += f"-{'+'.join(self.tasks)}"
        if self.facts is not None:
            kind += f"-of-{self.facts}-facts"
        if self.asked is not None:
            kind += f"-asked-{self.asked:g}"
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
    documents: int | None = None
    """Per task and length; left out: the examination's."""
    control: int | None = None
    """More of them, without what is asked for; left out: the examination's."""


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

    @property
    def tokens(self) -> int:
        """That a model reads in all."""
        documents = sum(
            len(probe.tasks) * ((probe.documents or self.documents) + (probe.control or 0))
            for probe in self.probes
        )
        return documents * sum(self.lengths) + self.loss_tokens * len(self.loss_lengths)


class Recipe(_Checked):
    seed: int = 1
    """Of weights and order."""
    documents_seed: int = 1
    """Of the retrieval documents: runs with other seeds see the same ones in another order."""
    after: Path | None = None
    """The recipe that these phases go on from, named from this file's folder."""
    after_arm: str | None = None
    """The arm whose weights all arms go on from; left out: each from its own. Where a phase is no
    longer than an arm's window, one arm can be trained for all."""
    start: str | None = None
    """A Hugging Face folder under the data folder whose weights the first phase goes on from."""
    spread: bool = False
    """An arm takes all GPUs that there are: all else waits for it."""
    alone: bool = False
    """An arm has its GPU to itself, for its memory; where its time is compared it has anyway."""
    phases: list[Phase] = []
    """None: what was trained before is examined, and nothing is trained."""
    examination: Examination | None = None
    """Left out: arms are only trained, to time them or to go on from."""
    watch_tokens: int = 262_144
    """Held-out tokens, of text and of retrieval, whose loss is taken on the way."""
    dense_kernels: list[Literal["cudnn", "flash"]] = []
    """What dense layers may compute with, without Transformer Engine: of several the fastest, which
    a phase with `train_seconds` finds out. Empty: what torch chooses."""
    megatron: dict = Field(default_factory=dict)
    """Options of Megatron for all phases, over those of the run file."""

    @model_validator(mode="after")
    def _has_what_to_do(self):
        before = [name for name in ("after", "start") if getattr(self, name) is not None]
        if not self.phases and not before:
            raise ValueError("phases: is empty, and there is no after or start to examine")
        if len(before) == 2:
            raise ValueError(f"start: {self.start} cannot stand beside after: {self.after}")
        if self.after_arm is not None and self.after is None:
            raise ValueError(f"after_arm: {self.after_arm} needs after, the recipe of that arm")
        longest = max((phase.length for phase in self.phases), default=0)
        if self.watch_tokens < 2 * longest:  # Megatron's sequences overlap by a token
            raise ValueError(
                f"watch_tokens: {self.watch_tokens} hold no whole sequence and one token more of "
                f"length={longest}; give at least {2 * longest}"
            )
        timed = all(phase.train_seconds for phase in self.phases)
        if len(self.dense_kernels) > 1 and not timed:
            raise ValueError("dense_kernels: only one is allowed for a phase without train_seconds")
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe; its `after` is then a path from the current folder.

    Raises:
        ConfigError: naming file, field and value.
    """
    path = Path(path)
    try:
        found = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"--recipe {path}: there is no such file") from None
    except ValidationError as errors:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors.errors()]
        raise ConfigError(f"--recipe {path}:\n" + "\n".join(lines)) from None
    if found.after is None:
        return found
    return found.model_copy(update={"after": Path(os.path.normpath(path.parent / found.after))})


def history(path: str | Path) -> list[Recipe]:
    """A recipe and those that it goes on from, the first one first."""
    found = [load_recipe(path)]
    while found[0].after is not None:
        found.insert(0, load_recipe(found[0].after))
    return found
