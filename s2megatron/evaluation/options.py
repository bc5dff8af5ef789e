"""The commands `evaluate`, `compare` and `choose-...`: their options, and what they start.

This imports no torch: the functions that run a command import what they need.
"""

import argparse
from pathlib import Path

from s2megatron.errors import ConfigError
from s2megatron.evaluation.retrieval import TASKS


def add_evaluation(commands) -> None:
    """The four commands."""
    evaluate = commands.add_parser("evaluate", help="loss and retrieval of a Hugging Face model")
    _add_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="what one evaluation does better than another")
    compare.add_argument("first", metavar="A", help="folder that `evaluate` wrote")
    compare.add_argument("second", metavar="B", help="another, of the same options")
    compare.add_argument("--out", metavar="FILE.md", help="write it there too")
    compare.set_defaults(run=_compare)

    choice = commands.add_parser("choose-dense", help="layers of a dense model to leave dense")
    _add_choice(choice)
    choice.set_defaults(run=_choose_dense)

    base = commands.add_parser("choose-rotary-base", help="a RoPE base for a longer context")
    _add_base(base)
    base.set_defaults(run=_choose_rotary_base)


def _evaluate(options) -> None:
    from s2megatron.evaluation.command import run

    out = run(options)
    print(f"{out}: evaluation.md, evaluation.json, rows.json and pictures")


def _choose_dense(options) -> None:
    from s2megatron.evaluation.choose import run

    run(options)


def _choose_rotary_base(options) -> None:
    from s2megatron.evaluation.rotary import run

    run(options)


def _compare(options) -> None:
    from s2megatron.evaluation.compare import compare

    text = compare(options.first, options.second)
    print(text, end="")
    try:
        if options.out:
            Path(options.out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be written: {error.strerror}") from None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(parser=parser)
    add("folder", metavar="HF_DIR", help="a model, as `convert to-hf` or transformers wrote it")
    add("--out", required=True, metavar="DIR", help="for JSON, markdown and pictures")
    add("--attention", choices=("s2", "dense"),
        help="as trained, or plain (default: s2 where config.json has the key)")  # fmt: skip
    add("--lengths", metavar="4k,8k", help="tokens (default: the model's positions, 1/2, 1/4)")
    add("--data", metavar="PREFIX", help="dataset for the loss (default: no loss)")
    add("--windows", type=int, default=100, help="of each length, for the loss (100)")
    add("--packed", action="store_true", help="windows run over the ends of documents")
    add("--tasks", default=",".join(TASKS), help="retrieval tasks, or none (default: all five)")
    add("--documents", type=int, default=100, help="per task and length (100)")
    add("--control", type=int, default=50, help="more, without what is asked for (50)")
    add("--queries", type=int, help="answers a document")
    add("--records", type=int, help="facts planted in a document")
    add("--style", default="sentences", help="sentences or records")
    add("--filler", metavar="PREFIX", help="dataset to plant facts in (default: made-up text)")
    add("--tokenizer", help="bytes, huggingface:DIR, sentencepiece:FILE (default: HF_DIR's)")
    add("--grid", action="append", default=[], metavar="BLOCK:STRIDE",
        help="count by these shards too, as 64:16 (a dense model has none of its own)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"))
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--batch-tokens", type=int, help="in one forward pass (65536 on a GPU, 4096 on a CPU)")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(parser=parser)
    add("folder", metavar="HF_DIR", help="a dense model, as transformers wrote it")
    add("--config", required=True, metavar="RUN.yaml", help="its sparsity is put over the model")
    add("overrides", nargs="*", metavar="key.path=value")
    add("--dense-layers", type=int, required=True, metavar="N", help="to leave dense beside those "
        "that the run file makes dense")  # fmt: skip
    add("--data", required=True, metavar="PREFIX", help="dataset to judge by, of its tokenizer")
    add("--out", required=True, metavar="FILE.json", help="for the losses of every layer")
    add("--length", type=int, default=8192, help="tokens of a sample (8192)")
    add("--samples", type=int, default=6, help="of text, and as many with questions (6)")
    add("--tokenizer", help="bytes, huggingface:DIR, sentencepiece:FILE (default: HF_DIR's)")
    add("--device", choices=("cuda", "cpu"))
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--batch-tokens", type=int, help="in one forward pass (65536 on a GPU, 4096 on a CPU)")


def _add_base(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.set_defaults(parser=parser)
    add("folder", metavar="HF_DIR", help="a model, as `convert to-hf` or transformers wrote it")
    add("--data", required=True, metavar="PREFIX", help="dataset to judge by, of its tokenizer")
    add("--length", type=int, required=True, help="tokens of the longer context")
    add("--out", required=True, metavar="FILE.json", help="for the losses under every base")
    add("--bases", metavar="N,N", help="to try (default: the model's, twice that, ...)")
    add("--trained-length", type=int, help="tokens (default: the model's positions)")
    add("--windows", type=int, default=4, help="of the longer length (4)")
    add("--attention", choices=("s2", "dense"),
        help="as trained, or plain (default: s2 where config.json has the key)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"))
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
