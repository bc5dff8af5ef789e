"""`s2megatron evaluate`: a Hugging Face folder in; JSON, markdown and pictures out."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from pydantic import ValidationError

from s2megatron.convert.tokenizer import has_tokenizer
from s2megatron.data import make_tokenizer
from s2megatron.errors import ConfigError, refuse_unread
from s2megatron.evaluation.evaluate import LossPlan, evaluate
from s2megatron.evaluation.network import Network, load_network
from s2megatron.evaluation.progress import Say
from s2megatron.evaluation.report import remove_report, write_report
from s2megatron.evaluation.result import Evaluation
from s2megatron.evaluation.scoring import Filler, RetrievalPlan
from s2megatron.evaluation.shards import parse_grid
from s2megatron.evaluation.windows import Documents
from s2megatron.evaluation.words import Encode

_OF_RETRIEVAL = "documents control queries records style filler tokenizer grid seed"


def run(options: argparse.Namespace, say: Say = print) -> Path:
    """Does what the command line says; returns the output folder. Raises ConfigError."""
    tasks = () if options.tasks == "none" else tuple(options.tasks.split(","))
    if not tasks and options.data is None:
        raise ConfigError("--tasks none, and no --data: nothing is left to evaluate")
    if options.data is None:
        refuse_unread(options, "windows packed", "the loss (--data)")
    if not tasks:
        refuse_unread(options, _OF_RETRIEVAL, "retrieval (--tasks)")
    if tasks == ("single",):  # a document has one fact
        refuse_unread(options, "queries records", "tasks of several facts (--tasks)")
    extra = tuple(map(parse_grid, options.grid))
    out = Path(options.out)
    encode, tokenizer = find_tokenizer(options.folder, options.tokenizer) if tasks else (None, None)
    network = load_network(
        options.folder, options.attention, device=options.device, dtype=options.dtype
    )
    lengths = _lengths(options.lengths, network)
    loss, retrieval = _plans(options, lengths, tasks)
    documents = Documents(options.data, network.vocab_size) if options.data else None
    filler: Filler | None = None
    if tasks and options.filler:
        stock = Documents(options.filler, network.vocab_size, "--filler")
        filler = stock.stretch
    _make(out)  # it fails now or not at all
    about = {
        "model": str(options.folder),
        "data": options.data,
        "packed": options.packed if options.data else None,
        "tokenizer": tokenizer,
        "filler": options.filler,
        "command": shlex.join(["s2megatron", *sys.argv[1:]]),
    }
    found = evaluate(
        network,
        {name: value for name, value in about.items() if value is not None},
        loss=loss,
        documents=documents,
        retrieval=retrieval,
        encode=encode,
        filler=filler,
        extra_grids=extra,
        batch_tokens=options.batch_tokens,
        say=say,
        keep=lambda part: _keep(part, out),
    )
    write_report(found.summary(), out)
    return out


def _keep(part: Evaluation, out: Path) -> None:
    part.write(out)
    remove_report(out)  # of the numbers that were there before


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    if not writable:
        raise ConfigError(f"--out {out}: cannot be written to; name another folder")


def find_tokenizer(folder: str, name: str | None) -> tuple[Encode, str]:
    """The tokenizer of that name, or of the model in `folder`, and its name. Raises ConfigError."""
    if name is None:
        if Path(folder).is_dir() and not has_tokenizer(Path(folder)):
            raise ConfigError(
                f"{folder} has no tokenizer, which retrieval needs: name the one it was trained "
                "with (--tokenizer bytes, huggingface:DIR or sentencepiece:FILE); `evaluate` can "
                "leave retrieval out (--tasks none)"
            )
        name = f"huggingface:{folder}"
    return make_tokenizer(name)[0], name


def _lengths(text: str | None, network: Network) -> tuple[int, ...]:
    if text is None:
        if network.positions is None:
            raise ConfigError("--lengths: is missing; the model's config.json names no length")
        return tuple(max(1, network.positions // part) for part in (4, 2, 1))
    lengths = []
    for part in text.lower().split(","):
        number, thousands = part.removesuffix("k"), part.endswith("k")
        if not number.isdigit() or int(number) < 1:
            raise ConfigError(f"--lengths {text}: {part!r} is no number of tokens, as 4096 or 4k")
        lengths.append(int(number) * (1024 if thousands else 1))
    return tuple(lengths)


def _plans(options, lengths, tasks) -> tuple[LossPlan | None, RetrievalPlan | None]:
    """Raises ConfigError that names the option."""
    loss = retrieval = None
    try:
        if options.data is not None:
            loss = LossPlan(lengths=lengths, windows=options.windows, packed=options.packed)
        if tasks:
            retrieval = RetrievalPlan(
                lengths=lengths, tasks=tasks, documents=options.documents,
                control=options.control, queries=options.queries, records=options.records,
                style=options.style, seed=options.seed,
            )  # fmt: skip
    except ValidationError as errors:
        error = errors.errors()[0]
        message = error["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--{error['loc'][0]} {error['input']}: {message}") from None
    return loss, retrieval
