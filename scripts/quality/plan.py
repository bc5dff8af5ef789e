"""What the study trains next: configs/quality/plan.yaml, part by part.

    python scripts/quality/plan.py --gpus 4 --arms-per-gpu 3     # parts, and what they take
    python scripts/quality/plan.py expand part:first dense#3     # the arms, as study.py wants them

`expand` with nothing named takes all parts but those that are only run when asked for.
"""

import argparse
from pathlib import Path

import yaml
from jobs import ROOT, Job, with_what_comes_before
from pydantic import BaseModel, ConfigDict

from s2megatron.errors import ConfigError

FILE = ROOT / "configs" / "quality" / "plan.yaml"


class Part(BaseModel):
    """Arms with one recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str
    recipe: Path
    """From the plan's folder."""
    arms: list[str]
    seeds: list[int | None] = [None]
    """None is the recipe's."""
    asked: bool = False
    """Run only when it is named: it needs other settings or data than the rest."""

    def jobs(self) -> list[str]:
        """As study.py wants them."""
        path = FILE.parent.relative_to(ROOT) / self.recipe
        seeds = ["" if seed is None else f"#{seed}" for seed in self.seeds]
        return [f"{arm}@{path}{seed}" for seed in seeds for arm in self.arms]


def read_plan(file: Path = FILE) -> list[Part]:
    return [Part.model_validate(part) for part in yaml.safe_load(file.read_text())["parts"]]


def expand(names: list[str], parts: list[Part]) -> list[str]:
    """`part:NAME` becomes its arms; everything else stays. Raises ConfigError."""
    known = {part.name: part for part in parts}
    if not names:
        return [job for part in parts if not part.asked for job in part.jobs()]
    found = []
    for name in names:
        if not name.startswith("part:"):
            found.append(name)
        elif (wanted := name.removeprefix("part:")) in known:
            found += known[wanted].jobs()
        else:
            raise ConfigError(f"{name}: there is no such part; parts are {', '.join(known)}")
    return found


def seconds(jobs: list[Job], gpus: int, arms_per_gpu: int) -> float:
    """About what training the jobs takes, examinations beside it."""
    first, room, longest = 0.0, 0.0, 0.0
    for job in jobs:
        if job.recipe.spread:
            first += job.seconds(gpus, arms_per_gpu)
        else:
            took = job.seconds(1, arms_per_gpu)
            room += took / (1 if job.alone else arms_per_gpu)
            longest = max(longest, took)
    return first + max(room / gpus, longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("list", "expand"), default="list")
    parser.add_argument("names", nargs="*", metavar="part:NAME|ARM")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--arms-per-gpu", type=int, default=3)
    a = parser.parse_args()
    parts = read_plan()
    if a.what == "expand":
        print("\n".join(expand(a.names, parts)))
        return
    counted: set[Job] = set()
    print(f"{'part':<16} {'arms':>4} {'seconds':>8}  on {a.gpus} GPUs, {a.arms_per_gpu} arms each")
    for part in parts:
        jobs = with_what_comes_before([Job.parse(text, FILE) for text in part.jobs()])
        new = [job for job in jobs if job not in counted]
        counted |= set(new)
        took = seconds(new, a.gpus, a.arms_per_gpu)
        print(f"{part.name:<16} {len(new):>4} {took:>8.0f}  {part.about}")


if __name__ == "__main__":
    main()
