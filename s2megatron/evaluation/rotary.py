"""`s2megatron choose-rotary-base`: with which RoPE base a model goes on at a longer context.

Nothing is trained. The loss on text of the longer length is taken under one base after the other:
one that is too small loses everything beyond the length that the model was trained at, one that is
too large a little everywhere. The best of them is where training has the least to mend.
"""

import argparse
import math
import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy
import torch

from s2megatron import provenance
from s2megatron.errors import ConfigError
from s2megatron.evaluation.network import Network, load_model, load_model_config
from s2megatron.evaluation.progress import Say
from s2megatron.evaluation.result import writable, write_json
from s2megatron.evaluation.statistics import mean
from s2megatron.evaluation.windows import Documents

SKIPPED = 128
"""The first length / SKIPPED tokens of a window do not count: their context is short under any."""

PLAIN = ("default", "llama3")
"""Kinds of RoPE that a Megatron run can have beside a base of its own (`convert to-megatron`)."""


def ladder(base: float, trained: int, length: int) -> list[int]:
    """The base as it is, and twice as large again and again, up to four times the longer length's
    share: 16 times for a context of four times the length."""
    steps = max(0, math.ceil(math.log2(length / trained))) + 2
    return [round(base) << i for i in range(steps + 1)]


def position_bins(trained: int, length: int) -> list[int]:
    """Where a window is cut: half of the trained length, all of it, twice, ..., the longer one."""
    edges, edge = [length // SKIPPED], max(2, trained // 2)
    while edge < length:
        edges += [edge] if edge > edges[-1] else []
        edge *= 2
    return [*edges, length]


def base_of(config, folder: str) -> float:
    """The RoPE base in a transformers config. Raises ConfigError for a RoPE that is not PLAIN."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None and getattr(config, "rope_theta", None) is not None:  # transformers 4
        rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    if not rope or "rope_theta" not in rope:
        raise ConfigError(
            f"{folder}: config.json of a {config.model_type} has no single rope_theta; a decoder "
            "in the manner of Llama is needed"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in PLAIN:
        raise ConfigError(
            f"{folder}: rope_type {kind!r} stretches positions by a rule of its own; a base is "
            f"chosen for {' and '.join(PLAIN)}, which Megatron's rotary_base is for"
        )
    return float(rope["rope_theta"])


def use_base(model, base: float) -> None:
    """The model's rotary embeddings made anew, as transformers makes them for this base.

    Raises:
        ConfigError: there is none, so that the base would change nothing.
    """
    config = model.config
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": float(base)}
    else:
        config.rope_theta = float(base)
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if hasattr(child, "inv_freq")
    ]
    if not found:
        raise ConfigError(
            f"a {config.model_type} has no rotary embedding that can be made anew (a module with "
            "inv_freq), so its base cannot be tried; a decoder in the manner of Llama is needed"
        )
    for module, name, child in found:
        setattr(module, name, type(child)(config=config).to(model.device))


def choose(
    model, windows: list[numpy.ndarray], bases: list[int], edges: list[int], say: Say = print
) -> dict:
    """The losses of a model under each base.

    Args:
        model: of transformers, with plain RoPE; has the last of the bases afterwards.
        windows: int64 [n + 1] each.
        edges: positions that the bins lie between; what stands before the first does not count.

    Returns:
        "best": the base with the smallest mean loss; "bases": of each, nats a token "from" the
        first edge on, by position ("FIRST to LAST"), and of every window ("windows"), and how much
        that is "above best", with its standard error over the windows.
    """
    found: dict[int, dict] = {}
    for base in bases:
        began = time.time()
        use_base(model, base)
        network = Network.of(model)
        nats = numpy.stack(
            [network.token_losses(torch.from_numpy(w)[None])[0].double().numpy() for w in windows]
        )
        counted = nats[:, edges[0] :]
        found[base] = {
            "from": float(counted.mean()),
            "by position": {f"{a} to {b}": float(nats[:, a:b].mean()) for a, b in pairwise(edges)},
            "windows": counted.mean(1).tolist(),
        }
        cells = ", ".join(f"{n} {x:.4f}" for n, x in found[base]["by position"].items())
        say(f"{base:>12,}: {found[base]['from']:.4f}; {cells} ({time.time() - began:.0f} s)")
    best = min(found, key=lambda base: found[base]["from"])
    for row in found.values():
        lost = numpy.subtract(row["windows"], found[best]["windows"])
        row["above best"] = mean(lost, numpy.ones(len(lost))).as_dict()
    return {"best": best, "bases": found}


def not_apart(found: dict) -> list[int]:
    """The bases whose loss is above the best one's by less than two standard errors."""
    above = {base: row["above best"] for base, row in found["bases"].items()}
    return [
        base
        for base, lost in above.items()
        if base != found["best"] and lost["error"] is not None and lost["value"] < 2 * lost["error"]
    ]


def run(options: argparse.Namespace, say: Say = print) -> dict:
    """Does what the command line says; returns what it wrote. Raises ConfigError."""
    for name in ("windows", "trained_length", "length"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    config = load_model_config(options.folder)
    own = base_of(config, options.folder)
    trained = options.trained_length or config.max_position_embeddings
    if options.length <= trained:
        raise ConfigError(
            f"--length {options.length}: the model has {trained} positions, which its base of "
            f"{own:,.0f} is for; name a longer one, or with --trained-length what it was trained at"
        )
    bases = _numbers(options.bases) if options.bases else ladder(own, trained, options.length)
    out = writable(Path(options.out))
    documents = Documents(options.data, config.vocab_size)
    found = documents.windows(options.length - 1, options.windows, packed=True)
    windows = [window.tokens for window in found]
    model = load_model(
        options.folder, options.attention, device=options.device, dtype=options.dtype
    )
    model.config.max_position_embeddings = max(options.length, config.max_position_embeddings)
    edges = position_bins(trained, options.length)
    attention = Network.of(model).attention
    say(f"{len(windows)} windows of {options.length:,} tokens, attention {attention}; base: nats a "
        f"token from position {edges[0]:,} on; by position")  # fmt: skip
    about = {
        "command": shlex.join(["s2megatron", *sys.argv[1:]]), "model": str(options.folder),
        "data": options.data, "length": options.length, "trained_length": trained,
        "own_base": own, "machine": provenance.machine(model.device),
        "versions": provenance.in_words(provenance.versions(("torch", "transformers"))),
        "date": provenance.now(),
    }  # fmt: skip
    whole = about | choose(model, windows, bases, edges, say)
    write_json(out, whole)
    say(f"{out}: every loss. For the run file:\n  rotary_base: {whole['best']}")
    if len(bases) > 1 and len(windows) < 2:
        say("one window: nothing says how far apart two bases are (--windows, a larger dataset)")
    if close := not_apart(whole):
        say(f"not apart from it by two standard errors: {', '.join(f'{b:,}' for b in close)}")
    if len(bases) > 1 and whole["best"] == max(bases):
        say("the largest of them is the best: try larger ones (--bases)")
    return whole


def _numbers(text: str) -> list[int]:
    try:
        bases = [int(float(part)) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--bases {text}: must be numbers, as 1000000,4200000") from None
    if min(bases) < 2:
        raise ConfigError(f"--bases {text}: {min(bases)} must be at least 2")
    return bases
