"""Pictures: the curves of runs, drawn from what they left on disk, and what eval.py found.

    python plot.py runs/add runs/add-2          # curves of several runs in one picture, compare.png
    python plot.py runs/recipes/*               # runs that differ in their seed alone become a mean and a band
    python plot.py --list                       # what runs there are, and how far they came

`plot` draws the curves.png of one run, while it trains.
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from flags import UserError, run_script
from track import align, is_run, read_config, read_rows

CURVES = {  # metric -> title of its panel
    "reward": "reward (mean of the step's responses)",
    "eval_accuracy": "accuracy on held-out problems, sampled",
    "thinking": "share of responses that think",
    "response_length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "grad_norm": "gradient norm before clipping",
}


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, and before them, as step 0, the held-out accuracy that the run set out from."""
    drawn = {"step", "true_reward", "eval_interval", *CURVES}
    rows = read_rows(folder / "metrics.jsonl", lambda key: key in drawn or key.startswith("reward/"))
    if (folder / "before.json").exists():
        before = json.loads((folder / "before.json").read_text())["sampled"]
        rows.insert(0, {"step": 0, "eval_accuracy": before["accuracy"], "eval_interval": before["interval"]})
    return rows


def smooth(values: list[float]) -> list[float]:
    """Each value's mean with the three before and the three behind it: [0, 0, 0, 7, 0, 0, 0] -> 1.75, 1.4 ..."""
    windows = [values[max(0, i - 3) : i + 4] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(panel, steps: list[int], values: list[float], color: str) -> None:
    """Each step thin, the mean of the steps around it thick; of a long run some 500 steps, for which there is room."""
    every = slice(None, None, 1 + len(steps) // 500)
    panel.plot(steps[every], values[every], color=color, alpha=0.35, linewidth=1)
    panel.plot(steps[every], smooth(values)[every], color=color, linewidth=2)


def panels(figure: Figure, curves: dict[str, str]):
    """-> (metric, panel) of each curve, three in a row."""
    for (metric, title), panel in zip(curves.items(), figure.subplots(-(-len(curves) // 3), 3).flat):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.set_xlabel("step", fontsize=9)
        yield metric, panel


def plot(folder: Path) -> None:
    """Draws curves.png from metrics.jsonl. The parts of a mixture get panels of their own; a true reward other than the
    reward is drawn beside it."""
    rows = read_metrics(folder)
    parts = {key: f"part of the reward: {key[7:]}" for key in rows[-1] if key.startswith("reward/")}
    curves = CURVES | (parts if len(parts) > 1 else {})
    figure = Figure(figsize=(11, 2.75 * -(-len(curves) // 3)), layout="constrained")
    for metric, panel in panels(figure, curves):
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
    save(figure, folder / "curves.png")


def save(figure: Figure, path: Path) -> None:
    """Whole or not at all: somebody may be looking at the picture. UserError where it cannot be written."""
    aside = path.with_name(f"{path.stem}.part.png")
    try:
        figure.savefig(aside, dpi=110)
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    gc.collect()  # a figure refers to itself: a long run would grow with each


def families(runs: list[Path]) -> dict[str, list[Path]]:
    """Runs by family: those whose flags differ in nothing but --seed, --name, and a base model named after the seed.
    A family is called by the name of its first, without the number: add-0, add-1 -> 'add (2 seeds)'."""
    members = {}
    for run in runs:
        config = read_config(run)
        config["model"] = config["model"].removesuffix(f"-{config['seed']}")
        flags = {flag: value for flag, value in config.items() if flag not in ("seed", "name", "runs_dir", "resume")}
        members.setdefault(json.dumps(flags, sort_keys=True), []).append(run)
    named = {}
    for group in members.values():
        name = group[0].name
        if len(group) > 1:
            name = f"{name.rstrip('-_0123456789') or name} ({len(group)} seeds)"
        named[name if name not in named else f"{name}, {group[0]}"] = group
    return named


def mean_and_band(curves: list[dict[int, float]]) -> tuple[list, list, list, list]:
    """{step: value} of each run -> steps that all of them have, mean, lowest, highest."""
    steps = sorted(set.intersection(*map(set, curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    return steps, [sum(column) / len(column) for column in columns], list(map(min, columns)), list(map(max, columns))


def compare(runs: list[Path], path: Path) -> None:
    """Draws the curves of several runs over each other, a colour each; of a family the mean, and as a band the lowest
    and the highest of its runs. All but the held-out accuracy is smoothed over seven steps first."""
    groups = {name: [read_metrics(run) for run in group] for name, group in families(runs).items()}
    figure = Figure(figsize=(11, 6), layout="constrained")
    for metric, panel in panels(figure, CURVES):
        for number, (name, group) in enumerate(groups.items()):
            curves, marker = [], "o-" if metric == "eval_accuracy" else "-"
            for rows in group:
                shown = [row for row in rows if metric in row]
                values = [row[metric] for row in shown]
                curves.append(dict(zip((row["step"] for row in shown), values if "o" in marker else smooth(values))))
            steps, mean, low, high = mean_and_band(curves)
            panel.plot(steps, mean, marker, color=f"C{number % 10}", markersize=3, linewidth=1.5, label=name)
            panel.fill_between(steps, low, high, color=f"C{number % 10}", alpha=0.2, linewidth=0)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    save(figure, path)


def plot_evaluation(results: dict[str, dict], path: Path) -> None:
    """Draws what eval.py found of each model: pass@k (full) and maj@k (dashed), or the accuracy if there was one
    response to a problem; and the sampled accuracy by difficulty, where the task has it, all with 95 % intervals."""
    sampled = {name: kinds["sampled"] for name, kinds in results.items()}
    levels = list(next(iter(sampled.values())).get("by_difficulty", {}))
    figure = Figure(figsize=(11 if levels else 5.5, 4), layout="constrained")
    panels = figure.subplots(1, 1 + bool(levels), sharey=True, squeeze=False)[0]
    for number, (name, found) in enumerate(sampled.items()):
        color, aside = f"C{number % 10}", min(0.12, 0.6 / len(sampled)) * (number - (len(sampled) - 1) / 2)
        for key, style in (("pass_at", "-"), ("maj_at", "--")):
            if key in found:
                ks, values = list(found[key]), found[key].values()
                panels[0].plot(ks, [value["accuracy"] for value in values], f"o{style}", color=color, markersize=3)
                band = zip(*(value["interval"] for value in values))
                panels[0].fill_between(ks, *band, color=color, alpha=0.15, linewidth=0)
        if "pass_at" not in found:
            bars(panels[0], ["greedy", "sampled"], results[name].values(), aside, color)
        if levels:
            bars(panels[1], levels, found["by_difficulty"].values(), aside, color)
        panels[0].plot([], [], "o-", color=color, label=name)
    if "pass_at" in found:
        panels[0].set_xscale("log", base=2)
        panels[0].set_xticks(ks, ks)
    panels[0].set_title("pass@k (full) and maj@k (dashed)" if "pass_at" in found else "accuracy", fontsize=10)
    if levels:
        panels[1].set_title("accuracy by difficulty, sampled", fontsize=10)
    for panel in panels:
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save(figure, path)


def bars(panel, labels: list[str], values, aside: float, color: str) -> None:
    """A point with its interval over each label, a little to the side, so that models do not cover each other."""
    heights, x = [value["accuracy"] for value in values], [place + aside for place in range(len(labels))]
    low, high = zip(*(value["interval"] for value in values))
    panel.vlines(x, low, high, color=color)
    panel.plot(x, heights, "o", color=color, markersize=4)
    panel.set_xticks(range(len(labels)), labels)


def listing(parent: Path) -> str:
    """A line a run in the folder: its name, task, model and recipe, steps done, and the last reward and held-out
    accuracy."""
    lines = [["name", "task", "model", "recipe", "steps", "reward", "accuracy"]]
    for folder in sorted(filter(is_run, parent.glob("*"))):
        config, rows = read_config(folder), read_metrics(folder)
        last = {key: f"{row[key]:.3f}" for row in rows for key in ("reward", "eval_accuracy") if key in row}
        lines.append([folder.name, Path(config["task"]).stem, config["model"], config.get("recipe") or "-",
                      f"{rows[-1]['step'] if rows else 0}/{config['steps']}", last.get("reward", "-"),
                      last.get("eval_accuracy", "-")])
    return align(lines)


@dataclass(frozen=True)
class Config:
    output: str = HfArg(default="compare.png", help="picture to write")
    list: bool = HfArg(default=False, help="say what runs there are instead")
    runs_dir: str = HfArg(default="runs", help="of --list: the folder of the runs")


def main(config: Config, runs: list[str]) -> None:
    if config.list:
        print(listing(Path(config.runs_dir)))
        return
    if not runs:
        raise UserError("name the folders of the runs to draw, or --list those that there are")
    if Path(config.output).suffix != ".png":
        raise UserError(f"--output {config.output}: must end in .png")
    if unfinished := [run for run in runs if not read_rows(Path(run) / "metrics.jsonl")]:
        raise UserError(f"{unfinished[0]}: no run there, or not a step of it is done")
    compare([Path(run) for run in runs], Path(config.output))
    print(f"{config.output}: the curves of {', '.join(families([Path(run) for run in runs]))}")


if __name__ == "__main__":
    run_script(main, Config, __doc__, runs=dict(nargs="*", help="folders of runs"))
