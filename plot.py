"""Pictures of runs, drawn from what they left on disk."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from track import read_rows

CURVES = {  # metric -> title of its panel
    "reward": "reward (mean of the step's responses)",
    "eval_accuracy": "accuracy on held-out problems, sampled",
    "thinking": "share of responses that think",
    "response_length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "grad_norm": "gradient norm before clipping",
}


def draw(panel, steps: list[int], values: list[float], color: str) -> None:
    """Each step thin, the mean of the steps around it thick."""
    windows = [values[max(0, i - 3) : i + 4] for i in range(len(values))]
    panel.plot(steps, values, color=color, alpha=0.35, linewidth=1)
    panel.plot(steps, [sum(window) / len(window) for window in windows], color=color, linewidth=2)


def plot(folder: Path) -> None:
    """Draws curves.png from metrics.jsonl. The parts of a mixture get panels of their own; a true reward other than the
    reward is drawn beside it."""
    rows = read_rows(folder / "metrics.jsonl")
    parts = {key: f"part of the reward: {key[7:]}" for key in rows[-1] if key.startswith("reward/")}
    curves = CURVES | (parts if len(parts) > 1 else {})
    if (folder / "before.json").exists():  # held-out accuracy starts where the base model stands
        before = json.loads((folder / "before.json").read_text())["sampled"]
        rows.insert(0, {"step": 0, "eval_accuracy": before["accuracy"], "eval_interval": before["interval"]})
    height = -(-len(curves) // 3)
    figure = Figure(figsize=(11, 2.75 * height), layout="constrained")
    for panel, (metric, title) in zip(figure.subplots(height, 3).flat, curves.items()):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.set_xlabel("step", fontsize=9)
        shown = [row for row in rows if metric in row]
        steps, values = [row["step"] for row in shown], [row[metric] for row in shown]
        if metric == "eval_accuracy" and shown:
            low, high = zip(*(row["eval_interval"] for row in shown))
            panel.fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0)
            panel.plot(steps, values, "o-", color="C0", markersize=4)
        else:
            draw(panel, steps, values, "C0")
        if metric in ("reward", "eval_accuracy", "thinking") and all(0 <= value <= 1 for value in values):
            panel.set_ylim(-0.03, 1.03)
        if metric == "reward" and (true := [row["true_reward"] for row in shown]) != values:
            panel.set_title("reward (blue, left) and true reward (red, right)", fontsize=10)
            right = panel.twinx()
            draw(right, steps, true, "C3")
            if all(0 <= value <= 1 for value in true):
                right.set_ylim(-0.03, 1.03)
    figure.suptitle(folder.name, fontsize=11)
    aside = folder / "curves.part.png"
    figure.savefig(aside, dpi=110)
    aside.replace(folder / "curves.png")
