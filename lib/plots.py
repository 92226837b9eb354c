"""Pictures: the curves of one run or of several, and what an evaluation found."""

import gc
import json
import math
from bisect import bisect
from itertools import chain
from statistics import fmean

from lib.files import read_rows, whole

CURVES = {  # metric -> title of its panel
    "reward": "reward (mean of the step's responses)",
    "true_reward": "true reward (mean of the step's responses)",
    "eval_mean_reward": "mean reward on held-out problems, sampled",
    "eval_accuracy": "accuracy on held-out problems, sampled",
    "informative": "share of groups with different rewards",
    "thinking": "share of responses that think",
    "response_length": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "kl": "KL from the starting policy (nats per token)",
    "clip_share": "share of tokens that the loss clips",
    "grad_norm": "gradient norm",
}
BESIDE = {"all_wrong", "all_right", "finished"}  # metrics that are drawn in a panel of CURVES
SHARES = {"eval_accuracy", "informative", "thinking"}  # always from 0 to 1
REWARDS = {"reward", "true_reward", "eval_mean_reward"}  # from 0 to 1 if they are within
PANELS = {  # of the sampled responses -> title of its panel
    "by_difficulty": "by difficulty, sampled",
    "pass_at": "pass@k, sampled",
    "maj_at": "maj@k, sampled",
}
POINTS = 500  # of a curve: a long run is thinned to about as many
LEGEND = {"loc": "outside lower center", "ncols": 4, "fontsize": 9, "title_fontsize": 9}
ONE_EACH = "thin: each step. Thick: mean of up to seven steps. Band: 95 % interval"
SEVERAL = "mean of the runs, smoothed. Band: from the lowest to the highest run"
MIXED = f"{SEVERAL}, or of one run the 95 % interval"
DASHES = "-", "--", "-.", ":"  # so that curves that coincide can be told apart


def read_metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl, with the number of "responses" sampled so far. What was measured
    before training comes first, as step 0."""
    plotted = {"step", "prompts_seen", *CURVES, *BESIDE}

    def is_plotted(key):
        return key in plotted or key.startswith(("reward/", "eval_"))

    rows = read_rows(folder / "metrics.jsonl", is_plotted)
    group_size = read_flag(folder, "group_size") or 1
    for row in rows:
        row["responses"] = row.pop("prompts_seen", row["step"]) * group_size
    if not (folder / "before.json").exists():
        return rows
    first = {"step": 0, "responses": 0}
    before = json.loads((folder / "before.json").read_text())
    for name in ("mean_reward", "accuracy"):
        if name in before:
            first[f"eval_{name}"] = before[name]["sampled"]["mean"]
            first[f"eval_{name}_interval"] = before[name]["sampled"]["interval"]
    return [first, *rows]


def read_flag(folder, name):
    """A flag of a run, or None."""
    path = folder / "config.json"
    return json.loads(path.read_text())["config"].get(name) if path.exists() else None


def curve(rows, metric, x="step"):
    """{step: value}, of the rows that have the metric"""
    return {row[x]: row[metric] for row in rows if metric in row}


def smooth(values):
    """The mean of each value and its neighbours: in a run of 30 steps or more the three before and
    the three after it, in a shorter one fewer."""
    reach = min(3, len(values) // 10)
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def value_at(found, x):
    """A curve {1: 0.2, 3: 0.4} at x = 2 -> 0.3: in a straight line between its points."""
    points = sorted(found)
    i = bisect(points, x)
    if points[i - 1] == x:
        return found[x]
    left, right = points[i - 1], points[i]
    return found[left] + (found[right] - found[left]) * (x - left) / (right - left)


def varies(runs, metric):
    """Whether a metric changes by more than 1 % in the runs (lists of rows)."""
    values = [value for rows in runs for value in curve(rows, metric).values()] or [0]
    return max(values) - min(values) > 0.01 * max(map(abs, values))


def plot_run(folder):
    """Draws curves.png of a run."""
    plot_runs({folder.name: [folder]}, folder / "curves.png")


def plot_runs(runs, path, x="step"):
    """Draws several runs in one picture, a color per name. What does not vary is left out.

    runs: name -> folders; of several the mean is drawn, and a band from the lowest to the highest
    x:    "step" or "responses"
    """
    groups = {name: list(map(read_metrics, folders)) for name, folders in runs.items()}
    everything = list(chain(*groups.values()))
    parts = set()
    for rows in everything:
        its_parts = [key for key in rows[-1] if key.startswith("reward/")]
        parts.update(its_parts if len(its_parts) > 1 else [])  # a single one is the reward
    titles = CURVES | {part: f"part of the reward: {part[7:]}" for part in sorted(parts)}
    single = everything[0] if len(everything) == 1 else None
    # what explains a run that stands still is drawn, though it does not vary
    always = {"reward", "eval_accuracy"} | ({"informative"} if single else set())
    always = {metric for metric in always if any(curve(rows, metric) for rows in everything)}
    shown = [metric for metric in titles if metric in always or varies(everything, metric)]
    same = all(curve(rows, "true_reward") == curve(rows, "reward") for rows in everything)
    if "true_reward" in shown and (same or single):  # of a single run it is in the first panel
        shown.remove("true_reward")
    lines = math.ceil(len(shown) / 4)
    columns = math.ceil(len(shown) / lines)
    figure = new_figure(3.7 * columns, 2.75 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for metric, panel in zip(shown, panels):
        panel.set_title(titles[metric], fontsize=10)
        panel.set_xlabel({"step": "step", "responses": "responses sampled"}[x], fontsize=9)
        panel.grid(alpha=0.3)
        if metric == "informative" and single and "all_wrong" in single[-1]:
            plot_outcomes(panel, single, x)
            continue
        for i, (name, group) in enumerate(groups.items()):
            plot_group(panel, group, metric, f"C{i}", name, DASHES[i % 4], x)
        if metric in SHARES or (metric in REWARDS and all_within(everything, metric)):
            panel.set_ylim(-0.03, 1.03)
        if single and metric == "reward" and not same:
            plot_right_axis(panel, curve(single, "true_reward", x), "true reward", "C1")
        if single and metric == "response_length":
            truncated = {at: 1 - share for at, share in curve(single, "finished", x).items()}
            if max(truncated.values(), default=0) > 0.01:
                plot_right_axis(panel, truncated, "share truncated", "C3")
        [folder, *_] = next(iter(runs.values()))
        if single and metric == "grad_norm":
            plot_clipped(panel, curve(single, metric, x), read_flag(folder, "max_grad_norm"))
    handles = panels[0].get_legend_handles_labels()
    several = [len(group) > 1 for group in groups.values()]
    explained = MIXED if any(several) else ONE_EACH
    if all(several):
        explained = SEVERAL
    legend = LEGEND | ({"ncols": 1} if max(map(len, groups)) > 40 else {})
    figure.legend(*handles, title=explained, **legend)
    save(figure, path)


def all_within(runs, metric):
    values = [value for rows in runs for value in curve(rows, metric).values()]
    return min(values) >= 0 and max(values) <= 1


def plot_group(panel, group, metric, color, label, dashes, x):
    """One curve: the mean of the runs of a group, smoothed, and a band from the lowest to the
    highest. For a single run each step thin, and evaluations with their interval."""
    curves = [found for rows in group if (found := curve(rows, metric, x))]
    if not curves:
        return
    first, last = max(map(min, curves)), min(map(max, curves))  # where every run has values
    places = [at for at in sorted(set(chain(*curves))) if first <= at <= last]
    columns = [[value_at(found, at) for found in curves] for at in places]
    mean, low, high = ([f(column) for column in columns] for f in (fmean, min, max))
    thinned = slice(None, None, 1 + len(places) // POINTS)
    if not metric.startswith("eval_"):
        if len(group) == 1:
            panel.plot(places[thinned], mean[thinned], color=color, alpha=0.35, linewidth=1)
        mean, low, high = map(smooth, (mean, low, high))
    elif len(group) == 1:
        low, high = zip(*curve(group[0], f"{metric}_interval", x).values())
    places, mean, low, high = (values[thinned] for values in (places, mean, low, high))
    panel.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
    marker = "o" if metric.startswith("eval_") or len(places) == 1 else ""
    panel.plot(
        places, mean, dashes, marker=marker, color=color, linewidth=2, markersize=3, label=label
    )


def plot_outcomes(panel, rows, x):
    """The shares of groups that are all wrong, mixed and all right, stacked."""
    wrong, right = curve(rows, "all_wrong", x), curve(rows, "all_right", x)
    wrong_shares, right_shares = smooth([*wrong.values()]), smooth([*right.values()])
    mixed = [1 - a - b for a, b in zip(wrong_shares, right_shares)]
    thinned = slice(None, None, 1 + len(wrong) // POINTS)
    layers = [values[thinned] for values in (wrong_shares, mixed, right_shares)]
    labels = ["all wrong", "mixed", "all right"]
    panel.set_title("groups by their responses", fontsize=10)
    panel.stackplot([*wrong][thinned], layers, labels=labels, colors=["C3", "C7", "C2"], alpha=0.6)
    panel.set_ylim(0, 1)
    panel.legend(fontsize=8, loc="lower left")


def plot_right_axis(panel, found, label, color):
    """A second quantity of a panel, dashed, with an axis of its own."""
    axis = panel.twinx()
    axis.plot([*found], smooth([*found.values()]), "--", color=color, linewidth=1.5)
    axis.set_ylabel(label, color=color, fontsize=9)
    axis.tick_params(axis="y", colors=color)
    if min(found.values()) >= 0 and max(found.values()) <= 1:
        axis.set_ylim(-0.03, 1.03)


def plot_clipped(panel, found, most):
    """What --max_grad_norm takes from the gradient."""
    above = [max(value, most or math.inf) for value in found.values()]
    if not most or max(above) == most:
        return
    panel.axhline(most, color="C3", linewidth=1, linestyle="--")
    panel.fill_between(
        [*found], most, above, color="C3", alpha=0.3, linewidth=0, label="scaled down"
    )
    panel.legend(handles=panel.get_legend_handles_labels()[0][-1:], fontsize=8)


def plot_evaluation(results, path):
    """Draws what eval.py found for each model, with 95 % intervals.

    Left: what is measured first, greedy and sampled. Then a panel for each of PANELS that the
    results have: over k lines, else bars.
    """
    first = next(iter(results.values()))
    measured = "mean_reward" if "mean_reward" in first else "accuracy"
    titles = {measured: measured.replace("_", " ")}
    titles |= {key: title for key, title in PANELS.items() if key in first}
    figure = new_figure(4.5 * len(titles), 4)
    panels = figure.subplots(1, len(titles), sharey=measured == "accuracy", squeeze=False)[0]
    for (key, title), panel in zip(titles.items(), panels):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if measured == "accuracy":
            panel.set_ylim(0, 1.03)
        over_k = key in ("pass_at", "maj_at") and len(first[key]) > 2
        if over_k:
            panel.set_xlabel("k")
            panel.set_xscale("log", base=2)
            panel.set_xticks([*map(int, first[key])], [*first[key]])
        for i, (name, found) in enumerate(results.items()):
            if over_k:
                plot_over_k(panel, found[key], f"C{i}", DASHES[i % 4])
            else:
                width = 0.8 / len(results)  # models side by side over a label
                plot_bars(panel, found[key], (i + 0.5) * width - 0.4, width, f"C{i}", name)
    figure.legend(*panels[0].get_legend_handles_labels(), title="95 % intervals", **LEGEND)
    save(figure, path)


def plot_over_k(panel, found, color, dashes):
    """{1: {"mean", "interval"}, 2: ...} -> a line with a band"""
    k = [*map(int, found)]
    low, high = zip(*(each["interval"] for each in found.values()))
    panel.fill_between(k, low, high, color=color, alpha=0.2, linewidth=0)
    means = [each["mean"] for each in found.values()]
    panel.plot(k, means, dashes, marker="o", color=color, markersize=4)


def plot_bars(panel, found, shift, width, color, label):
    """A bar with its interval over each key: {"sampled": {"mean", "interval"}}"""
    x = [i + shift for i in range(len(found))]
    means = [each["mean"] for each in found.values()]
    panel.bar(x, means, width, color=color, alpha=0.6, label=label)
    for at, each in zip(x, found.values()):
        panel.vlines(at, *each["interval"], color="black", linewidth=1)
    panel.set_xticks(range(len(found)), list(found))


def new_figure(width, height):
    from matplotlib.figure import Figure  # here: --help and a typo do not wait for it

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Whole or not at all, because somebody may be looking at the picture."""
    with whole(path) as aside:
        figure.savefig(aside, dpi=110)
    gc.collect()  # a figure is a reference cycle: a long run would grow with each
