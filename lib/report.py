"""Results of evaluations as text for the screen."""

import json

from lib.flags import align, shorten


def results_table(results):
    """{name: result of eval.beside_greedy} -> a column per model, a line per number."""
    columns = {name: number_texts(result) for name, result in results.items()}
    lines = [["", *columns]]
    for title in next(iter(columns.values())):
        lines.append([title, *(column[title] for column in columns.values())])
    return align(lines)


def number_texts(numbers, prefix=""):
    """{"finished": 0.9, "pass_at": {2: {"mean": 0.5, "interval": (0.4, 0.6)}}}
    -> {"finished": "0.900", "pass@2": "0.500 [0.400, 0.600]"}"""
    texts = {}
    for key, value in numbers.items():
        title = f"{prefix}{key}".replace("_at ", "@")
        if isinstance(value, float):
            texts[title] = f"{value:.3f}"
        elif isinstance(value, dict) and "interval" in value:
            low, high = value["interval"]
            texts[title] = f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]"
        elif isinstance(value, dict):
            texts |= number_texts(value, f"{key} ")
    return texts


def comparison_text(pair):
    """{"before": name, "after": name, "measured": "accuracy", "greedy": a comparison from
    lib/stats.py, "sampled": another}"""
    lines = [f"{pair['after']} against {pair['before']}, {pair['measured']} on the same problems:"]
    for kind in ("greedy", "sampled"):
        found = pair[kind]
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        counts = f"{found['gained']} problems better, {found['lost']} worse"
        lines.append(f"    {kind:7}  {difference}  {found['verdict']} ({counts})")
    return "\n".join(lines)


def before_and_after(folder, name, problems):
    """A run's before.json and after.json as a table, and three held-out prompts in full."""
    results = {}
    for when in ("before", "after"):
        file = folder / f"{when}.json"
        if not file.exists():  # a run that was resumed with evaluation, and started without
            return ""
        results[when] = json.loads(file.read_text())
    title = f"{len(problems)} held-out problems of task {name}, 95 % intervals"
    lines = [title, "", results_table(results)]
    for i, problem in enumerate(problems[:3]):
        lines += ["", shorten(problem.prompt)]
        for when, result in results.items():
            lines.append(f"  {when}: {shorten(result['responses'][i])}")
    return "\n".join(lines)
