"""One arm of the study: trained phase by phase, converted, examined; its result grows on the way.

    CUDA_VISIBLE_DEVICES=0 python scripts/quality/train_arm.py configs/quality/paper.yaml \
        --recipe configs/quality/recipe.yaml --data runs/quality/data --out runs/quality/arms/paper

OUT/phase-N/       checkpoints and log of phase N
OUT/hf/            the trained model
OUT/result.json    curves, speed, versions, loss and retrieval: written anew after every step

What is there is kept: a phase that is done is not trained again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from recipe import Phase, Recipe, load_recipe

from s2megatron import provenance

ROOT = Path(__file__).resolve().parents[2]

STEP = re.compile(r" iteration +(\d+)/ *\d+ .*?lm loss: ([\d.E+-]+)")
SPEED = re.compile(r" s2megatron iteration +(\d+) \| ([\d.]+) ms/iteration")
VALID = re.compile(r"validation(?:-(\w+))? loss at iteration (\d+).*?lm loss value: ([\d.E+-]+)")
DONE = "done.json"
"""In a phase's folder: its row of the result, once it is trained."""
LOOK = 15.0
"""Seconds between two looks at the log of a phase."""
SAVING = 90
"""Seconds that a phase which was told to stop has for its checkpoint."""

ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0",
         "WORLD_SIZE": "1"}  # fmt: skip
"""The environment of a single rank."""


@dataclass
class Arm:
    """An arm on its way. `result` is what OUT/result.json holds."""

    config: Path
    recipe: Recipe
    data: Path
    out: Path
    copy: Path | None
    """A second place for result.json."""
    sharing: int
    """Arms that share the GPU: above 1 the speed is not the arm's own."""
    overrides: list[str]
    trunk: Path | None = None
    """Where the phases that all arms have in common were trained."""
    only_trunk: bool = False
    """This is they."""
    result: dict = field(default_factory=dict)

    def write(self, status: str) -> None:
        """Writes result.json whole, or leaves the old one."""
        self.result["status"] = status
        text = json.dumps(self.result) + "\n"
        for place in filter(None, (self.out / "result.json", self.copy)):
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(place.name + ".part")
            part.write_text(text, encoding="utf-8")
            part.replace(place)


def options(arm: Arm, number: int) -> list[str]:
    """Overrides of phase `number` (from 0) over the arm's run file."""
    phase, recipe, out = arm.recipe.phases[number], arm.recipe, arm.out / f"phase-{number}"
    documents = arm.data / phase.documents_name(recipe.documents_seed)
    sets = [f"{1 - phase.retrieval:g} {arm.data / 'text'}", f"{phase.retrieval:g} {documents}"]
    sets = [entry for entry in sets if not entry.startswith("0 ")]
    few = recipe.watch_tokens
    watched = f"watch-{phase.length}-of-{max(1, few // phase.length)}"
    valid = [str(arm.data / f"watch-text-of-{few}"), str(arm.data / watched)]
    longest = max(p.length for p in recipe.phases)
    megatron = {
        "seed": recipe.seed,
        "seq_length": phase.length,
        "max_position_embeddings": longest,
        "micro_batch_size": micro_batch(phase),
        "global_batch_size": phase.sequences,
        "train_iters": phase.steps,
        "lr": phase.lr,
        "min_lr": phase.final_lr,
        "lr_decay_style": "linear",
        "lr_warmup_iters": min(phase.warmup_steps, phase.steps // 2),
        "log_interval": max(1, min(20, phase.steps // 10)),
        "eval_interval": max(20, phase.steps // 5),
        "multiple_validation_sets": True,
        "full_validation": True,
        "validation_set_names": ["text", "retrieval"],
        "save_interval": 10 * phase.steps,
        "no_save_optim": True,
        "async_save": False,
        "tensorboard_dir": None,
        **recipe.megatron,
    }
    ours = []
    if number:
        shared = number == recipe.trunk and arm.trunk is not None
        before = (arm.trunk if shared else arm.out) / f"phase-{number - 1}"
        ours = ["sparsity.on_resume=replace"] if shared else []
        megatron |= {"load": str(before / "checkpoints"),
                     "finetune": True, "no_load_optim": True, "no_load_rng": True}  # fmt: skip
    chosen = [f"megatron.{name}={json.dumps(value)}" for name, value in megatron.items()]
    return [
        *chosen,
        f"data.train={json.dumps(sets)}",
        f"data.valid={json.dumps(valid)}",
        f"data.tokenizer=huggingface:{arm.data / 'tokenizer'}",
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


def launcher() -> list[str]:
    """One rank without an agent, or one per visible GPU with it."""
    gpus = torch.cuda.device_count()
    if gpus <= 1:
        return [sys.executable, "-m", "s2megatron.pretrain"]
    return [sys.executable, "-m", "s2megatron.agent", "--nproc-per-node", str(gpus), "--"]


def train(arm: Arm, number: int) -> None:
    """Runs a phase to its end, or to its last second. Raises RuntimeError if it fails.

    A phase that is done has left DONE; what one that was broken off has left goes.
    """
    phase, out = arm.recipe.phases[number], arm.out / f"phase-{number}"
    rows = arm.result.setdefault("phases", [])
    if (out / DONE).is_file():
        rows.append(json.loads((out / DONE).read_text()))
        return
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows.append({})
    began = time.time()
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*launcher(), "--config", str(arm.config), *options(arm, number)],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(),
        )  # fmt: skip
        while not ended(process, began, phase.seconds):
            rows[-1] = phase_row(arm, number, began)
            arm.write(f"training phase {number}")
    rows[-1] = phase_row(arm, number, began)
    steps = rows[-1]["steps"] if tracker(arm, number).is_file() else 0
    if steps < (phase.steps if phase.seconds is None else 1):
        arm.result["log"] = (out / "log.txt").read_text(errors="replace")[-3000:]
        raise RuntimeError(
            f"phase {number} of {arm.config.stem} ended with a checkpoint of step {steps} of "
            f"{phase.steps}:\n{arm.result['log']}"
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
        "steps_planned": phase.steps,
        "wall_seconds": round(time.time() - began, 1),
    }
    if (saved := tracker(arm, number)).is_file():  # the log has every few steps only
        row["steps"] = int(saved.read_text())
    row["tokens"] = row["steps"] * phase.batch_tokens
    if row["ms_per_step"]:
        row["us_per_token"] = round(1e3 * row["ms_per_step"] / phase.batch_tokens, 4)
    return row


def read_log(path: Path) -> dict:
    """Curves and speed out of Megatron's log and the throughput meter's lines."""
    text = path.read_text(errors="replace")
    loss = [(int(step), round(float(value), 4)) for step, value in STEP.findall(text)]
    speed = [float(ms) for _, ms in SPEED.findall(text)]
    valid: dict[str, list] = {}
    for name, step, value in VALID.findall(text):
        valid.setdefault(name or "text", []).append((int(step), round(float(value), 4)))
    settled = sorted(speed[len(speed) // 3 :])
    return {
        "steps": loss[-1][0] if loss else 0,
        "loss": loss[:: max(1, len(loss) // 200)],
        "validation": valid,
        "ms_per_step": settled[len(settled) // 2] if settled else None,
    }


def examine(arm: Arm) -> None:
    """Converts the last phase and evaluates it, in one process of their own."""
    last = arm.out / f"phase-{len(arm.recipe.phases) - 1}"
    command = [sys.executable, str(Path(__file__).with_name("examine.py")), str(last), str(arm.out)]
    command += ["--data", str(arm.data), "--recipe-json", arm.recipe.examination.model_dump_json()]
    began = time.time()
    with (arm.out / "examine.txt").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    arm.result["examination_seconds"] = round(time.time() - began, 1)
    found = arm.out / "examination.json"
    if found.is_file():
        arm.result["examination"] = json.loads(found.read_text())
    if status:
        tail = (arm.out / "examine.txt").read_text(errors="replace")[-3000:]
        arm.result["log"] = tail
        raise RuntimeError(f"{arm.config.stem} could not be examined:\n{tail}")


def run(arm: Arm) -> None:
    """All of it. Raises RuntimeError; what was reached is in result.json."""
    arm.result = provenance.describe(ROOT) | {
        "arm": arm.config.stem,
        "recipe": arm.recipe.model_dump(),
        "overrides": arm.overrides,
        "arms_per_gpu": arm.sharing,
        "only_trunk": arm.only_trunk,
        "command": shlex.join(["python", "scripts/quality/train_arm.py", *sys.argv[1:]]),
    }
    arm.write("started")
    try:
        first, last = 0, len(arm.recipe.phases)
        if arm.only_trunk:
            last = arm.recipe.trunk
        elif arm.trunk is not None:
            first = arm.recipe.trunk
            arm.result["phases"] = json.loads((arm.trunk / "result.json").read_text())["phases"]
        for number in range(first, last):
            train(arm, number)
        if arm.recipe.examination is not None and not arm.only_trunk:
            examine(arm)
    except RuntimeError as error:
        arm.write(f"failed: {str(error).splitlines()[0]}")
        raise
    arm.write("done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="the arm's run file")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="made by prepare.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copy", type=Path, help="write result.json here, too")
    parser.add_argument("--seed", type=int, help="in place of the recipe's")
    parser.add_argument("--sharing", type=int, default=1, help="arms on the same GPU at a time")
    parser.add_argument("--trunk", type=Path, help="OUT of the run with --only-trunk")
    parser.add_argument("--only-trunk", action="store_true",
                        help="train the recipe's first phases, which all arms share")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    a = parser.parse_intermixed_args()
    recipe = load_recipe(a.recipe)
    if a.seed is not None:
        recipe = recipe.model_copy(update={"seed": a.seed})
    paths = (path.resolve() for path in (a.config, a.data, a.out))
    config, data, out = paths
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    try:
        run(
            Arm(
                config, recipe, data, out, a.copy and a.copy.resolve(), a.sharing, a.overrides,
                a.trunk and a.trunk.resolve(), a.only_trunk,
            )
        )  # fmt: skip
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
