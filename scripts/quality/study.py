"""Arms of the study on the GPUs of this machine, one arm a GPU, the next when one is done.

    python scripts/quality/study.py --data DATA --out OUT --copies DIR \
        dense@configs/quality/recipe.yaml paper@configs/quality/recipe.yaml

ARM is configs/quality/ARM.yaml; ARM@RECIPE#SEED gives it a recipe and a seed of its own.
`--gpus-per-arm` spreads an arm over several GPUs, `--arms-per-gpu` puts several arms on one. DIR
gets ARM--RECIPE--SEED.json of each, written anew whenever an arm has come further.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Job:
    arm: str
    recipe: Path
    seed: int | None

    @classmethod
    def parse(cls, text: str, recipe: Path) -> "Job":
        """'ARM', 'ARM@RECIPE', 'ARM#SEED', 'ARM@RECIPE#SEED'."""
        text, _, seed = text.partition("#")
        arm, _, own = text.partition("@")
        return cls(arm, Path(own or recipe), int(seed) if seed else None)

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"--seed-{self.seed}"
        return f"{self.arm}--{self.recipe.stem}{seed}"

    def command(self, a) -> list[str]:
        config = ROOT / "configs" / "quality" / f"{self.arm}.yaml"
        command = [sys.executable, str(HERE / "train_arm.py"), str(config)]
        command += ["--recipe", str(self.recipe), "--data", str(a.data)]
        command += ["--out", str(a.out / self.name)]
        if self.seed is not None:
            command += ["--seed", str(self.seed)]
        if a.arms_per_gpu > 1:
            command += ["--sharing", str(a.arms_per_gpu)]
        if a.copies:
            command += ["--copy", str(a.copies / f"{self.name}.json")]
        return command + a.override


def run_all(jobs: list[Job], a) -> int:
    """Runs the jobs, as many at a time as there are groups of GPUs; returns how many failed."""
    gpus = torch.cuda.device_count()
    size = max(1, a.gpus_per_arm)
    groups = [",".join(map(str, range(i, i + size))) for i in range(0, gpus - size + 1, size)]
    groups = groups or [""]  # the CPU
    places = [(group, i) for i in range(a.arms_per_gpu) for group in groups]
    waiting, running, failed = list(jobs), {}, 0
    began = time.time()
    while waiting or running:
        for place in places:
            if place not in running and waiting:
                group = place[0]
                job = waiting.pop(0)
                a.out.mkdir(parents=True, exist_ok=True)
                log = (a.out / f"{job.name}.txt").open("w")
                running[place] = job, subprocess.Popen(
                    job.command(a), stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": group},
                )  # fmt: skip
                print(f"{time.time() - began:6.0f} s  {job.name}: started on {group or 'CPU'}",
                      flush=True)  # fmt: skip
        time.sleep(0.5)
        for place, (job, process) in list(running.items()):
            if process.poll() is not None:
                failed += process.returncode != 0
                del running[place]
                last = (a.out / f"{job.name}.txt").read_text(errors="replace").strip()
                print(f"{time.time() - began:6.0f} s  {job.name}: "
                      f"{'done' if process.returncode == 0 else 'FAILED ' + last[-1500:]}",
                      flush=True)  # fmt: skip
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+", metavar="ARM[@RECIPE][#SEED]")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/quality/recipe.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=Path)
    parser.add_argument("--gpus-per-arm", type=int, default=1)
    parser.add_argument("--arms-per-gpu", type=int, default=1,
                        help="side by side: no arm can be timed then")  # fmt: skip
    parser.add_argument("--override", action="append", default=[], metavar="key.path=value")
    a = parser.parse_args()
    return 1 if run_all([Job.parse(text, a.recipe) for text in a.arms], a) else 0


if __name__ == "__main__":
    sys.exit(main())
