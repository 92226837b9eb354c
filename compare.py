"""Trains the built-in model by every recipe of loss.py, several seeds each, and writes what came of it.

    python compare.py                     # 39 runs in runs/recipes, 20 minutes on one CPU core; finished ones are kept
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
from flags import UserError, need, run_script
from loss import RECIPES

HERE = Path(__file__).parent
RUNS = {recipe: ["--recipe", recipe] for recipe in RECIPES}
RUNS["reinforce_rej, wrong -1"] = ["--recipe", "reinforce_rej", "--reward", "2*exact - 1"]
CONTROL = "grpo, random rewards"
RUNS[CONTROL] = ["--recipe", "grpo", "--reward", "compare.coin"]


@dataclass(frozen=True)
class Config:
    steps: int = HfArg(default=20, help="rollouts a run learns from")
    prompts_per_step: int = HfArg(default=16, help="P, prompts of a rollout")
    minibatches: int = HfArg(default=4, help="optimizer steps on each of them: above 1, or ratios and clips do nothing")
    seeds: int = HfArg(default=3, help="runs of each recipe")
    runs_dir: str = HfArg(default="runs/recipes", help="folder of the runs")


def coin(prompt: str, response: str, answer: str) -> float:
    """The control: a reward that knows nothing. What is learnt from it is learnt from noise."""
    return float(random.random() < 0.5)


def run(name: str, seed: int, config: Config) -> Path:
    """The folder of a finished run; trained if it is not there."""
    folder = HERE / config.runs_dir / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
    if not (folder / "after.json").exists():
        flags = dict(seed=seed, steps=config.steps, prompts_per_step=config.prompts_per_step, eval_every=2,
                     minibatches=config.minibatches, runs_dir=config.runs_dir, name=folder.name)
        done = subprocess.run(
            [sys.executable, "train.py", *RUNS[name], *(f"--{flag}={value}" for flag, value in flags.items())],
            cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the run {folder.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def summary(folder: Path, config: Config) -> dict:
    """What a run had come to when it had sampled as many responses as the others: one that resamples draws more a step,
    so it ends earlier. on the way: mean of the evaluations up to then; entropy: mean of the last five steps."""
    group_size, rows = track.read_config(folder)["group_size"], track.read_rows(folder / "metrics.jsonl")
    rows = [row for row in rows if row["drawn"] <= config.steps * config.prompts_per_step]
    measured = [row for row in rows if "eval_accuracy" in row]
    rows = [row for row in rows if row["step"] <= measured[-1]["step"]]
    return {
        "accuracy": measured[-1]["eval_accuracy"],
        "on the way": average(measured, "eval_accuracy"),
        "entropy": average(rows[-5:], "entropy"),
        "thinking": average(rows[-5:], "thinking"),
        "responses": rows[-1]["drawn"] * group_size,
        "seconds": sum(row["seconds"] for row in rows),
        "curve": [(row["drawn"] * group_size, row["eval_accuracy"]) for row in measured],
        "entropies": [(row["drawn"] * group_size, row["entropy"]) for row in rows],
    }


def average(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def table(results: dict[str, list[dict]]) -> str:
    """Markdown, best first. The noise of a run is taken to be the same in all recipes and pooled over them, but for the
    control: nothing holds it, it wanders further."""
    half, learnt = {}, [rows for name, rows in results.items() if name != CONTROL]
    for key in ("accuracy", "on the way"):
        squares = [(row[key] - average(rows, key)) ** 2 for rows in learnt for row in rows]
        noise = math.sqrt(sum(squares) / (len(squares) - len(learnt)))
        half[key] = 2.06 * noise / math.sqrt(len(learnt[0]))  # of the 95 % interval: t of about 24 degrees of freedom
    columns = {"accuracy": ".3f", "on the way": ".3f", "entropy": ".3f", "thinking": ".2f", "responses": ",.0f",
               "seconds": ".0f"}
    lines = [f"| recipe | {' | '.join(columns)} | accuracy of each run |", "|---|" + "---|" * (len(columns) + 1)]
    for name, rows in sorted(results.items(), key=lambda item: -average(item[1], "accuracy")):
        cells = [f"{average(rows, key):{form}}" + (f" ± {half[key]:.3f}" if key in half and name != CONTROL else "")
                 for key, form in columns.items()]
        runs = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        lines.append(f"| {' | '.join([name, *cells, runs])} |")
    apart = " and ".join(f"{value * math.sqrt(2):.3f} ({key})" for key, value in half.items())
    return "\n".join(lines) + f"\n\nTwo recipes, chosen before looking, differ by more than noise if {apart} apart."


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A panel a recipe: held-out accuracy (blue) and entropy (red) of each run; grey, grpo's mean for comparison."""
    height = -(-len(results) // 5)
    figure = Figure(figsize=(12, 2.3 * height), layout="constrained")
    panels = figure.subplots(height, 5, sharex=True, sharey=True).flat
    grpo = [sum(y) / len(y) for y in zip(*([y for _, y in row["curve"]] for row in results["grpo"]))]
    for (name, rows), panel in zip(results.items(), panels):
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
    need(config, 1, "steps prompts_per_step minibatches")
    need(config, 2, "seeds", most=1000)  # noise cannot be told from one
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
