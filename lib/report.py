"""Results of evaluations as text for the screen."""

import json
from textwrap import indent

from lib.flags import align, shorten
from lib.stats import compare_values, mean_interval, right_or_wrong, wilson

KINDS = "greedy", "sampled"


def describe_run(config, policy, task, measured, ends) -> str:
    """What a run is about to do, in four lines.

    measured: name -> text of the reward, as {"accuracy": "exact"}
    ends:     the tokens that end a response, as text
    """
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad) / 1e6
    size = f"{policy.num_parameters() / 1e6:,.2f} M parameters, {trained:,.2f} M of them trained"
    dtype = str(policy.dtype).removeprefix("torch.")
    held_out = min(config.eval_problems, len(task.validation))
    evaluated = " and ".join(f"{name} by {text}" for name, text in measured.items())
    guess = f" ({task.rule_guess}; --reward takes another)" if task.rule_guess else ""
    few = ""
    if 0 < held_out < 50:
        low, high = wilson(held_out / 2, held_out)
        few = (
            f"note       {held_out} held-out problems tell little: a share of 0.5 has the "
            f"interval [{low:.2f}, {high:.2f}]\n"
        )
    return f"""\
model      {config.model}: {size}, {dtype} on {policy.device.type}, --lr {config.lr:g}
problems   {task.name}: {len(task.train)} to train on, {held_out} held out to evaluate on, \
{len(task.test)} for eval.py
{few}reward     {config.reward or task.reward + guess}; evaluations measure {evaluated}
responses  {config.prompts_per_step} prompts x {config.group_size} of at most \
{config.max_new_tokens} tokens per step, ended by {" or ".join(map(repr, ends))}
"""


def results_table(results):
    """{name: result of eval.beside_greedy} -> a column per model, a line per number."""
    columns = {name: number_texts(result) for name, result in results.items()}
    if not any(result.get("thinking") for result in results.values()):
        for column in columns.values():  # a task without thinking
            column.pop("thinking", None)
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
            texts[title] = interval_text(value)
        elif isinstance(value, dict):
            texts |= number_texts(value, f"{key} ")
    return texts


def interval_text(found):
    """{"mean": 0.5, "interval": (0.4, 0.6)} -> '0.500 [0.400, 0.600]';  None -> ''"""
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['mean']:.3f} [{low:.3f}, {high:.3f}]"


def comparison_text(pair):
    """{"before": name, "after": name, "measured": "accuracy", "greedy": a comparison from
    lib/stats.py, "sampled": another}"""
    lines = [f"{pair['after']} against {pair['before']}, {pair['measured']} on the same problems:"]
    for kind in KINDS:
        found = pair[kind]
        low, high = found["interval"]
        difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        counts = f"{found['gained']} problems better, {found['lost']} worse"
        lines.append(f"    {kind:7}  {difference}  {found['verdict']} ({counts})")
    return "\n".join(lines)


def read_results(folder) -> dict:
    """{"before": result, "after": result} of a run, or {} where one of them is not there: the run
    was resumed with evaluation and started without, or has not ended yet."""
    results = {}
    for when in ("before", "after"):
        file = folder / f"{when}.json"
        if not file.exists():
            return {}
        results[when] = json.loads(file.read_text())
    for name in measures_of(results["after"]):
        numbers = [result[name][kind] for result in results.values() for kind in KINDS]
        # by the values before and after together: the intervals are of one kind
        proportion = right_or_wrong(value for number in numbers for value in number["values"])
        for number in numbers:
            number |= mean_interval(number["values"], proportion)
    return results


def measures_of(result) -> list[str]:
    """{"accuracy": {"greedy": ..., "sampled": ...}, "finished": 1.0} -> ["accuracy"]"""
    return [name for name, value in result.items() if isinstance(value, dict)]


def before_and_after(folder, name, problems):
    """What a run has changed: a table, whether the difference is more than noise, and the responses
    to three held-out prompts."""
    results = read_results(folder)
    if not results:
        return ""
    title = f"{len(problems)} held-out problems of task {name}, 95 % intervals"
    lines = [title, "", results_table(results)]
    first, *_ = measures_of(results["after"])
    pair = {"before": "before", "after": "after", "measured": first}
    for kind in KINDS:
        before, after = (results[when][first][kind]["values"] for when in ("before", "after"))
        pair[kind] = compare_values(before, after)
    lines += ["", comparison_text(pair)]
    for i, problem in enumerate(problems[:3]):
        lines += ["", shorten(last_message(problem.prompt))]
        for when, result in results.items():
            lines.append(f"  {when}: {shorten(result['responses'][i])}")
    return "\n".join(lines)


def last_message(prompt) -> str:
    """A prompt, or of a conversation the last message by the user."""
    if isinstance(prompt, str):
        return prompt
    messages = [message["content"] for message in prompt if message["role"] == "user"]
    return messages[-1] if messages else prompt[-1]["content"]


def model_card(folder, config, step) -> str:
    """The README.md of a checkpoint, for those who find it on the Hugging Face hub.

    config: the flags of the run, {"model": ...}
    """
    auto, package = "AutoModelForCausalLM", "transformers"
    if config["lora_rank"]:
        auto, package = "AutoPeftModelForCausalLM", "peft"
    results = read_results(folder)
    table = ""
    if results:
        held_out = "On held-out problems before and after, with 95 % intervals:"
        table = f"\n{held_out}\n\n{indent(results_table(results), '    ')}\n"
    return f"""\
---
library_name: {package}
tags: [grpo]
---
# {folder.name}

{config["model"]}, trained by GRPO: {step} steps of {config["prompts_per_step"]} prompts x \
{config["group_size"]} responses of at most {config["max_new_tokens"]} tokens, \
on the task `{config["task"]}` with the reward `{config["reward"] or "of the task"}`.
{table}
```python
from {package} import {auto}

model = {auto}.from_pretrained("this folder")
```
"""
