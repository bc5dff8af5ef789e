"""Arms of the study on the GPUs of this machine: trained, and examined while others train.

    python scripts/quality/study.py --data DATA --out OUT --copies DIR --seconds 560 \
        dense paper dense@configs/quality/recipes/long.yaml dense#2

ARM is configs/quality/ARM.yaml; ARM@RECIPE#SEED gives it a recipe and a seed of its own. What a
recipe goes on from is trained first. An arm is started only if it should end within `--seconds`;
the same command later goes on from what is there. `--gpus-per-arm` spreads an arm over several
GPUs, `--arms-per-gpu` puts several arms on one. DIR gets ARM--RECIPE--SEED.json of each, written
anew whenever an arm has come further.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from examiner import Examiner
from jobs import ROOT, Job, with_what_comes_before

MARGIN = 1.1
"""Of the time that an arm is thought to take: what is stopped in the middle is lost."""


@dataclass
class Place:
    """A group of GPUs (or the CPU) with what runs there."""

    gpus: str
    """As CUDA_VISIBLE_DEVICES has them."""
    examiner: Examiner | None
    running: dict[Job, subprocess.Popen] = field(default_factory=dict)

    def takes(self, job: Job, most: int) -> bool:
        """Whether one more arm may start here."""
        if job.alone:
            return not self.running and not (self.examiner and self.examiner.busy)
        return len(self.running) < most and not any(other.alone for other in self.running)

    @property
    def quiet(self) -> bool:
        """An arm is timed here."""
        return any(job.alone for job in self.running)


def gpu_names() -> list[str]:
    """The GPUs that are this study's, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names if len(names) == count and all(names) else [str(i) for i in range(count)]


def groups(names: list[str], size: int) -> list[str]:
    """As many groups of `size` GPUs as there are; [""], the CPU, without one."""
    found = [",".join(names[i : i + size]) for i in range(0, len(names) - size + 1, size)]
    return found or [""]


class Study:
    """The jobs of one command."""

    def __init__(self, a, began: float):
        self.a, self.began = a, began
        self.failed: list[Job] = []
        self.left: list[Job] = []

    def say(self, text: str) -> None:
        print(f"{time.time() - self.began:6.0f} s  {text}", flush=True)

    @property
    def seconds_left(self) -> float:
        return self.a.seconds - (time.time() - self.began)

    def fits(self, job: Job, gpus: int) -> bool:
        wanted = MARGIN * job.seconds(gpus, self.a.arms_per_gpu)
        wanted += job.examination_seconds(self.a.arms_per_gpu)
        return wanted <= self.seconds_left

    def start(self, job: Job, place: Place) -> None:
        with (self.a.out / f"{job.name}.txt").open("w") as log:
            place.running[job] = subprocess.Popen(
                job.command(self.a), stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": place.gpus},
            )  # fmt: skip
        self.say(f"{job.name}: started on {place.gpus or 'the CPU'}")

    def ready(self, job: Job) -> bool:
        return job.before is None or job.before.trained(self.a.out)

    def start_what_can(self, waiting: list[Job], places: list[Place], most: int) -> None:
        """Starts jobs in their order where there is room; those that no longer can go to `left`."""
        for job in list(waiting):
            lost = job.before in self.failed or job.before in self.left
            gpus = len(places[0].gpus.split(","))
            if lost or not self.fits(job, gpus):
                waiting.remove(job)
                self.left.append(job)
                continue
            free = [place for place in places if place.takes(job, most)]
            if self.ready(job) and free:
                waiting.remove(job)
                self.start(job, min(free, key=lambda place: len(place.running)))

    def reap(self, place: Place) -> None:
        """Sees which trainings have ended, and hands them to the examiner."""
        for job, process in list(place.running.items()):
            if process.poll() is None:
                continue
            del place.running[job]
            if process.returncode:
                self.failed.append(job)
                last = (self.a.out / f"{job.name}.txt").read_text(errors="replace").strip()
                self.say(f"{job.name}: FAILED {last[-1500:]}")
            else:
                self.say(f"{job.name}: trained")
                self.examine(job, place)

    def examine(self, job: Job, place: Place) -> None:
        if job.recipe.examination is not None and place.examiner:
            copy = self.a.copies and self.a.copies / f"{job.name}.json"
            place.examiner.ask(job, self.a.out / job.name, copy)

    def run(self, jobs: list[Job], places: list[Place], most: int) -> None:
        """Until all jobs are trained and examined, or no more fits into the time."""
        waiting = [job for job in jobs if not job.trained(self.a.out)]
        for i, job in enumerate(job for job in jobs if job.trained(self.a.out)):
            if not job.done(self.a.out):
                self.examine(job, places[i % len(places)])
        while waiting or any(p.running or (p.examiner and p.examiner.busy) for p in places):
            if self.seconds_left < 0:
                self.left += [*waiting, *(job for p in places for job in p.running)]
                break
            self.start_what_can(waiting, places, most)
            time.sleep(0.2)
            for place in places:
                self.reap(place)
                if place.examiner:
                    for job, answer in place.examiner.answers(quiet=place.quiet):
                        self.say(f"{job.name}: {answer}")
                        if answer != "done":
                            self.failed.append(job)


def stop(places: list[Place]) -> None:
    for place in places:
        for process in place.running.values():
            process.terminate()
        if place.examiner:
            place.examiner.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+", metavar="ARM[@RECIPE][#SEED]")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/quality/recipe.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--gpus-per-arm", type=int, default=1)
    parser.add_argument("--arms-per-gpu", type=int, default=1,
                        help="side by side: no arm can be timed then")  # fmt: skip
    parser.add_argument("--override", action="append", default=[], metavar="key.path=value")
    a = parser.parse_args(argv)
    study = Study(a, time.time())
    jobs = with_what_comes_before([Job.parse(text, a.recipe) for text in a.arms])
    a.out.mkdir(parents=True, exist_ok=True)
    names = gpu_names()
    examined = any(job.recipe.examination for job in jobs)
    places = [
        Place(group, Examiner(a.data, a.out, group) if examined else None)
        for group in groups(names, max(1, a.gpus_per_arm))
    ]
    spread = [job for job in jobs if job.recipe.spread]
    todo = sum(not job.trained(a.out) for job in spread)
    wide = [Place(g, None) for g in groups(names, max(1, len(names) // max(1, todo)))]
    try:
        study.run(spread, wide, 1)
        study.run([job for job in jobs if not job.recipe.spread], places, a.arms_per_gpu)
    finally:
        stop([*wide, *places])
    if study.left:
        study.say(f"left for another time: {' '.join(job.name for job in study.left)}")
    return 1 if study.failed else 0


if __name__ == "__main__":
    sys.exit(main())
