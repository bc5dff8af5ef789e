"""Retrieval: documents are made, one forward pass scores all answers, and answers are counted.

An answer is right if the model's argmax is right on every one of its tokens, given all that stands
before, the answers before it included.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from s2megatron.evaluation.network import Network
from s2megatron.evaluation.progress import Say, Ticker
from s2megatron.evaluation.retrieval import (
    STYLES,
    TASKS,
    RetrievalDocument,
    make_document,
)
from s2megatron.evaluation.shards import EDGE_NAMES, Grid
from s2megatron.evaluation.statistics import Mean, mean
from s2megatron.evaluation.words import Encode

DISTANCE_EDGES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

Filler = Callable[[int, random.Random], Sequence[int]]
"""So many tokens of natural text."""


def no_twins(values: tuple) -> tuple:
    """Of pydantic fields: what is asked for twice would be counted twice, with too small errors."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} stands there twice; name it once")
    return values


class RetrievalPlan(BaseModel):
    """What is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lengths: tuple[int, ...] = Field(min_length=1)
    """Tokens of a document."""
    tasks: tuple[str, ...] = TASKS
    documents: int = Field(default=100, ge=1)
    """Per task and length; their depths are spread evenly over the document."""
    control: int = Field(default=50, ge=0)
    """Documents more without what is asked for."""
    queries: int | None = Field(default=None, ge=1)
    """Answers a document (not of `single`); left out: the generator's."""
    records: int | None = Field(default=None, ge=1)
    style: str = "sentences"
    seed: int = 0

    _different = field_validator("lengths", "tasks")(no_twins)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"{task!r}: must be of {', '.join(TASKS)}")
        return tasks

    @field_validator("style")
    @classmethod
    def _known_style(cls, style: str) -> str:
        if style not in STYLES:
            raise ValueError(f"{style!r}: must be {' or '.join(STYLES)}")
        return style

    def document(
        self,
        task: str,
        length: int,
        number: int,
        encode: Encode,
        filler: Filler | None,
        *,
        needle: bool = True,
    ) -> RetrievalDocument:
        """Document `number` of a task: the same for every model with the same tokenizer.

        Raises:
            ValueError: the length is too small for the task.
        """
        rng = random.Random(f"{self.seed} {task} {length} {number} {needle}")
        of = self.documents if needle else self.control
        depth = (number + 0.05 + 0.9 * rng.random()) / of  # in its part of the document, not on
        single = task == "single"  # an edge
        return make_document(
            task,
            encode,
            length,
            rng,
            filler=None if filler is None else filler(length, rng),
            queries=None if single else self.queries,
            records=None if single else self.records,
            needle=needle,
            style=self.style,
            depth=depth,
        )


class AnswerRow(NamedTuple):
    """One answer and what became of it."""

    task: str
    length: int
    needle: bool
    """False: what is asked for was left out."""
    document: int
    source: int
    """Position of the planted value."""
    start: int
    """Position of the answer."""
    tokens: int
    """Of the answer."""
    right: bool
    nats: float
    """Cross entropy of the whole answer."""


@dataclass(frozen=True)
class RetrievalResult:
    """All answers, and the ways to count them."""

    plan: RetrievalPlan
    rows: list[AnswerRow]

    def share(self, **wanted) -> Mean:
        """Right answers over answers, of rows whose fields have these values."""
        return _share(
            row for row in self.rows if all(getattr(row, f) == v for f, v in wanted.items())
        )

    def by(self, key: Callable[[AnswerRow], str | int], task: str) -> dict[str | int, Mean]:
        """Shares of a task's answers (of all lengths, the control left out), by a key of theirs."""
        groups: dict[str | int, list[AnswerRow]] = {}
        for row in self.rows:
            if row.needle and row.task == task:
                groups.setdefault(key(row), []).append(row)
        return {name: _share(rows) for name, rows in groups.items()}

    def by_depth(self, task: str, length: int) -> list[Mean]:
        """Of each tenth of the document, from its beginning."""
        tenths = self.by(lambda row: (row.length, 10 * row.source // row.length), task)
        return [tenths.get((length, i), Mean(None, None, 0)) for i in range(10)]

    def by_distance(self, task: str) -> dict[str, Mean]:
        """Of answers by how far back the value stands, in tokens."""
        bins = self.by(
            lambda row: int(numpy.digitize(row.start - row.source, DISTANCE_EDGES)), task
        )
        edges = (0, *DISTANCE_EDGES)
        names = [f"{a} to {b}" for a, b in zip(edges, DISTANCE_EDGES, strict=False)]
        names.append(f"{edges[-1]} and more")
        return {names[i]: bins[i] for i in sorted(bins)}

    def by_shard(self, task: str, grid: Grid) -> dict[int, Mean]:
        """By the shard of the value's first token."""
        return dict(sorted(self.by(lambda row: grid.shard(row.source), task).items()))

    def by_edge(self, task: str, grid: Grid) -> dict[str, Mean]:
        """By where a block edge meets the fact."""
        found = self.by(lambda row: grid.edge(row.source, row.tokens), task)
        return {name: found[name] for name in EDGE_NAMES if name in found}


def _share(rows) -> Mean:
    """Documents are the samples: answers in one document are alike."""
    sums: dict[tuple, list[int]] = {}
    for row in rows:
        pair = sums.setdefault((row.task, row.length, row.needle, row.document), [0, 0])
        pair[0] += row.right
        pair[1] += 1
    return mean([right for right, _ in sums.values()], [count for _, count in sums.values()])


def evaluate_retrieval(
    network: Network,
    encode: Encode,
    plan: RetrievalPlan,
    *,
    filler: Filler | None = None,
    batch_tokens: int,
    say: Say = print,
) -> RetrievalResult:
    """Asks a model all questions of a plan.

    Args:
        encode: the model's tokenizer, as `make_document` wants it.
        filler: natural text of this tokenizer to plant facts in; left out: generated sentences.
        batch_tokens: tokens in one forward pass; one document goes in whole.

    Raises:
        ValueError: a length too small for a task.
    """
    rows: list[AnswerRow] = []
    for length, task, needle in itertools.product(plan.lengths, plan.tasks, (True, False)):
        count = plan.documents if needle else plan.control
        name = f"retrieval at {length:,} tokens, {task}" + ("" if needle else " (left out)")
        ticker = Ticker(name, count, "documents", say)
        size = max(1, batch_tokens // length)
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            batch = [plan.document(task, length, n, encode, filler, needle=needle) for n in numbers]
            found = score(network, batch)
            for number, document, results in zip(numbers, batch, found, strict=True):
                rows += [
                    AnswerRow(task, length, needle, number, a.source, a.start, a.end - a.start, *r)
                    for a, r in zip(document.answers, results, strict=True)
                ]
            right = [right for results in found for right, _ in results]
            ticker.step(len(batch), len(batch) * length, right=sum(right) / len(right))
    return RetrievalResult(plan, rows)


def score(
    network: Network, documents: Sequence[RetrievalDocument]
) -> list[list[tuple[bool, float]]]:
    """Whether each answer of each document (all of one length) is right, and its nats."""
    rows, places, owners = [], [], []
    for i, document in enumerate(documents):
        for j, answer in enumerate(document.answers):
            for place in range(answer.start, answer.end):
                rows.append(i)
                places.append(place)
                owners.append((i, j))
    tokens = torch.tensor([document.tokens for document in documents], dtype=torch.int64)
    right, nats = network.predictions(tokens, torch.tensor(rows), torch.tensor(places))
    found = [[(True, 0.0)] * len(document.answers) for document in documents]
    for (i, j), hit, cost in zip(owners, right.tolist(), nats.tolist(), strict=True):
        so_far, total = found[i][j]
        found[i][j] = (so_far and hit, total + cost)
    return found
