"""Pictures: the curves of one run or of several, and what an evaluation found."""

import gc
import json
from statistics import fmean

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
PANELS = {  # of the sampled responses -> title of its panel
    "by_difficulty": "accuracy by difficulty, sampled",
    "pass_at": "pass@k, sampled",
    "maj_at": "maj@k, sampled",
}
SHARES = ("reward", "true_reward", "eval_accuracy", "thinking")  # from 0 to 1, as a rule
LEGEND = {"loc": "outside lower center", "ncols": 4, "fontsize": 9}
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
        return [{"step": 0, **first}, *rows]
    return rows


def curve(rows, metric):
    """{step: value}, of the rows that have the metric"""
    return {row["step"]: row[metric] for row in rows if metric in row}


def smooth(values):
    """The mean of each value, the three before and the three after it.

    [0, 0, 0, 7, 0, 0, 0] -> 1.75, 1.4 ...
    """
    return [fmean(values[max(0, i - 3) : i + 4]) for i in range(len(values))]


def draw(panel, steps, values, low, high, color, **style):
    """A curve with points, and a band around it from `low` to `high`."""
    panel.plot(steps, values, "o-", color=color, **style)
    panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def make_panels(curves):
    """A figure, and the panel of each curve, with its title, three in a row."""
    lines = (len(curves) + 2) // 3
    figure = Figure(figsize=(11, 2.75 * lines), layout="constrained")
    panels = dict(zip(curves, figure.subplots(lines, 3).flat))
    for metric, panel in panels.items():
        panel.set_title(curves[metric], fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(alpha=0.3)
    return figure, panels


def plot_metric(panel, rows, metric, color):
    """Each step thin, the mean over seven steps thick. The held-out accuracy with its interval."""
    found = curve(rows, metric)
    steps = list(found)
    values = list(found.values())
    if metric != "eval_accuracy":
        every = 1 + len(steps) // POINTS
        panel.plot(steps[::every], values[::every], color=color, alpha=0.35, linewidth=1)
        panel.plot(steps[::every], smooth(values)[::every], color=color, linewidth=2)
    elif found:
        low, high = zip(*curve(rows, "eval_interval").values())
        draw(panel, steps, values, low, high, color, markersize=4)
    if metric in SHARES and all(0 <= value <= 1 for value in values):
        panel.set_ylim(-0.03, 1.03)


def plot_run(folder):
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
    figure, panels = make_panels(curves)
    for metric, panel in panels.items():
        plot_metric(panel, rows, metric, "C0")
    if curve(rows, "reward") != curve(rows, "true_reward"):
        panel = panels["reward"]
        panel.set_title("reward (blue, left) and true reward (red, right)", fontsize=10)
        plot_metric(panel.twinx(), rows, "true_reward", "C3")
    figure.suptitle(folder.name, fontsize=11)
    save(figure, folder / "curves.png")


def plot_runs(runs, path):
    """Draws several runs in one picture, a color per name.

    runs: name -> folders; of several the mean is drawn, and a band from the lowest to the highest
    All curves except the held-out accuracy are smoothed over seven steps.
    """
    groups = [list(map(read_metrics, folders)) for folders in runs.values()]
    figure, panels = make_panels(CURVES)
    for metric, panel in panels.items():
        for i, (name, group) in enumerate(zip(runs, groups)):
            curves = [curve(rows, metric) for rows in group]
            if metric != "eval_accuracy":
                curves = [dict(zip(found, smooth(list(found.values())))) for found in curves]
            steps = sorted(set.intersection(*map(set, curves)))  # steps that every run has
            columns = [[found[step] for found in curves] for step in steps]
            mean = list(map(fmean, columns))
            low = list(map(min, columns))
            high = list(map(max, columns))
            draw(panel, steps, mean, low, high, f"C{i}", markersize=1.5, label=name)
    figure.legend(handles=panel.lines, **LEGEND)
    save(figure, path)


def plot_evaluation(results, path):
    """Draws what eval.py found for each model, with 95 % intervals.

    Left: the accuracy, greedy and sampled. Then a panel for each of PANELS that the results have.
    """
    first = next(iter(results.values()))["sampled"]
    kinds = [kind for kind in PANELS if kind in first]
    columns = 1 + len(kinds)
    figure = Figure(figsize=(5 * columns, 4), layout="constrained")
    left, *others = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    left.set_title("accuracy", fontsize=10)
    for i, (name, found) in enumerate(results.items()):
        shift = 0.4 * ((i + 0.5) / len(results) - 0.5)  # models side by side over a label
        plot_points(left, found, shift, f"C{i}", name)
        for kind, panel in zip(kinds, others):
            panel.set_title(PANELS[kind], fontsize=10)
            plot_points(panel, found["sampled"][kind], shift, f"C{i}")
    figure.legend(**LEGEND)
    save(figure, path)


def plot_points(panel, accuracies, shift, color, label=None):
    """A point with its interval over each key: {"sampled": {"accuracy", "interval"}}"""
    for i, found in enumerate(accuracies.values()):
        panel.vlines(i + shift, *found["interval"], color=color)
    x = [i + shift for i in range(len(accuracies))]
    heights = [found["accuracy"] for found in accuracies.values()]
    panel.plot(x, heights, "o", color=color, markersize=4, label=label)
    panel.set_xticks(range(len(x)), list(accuracies))
    panel.set_ylim(-0.03, 1.03)
    panel.grid(alpha=0.3)


def save(figure, path):
    """Whole or not at all, because somebody may be looking at the picture."""
    aside = path.with_name(f"{path.stem}.part.png")
    with writing(path):
        figure.savefig(aside, dpi=110)
        aside.replace(path)
    gc.collect()  # a figure is a reference cycle: a long run would grow with each
