"""Pictures: the curves of one run or of several, and what an evaluation found."""

import gc
import json
from collections.abc import Iterator
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.files import read_rows, writing

CURVES = {  # metric -> title of its panel
    "reward": "reward (mean of the step's responses)",
    "eval_accuracy": "accuracy on held-out problems, sampled",
    "thinking": "share of responses that think",
    "response_length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "grad_norm": "gradient norm before clipping",
}
SHARES = ("reward", "true_reward", "eval_accuracy", "thinking")  # from 0 to 1, as a rule
POINTS = 500  # of a curve: a long run is thinned to about as many


def read_metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl. The held-out accuracy before training comes first, as step 0."""
    plotted = {"step", "true_reward", "eval_interval", *CURVES}
    rows = read_rows(
        folder / "metrics.jsonl", lambda key: key in plotted or key.startswith("reward/")
    )
    if (folder / "before.json").exists():
        before = json.loads((folder / "before.json").read_text())["sampled"]
        first = {"eval_accuracy": before["accuracy"], "eval_interval": before["interval"]}
        rows.insert(0, {"step": 0, **first})
    return rows


def smooth(values) -> list[float]:
    """The mean of each value, the three before and the three after it.

    [0, 0, 0, 7, 0, 0, 0] -> 1.75, 1.4 ...
    """
    windows = [values[max(0, i - 3) : i + 4] for i in range(len(values))]
    return [fmean(window) for window in windows]


def curve(rows, metric) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the metric."""
    rows = [row for row in rows if metric in row]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def panels(figure, curves) -> Iterator[tuple[str, Axes]]:
    """The panel of each curve, with its title, three in a row."""
    lines = (len(curves) + 2) // 3
    for (metric, title), panel in zip(curves.items(), figure.subplots(lines, 3).flat):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(alpha=0.3)
        yield metric, panel


def fill_band(panel, x, intervals, color) -> None:
    """intervals: (low, high) at each x"""
    low = [interval[0] for interval in intervals]
    high = [interval[1] for interval in intervals]
    panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def plot_curve(panel, rows, metric, color) -> None:
    """Each step thin, the mean over seven steps thick. The held-out accuracy with its interval."""
    steps, values = curve(rows, metric)
    if metric == "eval_accuracy":
        fill_band(panel, steps, curve(rows, "eval_interval")[1], color)
        panel.plot(steps, values, "o-", color=color, markersize=4)
    else:
        thin = slice(None, None, 1 + len(steps) // POINTS)
        panel.plot(steps[thin], values[thin], color=color, alpha=0.35, linewidth=1)
        panel.plot(steps[thin], smooth(values)[thin], color=color, linewidth=2)
    if metric in SHARES and all(0 <= value <= 1 for value in values):
        panel.set_ylim(-0.03, 1.03)


def plot_run(folder) -> None:
    """Draws curves.png from metrics.jsonl.

    The parts of a mixture have panels of their own. A true reward that differs from the reward is
    drawn beside it, on an axis at the right.
    """
    rows = read_metrics(folder)
    curves = dict(CURVES)
    parts = [key for key in rows[-1] if key.startswith("reward/")]
    if len(parts) > 1:
        for part in parts:
            curves[part] = f"part of the reward: {part.removeprefix('reward/')}"
    figure = Figure(figsize=(11, 2.75 * ((len(curves) + 2) // 3)), layout="constrained")
    for metric, panel in panels(figure, curves):
        plot_curve(panel, rows, metric, "C0")
        if metric == "reward" and curve(rows, "reward") != curve(rows, "true_reward"):
            panel.set_title("reward (blue, left) and true reward (red, right)", fontsize=10)
            plot_curve(panel.twinx(), rows, "true_reward", "C3")
    figure.suptitle(folder.name, fontsize=11)
    save(figure, folder / "curves.png")


def save(figure, path) -> None:
    """Whole or not at all, because somebody may be looking at the picture."""
    aside = path.with_name(f"{path.stem}.part.png")
    with writing(path):
        figure.savefig(aside, dpi=110)
        aside.replace(path)
    gc.collect()  # a figure is a reference cycle: a long run would grow with each


def plot_runs(runs, path) -> None:
    """Draws several runs in one picture, a color per name.

    runs: name -> folders; of several the mean is drawn, and a band from the lowest to the highest
    All curves except the held-out accuracy are smoothed over seven steps.
    """
    rows = {name: [read_metrics(folder) for folder in folders] for name, folders in runs.items()}
    figure = Figure(figsize=(11, 6), layout="constrained")
    for metric, panel in panels(figure, CURVES):
        marker = "o-" if metric == "eval_accuracy" else "-"
        for number, (name, group) in enumerate(rows.items()):
            curves = []
            for run in group:
                steps, values = curve(run, metric)
                if metric != "eval_accuracy":
                    values = smooth(values)
                curves.append(dict(zip(steps, values)))
            color = f"C{number % 10}"
            steps, mean, band = mean_and_band(curves)
            panel.plot(steps, mean, marker, color=color, markersize=3, linewidth=1.5, label=name)
            fill_band(panel, steps, band, color)
    legend(figure, panel)
    save(figure, path)


def mean_and_band(curves) -> tuple[list, list, list]:
    """{step: value} of each run -> steps that all runs have, means, (lowest, highest) of each step

    {1: 0.2, 2: 0.4}, {1: 0.6} -> [1], [0.4], [(0.2, 0.6)]
    """
    steps = sorted(set.intersection(*map(set, curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    mean = [fmean(column) for column in columns]
    band = [(min(column), max(column)) for column in columns]
    return steps, mean, band


def legend(figure, panel) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)


def plot_evaluation(results, path) -> None:
    """Draws what eval.py found for each model, with 95 % intervals.

    Left: pass@k (full) and maj@k (dashed), or the accuracy if there was one response per problem.
    Right: the sampled accuracy by difficulty, if the task has it.
    """
    first = next(iter(results.values()))["sampled"]
    levels = list(first.get("by_difficulty", {}))
    width = 11 if levels else 5.5
    figure = Figure(figsize=(width, 4), layout="constrained")
    left, *right = figure.subplots(1, 2 if levels else 1, sharey=True, squeeze=False)[0]
    step = min(0.12, 0.6 / len(results))  # models side by side over a label
    for number, (name, kinds) in enumerate(results.items()):
        color = f"C{number % 10}"
        shift = step * (number - (len(results) - 1) / 2)
        sampled = kinds["sampled"]
        left.plot([], [], "o-", color=color, label=name)
        if "pass_at" in sampled:
            plot_at_k(left, sampled["pass_at"], "o-", color)
            plot_at_k(left, sampled["maj_at"], "o--", color)
        else:
            plot_points(left, kinds, shift, color)
        for panel in right:
            plot_points(panel, sampled["by_difficulty"], shift, color)
            panel.set_title("accuracy by difficulty, sampled", fontsize=10)
    left.set_title("accuracy", fontsize=10)
    if "pass_at" in first:
        ks = list(first["pass_at"])
        left.set_title("pass@k (full) and maj@k (dashed)", fontsize=10)
        left.set_xscale("log", base=2)
        left.set_xticks(ks, ks)
    for panel in (left, *right):
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    legend(figure, left)
    save(figure, path)


def plot_at_k(panel, accuracies, style, color) -> None:
    """accuracies: k -> {"accuracy", "interval"}"""
    ks = list(accuracies)
    heights = [value["accuracy"] for value in accuracies.values()]
    panel.plot(ks, heights, style, color=color, markersize=3)
    fill_band(panel, ks, [value["interval"] for value in accuracies.values()], color)


def plot_points(panel, accuracies, shift, color) -> None:
    """A point with its interval over each label, moved sideways so that models do not overlap."""
    panel.set_xticks(range(len(accuracies)), list(accuracies))
    for i, value in enumerate(accuracies.values()):
        panel.vlines(i + shift, *value["interval"], color=color)
        panel.plot(i + shift, value["accuracy"], "o", color=color, markersize=4)
