"""`s2megatron`: look at a run file, make a dataset, plan a run, convert checkpoints, evaluate."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from s2megatron.errors import ConfigError, hide_import_warnings, refuse_unread
from s2megatron.evaluation.options import add_evaluation
from s2megatron.paths import user_path

PICTURES = (".png", ".pdf", ".svg")


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
    show.set_defaults(run=_show, parser=show)

    _add_data(
        commands.add_parser("data", help="text files, folders or JSONL -> Megatron .bin/.idx")
    )
    _add_planner(commands)
    check = commands.add_parser("verify", help="whether checkpoints hold what was written")
    check.add_argument("folder", metavar="FOLDER", help="output folder, or one checkpoint")
    check.set_defaults(run=_verify)
    _add_convert(commands.add_parser("convert", help="checkpoints to and from Hugging Face"))
    add_evaluation(commands)
    _add_generate(commands.add_parser("generate", help="text from a Hugging Face model"))

    options, rest = parser.parse_known_args(argv)
    # argparse takes key.path=value only beside the other positional arguments; let it stand last.
    if rest and hasattr(options, "overrides") and not any(part.startswith("-") for part in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    hide_import_warnings()
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, user_path(value))
    try:
        options.run(options)
    except ConfigError as error:
        print(f"s2megatron {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"s2megatron {options.command}: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print(f"s2megatron {options.command}: {_out_of_memory(error, options)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `s2megatron show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _out_of_memory(error: RuntimeError, options: argparse.Namespace) -> str:
    """What of the command's options decides how much GPU memory it takes."""
    deciding = ("batch_tokens", "length", "lengths", "max_new_tokens")
    names = [f"--{name.replace('_', '-')}" for name in deciding if hasattr(options, name)]
    way_out = f"choose less of {' or '.join(names)}, " if names else "choose "
    return f"{'. '.join(str(error).split('. ')[:2])}: {way_out}--device cpu, or a larger GPU"


def _add_data(data: argparse.ArgumentParser) -> None:
    add = data.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files or folders")
    add("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx")
    add("--tokenizer", default="bytes", help="bytes, huggingface:NAME_OR_DIR, sentencepiece:FILE")
    add("--suffix", action="append", help="file ending to look for in folders; '*': every file")
    add("--exclude", action="append", default=[], metavar="PATTERN",
        help="leave out files whose path below the input matches")  # fmt: skip
    add("--field", default="text", help="the text field of JSONL lines")
    add("--format", choices=("auto", "text", "jsonl"), default="auto",
        help="a document per file, or per line; auto: as each file looks")  # fmt: skip
    add("--encoding", help="of the files, as latin-1 or utf-16 (default: UTF-8)")
    add("--skip-bad", action="store_true",
        help="leave out lines and files that cannot be read, and count them")  # fmt: skip
    add("--group-by", choices=("file", "directory"), default="file",
        help="directory: the files of a folder are one document")  # fmt: skip
    add("--hold-out", type=float, metavar="SHARE",
        help="keep apart whole subtrees with this share of the bytes")  # fmt: skip
    add("--hold-out-depth", type=int, default=1, metavar="N",
        help="so many folders below INPUT the subtrees lie (1)")  # fmt: skip
    add("--hold-out-to", metavar="PREFIX", help="their dataset")
    add("--train-tokenizer", metavar="bpe:SIZE",
        help="train one on the input first, into --tokenizer's folder")  # fmt: skip
    add("--tokenizer-mb", type=float, default=256, metavar="MB",
        help="text that it is trained on, at most (256)")  # fmt: skip
    add("--workers", type=int, default=min(16, os.cpu_count() or 1),
        help="processes that encode (the cores, at most 16)")  # fmt: skip
    data.set_defaults(run=_data, parser=data)


def _data(options) -> None:
    from s2megatron.data.build import BuildOptions, build
    from s2megatron.data.reading import ReadOptions
    from s2megatron.data.sources import TEXT_SUFFIXES

    if options.hold_out is None:
        refuse_unread(options, "hold_out_depth", "what is held out (--hold-out)")
    if options.train_tokenizer is None:
        refuse_unread(options, "tokenizer_mb", "a tokenizer that is trained (--train-tokenizer)")
    if options.format == "text":
        refuse_unread(options, "field", "JSONL (--format jsonl)")
    reading = ReadOptions(
        options.field, options.encoding, options.format, options.skip_bad, options.group_by
    )
    for line in build(
        BuildOptions(
            inputs=options.inputs,
            out=options.out,
            tokenizer=options.tokenizer,
            suffixes=options.suffix or TEXT_SUFFIXES,
            exclude=options.exclude,
            reading=reading,
            hold_out=options.hold_out,
            hold_out_depth=options.hold_out_depth,
            hold_out_to=options.hold_out_to,
            train_tokenizer=options.train_tokenizer,
            tokenizer_mb=options.tokenizer_mb,
            workers=options.workers,
        )
    ):
        print(line, flush=True)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True)

    to_hf = ways.add_parser("to-hf", help="Megatron torch_dist checkpoint -> Hugging Face folder")
    to_hf.add_argument("checkpoint", metavar="CKPT_DIR")
    to_hf.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    to_hf.add_argument("--dtype", help="bf16, fp16 or fp32 (default: as stored)")
    to_hf.add_argument("--max-shard-size", default="5GB")
    to_hf.add_argument("--step", type=int, help="iteration (default: the latest)")
    to_hf.add_argument("--architecture", metavar="NAME",
                       help="llama, mistral, qwen2, qwen3, mixtral or qwen3_moe")  # fmt: skip
    to_hf.add_argument("--like", metavar="HF_DIR",
                       help="take the tokenizer and other config fields from here")  # fmt: skip
    to_hf.add_argument("--vocab-size", type=int, help="tokens without padding")
    to_hf.set_defaults(run=_to_hf)

    back = ways.add_parser("to-megatron", help="Hugging Face folder -> Megatron checkpoint")
    back.add_argument("source", metavar="HF_DIR")
    back.add_argument("--out", required=True, metavar="CKPT_DIR", help="a new folder")
    back.add_argument("--config", required=True, help="run file that will train it")
    back.add_argument("overrides", nargs="*", metavar="key.path=value")
    back.set_defaults(run=_to_megatron)

    look = ways.add_parser("inspect", help="what a Megatron checkpoint holds")
    look.add_argument("checkpoint", metavar="CKPT_DIR")
    look.add_argument("--step", type=int, help="iteration (default: the latest)")
    look.set_defaults(run=_inspect)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="HF_DIR", help="a model that `convert to-hf` wrote")
    add("--prompt-file", required=True, metavar="FILE", help="the text to go on from; - is stdin")
    add("--max-new-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest with this much in all")
    add("--seed", type=int, default=0, help="of sampling")
    add("--device", help="cuda or cpu (default: a GPU where there is one)")
    add("--dtype", help="bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on the CPU)")
    add("--graph", action="store_true", help="run a step as one CUDA graph")
    parser.set_defaults(run=_generate, parser=parser)


def _generate(options) -> None:
    from s2megatron.generate import Sampling, generate_text

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    if options.temperature == 0:
        refuse_unread(options, "top_p seed", "sampling (--temperature above 0)")
    report = generate_text(
        options.folder,
        options.prompt_file,
        sampling,
        device=options.device,
        dtype=options.dtype,
        graph=options.graph,
    )
    print(report, file=sys.stderr)


def _to_hf(options) -> None:
    from s2megatron.convert.to_hf import to_hugging_face

    report = to_hugging_face(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        step=options.step,
        architecture=options.architecture,
        like=options.like,
        vocab_size=options.vocab_size,
    )
    print("\n".join(report.notes))
    print(
        f"{report.folder}: {report.architecture}, {report.parameters:,} parameters of iteration "
        f"{report.iteration} in {report.shards} safetensors file(s)"
    )


def _to_megatron(options) -> None:
    if not _has_cuda():
        from s2megatron.training import cpu_runtime

        cpu_runtime.prepare_environment()
    from s2megatron.convert.to_megatron import to_megatron

    report = to_megatron(options.source, options.out, options.config, tuple(options.overrides))
    given = ["--config", options.config, *options.overrides, f"megatron.load={report.folder}"]
    for note in report.notes:
        print(note)
    print(
        f"{report.folder}: {report.architecture}, {report.parameters:,} parameters; train it with\n"
        f"  torchrun ... -m s2megatron.pretrain {shlex.join(given)}"
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _inspect(options) -> None:
    from s2megatron.convert.inspect import inspect

    print(inspect(options.checkpoint, options.step))


def _verify(options) -> None:
    from s2megatron.training.verify import verify

    for line in verify(options.folder):
        print(line, flush=True)


def _show(options) -> None:
    from s2megatron.config import load_config
    from s2megatron.context_split import ContextSplit
    from s2megatron.layer_table import layer_table
    from s2megatron.training.megatron_options import canonical, check_required, to_argv

    if not options.plot:
        refuse_unread(options, "layers heads blocks", "a picture (--plot)")
    run = load_config(options.config, options.overrides)
    patterns = run.sparsity.resolve(**_sizes(run.megatron))
    if options.plot:
        _check_picture("--plot", options.plot)
    to_argv(run.megatron)  # says which option Megatron has not
    megatron, split = canonical(run.megatron), None
    for name in ("context_parallel_size", "tensor_model_parallel_size"):
        if megatron.get(name) is not None:
            _check_size(name, megatron[name])
    if (megatron.get("context_parallel_size") or 1) > 1:
        check_required(megatron)
        split = ContextSplit.from_options(megatron)
        split.check(patterns)
    print(layer_table(patterns, megatron["seq_length"], split=split))
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


def _check_picture(option: str, path: str) -> None:
    """A picture can be written there, under this very name. Raises ConfigError."""
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file in it, like {file}/masks.png")
    if file.suffix.lower() not in PICTURES:
        raise ConfigError(f"{option} {path}: must end in {', '.join(PICTURES)}")
    if not file.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {file.parent}; make it first")


def _sizes(megatron: dict) -> dict[str, int]:
    """The head and layer counts of a run file, as Megatron reads them."""
    names = ["num_layers", "num_attention_heads", "seq_length"]
    if megatron.get("group_query_attention"):
        megatron = {"num_query_groups": 1} | megatron
        names.append("num_query_groups")
    for name in names:
        if name not in megatron:
            raise ConfigError(f"megatron.{name}: is missing; it belongs to the model's shape")
        _check_size(name, megatron[name])
    heads = megatron["num_attention_heads"]
    return {
        "num_layers": megatron["num_layers"],
        "heads": heads,
        "kv_heads": megatron[names[-1]] if len(names) == 4 else heads,
    }


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"megatron.{name}: {value!r}: must be a number")
    if value < 1:
        raise ConfigError(f"megatron.{name}: {value}: must be at least 1")


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
    plan.set_defaults(run=_plan, parser=plan)

    calibrate = commands.add_parser("calibrate", help="measure the constants of `plan` here")
    calibrate.add_argument("--out", required=True, metavar="FILE.yaml")
    calibrate.add_argument("--base", default="h200", metavar="h100|h200|b200|FILE.yaml",
                           help="where what is not measured comes from")  # fmt: skip
    calibrate.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    calibrate.set_defaults(run=_calibrate)


def _plan(options) -> None:
    from s2megatron.planner.report import plan_run

    if options.search is not None:
        refuse_unread(options, "tokens", "the run file's own layout (no --search)")
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


if __name__ == "__main__":
    sys.exit(main())
