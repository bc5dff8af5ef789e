"""`s2megatron`: look at a run file, make a dataset, plan a run."""

import argparse
import os
import sys

from s2megatron.errors import ConfigError, hide_import_warnings


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status: 2 for input that does not fit."""
    parser = argparse.ArgumentParser(prog="s2megatron", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="print a run file's layer table, draw its masks")
    show.add_argument("config", help="run file (YAML)")
    show.add_argument("overrides", nargs="*", metavar="key.path=value")
    show.add_argument("--plot", metavar="FILE.png", help="draw the masks of --layers and --heads")
    show.add_argument("--layers", help="layers to draw, as '1,3' (default: one of each kind)")
    show.add_argument("--heads", help="KV heads to draw, as '0,1,5' (default: the first four)")
    show.add_argument("--blocks", type=int, help="side of the squares in blocks (default: 64)")
    show.set_defaults(run=_show)

    data = commands.add_parser("data", help="text files, folders or JSONL -> Megatron .bin/.idx")
    data.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders")
    data.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx")
    data.add_argument("--tokenizer", default="bytes",
                      help="bytes, huggingface:NAME_OR_DIR or sentencepiece:FILE")  # fmt: skip
    data.add_argument("--suffix", action="append", help="file ending to look for in folders")
    data.add_argument("--field", default="text", help="the text field of JSONL lines")
    data.set_defaults(run=_data)

    _add_planner(commands)

    options, rest = parser.parse_known_args(argv)
    if any("=" not in text or text.startswith("-") for text in rest) or not (
        rest == [] or hasattr(options, "overrides")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that stand after an option
        options.overrides = [*options.overrides, *rest]
    hide_import_warnings()
    try:
        options.run(options)
    except ConfigError as error:
        print(f"s2megatron {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `s2megatron show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(options) -> None:
    from s2megatron.config import load_config
    from s2megatron.layer_table import layer_table

    run = load_config(options.config, options.overrides)
    patterns = run.sparsity.resolve(**_sizes(run.megatron))
    print(layer_table(patterns, int(run.megatron["seq_length"])))
    if options.plot:
        from s2megatron.plot import plot_masks

        chosen = _numbers("--layers", options.layers, range(1, len(patterns) + 1))
        if chosen is None:  # the first layer of each kind
            chosen = [patterns.index(pattern) + 1 for pattern in dict.fromkeys(patterns)]
        most = max(pattern.kv_heads for pattern in patterns)
        heads = _numbers("--heads", options.heads, range(most)) or list(range(min(4, most)))
        plot_masks(
            {n: patterns[n - 1] for n in chosen},
            options.plot,
            heads=heads,
            n_blocks=options.blocks or 64,
        )
        print(f"masks of layers {chosen}, KV heads {heads}: {options.plot}")


def _sizes(megatron: dict) -> dict[str, int]:
    """The head and layer counts of a run file, as Megatron reads them."""
    for name in ("num_layers", "num_attention_heads", "seq_length"):
        if not isinstance(megatron.get(name), int):
            raise ConfigError(f"megatron.{name}: {megatron.get(name)!r}: must be a number")
    heads = megatron["num_attention_heads"]
    grouped = megatron.get("group_query_attention")
    kv_heads = megatron.get("num_query_groups", 1) if grouped else heads
    return {"num_layers": megatron["num_layers"], "heads": heads, "kv_heads": kv_heads}


def _numbers(option: str, text: str | None, allowed: range) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: must be numbers with commas between") from None
    for number in numbers:
        if number not in allowed:
            raise ConfigError(f"{option}: {number} is not in {allowed.start}..{allowed.stop - 1}")
    return numbers


def _add_planner(commands) -> None:
    plan = commands.add_parser("plan", help="memory, bytes and step time on N GPUs")
    plan.add_argument("config", help="run file (YAML)")
    plan.add_argument("overrides", nargs="*", metavar="key.path=value")
    plan.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    plan.add_argument("--gpu", default="h200", metavar="h100|h200|b200|FILE.yaml",
                      help="the machine's constants (default: h200)")  # fmt: skip
    plan.add_argument("--tokens", type=float, default=1e12, help="budget that days are counted for")
    plan.add_argument("--search", nargs="?", type=int, const=10, metavar="BEST",
                      help="list the best layouts that fit (10)")  # fmt: skip
    plan.add_argument("--local", action="store_true",
                      help="Megatron's local modules, not Transformer Engine's")  # fmt: skip
    plan.set_defaults(run=_plan)

    calibrate = commands.add_parser("calibrate", help="measure the constants of `plan` here")
    calibrate.add_argument("--out", required=True, metavar="FILE.yaml")
    calibrate.add_argument("--base", default="h200", metavar="h100|h200|b200|FILE.yaml",
                           help="where what is not measured comes from")  # fmt: skip
    calibrate.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    calibrate.set_defaults(run=_calibrate)


def _plan(options) -> None:
    from s2megatron.planner.report import plan_run

    text = plan_run(
        options.config,
        options.overrides,
        gpus=options.gpus,
        gpu=options.gpu,
        tokens=options.tokens,
        local=options.local,
        best=options.search,
    )
    print(text)


def _calibrate(options) -> None:
    from s2megatron.planner.calibrate import calibrate

    calibrate(options.out, base=options.base, small=options.small)


def _data(options) -> None:
    from s2megatron.data import TEXT_SUFFIXES, documents, find_files, write_dataset

    files = find_files(options.inputs, tuple(options.suffix or TEXT_SUFFIXES))
    plain = all(file.suffix != ".jsonl" for file in files)
    report = write_dataset(
        documents(files, options.field),
        options.out,
        options.tokenizer,
        total=len(files) if plain else None,
    )
    print(
        f"{report.prefix}.bin, .idx: {report.documents:,} documents, {report.tokens:,} tokens, "
        f"vocabulary {report.vocab_size} ({options.tokenizer})"
    )


if __name__ == "__main__":
    sys.exit(main())
