"""One arm of the study, trained phase by phase; its result grows on the way.

    CUDA_VISIBLE_DEVICES=0 python scripts/quality/train_arm.py configs/quality/paper.yaml \
        --recipe configs/quality/recipes/long.yaml --data runs/quality/data \
        --out runs/quality/arms/paper--long --before runs/quality/arms/paper--recipe

OUT/phase-N/       checkpoints and log of phase N
OUT/result.json    curves, speed, versions: written anew every few seconds
OUT/trained.txt    once all phases are done: where the checkpoint is

What is there is kept: a phase that is done is not trained again. examine.py goes on from here.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from recipe import Phase, Recipe, load_recipe
from results import TRAINED, read_log, read_result, write_result

from s2megatron import cli, provenance
from s2megatron.cluster.environment import ALONE

ROOT = Path(__file__).resolve().parents[2]

DONE = "done.json"
"""In a phase's folder: its row of the result, once it is trained."""
LOOK = 15.0
"""Seconds between two looks at the log of a phase."""
SAVING = 90
"""Seconds that a phase which was told to stop has for its checkpoint."""
TIMING_STEPS = 12
"""Steps that a phase with `train_seconds` is timed by."""


@dataclass
class Arm:
    """An arm on its way. `result` is what OUT/result.json holds."""

    config: Path
    recipe: Recipe
    data: Path
    out: Path
    copy: Path | None = None
    """A second place for result.json."""
    sharing: int = 1
    """Arms that share the GPU: above 1 the speed is not the arm's own."""
    overrides: tuple[str, ...] = ()
    before: Path | None = None
    """OUT of what this goes on from, as the recipe's `after` says."""
    result: dict = field(default_factory=dict)

    def write(self, status: str) -> None:
        self.result["status"] = status
        write_result(self.result, self.out, self.copy)

    @property
    def has_dense_layers(self) -> bool:
        sparsity = yaml.safe_load(self.config.read_text())["sparsity"]
        rules = [sparsity.get("default", {}), *sparsity.get("layers", [])]
        return any(rule.get("kind") == "dense" for rule in rules)


def checkpoint(arm: Arm, number: int) -> Path | None:
    """Of the weights that phase `number` goes on from; None where it begins with new ones."""
    if number:
        return arm.out / f"phase-{number - 1}" / "checkpoints"
    if arm.before is not None:
        return Path((arm.before / TRAINED).read_text())
    return arm.out / "start" if arm.recipe.start else None


def block_size(arm: Arm, number: int) -> int | None:
    """Of phase `number`, or of the last phase of what came before it (-1); None: the arm's own."""
    recipe = arm.recipe
    if number < 0:
        recipe = load_recipe(recipe.after) if recipe.after else None
    return recipe.phases[number].block_size if recipe and recipe.phases else None


def data_options(arm: Arm, phase: Phase) -> list[str]:
    recipe = arm.recipe
    documents = arm.data / phase.documents_name(recipe.documents_seed)
    sets = [f"{1 - phase.retrieval:g} {arm.data / 'text'}", f"{phase.retrieval:g} {documents}"]
    sets = [entry for entry in sets if not entry.startswith("0 ")]
    few = recipe.watch_tokens
    watched = f"watch-{phase.length}-of-{max(1, few // phase.length)}"
    valid = [str(arm.data / f"watch-text-of-{few}"), str(arm.data / watched)]
    return [f"data.train={json.dumps(sets)}", f"data.valid={json.dumps(valid)}",
            f"data.tokenizer=huggingface:{arm.data / 'tokenizer'}"]  # fmt: skip


def options(arm: Arm, number: int, steps: int) -> list[str]:
    """Overrides of phase `number` (from 0), of so many steps, over the arm's run file."""
    phase, recipe, out = arm.recipe.phases[number], arm.recipe, arm.out / f"phase-{number}"
    looks = max(4, steps // 10) if phase.train_seconds else max(20, steps // 5)
    megatron = {
        "seed": recipe.seed,
        "seq_length": phase.length,
        "max_position_embeddings": max(p.length for p in recipe.phases),
        "micro_batch_size": micro_batch(phase),
        "global_batch_size": phase.sequences,
        "train_iters": steps,
        "lr": phase.lr,
        "min_lr": phase.final_lr,
        "lr_decay_style": "linear",
        "lr_warmup_iters": min(phase.warmup_steps, steps // 2),
        "log_interval": max(1, min(20, steps // 10, looks // 2)),
        "eval_interval": looks,
        "multiple_validation_sets": True,
        "full_validation": True,
        "validation_set_names": ["text", "retrieval"],
        "save_interval": 10 * steps,
        "no_save_optim": True,
        "async_save": False,
        "tensorboard_dir": None,
        **recipe.megatron,
    }
    ours = [f"sparsity.block_size={phase.block_size}"] if phase.block_size else []
    if (before := checkpoint(arm, number)) is not None:
        other = number == 0 and recipe.after_arm is not None
        if other or block_size(arm, number) != block_size(arm, number - 1):
            ours.append("sparsity.on_resume=replace")
        megatron |= {"load": str(before), "finetune": True, "no_load_optim": True,
                     "no_load_rng": True}  # fmt: skip
    return [
        *(f"megatron.{name}={json.dumps(value)}" for name, value in megatron.items()),
        *data_options(arm, phase),
        f"data.cache={out / 'cache'}",
        f"output.folder={out}",
        *ours,
        *arm.overrides,
    ]


def micro_batch(phase: Phase) -> int:
    """Sequences of a forward pass on each of the visible GPUs."""
    ranks = max(1, torch.cuda.device_count())
    if phase.sequences % ranks:
        raise RuntimeError(f"{phase.sequences} sequences a step do not divide over {ranks} GPUs")
    return phase.micro_batch(phase.sequences // ranks)


def environment() -> dict[str, str]:
    """What a rank without an agent is told of itself; an agent tells its ranks."""
    return dict(os.environ) if torch.cuda.device_count() > 1 else os.environ | ALONE


def launcher(kernel: str | None = None) -> list[str]:
    """One rank without an agent, or one per visible GPU with it.

    Args:
        kernel: that dense layers have to take, see pretrain_dense.py.
    """
    gpus = torch.cuda.device_count()
    if kernel is not None:
        if gpus > 1:
            raise RuntimeError(f"dense_kernels: {kernel} is chosen for one GPU an arm, not {gpus}")
        return [sys.executable, str(Path(__file__).with_name("pretrain_dense.py")), kernel]
    if gpus <= 1:
        return [sys.executable, "-m", "s2megatron.pretrain"]
    return [sys.executable, "-m", "s2megatron.agent", "--nproc-per-node", str(gpus), "--"]


def start_training(arm: Arm, out: Path, number: int, steps: int, kernel, *more) -> subprocess.Popen:
    """Starts a phase, or a timing of it, with its log in OUT/log.txt; what was there goes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [*launcher(kernel), "--config", str(arm.config), *options(arm, number, steps), *more]
    with (out / "log.txt").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment()
        )


def plan_steps(arm: Arm, number: int) -> tuple[int, str | None, dict]:
    """(steps, kernel of the dense layers, milliseconds a step by kernel) of a phase.

    Where the phase has `train_seconds`, each kernel is timed, and the fastest gets the phase.
    """
    phase, kernels = arm.recipe.phases[number], arm.recipe.dense_kernels
    if phase.train_seconds is None:
        return phase.steps, kernels[0] if kernels else None, {}
    found: dict = {}
    for kernel in (kernels if arm.has_dense_layers else kernels[:1]) or [None]:
        out = arm.out / f"timing-{number}-{kernel or 'default'}"
        if not (out / DONE).is_file():
            more = [f"output.folder={out}", f"data.cache={out / 'cache'}", "data.valid=[]",
                    "megatron.multiple_validation_sets=false", "megatron.full_validation=false",
                    "megatron.validation_set_names=null", "megatron.eval_iters=0",
                    "megatron.log_interval=2"]  # fmt: skip
            process = start_training(arm, out, number, TIMING_STEPS, kernel, *more)
            process.wait()
            ms = read_log(out / "log.txt")["ms_per_step"]
            if process.returncode or ms is None:
                tail = (out / "log.txt").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{arm.config.stem} could not be timed with {kernel}:\n{tail}")
            (out / DONE).write_text(json.dumps(ms))
        found[kernel] = json.loads((out / DONE).read_text())
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    best = min(found, key=found.get)
    steps = min(phase.steps, max(1, int(1e3 * phase.train_seconds / found[best])))
    return steps, best, {str(name): ms for name, ms in found.items()}


def train(arm: Arm, number: int) -> None:
    """Runs a phase to its end, or to its last second. Raises RuntimeError if it fails.

    A phase that is done has left DONE; what one that was broken off has left goes.
    """
    phase, out = arm.recipe.phases[number], arm.out / f"phase-{number}"
    rows = arm.result.setdefault("phases", [])
    if (out / DONE).is_file():
        rows.append(json.loads((out / DONE).read_text()))
        return
    steps, kernel, timed = plan_steps(arm, number)
    rows.append({})
    began = time.time()
    process = start_training(arm, out, number, steps, kernel)

    def look() -> dict:
        row = phase_row(arm, number, began) | {"steps_planned": steps}
        return row | ({"dense_kernel": kernel, "ms_by_kernel": timed} if kernel else {})

    while not ended(process, began, phase.seconds):
        rows[-1] = look()
        arm.write(f"training phase {number}")
    rows[-1] = look()
    reached = rows[-1]["steps"] if tracker(arm, number).is_file() else 0
    if reached < (steps if phase.seconds is None else 1):
        arm.result["log"] = (out / "log.txt").read_text(errors="replace")[-3000:]
        raise RuntimeError(
            f"phase {number} of {arm.config.stem} ended with a checkpoint of step {reached} of "
            f"{steps}:\n{arm.result['log']}"
        )
    (out / DONE).write_text(json.dumps(rows[-1]))
    arm.write(f"trained phase {number}")


def tracker(arm: Arm, number: int) -> Path:
    """The file that is there when a phase has left its checkpoint, with the number of steps."""
    folder = arm.out / f"phase-{number}" / "checkpoints"
    return folder / "latest_checkpointed_iteration.txt"


def ended(process: subprocess.Popen, began: float, seconds: float | None) -> bool:
    """Waits for a while; at the last second it asks the process to save and leave."""
    left = LOOK if seconds is None else min(LOOK, max(0.0, began + seconds - time.time()))
    try:
        process.wait(left)
    except subprocess.TimeoutExpired:
        if seconds is None or time.time() < began + seconds:
            return False
        process.send_signal(signal.SIGTERM)  # Megatron saves after the step
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return True


def phase_row(arm: Arm, number: int, began: float) -> dict:
    """What the log of a phase says so far."""
    phase = arm.recipe.phases[number]
    row = read_log(arm.out / f"phase-{number}" / "log.txt") | {
        "length": phase.length,
        "batch_tokens": phase.batch_tokens,
        "wall_seconds": round(time.time() - began, 1),
    }
    if (saved := tracker(arm, number)).is_file():  # the log has every few steps only
        row["steps"] = int(saved.read_text())
    row["tokens"] = row["steps"] * phase.batch_tokens
    if row["ms_per_step"]:
        row["us_per_token"] = round(1e3 * row["ms_per_step"] / phase.batch_tokens, 4)
    return row


def convert_start(arm: Arm) -> None:
    """The recipe's `start` as a Megatron checkpoint that records this arm's pattern."""
    if (arm.out / "start").is_dir():
        return
    model = [f"megatron.{name}={json.dumps(v)}" for name, v in arm.recipe.megatron.items()]
    command = ["convert", "to-megatron", str(arm.data / arm.recipe.start), "--out",
               str(arm.out / "start"), "--config", str(arm.config), "megatron.seq_length=128",
               "megatron.train_iters=1", "megatron.micro_batch_size=1", "megatron.lr=0.001",
               "megatron.max_position_embeddings=8192", "data.mock=true",
               f"data.tokenizer=huggingface:{arm.data / 'tokenizer'}", *model]  # fmt: skip
    if cli.main(command):
        raise RuntimeError(f"{arm.recipe.start} could not be converted: s2megatron {command}")


def run(arm: Arm) -> None:
    """All of it. Raises RuntimeError; what was reached is in result.json."""
    arm.result = provenance.describe(ROOT) | {
        "arm": arm.config.stem,
        "recipe": json.loads(arm.recipe.model_dump_json()),
        "overrides": list(arm.overrides),
        "arms_per_gpu": arm.sharing,
        "gpus": max(1, torch.cuda.device_count()),
        "command": shlex.join(["python", "scripts/quality/train_arm.py", *sys.argv[1:]]),
    }
    arm.out.mkdir(parents=True, exist_ok=True)
    try:
        # Which weights it began with, and whether other arms began with them, too.
        arm.result |= {"origin": arm.result["date"], "shared": False}
        if arm.before is not None:
            before = read_result(arm.before)
            shared = arm.recipe.after_arm is not None or before["shared"]
            arm.result |= {x: before[x] for x in ("phases", "origin")} | {"shared": shared}
        arm.write("started")
        if arm.recipe.start:
            convert_start(arm)
        for number in range(len(arm.recipe.phases)):
            train(arm, number)
        (arm.out / TRAINED).write_text(str(checkpoint(arm, len(arm.recipe.phases))))
    except RuntimeError as error:
        arm.write(f"failed: {str(error).splitlines()[0]}")
        raise
    arm.write("trained" if arm.recipe.examination else "done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="the arm's run file")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="made by prepare.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copy", type=Path, help="write result.json here, too")
    parser.add_argument("--seed", type=int, help="in place of the recipe's")
    parser.add_argument("--sharing", type=int, default=1, help="arms on the same GPU at a time")
    parser.add_argument("--before", type=Path, help="OUT of what the recipe's `after` names")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    a = parser.parse_intermixed_args()
    recipe = load_recipe(a.recipe)
    if (recipe.after is None) != (a.before is None):
        parser.error(f"--before {a.before}: the recipe has after={recipe.after}")
    if a.seed is not None:
        recipe = recipe.model_copy(update={"seed": a.seed})
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    config, data, out = (path.resolve() for path in (a.config, a.data, a.out))
    copy, before = (path and path.resolve() for path in (a.copy, a.before))
    try:
        run(Arm(config, recipe, data, out, copy, a.sharing, tuple(a.overrides), before))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
