"""Where an arm's result stands, and what a phase's log says."""

import json
import re
from pathlib import Path

STEP = re.compile(r" iteration +(\d+)/ *\d+ .*?lm loss: ([\d.E+-]+)")
SPEED = re.compile(r" s2megatron iteration +(\d+) \| ([\d.]+) ms/iteration")
VALID = re.compile(r"validation(?:-(\w+))? loss at iteration (\d+).*?lm loss value: ([\d.E+-]+)")

RESULT = "result.json"
"""In an arm's folder: all that is known of it."""
TRAINED = "trained.txt"
"""In an arm's folder once it is trained: the folder of its checkpoint."""
MOST = 200
"""Points of a curve that are kept."""


def write_result(result: dict, out: Path, copy: Path | None) -> None:
    """Writes OUT/result.json and its copy, each whole or not at all."""
    text = json.dumps(result) + "\n"
    for place in filter(None, (out / RESULT, copy)):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(place.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(place)


def read_result(out: Path) -> dict:
    return json.loads((out / RESULT).read_text(encoding="utf-8"))


def read_log(path: Path) -> dict:
    """Curves and speed out of Megatron's log and the throughput meter's lines.

    Returns:
        "steps"; "loss" [(step, loss), ...]; "validation" name -> such a list; "ms_per_step", the
        median of the last two thirds; "seconds" [(step, seconds of training until then), ...],
        without start, evaluations and checkpoints.
    """
    text = path.read_text(errors="replace")
    loss = [(int(step), round(float(value), 4)) for step, value in STEP.findall(text)]
    speed = [(int(step), float(ms)) for step, ms in SPEED.findall(text)]
    valid: dict[str, list] = {}
    for name, step, value in VALID.findall(text):
        valid.setdefault(name or "text", []).append((int(step), round(float(value), 4)))
    settled = sorted(ms for _, ms in speed[len(speed) // 3 :])
    seconds, last, total = [], 0, 0.0
    for step, ms in speed:
        total += (step - last) * ms / 1e3
        last = step
        seconds.append((step, round(total, 2)))
    return {
        "steps": loss[-1][0] if loss else 0,
        "loss": loss[:: max(1, len(loss) // MOST)],
        "validation": valid,
        "ms_per_step": settled[len(settled) // 2] if settled else None,
        "seconds": seconds[:: max(1, len(seconds) // MOST)],
    }
