"""Pictures: the curves of one run or of several, and what an evaluation found."""

import gc
import json
import math
from itertools import chain
from statistics import fmean

from lib.files import read_rows, whole

CURVES = {  # metric -> title of its panel
    "reward": "reward (mean of the step's responses)",
    "true_reward": "true reward (mean of the step's responses)",
    "eval_mean_reward": "mean reward on held-out problems, sampled",
    "eval_accuracy": "accuracy on held-out problems, sampled",
    "thinking": "share of responses that think",
    "finished": "share of responses that end by themselves",
    "response_length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "kl": "KL from the starting policy (nats per token)",
    "grad_norm": "gradient norm before clipping",
}
PANELS = {  # of the sampled responses -> title of its panel
    "by_difficulty": "by difficulty, sampled",
    "pass_at": "pass@k, sampled",
    "maj_at": "maj@k, sampled",
}
SHARES = ("eval_accuracy", "thinking", "finished")  # always from 0 to 1
POINTS = 500  # of a curve: a long run is thinned to about as many
LEGEND = {"loc": "outside lower center", "ncols": 4, "fontsize": 9}


def read_metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl. What was measured before training comes first, as step 0."""
    plotted = {"step", *CURVES}

    def is_plotted(key):
        return key in plotted or key.startswith(("reward/", "eval_"))

    rows = read_rows(folder / "metrics.jsonl", is_plotted)
    if not (folder / "before.json").exists():
        return rows
    first = {"step": 0}
    before = json.loads((folder / "before.json").read_text())
    for name in ("mean_reward", "accuracy"):
        if name in before:
            first[f"eval_{name}"] = before[name]["sampled"]["mean"]
            first[f"eval_{name}_interval"] = before[name]["sampled"]["interval"]
    return [first, *rows]


def curve(rows, metric):
    """{step: value}, of the rows that have the metric"""
    return {row["step"]: row[metric] for row in rows if metric in row}


def smooth(values):
    """The mean of each value, the three before and the three after it.

    [0, 0, 0, 7, 0, 0, 0] -> 1.75, 1.4 ...
    """
    return [fmean(values[max(0, i - 3) : i + 4]) for i in range(len(values))]


def varies(runs, metric):
    """Whether a metric changes by more than 1 % in the runs (lists of rows)."""
    values = [value for rows in runs for value in curve(rows, metric).values()] or [0]
    return max(values) - min(values) > 0.01 * max(map(abs, values))


def plot_run(folder):
    """Draws curves.png of a run."""
    plot_runs({folder.name: [folder]}, folder / "curves.png")


def plot_runs(runs, path):
    """Draws several runs in one picture, a color per name. What does not vary is left out.

    runs: name -> folders; of several the mean is drawn, and a band from the lowest to the highest
    """
    groups = {name: list(map(read_metrics, folders)) for name, folders in runs.items()}
    everything = list(chain(*groups.values()))
    parts = {key for rows in everything for key in rows[-1] if key.startswith("reward/")}
    if len(parts) == 1:
        parts = set()  # it is the reward
    titles = CURVES | {part: f"part of the reward: {part[7:]}" for part in sorted(parts)}
    shown = [metric for metric in titles if metric == "reward" or varies(everything, metric)]
    if all(curve(rows, "true_reward") == curve(rows, "reward") for rows in everything):
        shown = [metric for metric in shown if metric != "true_reward"]
    lines = math.ceil(len(shown) / 4)
    columns = math.ceil(len(shown) / lines)
    figure = new_figure(3.7 * columns, 2.75 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for metric, panel in zip(shown, panels):
        panel.set_title(titles[metric], fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(alpha=0.3)
        for i, (name, group) in enumerate(groups.items()):
            plot_group(panel, group, metric, color=f"C{i}", label=name)
        if metric in SHARES:
            panel.set_ylim(-0.03, 1.03)
    figure.legend(*panels[0].get_legend_handles_labels(), **LEGEND)
    save(figure, path)


def plot_group(panel, group, metric, color, label):
    """One curve: the mean of the runs of a group, smoothed over seven steps, and a band from the
    lowest to the highest. For a single run each step thin, and evaluations with their interval."""
    curves = [curve(rows, metric) for rows in group]
    steps = sorted(set.intersection(*map(set, curves)))  # steps that every run has
    columns = [[found[step] for found in curves] for step in steps]
    mean, low, high = ([f(column) for column in columns] for f in (fmean, min, max))
    thinned = slice(None, None, 1 + len(steps) // POINTS)
    if not metric.startswith("eval_"):
        if len(group) == 1:
            panel.plot(steps[thinned], mean[thinned], color=color, alpha=0.35, linewidth=1)
        mean, low, high = map(smooth, (mean, low, high))
    elif len(group) == 1 and steps:
        low, high = zip(*curve(group[0], f"{metric}_interval").values())
    steps, mean, low, high = (values[thinned] for values in (steps, mean, low, high))
    panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(steps, mean, "o-", color=color, markersize=2, label=label)


def plot_evaluation(results, path):
    """Draws what eval.py found for each model, with 95 % intervals.

    Left: what is measured first, greedy and sampled. Then a panel for each of PANELS that the
    results have.
    """
    first = next(iter(results.values()))
    measured = "mean_reward" if "mean_reward" in first else "accuracy"
    titles = {measured: measured.replace("_", " ")}
    titles |= {key: title for key, title in PANELS.items() if key in first}
    figure = new_figure(5 * len(titles), 4)
    panels = figure.subplots(1, len(titles), sharey=measured == "accuracy", squeeze=False)[0]
    for (key, title), panel in zip(titles.items(), panels):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("k" if key in ("pass_at", "maj_at") else "")
        panel.grid(alpha=0.3)
        if measured == "accuracy":
            panel.set_ylim(-0.03, 1.03)
        for i, (name, found) in enumerate(results.items()):
            shift = 0.4 * ((i + 0.5) / len(results) - 0.5)  # models side by side over a label
            label = name if key == measured else None
            plot_points(panel, found[key], shift, f"C{i}", label)
    figure.legend(**LEGEND)
    save(figure, path)


def plot_points(panel, found, shift, color, label):
    """A point with its interval over each key: {"sampled": {"mean", "interval"}}"""
    for i, each in enumerate(found.values()):
        panel.vlines(i + shift, *each["interval"], color=color)
    x = [i + shift for i in range(len(found))]
    heights = [each["mean"] for each in found.values()]
    panel.plot(x, heights, "o", color=color, markersize=4, label=label)
    panel.set_xticks(range(len(x)), list(found))


def new_figure(width, height):
    from matplotlib.figure import Figure  # here: --help and a typo do not wait for it

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Whole or not at all, because somebody may be looking at the picture."""
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    gc.collect()  # a figure is a reference cycle: a long run would grow with each
