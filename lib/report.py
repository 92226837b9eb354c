"""Results of evaluations as text for the screen."""

import json

from lib.flags import align, shorten


def results_table(results):
    """{name: {"greedy": evaluation, "sampled": evaluation}} -> a column per model: both accuracies,
    and below them all other numbers of the sampled responses."""
    columns = {}
    for name, result in results.items():
        columns[name] = number_texts({**result, **result["sampled"]})
        del columns[name]["accuracy"]  # stands in the line "sampled"
    lines = [["", *columns]]
    for title in columns[name]:
        lines.append([title, *(column[title] for column in columns.values())])
    return align(lines)


def number_texts(numbers, prefix=""):
    """{"reward": 0.9, "pass_at": {2: {"accuracy": 0.5, "interval": (0.4, 0.6)}}}
    -> {"reward": "0.900", "pass@2": "0.500 [0.400, 0.600]"}"""
    texts = {}
    for key, value in numbers.items():
        title = f"{prefix}{key}".replace("_at ", "@")
        if isinstance(value, float):
            texts[title] = f"{value:.3f}"
        elif isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            texts[title] = f"{value['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        elif isinstance(value, dict):
            texts |= number_texts(value, f"{key} ")
    return texts


def comparison_text(pair):
    """A comparison of two models (lib/stats.py), with their names as "before" and "after"."""
    lines = [f"{pair['after']} against {pair['before']}, on the same problems:"]
    for kind in ("greedy", "sampled"):
        found = pair[kind]
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"    {kind:7}  {difference}  {found['verdict']}")
    counts = "{gained} problems gained, {lost} lost; exact McNemar test: p = {p:.2g}"
    lines.append(f"    greedy:  {counts.format(**pair['greedy'])}")
    return "\n".join(lines)


def before_and_after(folder, name, problems):
    """A run's before.json and after.json as a table, and three held-out prompts in full."""
    results = {}
    for when in ("before", "after"):
        file = folder / f"{when}.json"
        if not file.exists():  # a run that was resumed with evaluation, and started without
            return ""
        results[when] = json.loads(file.read_text())
    title = f"{len(problems)} held-out problems of task {name}, 95 % Wilson intervals"
    lines = [title, "", results_table(results)]
    for i, problem in enumerate(problems[:3]):
        lines += ["", shorten(problem.prompt)]
        for when, result in results.items():
            lines.append(f"  {when}: {shorten(result['sampled']['responses'][i])}")
    return "\n".join(lines)
