"""The options of `s2megatron evaluate`, apart from what they start: this imports no torch."""

import argparse

from s2megatron.evaluation.retrieval import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `s2megatron evaluate`."""
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
