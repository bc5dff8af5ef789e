"""Arms of the study on the GPUs of this machine, one arm a GPU, the next when one is done.

    python scripts/quality/study.py --data DATA --out OUT --copies DIR \
        dense@configs/quality/recipe.yaml paper@configs/quality/recipe.yaml

ARM is configs/quality/ARM.yaml; ARM@RECIPE#SEED gives it a recipe and a seed of its own. A recipe's
trunk is trained first, on all GPUs. `--gpus-per-arm` spreads an arm over several GPUs,
`--arms-per-gpu` puts several arms on one. DIR gets ARM--RECIPE--SEED.json of each, written anew
whenever an arm has come further.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from recipe import load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Job:
    """An arm with a recipe; or, with no arm, the phases that the recipe's arms have in common."""

    arm: str | None
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
        return f"{self.arm or 'trunk'}--{self.recipe.stem}{seed}"

    @property
    def trunk(self) -> "Job | None":
        """What has to be trained before this."""
        shares = self.arm is not None and load_recipe(self.recipe).trunk > 0
        return Job(None, self.recipe, self.seed) if shares else None

    def command(self, a) -> list[str]:
        config = ROOT / "configs" / "quality" / f"{self.arm or 'dense'}.yaml"
        command = [sys.executable, str(HERE / "train_arm.py"), str(config)]
        command += ["--recipe", str(self.recipe), "--data", str(a.data)]
        command += ["--out", str(a.out / self.name)]
        if self.seed is not None:
            command += ["--seed", str(self.seed)]
        if a.copies:
            command += ["--copy", str(a.copies / f"{self.name}.json")]
        if self.arm is None:
            return [*command, "--only-trunk", *a.override]
        if self.trunk:
            command += ["--trunk", str(a.out / self.trunk.name)]
        if a.arms_per_gpu > 1:
            command += ["--sharing", str(a.arms_per_gpu)]
        return command + a.override


def places(gpus_per_arm: int, arms_per_gpu: int) -> list[tuple[str, int]]:
    """(GPUs, number) of each place where an arm can run; no GPU: the CPU."""
    gpus, size = torch.cuda.device_count(), max(1, gpus_per_arm)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # others are not this study's
    names = names if len(names) == gpus and all(names) else [str(i) for i in range(gpus)]
    groups = [",".join(names[i : i + size]) for i in range(0, gpus - size + 1, size)]
    return [(group, i) for i in range(arms_per_gpu) for group in groups or [""]]


def run_all(jobs: list[Job], free: list[tuple[str, int]], a, began: float) -> list[Job]:
    """Runs the jobs in the places that are free; returns those that failed."""
    waiting, running, failed = list(jobs), {}, []

    def say(text: str) -> None:
        print(f"{time.time() - began:6.0f} s  {text}", flush=True)

    while waiting or running:
        while waiting and len(running) < len(free):
            job, place = waiting.pop(0), next(place for place in free if place not in running)
            with (a.out / f"{job.name}.txt").open("w") as log:
                running[place] = job, subprocess.Popen(
                    job.command(a), stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": place[0]},
                )  # fmt: skip
            say(f"{job.name}: started on {place[0] or 'the CPU'}")
        time.sleep(0.5)
        for place, (job, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[place]
            if process.returncode:
                failed.append(job)
                last = (a.out / f"{job.name}.txt").read_text(errors="replace").strip()
                say(f"{job.name}: FAILED {last[-1500:]}")
            else:
                say(f"{job.name}: done")
    return failed


def main(argv: list[str] | None = None) -> int:
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
    a = parser.parse_args(argv)
    jobs = [Job.parse(text, a.recipe) for text in a.arms]
    a.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    trunks = list(dict.fromkeys(job.trunk for job in jobs if job.trunk))
    failed = run_all(trunks, places(max(1, torch.cuda.device_count()), 1), a, began)
    jobs = [job for job in jobs if job.trunk not in failed]
    failed += run_all(jobs, places(a.gpus_per_arm, a.arms_per_gpu), a, began)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
