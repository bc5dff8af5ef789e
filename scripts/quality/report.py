"""Tables and pictures of the study from the arms' JSON files.

    python scripts/quality/report.py runs/quality/results --out runs/quality/report

OUT/report.md has a row per arm, the dense arm of the same recipe and seed as the measure, and the
pairs of arms that a claim is about: standard errors are those of the differences, window by window
and document by document. They do not know the noise between seeds; where there are several seeds a
table shows it. OUT/loss-against-time.png is the frontier, OUT/curves.png how the losses fell,
OUT/equal-time.png how they fell in seconds of training. What an arm has not reached yet is left
empty.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy
import pictures
from arms import ARMS, DENSE, PAIRS, density


def read_results(*folders: Path) -> list[dict]:
    """The results of folders, by recipe, seed, and the order of the table of arms."""
    files = [path for folder in folders for path in folder.glob("*.json")]
    found = [json.loads(path.read_text()) | {"file": path.stem} for path in files]
    order = list(ARMS)
    return sorted(found, key=lambda r: (group(r), order.index(r["arm"])))


def group(result: dict) -> tuple[str, int, str]:
    """What makes arms comparable: the same recipe, seed, and first weights.

    Weights of one seed that were trained twice are not the same: GPUs do not add in one order. Arms
    that each began with weights of their own are comparable whenever that was. What a phase leaves
    out counts as if its recipe did not know of it: an older result has fewer fields.
    """
    recipe = result["recipe"]
    said = [{k: v for k, v in phase.items() if v is not None} for phase in recipe["phases"]]
    before = recipe.get("start") or recipe.get("after")
    origin = result.get("origin", "") if result.get("shared", True) else ""
    return f"{before} {json.dumps(said)}", recipe["seed"], origin


def losses(result: dict, length: int, far: bool = False) -> numpy.ndarray | None:
    """[windows, 2] of nats and tokens; with `far`, of repeats from 2,500 tokens back and more."""
    found = result.get("examination", {}).get(f"loss-{length}")
    rows = found and numpy.array(found["samples"]["loss"][str(length)], dtype=float)
    return None if rows is None else rows[:, 2:] if far else rows[:, :2]


def answers(result: dict, probe: str, task: str, length: int, far: bool = False):
    """[documents, 2] of right answers and answers; with `far`, to values 2,048 back and more."""
    found = result.get("examination", {}).get(probe)
    rows = found and numpy.array(found["samples"]["right"][task][str(length)], dtype=float)
    return None if rows is None else rows[:, 2:] if far else rows[:, :2]


def mean(rows: numpy.ndarray | None) -> float | None:
    """Of [samples, 2] of sums and counts; None where there is nothing to count."""
    return None if rows is None or not rows[:, 1].sum() else rows[:, 0].sum() / rows[:, 1].sum()


def difference(mine: numpy.ndarray, other: numpy.ndarray) -> tuple[float, float]:
    """Of two means over the same samples, and its standard error from the samples' differences.

    It says how sure the difference is for these two trained models; another seed is another model.
    """
    weight = mine[:, 1] / mine[:, 1].mean()
    gaps = (mine[:, 0] - other[:, 0]) / numpy.maximum(mine[:, 1], 1) * weight
    return mean(mine) - mean(other), gaps.std(ddof=1) / len(gaps) ** 0.5


def loss_table(results: list[dict]) -> list[str]:
    """Markdown: densities, losses and speed of arms that are comparable."""
    lengths = examination(results[0])["loss_lengths"]
    phases = max((result.get("phases", []) for result in results), key=len)
    head = ["arm", "density at 8k", "at 32k", "tokens"]
    for name in (f"loss at {n}" for n in lengths):
        head += [name, "against dense", "on far repeats", "against dense"]
    speeds = [f"us a token at {phase['length']}" for phase in phases]
    lines = rule([*head, *speeds, "status"])
    dense = dense_of(results)
    for result in results:
        cells = [result["arm"], *(f"{density(result['arm'], n):.1%}" for n in (8192, 32768)),
                 f"{sum(p['tokens'] for p in result.get('phases', [])) / 1e6:.0f}M"]  # fmt: skip
        for length in lengths:
            for far in (False, True):
                mine, other = losses(result, length, far), dense and losses(dense, length, far)
                value = mean(mine)
                cells.append("" if value is None else f"{value:.4f}")
                cells.append(against(mine, other) if result is not dense else "")
        speeds = (own_speed(result, number) for number in range(len(phases)))
        cells += ["" if speed is None else f"{speed:.2f}" for speed in speeds]
        cells.append(result["status"])
        lines.append(row(cells))
    return lines


def dense_of(results: list[dict]) -> dict | None:
    return next((r for r in results if r["arm"] in DENSE), None)


def against(mine: numpy.ndarray | None, other: numpy.ndarray | None) -> str:
    """The difference in percent of the other, and its standard error."""
    if mean(mine) is None or mean(other) is None:
        return ""
    gap, error = difference(mine, other)
    return f"{gap / mean(other):+.2%} (se {error / mean(other):.2%})"


def retrieval_table(results: list[dict], probe: dict) -> list[str]:
    """Markdown: right answers of one probe, by task and length, and those from far away.

    Behind a share stand the points more or less than dense has on the same documents.
    """
    lengths = examination(results[0])["lengths"]
    columns = [(task, n, False) for task in probe["tasks"] for n in lengths]
    columns += [(task, n, True) for task in probe["tasks"] for n in lengths[-1:]]
    names = [f"{task} {n}{' far' if far else ''}" for task, n, far in columns]
    lines, dense = rule(["arm", *names]), dense_of(results)
    for result in results:
        cells = []
        for column in columns:
            mine = answers(result, probe["name"], *column)
            other = dense and answers(dense, probe["name"], *column)
            share = mean(mine)
            cells.append("" if share is None else f"{share:.0%}")
            if result is not dense and share is not None and mean(other) is not None:
                gap, error = difference(mine, other)
                cells[-1] += f" ({100 * gap:+.1f}, se {100 * error:.1f})"
        lines.append(row([result["arm"], *cells]))
    return lines


def worst_table(results: list[dict], probe: dict) -> list[str]:
    """Markdown: how one probe goes where it goes worst: by depth, distance and shard.

    Distances and shards are those of all lengths together.
    """
    lines = []
    for result in results:
        found = result.get("examination", {}).get(probe["name"], {}).get("retrieval", {})
        for task, cells in found.items():
            places = [worst(cells["by distance"])]
            shards = {f"shard {n} ({grid})": cell for grid, table in cells["by shard"].items()
                      for n, cell in table.items()}  # fmt: skip
            places.append(worst(shards))
            for length, at in cells["by length"].items():
                depths = {f"{10 * i}%": cell for i, cell in enumerate(at["by depth"])}
                lines.append(
                    row([result["arm"], f"{task} {length}", of(at["all"]), worst(depths), *places,
                         of(at["left out"])])
                )  # fmt: skip
    head = ["arm", "asked", "right", "worst depth", "worst distance", "worst shard", "left out"]
    return [*rule(head), *lines] if lines else []


def worst(cells: dict[str, dict]) -> str:
    """The name and the share of the worst of some cells."""
    there = {name: cell for name, cell in cells.items() if cell["value"] is not None}
    if not there:
        return ""
    name = min(there, key=lambda name: there[name]["value"])
    return f"{name}: {of(there[name])}"


def of(cell: dict) -> str:
    """'48 of 50'."""
    return f"{round((cell['value'] or 0) * cell['count'])} of {cell['count']}"


COUNTS = 0.95
"""A probe counts where dense has at least this share of its answers right."""


def claims_table(results: list[dict]) -> list[str]:
    """Markdown: each of PAIRS that is there, on losses and on the probes, in standard errors."""
    arms, dense = {result["arm"]: result for result in results}, dense_of(results)
    plan = examination(results[0])
    what = [(f"loss at {n}{', far repeats' if far else ''}", losses, (n, far))
            for n in plan["loss_lengths"] for far in (False, True)]  # fmt: skip
    what += [
        (f"{probe['name']}, {task} {n}{', far' if far else ''}", answers,
         (probe["name"], task, n, far))
        for probe in plan["probes"] for task in probe["tasks"] for n in plan["lengths"]
        for far in (False, True)
    ]  # fmt: skip
    lines = []
    for first, second, about_what in PAIRS:
        if first not in arms or second not in arms:
            continue
        for name, read, column in what:
            mine, other = (read(arms[arm], *column) for arm in (first, second))
            if mean(mine) is None or mean(other) is None:
                continue
            known = mean(dense and read(dense, *column))
            counted = read is losses or (known is not None and known >= COUNTS)
            gap, error = difference(mine, other)
            lines.append(
                row([f"`{first}` - `{second}`: {about_what}", name, f"{mean(mine):.4f}",
                     f"{mean(other):.4f}", f"{gap:+.4f}", f"{error:.4f}",
                     f"{gap / error:+.1f}" if error else "", "yes" if counted else "no"])
            )  # fmt: skip
    head = ["pair", "on", "first", "second", "difference", "se", "in se", "counts"]
    return [*rule(head), *lines] if lines else []


def seeds_table(results: list[dict]) -> list[str]:
    """Markdown: loss against dense of arms with several seeds, and how far the seeds are apart."""
    recipes: dict[str, dict[str, dict[tuple, dict]]] = {}
    for result in results:
        recipe, *weights = group(result)
        of_arm = recipes.setdefault(recipe, {}).setdefault(result["arm"], {})
        of_arm[tuple(weights)] = result
    lines = []
    for arms in recipes.values():
        dense = next((arms[name] for name in DENSE if name in arms), {})
        for arm, by_seed in arms.items():
            lengths = examination(next(iter(by_seed.values())))["loss_lengths"]
            for length, far in itertools.product(lengths, (False, True)):
                found = {seed: mean(losses(r, length, far)) for seed, r in by_seed.items()}
                base = {seed: mean(losses(r, length, far)) for seed, r in dense.items()}
                both = [seed for seed in sorted(found) if found[seed] and base.get(seed)]
                if len(both) < 2:
                    continue
                gaps = numpy.array([found[seed] / base[seed] - 1 for seed in both])
                each = ", ".join(f"{gap:+.2%}" for gap in gaps)
                of = f"{length}, far repeats" if far else str(length)
                cells = [arm, of, ", ".join(f"{found[seed]:.4f}" for seed in both), each]
                lines.append(row([*cells, f"{gaps.mean():+.2%}", f"{gaps.std(ddof=1):.2%}"]))
    head = ["arm", "loss at", "by seed", "against dense, by seed", "mean", "spread (sd)"]
    return [*rule(head), *lines] if lines else []


def rule(head: list[str]) -> list[str]:
    return [row(head), "|" + " --- |" * len(head)]


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def examination(result: dict) -> dict:
    """The recipe's, or one that asks nothing."""
    none: dict = {"lengths": [], "loss_lengths": [], "probes": []}
    return result["recipe"]["examination"] or none


def own_speed(result: dict, number: int) -> float | None:
    """Microseconds a token in a phase; None where the arm had not the GPU to itself."""
    phases = result.get("phases", [])
    if len(phases) <= number or not phases or result.get("arms_per_gpu", 1) > 1:
        return None
    return phases[number].get("us_per_token")


def about(result: dict) -> list[str]:
    """What the arms of a table were made with, and on what."""
    recipe = result["recipe"]
    lines = [
        f"{result['gpu']}, commit {result['commit']}, {result['date']}, seed {recipe['seed']}; "
        + ", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        "",
    ]
    for number, phase in enumerate(recipe["phases"]):
        limit = f", stopped after {phase['seconds']:g} s" if phase["seconds"] else ""
        lines.append(
            f"- phase {number}: {phase['length']} tokens, {phase['tokens'] / 1e6:g}M planned in "
            f"steps of {phase['batch_tokens']}{limit}; rate {phase['lr']:g} to "
            f"{phase['final_lr']:g}; {phase['retrieval']:.0%} retrieval documents "
            f"(repeats {phase['repeats']:.0%}, records {phase['records']:.0%} of the others)"
        )
    return [*lines, "", f"`{result['command']}`", ""]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(argv)
    results = read_results(*a.results)
    a.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Arms of the quality study", ""]
    for key in dict.fromkeys(map(group, results)):
        alike = [result for result in results if group(result) == key]
        lines += [*about(alike[0]), *loss_table(alike), ""]
        for probe in examination(alike[0])["probes"]:
            lines += [f"Right answers, {probe['name']}; in brackets points against dense; far: "
                      "value and answer 2,048 tokens apart and more", "",
                      *retrieval_table(alike, probe), ""]  # fmt: skip
            if worst_places := worst_table(alike, probe):
                lines += [f"{probe['name']}, where it goes worst", "", *worst_places, ""]
        if claims := claims_table(alike):
            lines += ["Pairs, on the same windows and documents", "", *claims, ""]
    if seeds := seeds_table(results):
        lines += ["## Several seeds", "", *seeds, ""]
    speeds = {result["file"]: own_speed(result, -1) for result in results}
    values = {result["file"]: mean(losses(result, longest(result))) for result in results}
    for name, file in pictures.draw(results, speeds, values, a.out).items():
        lines += [f"![{name}]({file.name})", ""]
    (a.out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{a.out}/report.md: {len(results)} arms")


def longest(result: dict) -> int:
    return max(examination(result)["loss_lengths"], default=0)


if __name__ == "__main__":
    main()
