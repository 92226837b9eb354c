"""List runs: a line each, the best of each task first. Runs that differ only in their seed are one
line.

    python -m tools.runs                          # all in runs/
    python -m tools.runs runs/lr-* runs/add       # these
    python -m tools.runs --plot compare.png       # their curves in one picture
    python -m tools.runs --csv > runs.csv         # for a spreadsheet

before and after are held-out problems, sampled, with 95 % intervals: of the problems for one run,
of the seeds (Student's t) for several. Without evaluations (--eval_problems 0) they are the mean
rewards of the first and the last quarter of the steps. A run is running, finished, stopped (by a
signal: its checkpoint is as new as its metrics), or failed. Below the table the best is compared
with each of the others.
"""

import csv
import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.checkpoint import lock
from lib.files import read_rows
from lib.flags import UserError, align, flag, run_script
from lib.plots import plot_runs
from lib.report import interval_text
from lib.run import is_run, read_config, saved_step
from lib.stats import mean_over_runs, unpaired_difference
from loss import RECIPES

ONE_SEED = """\
The interval of a single run is over problems: another seed may differ by more. Before you believe
in a flag, run it with --seed 1 and --seed 2 too."""
STEPS = "reward of steps"  # what is measured where a run has no evaluations
NOT_LEARNED_FROM = ("name", "runs_dir", "resume", "tracker", "log_samples")


@dataclass(frozen=True)
class Config:
    csv: bool = flag(False, "comma-separated values, with a column for each flag that differs")
    plot: str = flag("", "a picture of the curves to write; of several seeds their mean and a band")
    x: Literal["step", "responses"] = flag("step", "responses: where steps differ in their size")


def main(config, runs) -> None:
    if config.plot and Path(config.plot).suffix != ".png":
        raise UserError(f"--plot {config.plot}: must end in .png")
    folders = [Path(run) for run in runs] or sorted(Path("runs").glob("*"))
    found = [describe(folder) for folder in folders if runs or is_run(folder)]
    if not found:
        raise UserError("runs: no run there; name some, as in python -m tools.runs ELSEWHERE/*")
    rows = pool_seeds(found)
    rows.sort(key=rank)
    differing = differing_flags(rows)
    if config.plot:
        groups = {f"{row['name']} {flags_text(row, differing)}": row["folders"] for row in rows}
        plot_runs(groups, Path(config.plot), config.x)
    if config.csv:
        write_csv(rows, differing)
        return
    print(table(rows, differing))
    comparable = defaultdict(list)
    for row in rows:
        if row["after"]:
            comparable[str(basis(row))].append(row)
    for group in comparable.values():
        if len(group) > 1:
            print(f"\n{verdict(*group)}")


def rank(row) -> tuple:
    """Rows of one task are together, the best first."""
    return row["flags"]["task"], -row["after"]["mean"] if row["after"] else math.inf


def describe(folder) -> dict:
    """A run: name, flags, steps, state, seconds, what is measured, and before and after, each
    {"mean", "interval"} or None."""
    flags = read_config(folder)
    metrics = read_rows(folder / "metrics.jsonl")
    done = metrics[-1]["step"] if metrics else 0
    measured, before, after = evaluations(folder, metrics)
    return {
        "name": folder.name,
        "folders": [folder],
        "flags": {
            **{name: value for name, value in flags.items() if name not in NOT_LEARNED_FROM},
            "code": code_of(folder),
            "problems": problems_of(folder),
        },
        "steps": done,
        "state": state_of(folder, done, flags["steps"]),
        "seconds": sum(row["seconds"] for row in metrics),
        "measured": measured,
        "before": before,
        "after": after,
    }


def code_of(folder) -> str:
    """A fingerprint of the scripts as the run ran them, as '1f3a9c20': an edit makes another."""
    digest = sha256()
    for file in sorted(folder.glob("code*/**/*.py")):
        if file.parent.name != "tools":
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def problems_of(folder) -> str:
    """A fingerprint of the problems of training and validation, as '1f3a9c20': a .jsonl file may
    have changed between runs, or before a --resume."""
    content = json.loads((folder / "config.json").read_text())
    sessions = [content, *content.get("resumed", [])]
    return " ".join(dict.fromkeys(one.get("problems", "")[:8] for one in sessions))


def evaluations(folder, metrics) -> tuple:
    """What was measured (mean_reward before accuracy, else the reward of the steps), before the
    first step and last."""
    before_file = folder / "before.json"
    before = json.loads(before_file.read_text()) if before_file.exists() else {}
    for name in ("mean_reward", "accuracy"):
        key = f"eval_{name}"
        values = [(row[key], row[f"{key}_interval"]) for row in metrics if key in row]
        if name in before or values:
            first = before[name]["sampled"] if name in before else None
            last = None
            if values:
                mean, interval = values[-1]
                last = {"mean": mean, "interval": interval}
            return name, first, last
    rewards = [row["reward"] for row in metrics if "reward" in row]
    quarter = math.ceil(len(rewards) / 4)
    if quarter < 2:
        return "", None, None
    ends = rewards[:quarter], rewards[-quarter:]
    return STEPS, *map(mean_over_runs, ends)


def state_of(folder, done, steps) -> str:
    if done >= steps:
        return "finished"
    try:
        lock(folder).close()
    except UserError:  # another process holds it
        return "running"
    return "stopped" if saved_step(folder) == done else "failed"


def pool_seeds(runs) -> list[dict]:
    """Finished runs of the same code that differ only in their seed become one row."""
    groups = defaultdict(list)
    for run in runs:
        flags = {**run["flags"]}
        seed = flags.pop("seed", None)
        alone = "" if run["state"] == "finished" and run["after"] else run["name"]
        key = json.dumps([flags, alone])
        if seed in [other["flags"].get("seed") for other in groups[key]]:
            key += run["name"]  # the same run again
        groups[key].append(run)
    return [pool(group) if len(group) > 1 else group[0] for group in groups.values()]


def pool(runs) -> dict:
    stem = re.sub(r"-\d+$", "", runs[0]["name"])
    row = {**runs[0], "name": f"{stem} ({len(runs)} seeds)"}
    row["folders"] = [folder for run in runs for folder in run["folders"]]
    row["seconds"] = fmean(run["seconds"] for run in runs)
    row["flags"] = {name: value for name, value in row["flags"].items() if name != "seed"}
    for when in ("before", "after"):
        means = [run[when]["mean"] for run in runs if run[when]]
        once = when == "before" and row["measured"] != STEPS  # all seeds begin with one model
        # where all are equal the interval over problems stays: that over seeds has no width
        if len(set(means)) > 1 and not once:
            row[when] = mean_over_runs(means, row["measured"] == "accuracy")
    return row


def differing_flags(rows) -> list[str]:
    """Names of the flags in which the rows differ. A pooled row has no seed."""
    names = dict.fromkeys(name for row in rows for name in row["flags"])
    return [
        name
        for name in names
        if len({str(row["flags"][name]) for row in rows if name in row["flags"]}) > 1
    ]


def flags_text(row, differing) -> str:
    """'recipe=dapo lr=1e-05': what follows from the recipe is left out."""
    recipe = RECIPES.get(row["flags"].get("recipe"), {})
    own = dict(row["flags"].items() - recipe.items())
    return " ".join(f"{name}={own[name]}" for name in differing if name in own)


def table(rows, differing) -> str:
    lines = [["run", "flags that differ", "steps", "state", "measured", "before", "after", "time"]]
    for row in rows:
        minutes, seconds = divmod(round(row["seconds"]), 60)
        lines.append(
            [
                row["name"],
                flags_text(row, differing),
                f"{row['steps']}/{row['flags']['steps']}",
                row["state"],
                row["measured"],
                interval_text(row["before"]),
                interval_text(row["after"]),
                f"{minutes}:{seconds:02}",
            ]
        )
    columns = [column for column in zip(*lines) if any(column[1:])]
    return align([*zip(*columns)])


def basis(row) -> list:
    """What rows must have in common to be compared."""
    names = ("task", "data_dir", "problems", "eval_problems", "reward", "true_reward")
    return [row["measured"], *(row["flags"].get(name) for name in names)]


def verdict(first, *others) -> str:
    """Whether the best row is better than each of the others by more than noise."""
    lines = []
    for row in others:
        found = unpaired_difference(row["after"], first["after"])
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([f"    {row['name']}", difference, found["verdict"]])
    text = f"{first['name']} against the others:\n{align(lines)}"
    if any(len(row["folders"]) == 1 for row in (first, *others)):
        text += f"\n{ONE_SEED}"
    return text


def write_csv(rows, differing) -> None:
    writer = csv.writer(sys.stdout)
    ends = [f"{when}{end}" for when in ("before", "after") for end in ("", "_low", "_high")]
    writer.writerow(["run", *differing, "steps", "state", "measured", *ends, "seconds"])
    for row in rows:
        numbers = []
        for when in ("before", "after"):
            found = row[when]
            numbers += [found["mean"], *found["interval"]] if found else [""] * 3
        flags = [row["flags"].get(name, "") for name in differing]
        known = [row["steps"], row["state"], row["measured"]]
        writer.writerow([row["name"], *flags, *known, *numbers, round(row["seconds"], 1)])


if __name__ == "__main__":
    run_script(main, Config, __doc__, runs={"nargs": "*", "help": "folders; default: all in runs"})
