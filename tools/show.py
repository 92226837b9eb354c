"""Show the groups of a step as a person reads them: the prompt, then the responses from best to
worst, each with its reward and its weight. A weight above 0 made a response more likely.

    python -m tools.show runs/add                     # the newest step
    python -m tools.show runs/add --step 1            # the first
    python -m tools.show runs/add --html groups.html  # a page with a slider over all steps
    python -m tools.show runs/add --step 1 --tokens   # what the training changed, token by token

With --tokens a token is green where the checkpoint of the run finds it more likely than the model
that the run started from, and red where it finds it less likely. That is the change over the whole
run, not of the step: what a late step sampled is likely by then, so it is mostly green. --step 1
shows most.
"""

import json
import math
import os
import sys
import unicodedata
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import indent
from typing import Literal

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

from lib.files import read_rows, write_text
from lib.flags import UserError, check_range, flag, run_script
from lib.run import read_config
from lib.texts import opened_thought
from policy import DEVICES, load_policy, pick_device, stop_ids
from sample import policy_distribution, sampling_of
from tasks import NO_TASK, Problem, load_task, prompt_ids

STYLES = {"up": "32", "far up": "1;32", "down": "31", "far down": "1;31", "bold": "1", "dim": "2"}


@dataclass(frozen=True)
class Config:
    step: int = flag(0, "the step to show; 0: the newest, in a page all")
    html: str = flag("", "a page to write, such as groups.html, instead of text")
    tokens: bool = flag(False, "color tokens by how the training has changed their log-prob")
    device: Literal[DEVICES] = flag("auto", "where the two models of --tokens run")


def main(config, run) -> None:
    check_range(config, 0, "step")
    folder = Path(run)
    flags = read_config(folder)
    steps = read_steps(folder, config.step, newest_only=not config.html)
    prompt_text = prompt_reader(folder, flags)
    if config.tokens:
        add_changes(steps.values(), folder, flags, pick_device(config.device))
    if config.html:
        write_text(Path(config.html), page(folder, steps, prompt_text))
        print(f"{config.html}: the groups of {run}, to be opened in a browser")
        return
    paint = in_color if sys.stdout.isatty() and "NO_COLOR" not in os.environ else in_plain
    if config.tokens and paint is in_plain:
        print("(no colors: this is not a terminal, or NO_COLOR is set; --html has them)")
    for step, groups in steps.items():
        print(paint(f"step {step} of {folder}{summary(folder, step)}", "bold"))
        for group in groups:
            print("\n" + group_text(group, prompt_text, paint))


# ---------------------------------------------------------- what is shown


def read_steps(folder, step, newest_only) -> dict[int, list]:
    """{step: groups}. A group is a list of rows of samples.jsonl, the best reward first."""
    rows = read_rows(folder / "samples.jsonl")
    if not rows:
        raise UserError(f"{folder}: has no responses in samples.jsonl (yet, or --log_samples 0)")
    if "group" not in rows[0]:
        raise UserError(f"{folder}/samples.jsonl: is of an older version, without groups")
    first, newest = rows[0]["step"], rows[-1]["step"]
    if newest_only:
        step = step or newest
    groups = defaultdict(list)
    for row in rows:
        if step in (0, row["step"]):
            groups[row["step"], row["group"]].append(row)
    if not groups:
        raise UserError(f"--step {step}: {folder} has the steps {first} to {newest}")
    steps = defaultdict(list)
    for (number, _), group in groups.items():
        steps[number].append(sorted(group, key=lambda row: row["reward"], reverse=True))
    return steps


def summary(folder, step) -> str:
    """': mean reward 0.278, 97 % of the groups have different rewards'"""
    for row in read_rows(folder / "metrics.jsonl", {"step", "reward", "informative"}.__contains__):
        if row["step"] == step:
            share = f"{row['informative']:.0%} of the groups have different rewards"
            return f": mean reward {row['reward']:.3f}, {share}"
    return ""


def prompt_reader(folder, flags):
    """-> a function: a row of samples.jsonl -> the text of the prompt that the model got. Where the
    tokenizer or the task is not at hand, it is the prompt as the task has it."""
    tokenizer = None
    task = NO_TASK
    with suppress(OSError, ValueError, UserError):
        tokenizer = read_tokenizer(folder, flags)
        task = load_task(flags["task"], flags["data_dir"])

    def prompt_text(row):
        with suppress(UserError):
            if tokenizer:
                return tokenizer.decode(prompt_ids(task, problem_of(row), tokenizer))
        prompt = row["prompt"]
        return prompt if isinstance(prompt, str) else json.dumps(prompt, indent=1)

    return prompt_text


def problem_of(row) -> Problem:
    return Problem(row["prompt"], row["answer"], columns=row.get("columns", {}))


def read_tokenizer(folder, flags):
    for checkpoint in (folder / "checkpoint", Path(flags["model"], "checkpoint")):
        if checkpoint.is_dir():
            return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(flags["model"], trust_remote_code=False)


def remarks(group) -> list[str]:
    """What is worth knowing about a group, in sentences."""
    drawn = group[0]["drawn"]
    lines = ["Drawn evenly over all groups." if drawn else "The largest spread of rewards."]
    if len(group) < group[0]["group_size"]:
        lines[0] += f" {len(group)} of its {group[0]['group_size']} responses."
    if any(row["weight"] for row in group):
        return lines
    if len({row["reward"] for row in group}) == 1:
        lines.append("All rewards are equal, so all weights are 0: this group teaches nothing.")
    else:
        lines.append("All weights are 0, by --normaliser or --filter.")
    return lines


def printable(text) -> str:
    """Control characters, which could change the screen, as codes: escape -> \\u001b"""
    shown = []
    for character in text:
        control = unicodedata.category(character).startswith("C") and character not in "\n\t"
        shown.append(f"\\u{ord(character):04x}" if control else character)
    return "".join(shown)


# ---------------------------------------------------------- --tokens


@torch.no_grad()
def add_changes(steps, folder, flags, device) -> None:
    """Gives each row "changes": for each token its text and its log-prob under the model that the
    run started from and under its checkpoint."""
    if not (folder / "checkpoint").is_dir():
        raise UserError(f"--tokens: {folder} has no checkpoint yet")
    task = load_task(flags["task"], flags["data_dir"])
    sampling = sampling_of(flags)
    rows = [row for groups in steps for group in groups for row in group]
    for name in (flags["model"], str(folder)):
        policy, tokenizer = load_policy(name, device, flags["dtype"], flags["load_in_4bit"])
        stop = stop_ids(policy, tokenizer, sampling.stop)
        for row in rows:
            prompt = prompt_ids(task, problem_of(row), tokenizer)
            ids, texts = split_response(row, prompt, stop, tokenizer)
            changes = row.setdefault("changes", [texts])
            changes.append(response_logprobs(policy, prompt, ids, sampling))
    for row in rows:
        row["changes"] = [*zip(*row["changes"])]


def split_response(row, prompt, stop, tokenizer) -> tuple[list[int], list[str]]:
    """Token ids and the text of each, with the stop token where the response has one, and it can
    only be one. The text is tokenised again: the ids that were sampled are not kept, and may have
    been others."""
    # a <think> that the prompt has opened
    response = row["response"].removeprefix(opened_thought(tokenizer, prompt))
    found = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    texts = []
    end = 0
    for _, next_end in found["offset_mapping"]:
        texts.append(response[end:next_end])
        end = max(end, next_end)
    if row["finished"] and len(stop) == 1:
        ids = [*ids, *stop]
        texts += tokenizer.convert_ids_to_tokens(stop)
    return ids, texts


def response_logprobs(policy, prompt, ids, sampling) -> list[float]:
    row = torch.tensor([prompt + ids], device=policy.device)
    logits = policy(row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1]
    logprobs = policy_distribution(logits, sampling).log_softmax(-1)
    return logprobs.gather(1, row[0, len(prompt) :, None])[:, 0].tolist()


def shade(change) -> str:
    """A difference of log-probs -> a key of STYLES, '' for less than 0.1 nats."""
    size = abs(change)
    if size < 0.1:
        return ""
    return ("far " if size > 1 else "") + ("up" if change > 0 else "down")


# ---------------------------------------------------------- text


def in_plain(text, style) -> str:
    return text


def in_color(text, style) -> str:
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style else text


def group_text(group, prompt_text, paint) -> str:
    first = group[0]
    lines = [paint(f"group {first['group']}: {' '.join(remarks(group))}", "bold")]
    lines.append(indent(printable(prompt_text(first)), "  | "))
    lines.append(f"  answer: {printable(str(first['answer']))}\n")
    lines.append(paint("   reward   weight  tokens  response", "dim"))
    for row in group:
        weight = paint(f"{row['weight']:+9.2f}", shade(row["weight"]))
        text = response_text(row, paint).replace("\n", "\n" + " " * 28)
        lines.append(f"{row['reward']:9.3f}{weight}{row['length']:8d}  {text}")
    return "\n".join(lines)


def response_text(row, paint) -> str:
    text = printable(row["response"]) or paint("(empty)", "dim")
    if "changes" in row:
        text = ""
        for token, before, after in row["changes"]:
            text += paint(printable(token), shade(after - before))
    return text + paint("".join(f"  [{note}]" for note in notes(row)), "dim")


def notes(row) -> list[str]:
    found = []
    if len(row["parts"]) > 1:
        found.append(", ".join(f"{part} {value:g}" for part, value in row["parts"].items()))
    if not row["finished"]:
        found.append("truncated")
    return found


# ---------------------------------------------------------- a page

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 64em; color: #222 }}
  nav {{ position: sticky; top: 0; background: white; padding: .5em 0 }}
  input {{ width: 90%; vertical-align: middle }} output {{ padding-left: .8em }}
  h2 {{ font-size: 1.1em; margin: 1.5em 0 .5em }}
  pre, td.text {{ font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
  pre {{ background: #f5f5f5; padding: .6em 1em }}
  table {{ border-collapse: collapse; width: 100% }}
  th {{ text-align: left; font-weight: normal; color: #777 }}
  th, td {{ padding: .2em .8em .2em 0; vertical-align: top; border-bottom: 1px solid #eee }}
  td.text {{ width: 99% }} td.number {{ text-align: right }}
  td.up {{ color: #080 }} td.down {{ color: #c00 }}
  span.up {{ background: #d8f3d8 }} span.far.up {{ background: #93df93 }}
  span.down {{ background: #fbdcdc }} span.far.down {{ background: #f49f9f }}
  small {{ color: #777 }}
</style>
<h1>{title}</h1>
<p>Two groups of each step: responses to one prompt, best first. A weight above 0 made a response
more likely, one below 0 less.{legend}</p>
<nav>
<input type="range" min="0" max="{last}" value="{last}" aria-label="step"><output></output>
</nav>
{sections}
<script>
  const slider = document.querySelector("input");
  const sections = document.querySelectorAll("section");
  slider.oninput = () => {{
    sections.forEach((one, i) => one.hidden = i != slider.value);
    document.querySelector("output").value = sections[slider.value].dataset.step;
  }};
  slider.oninput();
  slider.hidden = sections.length == 1;
</script>
</html>
"""
LEGEND = """ A token is green where the checkpoint of the run finds it more likely than the model
that the run started from, and red where it finds it less likely: pale from 0.1 nats of log-prob
on, strong from 1 on. Hover over a token for its probabilities. That is the change over the whole
run, not of the step: what a late step sampled is likely by then, so it is mostly green."""


def page(folder, steps, prompt_text) -> str:
    """One page that needs no other file. Whatever a model or a task has written is escaped."""
    sections = []
    for step, groups in steps.items():
        title = f"Step {step}{summary(folder, step)}"
        shown = "\n".join(group_html(group, prompt_text) for group in groups)
        heading = f"<h2>{escape(title)}</h2>"
        sections.append(f"<section data-step='step {step}'>\n{heading}\n{shown}\n</section>")
    has_changes = any("changes" in groups[0][0] for groups in steps.values())
    return PAGE.format(
        title=escape(f"Groups of {folder}"),
        legend=LEGEND if has_changes else "",
        last=len(steps) - 1,
        sections="\n".join(sections),
    )


def group_html(group, prompt_text) -> str:
    first = group[0]
    prompt = escape(printable(prompt_text(first)))
    answer = escape(printable(str(first["answer"])))
    lines = [f"<h2>Group {first['group']}. {escape(' '.join(remarks(group)))}</h2>"]
    lines.append(f"<pre>{prompt}</pre>\n<p>answer: <b>{answer}</b></p>\n<table>")
    lines.append("<tr><th>reward<th>weight<th>tokens<th>response</tr>")
    for row in group:
        weight = f"<td class='number {shade(row['weight'])}'>{row['weight']:+.2f}"
        number = "<td class='number'>"
        text = f"<td class='text'>{response_html(row)}"
        lines.append(f"<tr>{number}{row['reward']:.3f}{weight}{number}{row['length']}{text}</tr>")
    return "\n".join([*lines, "</table>"])


def response_html(row) -> str:
    text = escape(printable(row["response"])) or "<small>(empty)</small>"
    if "changes" in row:
        text = ""
        for token, before, after in row["changes"]:
            hint = f"{math.exp(before):.3f} to {math.exp(after):.3f}"
            kind = shade(after - before)
            text += f"<span class='{kind}' title='{hint}'>{escape(printable(token))}</span>"
    return text + "".join(f" <small>[{escape(note)}]</small>" for note in notes(row))


if __name__ == "__main__":
    run_script(main, Config, __doc__, run={"help": "folder of the run"})
