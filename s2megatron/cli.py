"""`s2megatron`: look at a run file, make a dataset."""

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

    options = parser.parse_args(argv)
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
