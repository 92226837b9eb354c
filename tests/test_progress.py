import io
import re
import sys
import time

import pytest

from lib.metrics import collapse, no_update, stood_still, tokens_per_second
from lib.progress import Progress, cell, phase, step_line

METRICS = {
    "reward": 0.278,
    "informative": 0.97,
    "thinking": 0.29,
    "response_length": 8.1,
    "finished": 1.0,
    "entropy": 0.578,
    "grad_norm": 0.41,
    "tokens_per_second_sampled": 21034.5,
    "tokens_per_second_trained": 9876.5,
    "seconds": 0.71,
    "skipped": 0,
    "updates": 1,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@phase("loading {}")
def load(name, seconds):
    time.sleep(seconds)
    if name == "broken":
        raise ValueError


def test_a_phase_of_more_than_a_second_is_said_with_its_time(capsys):
    load("at once", 0)
    assert capsys.readouterr().err == ""
    load("models/add", 1.2)
    assert re.fullmatch(r"loading models/add ... 1\.[2-9] s\n", capsys.readouterr().err)
    with pytest.raises(ValueError):
        load("broken", 1.2)
    assert capsys.readouterr().err == "loading broken ...\n"  # an error begins a line


def test_the_bar_moves_within_a_step(monkeypatch):
    """A half and then all of the first step is sampled, then two of its eight rows are trained on.
    The second step expects what the first had: 120 tokens and 2 rows."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress()
    with progress.evaluating("evaluating", 4) as bar:
        progress.sampled(1000)
        progress.sampled(24)
        assert bar.postfix == "1,024 tokens"
    seen = []
    for _ in progress.steps(1, 2):
        progress.expect(tokens=100)
        progress.sampled(50)
        seen.append((progress.bar.n, progress.bar.desc))
        progress.sampled(70)  # more than expected
        seen.append((progress.bar.n, progress.bar.desc))
        progress.expect(rows=8)
        trains = progress.bar.desc
        progress.trained(2)
        with progress.evaluating("evaluating", 4):
            progress.sampled(1000)
        seen.append((progress.bar.n, progress.bar.desc))
    assert trains == "step 2: trained 0 of 2 rows"
    assert seen == [
        (0.25, "step 1: sampled 50 of 100 tokens"),
        (0.5, "step 1: sampled 120 of 120 tokens"),
        (0.625, "step 1: trained 2 of 8 rows"),
        (pytest.approx(1 + 50 / 240), "step 2: sampled 50 of 120 tokens"),
        (1.5, "step 2: sampled 120 of 120 tokens"),
        (2, "step 2: trained 2 of 2 rows"),
    ]
    assert "step 2: trained 2 of 2 rows" in sys.stderr.getvalue()


def test_there_is_no_bar_in_a_file(capsys):
    for _ in Progress().steps(1, 3):
        pass
    assert capsys.readouterr().err == ""


def shown_steps(capsys, last, **changes):
    progress = Progress()
    for step in progress.steps(1, last):
        progress.show({**METRICS, "step": step, **(changes if step == 7 else {})})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    headers = [i for i, line in enumerate(lines) if line.split()[:2] == ["step", "reward"]]
    return [int(line.split()[0]) for line in lines if line.split()[0].isdigit()], headers


def test_a_header_every_20_lines_and_a_long_run_shows_every_tenth_step(capsys):
    steps, headers = shown_steps(capsys, 50)
    assert steps == [*range(1, 51)]
    assert headers == [1, 1 + 22, 1 + 44]  # a header has two lines
    steps, headers = shown_steps(capsys, 201, eval_accuracy=0.5)
    assert steps == [1, 7, *range(10, 201, 10), 201]
    assert len(headers) == 2


def test_the_line_of_a_step_fits_80_columns_whatever_the_numbers():
    huge = dict.fromkeys(METRICS, 123456.789) | {"updates": 0, "skipped": 0, "step": 99999}
    huge |= {"reward": -123456.789, "seconds": 5000.5}
    for metrics in (METRICS | {"step": 3, "eval_accuracy": 1.0}, huge | {"eval_mean_reward": -1e9}):
        first, *rest = step_line(metrics).splitlines()
        assert len(first) <= 80 and len(first.split()) == 12
        assert rest == ([] if metrics["updates"] else [f"      no update: {no_update(metrics)}"])
    assert step_line(METRICS | {"step": 3, "eval_accuracy": 0.5}).endswith(" 0.500")
    assert cell(1234.5, 7, 3) == " 1234.5"
    assert cell(-0.5, 7, 3) == " -0.500"


def test_why_a_step_made_no_update():
    assert no_update({"informative": 0.0}) == "all rewards of each group are equal"
    assert no_update({"informative": 0, "all_wrong": 1, "all_right": 0}).endswith("(all wrong)")
    assert no_update({"informative": 0.5}).startswith("all weights are 0, by --norm")
    still = [{"updates": 0, "informative": 0, "all_wrong": 1}] * 8
    assert "none of the 8 steps made an update: all rewards" in stood_still(still)
    assert stood_still([{"updates": 0, "skipped": 1}]) == ""  # not finite: another reason
    assert stood_still([*still, {"updates": 1}]) == stood_still([]) == ""


def test_a_metric_that_is_not_there_leaves_its_column_empty():
    metrics = {**METRICS, "step": 3}
    full = step_line(metrics)
    del metrics["entropy"]
    assert step_line(metrics) == full.replace("   0.578", "        ")


def test_tokens_per_second():
    metrics = {"response_length": 10, "trained": 0.5, "seconds_sample": 2, "seconds": 6}
    assert tokens_per_second(metrics, 100) == {
        "tokens_per_second_sampled": 500,
        "tokens_per_second_trained": 125,
    }


def test_a_run_whose_reward_fell_to_nothing_ends_with_a_warning():
    """It was 0.5 around step 13, and 0.01 in the last steps. One that learned late, one that never
    had a reward and one that fell by half are no collapse."""
    up_and_down = [0.1] * 10 + [0.5] * 5 + [0.01] * 15
    assert "was 0.5 around step 13 and is 0.01 at the end" in collapse(up_and_down)
    for rewards in ([0.0] * 29 + [0.5], [0.0] * 30, [0.1] * 10 + [1.0] * 10 + [0.5] * 10):
        assert collapse(rewards) == ""
    assert collapse([0.5, 0.5, 0.0, 0.0]) == ""  # too short to tell
