"""What is to be trained: an arm with a recipe and a seed, and what it goes on from."""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

from recipe import Recipe, load_recipe
from results import RESULT, TRAINED, read_result

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

START = 40.0
"""Seconds from the start of an arm to its first step, its end included (H200, 2026-11-27)."""
MEASURED_WITH = 3
"""Arms a GPU, at which the recipes' us_per_token were measured; of recipes that are spread or alone
they are those of one arm on one GPU."""
READING = 2e-6
"""Seconds a token of an examination, beside trainings: a guess. Plus EXAMINING seconds an arm."""
EXAMINING = 5.0
PER_TIMING = 45.0
"""Seconds to time one kernel for a phase with `train_seconds`."""


_recipe = functools.lru_cache(load_recipe)


@dataclass(frozen=True)
class Job:
    """An arm with a recipe and a seed (None: the recipe's)."""

    arm: str
    path: Path
    """Of the recipe."""
    seed: int | None = None

    @classmethod
    def parse(cls, text: str, recipe: Path) -> "Job":
        """'ARM', 'ARM@RECIPE', 'ARM#SEED', 'ARM@RECIPE#SEED'."""
        text, _, seed = text.partition("#")
        arm, _, own = text.partition("@")
        return cls(arm, Path(own or recipe), int(seed) if seed else None)

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"--seed-{self.seed}"
        return f"{self.arm}--{self.path.stem}{seed}"

    @property
    def recipe(self) -> Recipe:
        return _recipe(self.path)

    @property
    def before(self) -> "Job | None":
        """What has to be trained first."""
        recipe = self.recipe
        if recipe.after is None:
            return None
        return Job(recipe.after_arm or self.arm, recipe.after, self.seed)

    @property
    def alone(self) -> bool:
        """Nothing else may run on its GPU: it is large, or its time is compared."""
        return self.recipe.alone or any(phase.train_seconds for phase in self.recipe.phases)

    def trained(self, arms: Path) -> bool:
        return (arms / self.name / TRAINED).is_file()

    def done(self, arms: Path) -> bool:
        """Trained, and examined where the recipe asks for it."""
        found = arms / self.name / RESULT
        return found.is_file() and read_result(arms / self.name)["status"] == "done"

    def seconds(self, gpus: int, arms_per_gpu: int) -> float:
        """What training it takes, by what was measured before; 0 where nothing is trained."""
        recipe, total = self.recipe, 0.0
        share = 1.0 if self.alone else arms_per_gpu / MEASURED_WITH
        share = 1 / gpus if recipe.spread else share
        for phase in recipe.phases:
            if phase.train_seconds:
                timings = max(1, len(recipe.dense_kernels))
                total += START + phase.train_seconds + timings * PER_TIMING
            else:
                total += START + 1e-6 * phase.tokens * (phase.us_per_token or 0) * share
        return total

    def examination_seconds(self, arms_per_gpu: int) -> float:
        """What examining it takes; arms that train side by side end, and wait for it, together."""
        plan, together = self.recipe.examination, self.recipe.phases and not self.alone
        if plan is None:
            return 0.0
        return (EXAMINING + READING * plan.tokens) * (arms_per_gpu if together else 1)

    def command(self, a) -> list[str]:
        """Of train_arm.py, with the folders and options of study.py's command line."""
        config = ROOT / "configs" / "quality" / f"{self.arm}.yaml"
        command = [sys.executable, str(HERE / "train_arm.py"), str(config)]
        command += ["--recipe", str(self.path), "--data", str(a.data)]
        command += ["--out", str(a.out / self.name)]
        if self.seed is not None:
            command += ["--seed", str(self.seed)]
        if a.copies:
            command += ["--copy", str(a.copies / f"{self.name}.json")]
        if self.before:
            command += ["--before", str(a.out / self.before.name)]
        if a.arms_per_gpu > 1 and not self.recipe.spread and not self.alone:
            command += ["--sharing", str(a.arms_per_gpu)]
        return command + a.override


def with_what_comes_before(jobs: list[Job]) -> list[Job]:
    """The jobs and all that has to be trained for them, each once, in an order that works."""
    found: dict[Job, None] = {}
    for job in jobs:
        chain = [job]
        while (before := chain[0].before) is not None:
            chain.insert(0, before)
        found |= dict.fromkeys(chain)
    return list(found)
