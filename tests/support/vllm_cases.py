"""vLLM for tests: the environment that has it, models to serve, and a process that serves them."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from convert_models import make_model, run_tree
from launches import ROOT

import s2megatron.hf as s2hf
from s2_kernels.record import ARCHITECTURE_PREFIX, record
from s2megatron.config import parse_config

VLLM = Path(sys.prefix) / "vllm"
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two ranks want a NUMA node each
    "TORCH_COMPILE_DISABLE": "1",  # compiling what samples takes 10 s
    "OMP_NUM_THREADS": "1",
}


def environment(folder: Path, changes=ON_CPU) -> dict[str, str]:
    """To run vLLM in: its packages beside ours, and the plugin's entry point as pip leaves it.

    Skips the test where vLLM is not installed.
    """
    if not (VLLM / "vllm").exists() and importlib.util.find_spec("vllm") is None:
        pytest.skip(f"no vLLM in {VLLM}: scripts/test.sh could not install it")
    project = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]
    info = folder / "s2_kernels-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: s2-kernels\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    paths = [VLLM, ROOT / "kernels", folder]
    always = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    always["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, **always, **changes}


def make_folder(name: str, folder: Path, sparsity: dict, **changes) -> Path:
    """A tiny model as `convert to-hf` writes it: its config.json has an `s2` key."""
    model = make_model(name, folder, **changes)
    sizes = model.config
    patterns = parse_config(run_tree(name, sparsity)).sparsity.resolve(
        num_layers=sizes.num_hidden_layers,
        heads=sizes.num_attention_heads,
        kv_heads=sizes.num_key_value_heads,
    )
    names = [ARCHITECTURE_PREFIX + name for name in sizes.architectures or [type(model).__name__]]
    change_config(folder, s2=record(patterns), architectures=names)
    return folder


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def random_tokens(*lengths: int, seed: int = 3, vocab: int = 128) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=random).tolist() for n in lengths]


def chosen_tokens(folder: Path, prompts: list[list[int]], tokens: list[list[int]], device="cpu"):
    """What transformers with attention "s2" chooses after every prefix of prompt + tokens.

    One pass each, without a cache. Where it is `tokens`, these are what greedy generation gives.
    """
    model = s2hf.load(folder).eval().to(device)
    out = []
    for prompt, new in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new], device=device), use_cache=False).logits
        out.append(logits[0, len(prompt) - 1 : -1].argmax(-1).tolist())
    return out


def shortfall(folder: Path, prompts, tokens, dtype: str) -> tuple[float, float, float]:
    """How much worse than the best choice `tokens` are, by the logits of transformers in float32.

    Returns:
        The most that a chosen token's logit lies below the best one's; the most that a logit of
        transformers in `dtype` is off; how far below the best logit the mean one lies.
    """
    exact, low = (s2hf.load(folder, dtype=d).eval() for d in (torch.float32, getattr(torch, dtype)))
    short, error, spread = [], [], []
    for prompt, new in zip(prompts, tokens, strict=True):
        ids, places = torch.tensor([prompt + new]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            right, off = (m(ids, use_cache=False).logits[0, places].float() for m in (exact, low))
        best = right.amax(-1)
        short.append((best - right.gather(1, torch.tensor(new)[:, None])[:, 0]).max())
        error.append((off - right).abs().max())
        spread.append((best - right.mean(-1)).mean())
    return float(max(short)), float(max(error)), float(min(spread))


def serve(jobs: list[dict], folder: Path, changes=ON_CPU) -> list[dict]:
    """Runs vllm_worker.py; a report per job."""
    files = [folder / "jobs.json", folder / "reports.json"]
    files[0].write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests/support/vllm_worker.py"), *map(str, files)]
    done = subprocess.run(
        command,
        env=environment(folder / "site", changes),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return json.loads(files[1].read_text())
