"""Converts trained arms to Hugging Face and asks them what their recipe's examination says.

    python scripts/quality/examine.py DATA OUT [OUT ...]
    python scripts/quality/examine.py DATA --serve      # reads "OUT [COPY]" lines, answers each

OUT is an arm's folder as train_arm.py leaves it; its result.json gets the examination, part by
part. Each probe of the recipe and each length of the losses is what `s2megatron evaluate` does and
leaves its files in OUT/NAME; one that is there is not done again.

A process that has imported everything, started the GPU and compiled its kernels examines the next
arm in a fraction of the time: hence `--serve`, which study.py starts beside the training.
"""

import argparse
import json
import shlex
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from examiner import READY
from recipe import Examination, Probe
from results import TRAINED, read_result, write_result

from s2megatron import cli
from s2megatron.data import make_tokenizer
from s2megatron.evaluation.evaluate import LossPlan, evaluate
from s2megatron.evaluation.loss import FAR, REPEAT_EDGES
from s2megatron.evaluation.network import Network, load_network
from s2megatron.evaluation.result import Evaluation
from s2megatron.evaluation.scoring import AnswerRow, RetrievalPlan
from s2megatron.evaluation.shards import parse_grid
from s2megatron.evaluation.windows import Documents

FAR_ANSWER = 2048
"""Tokens from a planted value to its answer, from which it counts as far."""


@lru_cache(maxsize=2)
def tokenizer(data: Path):
    """text -> token ids, of the data folder's tokenizer."""
    return make_tokenizer(f"huggingface:{data / 'tokenizer'}")[0]


def ask(network: Network, data: Path, plan: Examination, probe: Probe) -> Evaluation:
    """One probe."""
    filler = Documents(str(data / "valid"), network.vocab_size, "--filler")
    wanted = RetrievalPlan(
        lengths=tuple(plan.lengths), tasks=tuple(probe.tasks), style=probe.style,
        documents=probe.documents or plan.documents,
        control=plan.control if probe.control is None else probe.control,
        queries=probe.queries, records=probe.records,
    )  # fmt: skip
    return evaluate(
        network, {"probe": probe.name}, retrieval=wanted, encode=tokenizer(data),
        filler=filler.stretch, extra_grids=tuple(map(parse_grid, plan.grids)),
    )  # fmt: skip


def loss_at(network: Network, data: Path, plan: Examination, length: int) -> Evaluation:
    """Loss on held-out text in sequences of one length."""
    windows = LossPlan(lengths=(length,), windows=max(1, plan.loss_tokens // length), packed=True)
    held_out = Documents(str(data / "valid"), network.vocab_size)
    return evaluate(network, {"data": "valid"}, loss=windows, documents=held_out)


def examine(out: Path, data: Path, copy: Path | None = None) -> None:
    """Everything that the arm's recipe asks; OUT/result.json has it part by part.

    Raises:
        RuntimeError: the arm cannot be converted.
    """
    began = time.time()
    result = read_result(out)
    plan = Examination.model_validate(result["recipe"]["examination"])
    if not (out / "hf" / "config.json").is_file():
        command = ["convert", "to-hf", (out / TRAINED).read_text(), "--out", str(out / "hf")]
        if cli.main(command):
            raise RuntimeError(f"{out.name} could not be converted: s2megatron {command}")
    network = load_network(out / "hf")
    parts = [(probe.name, ask, probe) for probe in plan.probes]
    parts += [(f"loss-{length}", loss_at, length) for length in plan.loss_lengths]
    found = result.setdefault("examination", {})
    for name, work, what in parts:
        if not (out / name / "evaluation.json").is_file():
            print(f"{out.name}: {name}", flush=True)
            work(network, data, plan, what).write(out / name)
        found[name] = json.loads((out / name / "evaluation.json").read_text())
        found[name]["samples"] = samples(json.loads((out / name / "rows.json").read_text()))
        write_result(result, out, copy)
    result |= {"status": "done", "examination_seconds": round(time.time() - began, 1)}
    write_result(result, out, copy)


def samples(rows: dict) -> dict:
    """What arms are compared by, sample by sample: all see the same windows and documents.

    Returns:
        "loss": length -> [[nats, tokens, nats of far repeats, their tokens], ...] of each window;
        "right": task -> length -> [right, answers, right from FAR_ANSWER and more, answers] of each
        document.
    """
    far = REPEAT_EDGES.index(FAR) + 1
    found: dict = {"loss": {}, "right": {}}
    for length, table in rows["loss"].items():
        columns = (table["by_position"], table["position_counts"], table["by_repeat"],
                   table["repeat_counts"])  # fmt: skip
        found["loss"][length] = [
            [round(sum(nats), 3), sum(count),
             round(sum(repeats[far:-1]), 3), sum(counts[far:-1])]
            for nats, count, repeats, counts in zip(*columns, strict=True)
        ]  # fmt: skip
    for row in map(AnswerRow._make, rows["answers"]):
        if row.needle:
            lengths = found["right"].setdefault(row.task, {})
            documents = lengths.setdefault(str(row.length), {})
            sums = documents.setdefault(row.document, [0, 0, 0, 0])
            far_away = row.start - row.source >= FAR_ANSWER
            for i, value in enumerate((row.right, 1, row.right * far_away, far_away)):
                sums[i] += int(value)
    for lengths in found["right"].values():
        for length, documents in lengths.items():
            lengths[length] = [documents[number] for number in sorted(documents)]
    return found


def serve(data: Path) -> None:
    """Examines the arms that standard input names, a line each; says how each went on stdout.

    All other output, ours and the libraries', goes to standard error.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    tokenizer(data)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        out, *copy = map(Path, shlex.split(line))
        try:
            examine(out, data, *copy)
            answer = "done"
        except (RuntimeError, ValueError, OSError) as error:  # of this arm; the next one may do
            answer = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            write_result(read_result(out) | {"status": answer}, out, *copy)
        print(answer, file=answers, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="*")
    parser.add_argument("--serve", action="store_true")
    a = parser.parse_args()
    if a.serve:
        serve(a.data)
    for out in a.out:
        examine(out, a.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
