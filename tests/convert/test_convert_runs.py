"""Real runs around a conversion: Hugging Face -> training -> Hugging Face, loss by loss.

Every document is the same sequence, as long as a sample, so every sample of the dataset is that
sequence, and transformers can be asked for the loss of the very batch that Megatron trains on.
"""

import json

import numpy
import pytest
import torch
import transformers
from convert_models import DENSE, S2, SMALL, make_model, run_tree
from in_process import call
from launches import start, write_run_file

from s2megatron import hf
from s2megatron.convert.to_hf import to_hugging_face
from s2megatron.plot import read_scalars

SEQ = 128
STEPS = 3
# name -> (model, sparsity, attention in transformers, options of the run)
RUNS = {
    "dense_continues": ("llama", DENSE, "sdpa", ["megatron.pipeline_model_parallel_size=2"]),
    "s2_continues": ("llama", S2, hf.NAME, ["megatron.tensor_model_parallel_size=2",
                                            "megatron.sequence_parallel=true"]),
    "bf16_odd_vocabulary": ("qwen2", S2, hf.NAME, ["megatron.bf16=true",
                                                   "megatron.tensor_model_parallel_size=2"]),
}  # fmt: skip


def sequence() -> torch.Tensor:
    """[SEQ]"""
    return torch.randint(3, SMALL["vocab_size"], (SEQ,), generator=torch.Generator().manual_seed(9))


def write_dataset(prefix) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(64):
        builder.add_document(sequence().numpy(), [SEQ])
    builder.finalize(f"{prefix}.idx")


def convert_sources(home: str) -> list:
    """Every run's source to a Megatron checkpoint; in an interpreter of its own."""
    from pathlib import Path

    from in_process import forget_megatron

    from s2megatron.convert.to_megatron import to_megatron

    for name in RUNS:
        folder = Path(home) / name
        to_megatron(folder / "hf", folder / "start", str(folder / "run.yaml"), tuple(RUNS[name][3]))
        forget_megatron()
    return []


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    write_dataset(home / "data")
    for name, (kind, sparsity, _, _) in RUNS.items():
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        make_model(kind, home / name / "hf", dtype)
        tree = run_tree(kind, sparsity)
        tree["data"] = {
            "train": [str(home / "data")],
            "valid": [str(home / "data")],
            "tokenizer": "megatron",
        }
        write_run_file(home / name / "run.yaml", tree)
    call("test_convert_runs", "convert_sources", str(home))
    return home


@pytest.fixture(scope="module")
def run(home):
    """(TensorBoard scalars, converted folder) of STEPS steps with a distributed optimizer."""
    done = {}

    def train(name: str):
        if name not in done:
            folder = home / name
            process = start(
                folder / "run.yaml",
                f"megatron.load={folder / 'start'}",
                f"megatron.save={folder / 'start'}",
                f"megatron.save_interval={STEPS}",
                f"megatron.train_iters={STEPS}",
                f"megatron.eval_interval={STEPS}",
                "megatron.eval_iters=1",
                "megatron.use_distributed_optimizer=true",
                f"megatron.tensorboard_dir={folder / 'events'}",
                *RUNS[name][3],
                ranks=2,
            )
            assert process.returncode == 0, process.stderr[-5000:]
            to_hugging_face(folder / "start", folder / "back")
            done[name] = read_scalars(folder / "events"), folder / "back"
        return done[name]

    return train


@pytest.fixture(scope="module")
def started(home):
    """The checkpoint that a run begins with, as a Hugging Face folder that knows its sparsity."""

    def convert(name: str):
        folder = home / name
        if not (folder / "started").exists():
            to_hugging_face(folder / "start" / "release", folder / "started")
        return folder / "started"

    return convert


@torch.no_grad()
def token_logits(folder, attention: str, dtype: torch.dtype, padded: int = 0) -> torch.Tensor:
    """Float32 [SEQ, vocabulary] of the sequence that the dataset holds.

    Args:
        padded: size to which Megatron's vocabulary is filled up with rows of zeros.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=dtype
    )
    logits = model(sequence()[None]).logits[0].float()
    return torch.nn.functional.pad(logits, (0, max(0, padded - logits.shape[1])))


def loss(logits: torch.Tensor) -> float:
    """Cross entropy; the sample after the sequence begins with its first token."""
    return torch.nn.functional.cross_entropy(logits, sequence().roll(-1)).item()


@pytest.mark.parametrize("name", ["dense_continues", "s2_continues"])
def test_first_loss_is_that_of_transformers(run, started, name):
    (scalars, _), attention = run(name), RUNS[name][2]
    expected = loss(token_logits(started(name), attention, torch.float32))
    first = dict(scalars["lm loss"])[1]
    print(f"{name}: Megatron {first:.6f}, transformers {expected:.6f}")
    assert abs(first - expected) < 1e-4


@pytest.mark.parametrize("name", ["dense_continues", "s2_continues"])
def test_checkpoint_in_the_middle_of_training(run, name):
    """With a distributed optimizer: Megatron's validation loss at the step that was saved."""
    scalars, back = run(name)
    first = dict(scalars["lm loss"])[1]
    validation = dict(scalars["lm loss validation"])[STEPS]
    expected = loss(token_logits(back, RUNS[name][2], torch.float32))
    print(f"{name}: Megatron {validation:.6f}, transformers {expected:.6f}, first {first:.6f}")
    assert abs(validation - expected) < 1e-4
    assert abs(first - expected) > 1e-2  # it is not the checkpoint that training began with


def test_bf16_run_with_padded_vocabulary(run, started):
    """257 tokens in 384 rows, tied; bf16 weights and a distributed optimizer, midway."""
    scalars, back = run("bf16_odd_vocabulary")
    model = hf.load(back)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.get_input_embeddings().weight.shape == (257, 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    folder = started("bf16_odd_vocabulary")
    exact = token_logits(folder, hf.NAME, torch.float32, padded=384)
    rounded = token_logits(folder, hf.NAME, torch.bfloat16, padded=384)
    # A loss moves by at most twice the largest error of its logits.
    tolerance = 2 * (rounded - exact).abs().amax(dim=1).mean().item()
    first = dict(scalars["lm loss"])[1]
    print(f"Megatron bf16 {first:.4f}, float32 {loss(exact):.4f}, tolerance {tolerance:.4f}")
    assert abs(first - loss(exact)) < tolerance
    assert abs(loss(exact[:, :257]) - loss(exact)) > tolerance  # the padding counts
