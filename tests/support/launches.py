"""Starts real runs on the CPU, and reads their losses."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
import zygote

from s2megatron.plot import read_scalars

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # these runs are small and in float32: no GPU is needed
ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "sparsity": {
        "block_size": 16,
        "default": {"local_blocks": 2, "stride": 4},
        "layers": [{"layers": [1], "kind": "dense"}],
    },
    "megatron": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "seq_length": 128,
        "max_position_embeddings": 128,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "train_iters": 20,
        "lr": 0.003,
        "min_lr": 0.0003,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 2,
        "clip_grad": 1.0,
        "log_interval": 1,
        "eval_iters": 0,
        "ckpt_format": "torch_dist",
        "tensorboard_log_interval": 1,
        "log_throughput": True,
    },
    "data": {"tokenizer": "bytes"},
}


def write_run_file(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path, *overrides: str, ranks: int = 1):
    """The launcher on ranks of its own, forked ready (zygote.py); returns the finished process."""
    env = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1"}
    arguments = ["--config", str(config), *overrides]
    return zygote.run("s2megatron.pretrain:main", arguments, ranks=ranks, env=env)


def torchrun(config: Path, *overrides: str, ranks: int = 1, env: dict | None = None):
    """One torchrun launch on loopback and a free port; returns the finished process."""
    environment = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", **(env or {})}
    paths = [(env or {}).get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "-m", "s2megatron.pretrain", "--config", str(config), *overrides,
    ]  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=environment,
    )


def losses(config: Path, folder: Path, *overrides: str, ranks: int = 1) -> dict[int, float]:
    """Trains, writing TensorBoard events into `folder`; training loss per iteration."""
    done = start(config, f"megatron.tensorboard_dir={folder}", *overrides, ranks=ranks)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return dict(read_scalars(folder)["lm loss"])


def write_weights(folder: Path, corpus: str, **options) -> None:
    """Makes `folder` the start of runs to compare: a run file of TINY, and one checkpoint.

    Megatron's initial weights depend on the layout, so all of them start from these (`train_on`).

    Args:
        corpus: the dataset's prefix.
        options: of Megatron, beside TINY's.
    """
    tree = TINY | {"data": {"train": [corpus], "tokenizer": "bytes"}}
    tree["megatron"] = tree["megatron"] | options
    config = write_run_file(folder / "run.yaml", tree)
    once = ["megatron.save_interval=1", "megatron.train_iters=1", "megatron.lr_decay_iters=20"]
    done = start(config, f"megatron.save={folder / 'init'}", *once)
    assert done.returncode == 0, done.stderr[-6000:]


def train_on(home: Path, name: str, *overrides: str, ranks: int) -> dict[int, float]:
    """Losses from those weights on, without their optimizer state and iteration count."""
    anew = [f"megatron.{name}=true" for name in ("finetune", "no_load_optim", "no_load_rng")]
    load = f"megatron.load={home / 'init'}"
    return losses(home / "run.yaml", home / name, load, *anew, *overrides, ranks=ranks)


def assert_same(got: dict[int, float], expected: dict[int, float], first: int = 1) -> None:
    """The same losses from iteration `first` on to the last of TINY's."""
    assert sorted(got) == list(range(first, TINY["megatron"]["train_iters"] + 1))
    differences = {step: abs(got[step] - expected[step]) for step in got}
    worst = max(differences.values())
    print(f"largest loss difference over {len(got)} steps: {worst:.2e}")
    assert worst < 1e-4, differences
