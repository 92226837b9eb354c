"""Trains the built-in model by every recipe of loss.py, several seeds each, and writes what came of it.

    python compare.py                     # 39 runs in runs/recipes, half an hour on one CPU core; finished ones are kept
    python compare.py --steps 100 --minibatches 1 --runs_dir runs/other

All get the same base model, problems, learning rate and number of sampled responses, and are measured on the same
held-out problems. Writes the table into docs/recipes.md and draws docs/recipes.png.
"""

import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import track
from flags import UserError, run_script
from loss import RECIPES

HERE = Path(__file__).parent
RUNS = {recipe: ["--recipe", recipe] for recipe in RECIPES}
RUNS["reinforce_rej, wrong -1"] = ["--recipe", "reinforce_rej", "--reward", "2*exact - 1"]
RUNS["grpo, random rewards"] = ["--recipe", "grpo", "--reward", "compare.coin"]


@dataclass(frozen=True)
class Config:
    steps: int = HfArg(default=40, help="rollouts a run learns from")
    minibatches: int = HfArg(default=4, help="optimizer steps on each of them: above 1, or ratios and clips do nothing")
    seeds: int = HfArg(default=3, help="runs of each recipe")
    runs_dir: str = HfArg(default="runs/recipes", help="folder of the runs")


def coin(prompt: str, response: str, answer: str) -> float:
    """The control: a reward that knows nothing. What is learnt from it is learnt from noise."""
    return float(random.random() < 0.5)


def run(name: str, seed: int, config: Config) -> Path:
    """The folder of a finished run; trained if it is not there."""
    folder = Path(config.runs_dir) / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
    if not (folder / "after.json").exists():
        done = subprocess.run(
            [sys.executable, "train.py", *RUNS[name], "--seed", str(seed), "--steps", str(config.steps), "--minibatches",
             str(config.minibatches), "--eval_every", "2", "--runs_dir", config.runs_dir, "--name", folder.name],
            cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the run {folder.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def summary(folder: Path, config: Config) -> dict:
    """accuracy: at the last evaluation before more problems had been drawn than --steps of P are (only resampling
    recipes draw more); entropy: mean of the five steps up to it; seconds a step; problems drawn."""
    settings, rows = track.read_config(folder), track.read_rows(folder / "metrics.jsonl")
    rows = [row for row in rows if row["drawn"] <= config.steps * settings["prompts_per_step"]]
    last = next(i for i in reversed(range(len(rows))) if "eval_accuracy" in rows[i])
    return {
        "accuracy": rows[last]["eval_accuracy"],
        "entropy": sum(row["entropy"] for row in rows[max(0, last - 4) : last + 1]) / min(5, last + 1),
        "thinking": rows[last]["thinking"],
        "responses": rows[last]["drawn"] * settings["group_size"],
        "seconds": sum(row["seconds"] for row in rows[: last + 1]),
        "curve": [(row["drawn"] * settings["group_size"], row["eval_accuracy"]) for row in rows
                  if "eval_accuracy" in row],
        "entropies": [(row["drawn"] * settings["group_size"], row["entropy"]) for row in rows],
    }


def average(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def table(results: dict[str, list[dict]]) -> str:
    """Markdown, best first. The noise of a run is taken to be the same in all recipes, and pooled over them."""
    squares = [(row["accuracy"] - average(rows, "accuracy")) ** 2 for rows in results.values() for row in rows]
    noise = math.sqrt(sum(squares) / (len(squares) - len(results)))
    half = 2.06 * noise / math.sqrt(len(squares) / len(results))  # t of about 26 degrees of freedom, 95 %
    lines = ["| recipe | accuracy | its runs | entropy | thinking | responses | seconds |", "|---|---|---|---|---|---|---|"]
    for name, rows in sorted(results.items(), key=lambda item: -average(item[1], "accuracy")):
        runs = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        lines.append(f"| {name} | {average(rows, 'accuracy'):.3f} ± {half:.3f} | {runs} | {average(rows, 'entropy'):.3f} | "
                     f"{average(rows, 'thinking'):.2f} | {average(rows, 'responses'):,.0f} | "
                     f"{average(rows, 'seconds'):.0f} |")
    return "\n".join(lines) + (f"\n\nStandard deviation between runs that differ in the seed alone: {noise:.3f}. Two "
                               f"recipes differ by more than noise if their means are {half * math.sqrt(2):.3f} apart.")


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A panel a recipe: held-out accuracy (blue) and entropy (red) of each run; grey, grpo's mean for comparison."""
    height = -(-len(results) // 5)
    figure = Figure(figsize=(12, 2.3 * height), layout="constrained")
    panels = figure.subplots(height, 5, sharex=True, sharey=True).flat
    grpo = [sum(y) / len(y) for y in zip(*([y for _, y in row["curve"]] for row in results["grpo"]))]
    for panel, (name, rows) in zip(panels, results.items()):
        panel.plot([x for x, _ in results["grpo"][0]["curve"]], grpo, color="0.6", linewidth=3)
        for row in rows:
            panel.plot(*zip(*row["entropies"]), color="C3", linewidth=0.8, alpha=0.7)
            panel.plot(*zip(*row["curve"]), color="C0", linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    for panel in panels:
        panel.axis("off")
    figure.supxlabel("responses sampled", fontsize=9)
    figure.supylabel("accuracy (blue), entropy in nats (red)", fontsize=9)
    figure.savefig(path, dpi=80)


def main(config: Config) -> None:
    pairs = [(name, seed) for seed in range(config.seeds) for name in RUNS]  # all recipes once, then again
    results = {name: [] for name in RUNS}
    for name, seed in tqdm(pairs):
        results[name].append(summary(run(name, seed, config), config))
    page = HERE / "docs" / "recipes.md"
    head, _, rest = page.read_text().partition("<!-- table -->\n")
    page.write_text(f"{head}<!-- table -->\n{table(results)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    draw(results, page.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
