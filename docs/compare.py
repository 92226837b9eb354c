"""Train the built-in model by every recipe of loss.py, several seeds each, and compare them.

    python docs/compare.py              # 39 runs in runs/recipes, 20 minutes on one CPU core
    python docs/compare.py --steps 100 --minibatches 1 --runs_dir runs/other

All runs have the same base model, problems, learning rate and number of sampled responses, and are
measured on the same held-out problems. Writes the table in docs/recipes.md. A run that is finished
is not trained again.
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from lib.files import read_rows
from lib.flags import UserError, check_range, flag, run_script
from loss import RECIPES

HERE = Path(__file__).parent.parent
CONTROL = "grpo, random rewards"
RUNS = {recipe: ["--recipe", recipe] for recipe in RECIPES}
RUNS["reinforce_rej, wrong -1"] = ["--recipe", "reinforce_rej", "--reward", "2*exact - 1"]
RUNS[CONTROL] = ["--recipe", "grpo", "--reward", "coin.coin"]
COIN = '''"""A reward that does not look at the response: all that is learned is noise."""
import random


def coin(prompt, response, answer):
    return float(random.random() < 0.5)
'''
P = 16  # prompts per rollout
G = 16  # responses to each
COLUMNS = "accuracy", "on the way", "entropy", "thinking"
T95 = 2.06  # a 95 % interval reaches as many standard errors: t with 24 degrees of freedom


@dataclass(frozen=True)
class Config:
    steps: int = flag(20, "rollouts per run")
    minibatches: int = flag(4, "optimizer steps per rollout; with 1 nothing is clipped")
    seeds: int = flag(3, "runs of each recipe")
    runs_dir: str = flag("runs/recipes", "folder of the runs")


def train(name, seed, config) -> Path:
    """The folder of a finished run, which is trained unless it is there. In the folder of the
    runs, because train.py looks for coin.py in the current folder."""
    runs_dir = HERE / config.runs_dir
    folder = runs_dir / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
    if (folder / "after.json").exists():
        return folder
    runs_dir.mkdir(parents=True, exist_ok=True)
    (runs_dir / "coin.py").write_text(COIN)
    flags = {
        "model": HERE / "models" / "add",
        "name": folder.name,
        "runs_dir": ".",
        "seed": seed,
        "steps": config.steps,
        "prompts_per_step": P,
        "group_size": G,
        "minibatches": config.minibatches,
        "eval_every": 2,
    }
    command = [sys.executable, HERE / "train.py", *RUNS[name]]
    command += [f"--{flag}={value}" for flag, value in flags.items()]
    done = subprocess.run(command, cwd=runs_dir, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the run {folder.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def summarise(folder, config) -> dict:
    """A run at the point where it had sampled as many responses as the others: a recipe that
    resamples takes more per step, so its last steps are left out.

    on the way: mean of the evaluations so far; entropy, thinking: mean of the last five steps
    """
    rows = read_rows(folder / "metrics.jsonl")
    rows = [row for row in rows if row["prompts_seen"] <= config.steps * P]
    evaluated = [row for row in rows if "eval_accuracy" in row]
    rows = rows[: evaluated[-1]["step"]]  # one row per step
    return {
        "accuracy": evaluated[-1]["eval_accuracy"],
        "on the way": average(evaluated, "eval_accuracy"),
        "entropy": average(rows[-5:], "entropy"),
        "thinking": average(rows[-5:], "thinking"),
    }


def average(rows, key) -> float:
    return fmean(row[key] for row in rows)


def half_interval(results, key) -> float:
    """Half of the 95 % interval of a recipe's mean. The noise of a run is taken to be the same in
    all recipes: the mean of their variances, without the control, which wanders further."""
    recipes = [runs for name, runs in results.items() if name != CONTROL]
    noise = fmean(variance(run[key] for run in runs) for runs in recipes)
    return T95 * math.sqrt(noise / len(recipes[0]))


def results_table(results) -> str:
    """Markdown, best first."""
    half = {key: half_interval(results, key) for key in ("accuracy", "on the way")}
    lines = [f"| recipe | {' | '.join(COLUMNS)} | accuracy of each run |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name in sorted(results, key=lambda name: -average(results[name], "accuracy")):
        cells = [name]
        for key in COLUMNS:
            cell = f"{average(results[name], key):.3f}"
            if key in half and name != CONTROL:
                cell += f" ± {half[key]:.3f}"
            cells.append(cell)
        cells.append(", ".join(f"{run['accuracy']:.3f}" for run in results[name]))
        lines.append(f"| {' | '.join(cells)} |")
    apart = " and ".join(f"{value * 2**0.5:.3f} ({key})" for key, value in half.items())
    text = f"Two recipes, chosen before looking, differ by more than noise if {apart} apart."
    return "\n".join([*lines, "", text])


def main(config) -> None:
    check_range(config, 1, "steps minibatches")
    check_range(config, 2, "seeds", most=1000)  # one run does not tell noise from effect
    jobs = [(name, seed) for seed in range(config.seeds) for name in RUNS]
    results = {name: [] for name in RUNS}
    for name, seed in tqdm(jobs):
        results[name].append(summarise(train(name, seed, config), config))
    page = HERE / "docs" / "recipes.md"
    head, rest = page.read_text().split("<!-- table -->\n")
    _, tail = rest.split("<!-- end -->")
    page.write_text(f"{head}<!-- table -->\n{results_table(results)}\n<!-- end -->{tail}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
