"""Short runs with and without CUDA graphs, a process each: Megatron keeps graphs in globals."""

from pathlib import Path

import torch
from launches import ROOT

from s2megatron.cluster import environment
from s2megatron.plot import read_scalars
from s2megatron.training import cpu_runtime

ITERATIONS = 12
"""Megatron captures after cuda_graph_warmup_steps: most of these are replays."""
SMALL = dict(
    num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, kv_channels=64,
    tensor_model_parallel_size=1,
    sequence_parallel="false", vocab_size=257, seq_length=2048, max_position_embeddings=2048,
    global_batch_size=4, micro_batch_size=1, train_iters=ITERATIONS, lr=0.01, lr_warmup_iters=0,
    eval_iters=0, log_interval=1, log_throughput="false", save_interval=1000,
)  # fmt: skip


def train_losses(folder: str, impl: str, modules: str) -> dict[int, float]:
    """Losses by iteration of a run under one capture of Megatron's; "none" captures nothing."""
    from s2megatron.training.train import train

    environment.apply()
    if not torch.cuda.is_available():
        cpu_runtime.prepare_environment()
        cpu_runtime.install()
    options = SMALL | dict(cuda_graph_impl=impl)
    if impl != "none" or torch.cuda.is_available():  # another tracker, other initial weights
        options |= dict(te_rng_tracker="true")
    if modules:
        options |= dict(cuda_graph_modules=f"[{modules}]")
    overrides = [
        f"output.folder={folder}",
        "sparsity.block_size=64",
        "sparsity.default.local_blocks=4",
        "sparsity.default.stride=4",
        "sparsity.layers=[]",
        "data.mock=true",
        *(f"megatron.{name}={value}" for name, value in options.items()),
    ]
    train(str(ROOT / "configs/llama_1.3b_32k.yaml"), overrides)
    return dict(read_scalars(Path(folder) / "tensorboard")["lm loss"])
