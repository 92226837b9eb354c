"""What a script says while it works: phases, a bar that moves within a step, a line per step.

    with phase("loading models/add"):            # -> "loading models/add ... 0.4 s"
        ...
    progress = Progress(first=1, last=60)
    for step in progress.steps():
        progress.expect(tokens=4096)             # the sampler, before it starts
        progress.sampled(512)                    # the sampler, whenever it knows more
        progress.expect(rows=128)                # the learner: rows of all epochs
        progress.trained(16)                     # the learner, after each micro-batch
        progress.show(metrics)                   # the line of the step

Everything but the lines of the steps goes to stderr, so that what a script prints can be piped.
`SILENT` takes the same calls and shows nothing.
"""

import sys
import time
from contextlib import contextmanager

from tqdm import tqdm

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


@contextmanager
def phase(title):
    """Says what is being done, and how long it took. Also a decorator: @phase("comparing")"""
    began = time.perf_counter()
    print(f"{title} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


class Progress:
    """The bar of a run, which moves within a step too, and the lines of its steps. Nothing here
    changes a run. first, last: step numbers"""

    def __init__(self, first, last, quiet=False):
        self.first = first
        self.last = last
        self.step = first
        self.lines = 0
        self.expected = {"tokens": 0, "rows": 0}
        self.done = {"tokens": 0, "rows": 0}
        self.bar = tqdm(
            total=last,
            initial=first - 1,
            disable=quiet or None,  # None: only where stderr is a terminal
            dynamic_ncols=True,
            miniters=0,
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]",
        )

    def steps(self):
        """The step numbers."""
        for step in range(self.first, self.last + 1):
            self.step = step
            self.expected = dict.fromkeys(self.expected, 0)
            self.done = dict.fromkeys(self.done, 0)
            self.draw(f"step {step} of {self.last}")
            yield step
        self.draw("done", self.last)
        self.bar.close()

    def expect(self, tokens=0, rows=0):
        """More to sample, at a guess, or more rows to train on in this step."""
        self.expected["tokens"] += tokens
        self.expected["rows"] += rows

    def sampled(self, tokens):
        self.done["tokens"] += tokens
        self.draw(self.part("sampled", "tokens"))

    def trained(self, rows):
        self.done["rows"] += rows
        self.draw(self.part("trained", "rows"))

    def part(self, verb, unit):
        """'step 3: sampled 512 of 4,096 tokens'"""
        most = max(self.done[unit], self.expected[unit])  # what was expected is a guess
        return f"step {self.step}: {verb} {self.done[unit]:,} of {most:,} {unit}"

    def draw(self, text, done=None):
        """Sampling is taken for one half of a step, training for the other."""
        if done is None:
            halves = [min(1, self.done[unit] / max(1, self.expected[unit])) for unit in self.done]
            done = self.step - 1 + sum(halves) / 2
        self.bar.n = done
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(0)  # at most ten times per second

    def show(self, metrics):
        """Prints the line of a step, under a header every 20 lines. A run of more than 200 steps
        shows the first, the last, every tenth and those with an evaluation or a skipped update."""
        step = metrics["step"]
        long_run = self.last > SHORT_RUN
        special = step in (self.first, self.last) or has_eval(metrics) or metrics["skipped"]
        if long_run and step % 10 and not special:
            return
        if self.lines % LINES_PER_HEADER == 0:
            tqdm.write(header())
        self.lines += 1
        tqdm.write(step_line(metrics))


class Silent:
    """Takes the calls of a Progress and shows nothing: for samplers and learners outside a run."""

    def expect(self, tokens=0, rows=0):
        pass

    def sampled(self, tokens):
        pass

    def trained(self, rows):
        pass


SILENT = Silent()


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
        line += "\n      all weights are zero: no update"
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
