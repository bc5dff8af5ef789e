"""Tables and pictures of the study from the arms' JSON files.

    python scripts/quality/report.py runs/quality/results --out runs/quality/report

OUT/report.md has a row per arm, the dense arm of the same recipe and seed as the measure;
OUT/loss-against-time.png is the frontier, OUT/curves.png how the losses fell. What an arm has not
reached yet is left empty.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from arms import ARMS, density

FAR = "repeats 2500 and more back"


def read_results(folder: Path) -> list[dict]:
    """The results of a folder, by recipe, seed, and the order of the table of arms."""
    found = [json.loads(path.read_text()) | {"file": path.stem} for path in folder.glob("*.json")]
    order = list(ARMS)
    return sorted(found, key=lambda r: (group(r), order.index(r["arm"])))


def group(result: dict) -> tuple[str, int]:
    """What makes arms comparable: the same recipe and seed."""
    return json.dumps(result["recipe"]["phases"]), result["recipe"]["seed"]


def loss(result: dict, length: int, name: str = "all") -> dict | None:
    """Mean, error and count of held-out losses in nats a token."""
    found = result.get("examination", {}).get(f"loss-{length}")
    return found and found["loss"][str(length)][name]


def retrieved(result: dict, probe: str, length: int, tasks=None) -> float | None:
    """Share of right answers over a probe's tasks."""
    found = result.get("examination", {}).get(probe)
    if not found:
        return None
    rows = [lengths["by length"][str(length)]["all"] for task, lengths in
            found["retrieval"].items() if tasks is None or task in tasks]  # fmt: skip
    return sum(row["value"] for row in rows) / len(rows)


def table(results: list[dict]) -> list[str]:
    """Markdown rows of arms that are comparable."""
    plan = results[0]["recipe"]["examination"]
    length = max(plan["loss_lengths"])
    probes = [probe["name"] for probe in plan["probes"]]
    dense = next((r for r in results if r["arm"] == "dense" and loss(r, length)), None)
    k = length // 1024
    head = ["arm", f"density at {k}k", "at 32k", "tokens", f"loss at {k}k", "against dense",
            f"on {FAR}", "against dense"]  # fmt: skip
    head += [f"{p} at {n // 1024}k" for p in probes for n in plan["lengths"]]
    head += ["us a token", "status"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for result in results:
        cells = [result["arm"], percent(density(result["arm"], length)),
                 percent(density(result["arm"], 32768)),
                 f"{sum(p['tokens'] for p in result.get('phases', [])) / 1e6:.0f}M"]  # fmt: skip
        for name in ("all", FAR):
            mine, other = loss(result, length, name), dense and loss(dense, length, name)
            cells.append(f"{mine['value']:.4f}" if mine and mine["value"] else "")
            both = mine and other and mine["value"] and other["value"]
            cells.append(f"{mine['value'] / other['value'] - 1:+.2%}" if both else "")
        for probe in probes:
            shares = (retrieved(result, probe, n) for n in plan["lengths"])
            cells += ["" if share is None else percent(share) for share in shares]
        speed = own_speed(result)
        cells += [f"{speed:.2f}" if speed else "", result["status"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def own_speed(result: dict) -> float | None:
    """Microseconds a token in the last phase; None where the arm had not the GPU to itself."""
    phases = result.get("phases")
    alone = result.get("arms_per_gpu", 1) == 1
    return phases[-1].get("us_per_token") if phases and alone else None


def percent(share: float) -> str:
    return f"{share:.1%}"


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


def plot_frontier(results: list[dict], path: Path) -> None:
    """Loss against measured time a token of the last phase."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for result in results:
        length = max(result["recipe"]["examination"]["loss_lengths"])
        found = loss(result, length)
        speed = own_speed(result)
        if found and speed:
            axis.errorbar(speed, found["value"], yerr=found["error"], marker="o", capsize=2)
            axis.annotate(result["arm"], (speed, found["value"]), fontsize=8,
                          xytext=(4, 4), textcoords="offset points")  # fmt: skip
    axis.set_xlabel("training, microseconds a token (last phase)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_curves(results: list[dict], path: Path) -> None:
    """Losses watched in training, of text and of records, against tokens seen."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name in zip(axes, ("text", "retrieval"), strict=True):
        for i, result in enumerate(results):
            seen, points = 0, []
            for phase in result.get("phases", []):
                watched = phase["validation"].get(name, [])
                points += [(seen + s * phase["batch_tokens"], value) for s, value in watched]
                seen += phase["tokens"]
            if points:
                tokens, values = zip(*points, strict=True)
                axis.plot([t / 1e6 for t in tokens], values, label=result["file"], color=f"C{i}")
        axis.set_title({"text": "held-out text", "retrieval": "records"}[name], fontsize=10)
        axis.set_xlabel("million tokens")
        axis.set_ylabel("loss (nats a token)")
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    results = read_results(a.results)
    a.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Arms of the quality study", ""]
    for key in dict.fromkeys(map(group, results)):
        alike = [result for result in results if group(result) == key]
        lines += [*about(alike[0]), *table(alike), ""]
    lines += ["![loss against time](loss-against-time.png)", "", "![curves](curves.png)", ""]
    plot_frontier(results, a.out / "loss-against-time.png")
    plot_curves(results, a.out / "curves.png")
    (a.out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{a.out}/report.md: {len(results)} arms")


if __name__ == "__main__":
    main()
