"""What a script says while it works: phases, a bar that moves within a step, a line per step.

    @phase("loading {}")                         # -> "loading models/add ... 4.2 s"
    def load_policy(name, device): ...

    progress = Progress()
    for step in progress.steps(1, 60):
        progress.expect(tokens=4096)             # the sampler, before it starts
        progress.sampled(512)                    # the sampler, whenever it knows more
        progress.expect(rows=128)                # the learner, before an update
        progress.trained(16)                     # the learner, after each micro-batch
        progress.show(metrics)                   # the line of the step

Everything but the lines of the steps goes to stderr, so that what a script prints can be piped.
"""

import sys
import time
from contextlib import contextmanager
from functools import partial, wraps
from threading import Timer

from tqdm import tqdm

from lib.metrics import no_update

LINES_PER_HEADER = 20
SHORT_RUN = 200  # steps; of a longer run every tenth is shown
# title, width, decimals and key in metrics.jsonl of each column of the lines of the steps
COLUMNS = [
    ("step", 6, 0, "step"),
    ("reward", 7, 3, "reward"),
    ("mixed", 6, 2, "informative"),
    ("think", 6, 2, "thinking"),
    ("length", 7, 1, "response_length"),
    ("ended", 6, 2, "finished"),
    ("entropy", 8, 3, "entropy"),
    ("grad", 6, 2, "grad_norm"),
    ("sampled", 8, 0, "tokens_per_second_sampled"),
    ("trained", 8, 0, "tokens_per_second_trained"),
    ("s", 5, 1, "seconds"),
    ("eval", 7, 3, "eval"),
]
ABOVE = f"{'tokens per second':>68}"


def phase(title):
    """A decorator: says what a function does and then how long it took, if that is a second or
    more. {} in the title stands for its first argument."""

    def decorate(function):
        @wraps(function)
        def timed(*arguments, **options):
            began = time.perf_counter()
            text = title.format(*arguments[:1])
            stream = sys.stderr
            timer = Timer(1, partial(print, text, "...", end="", file=stream, flush=True))
            timer.daemon = True
            timer.start()
            ended = ""
            try:
                result = function(*arguments, **options)
                ended = f" {time.perf_counter() - began:.1f} s"
                return result
            finally:
                timer.cancel()
                timer.join()
                if time.perf_counter() - began >= 1:
                    print(ended, file=stream, flush=True)

        return timed

    return decorate


class Progress:
    """The bar of a run, which moves within a step too, and the lines of its steps. Nothing here
    changes a run."""

    def __init__(self):
        self.bar = None  # until the first step: what is sampled before is an evaluation
        self.evaluation = None  # the bar of an evaluation
        self.lines = 0
        self.expected = {"tokens": 0, "rows": 0}
        self.done = {"tokens": 0, "rows": 0}

    def steps(self, first, last):
        """The numbers of the steps."""
        self.first, self.last = first, last
        self.bar = tqdm(
            total=last,
            initial=first - 1,
            disable=None,  # no bar where stderr is no terminal
            dynamic_ncols=True,
            miniters=0,
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]",
        )
        for step in range(first, last + 1):
            self.step = step
            self.expected = self.done  # as much as in the step before
            self.done = {"tokens": 0, "rows": 0}
            self.draw(f"step {step} of {last}")
            yield step
        self.bar.n = last
        self.bar.close()

    def expect(self, tokens=0, rows=0):
        """What is to be sampled or trained in this step. Later steps expect what the first had."""
        if self.bar is not None and self.step == self.first:
            self.expected["tokens"] += tokens
            self.expected["rows"] += rows
        if rows:
            self.trained(0)

    def sampled(self, tokens):
        if self.evaluation is None:
            self.add("tokens", tokens, "sampled")
        else:
            self.evaluation.tokens += tokens
            self.evaluation.set_postfix_str(f"{self.evaluation.tokens:,} tokens")

    @contextmanager
    def evaluating(self, label, responses):
        """A bar that counts responses; within the block, what is sampled is an evaluation."""
        options = dict(desc=label, unit=" responses", leave=False, disable=None)
        with tqdm(total=responses, **options) as self.evaluation:
            self.evaluation.tokens = 0
            yield self.evaluation
        self.evaluation = None

    def trained(self, rows):
        self.add("rows", rows, "trained")

    def add(self, unit, count, verb):
        if self.bar is None:
            return
        self.done[unit] += count
        most = max(self.done[unit], self.expected[unit])
        self.draw(f"step {self.step}: {verb} {self.done[unit]:,} of {most:,} {unit}")

    def draw(self, text):
        """Sampling is taken for one half of a step, training for the other."""
        halves = [min(1, self.done[unit] / max(1, self.expected[unit])) for unit in self.done]
        self.bar.n = self.step - 1 + sum(halves) / 2
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(0)  # redraws at most ten times per second

    def show(self, metrics):
        """Prints the line of a step, under a header every 20 lines. A run of more than 200 steps
        shows the first, the last, every tenth and those with an evaluation or a skipped update."""
        step = metrics["step"]
        special = step in (self.first, self.last) or has_eval(metrics) or metrics["skipped"]
        if self.last > SHORT_RUN and step % 10 and not special:
            return
        if self.lines % LINES_PER_HEADER == 0:
            tqdm.write(header())
        self.lines += 1
        tqdm.write(step_line(metrics))


def header():
    return f"{ABOVE}\n" + "".join(title.rjust(width) for title, width, _, _ in COLUMNS)


def has_eval(metrics):
    return "eval_accuracy" in metrics or "eval_mean_reward" in metrics


def step_line(metrics):
    """A step for the screen, in 80 columns. A second line says where updates were left out."""
    shown = {"eval": metrics.get("eval_mean_reward", metrics.get("eval_accuracy")), **metrics}
    line = "".join(cell(shown.get(key), width, digits) for _, width, digits, key in COLUMNS)
    if metrics["skipped"]:
        line += f"\n      {metrics['skipped']} updates skipped: their numbers are not finite"
    elif not metrics["updates"]:
        line += f"\n      no update: {no_update(metrics)}"
    return line.rstrip()


def cell(value, width, decimals):
    """A number in `width` characters, with a space before it and as many decimals as fit.

    0.25, 7, 3 -> '  0.250';  1234.5, 7, 3 -> ' 1234.5';  None -> spaces
    """
    if value is None:
        return " " * width
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) < width:
            return text.rjust(width)
    return f"{value:.0e}".rjust(width)
