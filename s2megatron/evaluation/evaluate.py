"""Loss and retrieval of a model that is already there: for programs, and for `command.py`."""

import itertools
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, field_validator

from s2megatron import provenance
from s2megatron.errors import ConfigError, as_config_error
from s2megatron.evaluation.loss import evaluate_loss
from s2megatron.evaluation.network import Network
from s2megatron.evaluation.progress import Say
from s2megatron.evaluation.result import Evaluation
from s2megatron.evaluation.retrieval import RetrievalDocument
from s2megatron.evaluation.scoring import Filler, RetrievalPlan, evaluate_retrieval, no_twins
from s2megatron.evaluation.shards import Grid, grids
from s2megatron.evaluation.windows import Documents
from s2megatron.evaluation.words import Encode, digest

BATCH_TOKENS = {"cuda": 65536, "cpu": 4096}


class LossPlan(BaseModel):
    """Which windows the loss is taken over."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lengths: tuple[int, ...] = Field(min_length=1)
    """Tokens of a window."""
    windows: int = Field(default=100, ge=1)
    """At most so many of each length."""
    packed: bool = False
    """All documents one after the other; else each window lies in one document."""

    _different = field_validator("lengths")(no_twins)


def evaluate(
    network: Network,
    about: dict,
    *,
    loss: LossPlan | None = None,
    documents: Documents | None = None,
    retrieval: RetrievalPlan | None = None,
    encode: Encode | None = None,
    filler: Filler | None = None,
    extra_grids: tuple[Grid, ...] = (),
    batch_tokens: int | None = None,
    say: Say = print,
    keep: Callable[[Evaluation], None] = lambda part: None,
) -> Evaluation:
    """Loss and retrieval of a model that is already there.

    Args:
        about: what the report is to say of it; "model" is its title.
        loss, documents: both, for the loss.
        retrieval, encode: both, for retrieval; `filler` as in `evaluate_retrieval`.
        extra_grids: block grids to count answers by, beside those of the model's own patterns.
        batch_tokens: tokens in one forward pass; left out: BATCH_TOKENS of the device.
        keep: is given what there is so far after every length of the loss, which says in `about`
            what is missing, and all at the end.

    Raises:
        ConfigError: lengths, tokens or documents that do not fit.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: must be at least 1")
    size = batch_tokens or BATCH_TOKENS.get(network.device.type, BATCH_TOKENS["cuda"])
    for length in (loss.lengths if loss else ()) + (retrieval.lengths if retrieval else ()):
        if network.positions is not None and length > network.positions:
            raise ConfigError(
                f"--lengths {length}: the model has {network.positions} positions "
                "(max_position_embeddings in its config.json); choose at most that"
            )
    if retrieval is not None:  # before anything has taken its time
        for length, task in itertools.product(retrieval.lengths, retrieval.tasks):
            with as_config_error(f"--tasks {task} at --lengths {length}"):
                _check_tokens(network, retrieval.document(task, length, 0, encode, filler))
    if encode is not None:
        about = about | {"tokenizer digest": digest(encode)}
    about = {
        "attention": network.attention,
        **about,
        "machine": provenance.machine(network.device),
        "versions": provenance.in_words(provenance.versions(("torch", "transformers"))),
        "date": provenance.now(),
    }
    counted_by = sorted({*grids(network.patterns), *extra_grids})
    found = Evaluation(about, [], None, counted_by)
    todo = [f"loss at {length}" for length in loss.lengths] if loss else []
    todo += ["retrieval"] if retrieval else []
    for length in loss.lengths if loss else ():
        losses = evaluate_loss(
            network, documents, length, windows=loss.windows, packed=loss.packed,
            batch_tokens=size, say=say,
        )  # fmt: skip
        todo = todo[1:]
        told = about | {"unfinished": "without " + ", ".join(todo)} if todo else about
        found = Evaluation(told, [*found.losses, losses], None, counted_by)
        keep(found)
    if retrieval is not None:
        answers = evaluate_retrieval(
            network, encode, retrieval, filler=filler, batch_tokens=size, say=say
        )
        found = Evaluation(about, found.losses, answers, counted_by)
        keep(found)
    return found


def _check_tokens(network: Network, document: RetrievalDocument) -> None:
    highest = max(document.tokens)
    if highest >= network.vocab_size:
        raise ConfigError(
            f"--tokenizer: makes token {highest}, the model's vocabulary has "
            f"{network.vocab_size}: it belongs to another model"
        )
