"""What sample.py shows on a terminal: responses side by side, a conversation, the newest samples of a run.

Colours on a terminal alone, and not where the environment variable NO_COLOR is set: what is piped is plain text.
"""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flags import UserError
from policy import context_length, load_policy
from reward import load_reward, score
from tasks import PLAIN, Problem, load_task, prompt_ids
from track import is_run, read_config, read_rows, shorten

COLORS = {"red": 31, "green": 32, "grey": 90}


def paint(text: str, color: str) -> str:
    """The text in a color, where colours are wanted (no-color.org)."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{COLORS[color]}m{text}\033[0m" if wanted else text


def columns(left: tuple[str, str], right: tuple[str, str], width: int) -> str:
    """Two texts, each with its color, in the halves of `width` characters: lines stay lines, folded where too long."""
    half = (width - 2) // 2
    sides = [[part for line in text.splitlines() or [""] for part in textwrap.wrap(
        line, half, replace_whitespace=False, drop_whitespace=False) or [""]] for text, _ in (left, right)]
    height = max(map(len, sides))
    rows = zip(*(side + [""] * (height - len(side)) for side in sides))
    return "\n".join(f"{paint(a.ljust(half), left[1])}  {paint(b, right[1])}".rstrip() for a, b in rows)


def before_and_after(folder: Path, prompts: int, samples: int, device: torch.device, respond: Callable) -> None:
    """Prints what a run's base model and the run itself say to the first held-out prompts of its task, side by side: +
    and green is right by the task's rule, - and red is not. UserError if there is no run.

    respond: (model, tokenizer, task, prompt, samples, number of the prompt) -> responses, each with a note on its end
    """
    if not is_run(folder):
        raise UserError(f"{folder}: is no run, which would bring prompts of its own: give a prompt, or --chat")
    run = read_config(folder)
    task = load_task(run["task"], run["data_dir"])
    problems, rule, sides = task.validation[:prompts], load_reward(task.reward), []
    for name in (run["model"], str(folder)):
        loaded, side = load_policy(name, device), []
        for number, problem in enumerate(problems):
            texts, ends = zip(*respond(*loaded, task, problem.prompt, samples, number))
            right = score(rule, [problem.prompt] * samples, texts, [problem.answer] * samples)[0]
            side.append([(f"+ {text}{end}", "green") if value == 1 else (f"- {text}{end}", "red")
                         for text, end, value in zip(texts, ends, right)])
        sides.append(side)
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    print(columns((run["model"], "grey"), (str(folder), "grey"), width))
    for problem, before, after in zip(problems, *sides):
        print(f"\n{paint(shorten(problem.prompt, 10 * width), 'grey')}")
        for pair in zip(before, after):
            print(columns(*pair, width))


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, respond: Callable) -> None:
    """Reads a line and prints the response to it, until the input ends (control D) or is interrupted (control C). The
    model sees the conversation so far, without its oldest turns where it has no room for them; one without a chat
    template knows no turns and sees the line alone. respond: as above."""
    history, room = [], context_length(model)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        while tokenizer.chat_template and room and len(history) > 1 and 2 * len(
                prompt_ids(PLAIN, Problem(history, ""), tokenizer)) > room:  # half of the room is for the response
            del history[:2]
        prompt = history if tokenizer.chat_template else line
        [(text, end)] = respond(model, tokenizer, PLAIN, prompt, 1, len(history))
        history.append({"role": "assistant", "content": text})
        print(f"{paint(text, 'green')}{end}", flush=True)


def watch(folder: Path, pause: float = 1.0) -> None:
    """Prints the samples of a run's newest step, then those of each step to come, until the run has done its steps.
    Green were reinforced, red were pushed away, grey had no weight. UserError if there is no run."""
    if not is_run(folder):
        raise UserError(f"--watch {folder}: no run there")
    steps, seen = read_config(folder)["steps"], 0
    try:
        while seen < steps:
            rows = read_rows(folder / "samples.jsonl")
            for row in rows:
                if row["step"] > seen and (seen or row["step"] == rows[-1]["step"]):
                    color = "green" if row["weight"] > 0 else "red" if row["weight"] < 0 else "grey"
                    print(f"step {row['step']}  reward {row['reward']:.3f}  weight {row['weight']:+.3f}  "
                          f"{paint(shorten(row['prompt'], 100), 'grey')} {paint(shorten(row['response']), color)}",
                          flush=True)
            seen = rows[-1]["step"] if rows else 0
            time.sleep(pause if seen < steps else 0)
    except KeyboardInterrupt:
        print()
