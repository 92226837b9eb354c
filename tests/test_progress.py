import io
import sys

import pytest

from lib.metrics import tokens_per_second
from lib.progress import SILENT, Progress, cell, phase, step_line

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


def test_a_phase_says_its_time_and_a_failed_one_ends_its_line(capsys):
    with phase("loading models/add"):
        pass
    with pytest.raises(ValueError), phase("checking"):
        raise ValueError
    assert capsys.readouterr().err == "loading models/add ... 0.0 s\nchecking ...\n"


def test_the_bar_moves_within_a_step(monkeypatch):
    """Half of the first step is sampled, then all, then a quarter of its rows is trained on."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(1, 2)
    seen = []
    for _ in progress.steps():
        progress.expect(tokens=100)
        progress.sampled(50)
        seen.append((progress.bar.n, progress.bar.desc))
        progress.sampled(70)  # more than expected
        seen.append((progress.bar.n, progress.bar.desc))
        progress.expect(rows=8)
        progress.trained(2)
        seen.append((progress.bar.n, progress.bar.desc))
    assert seen[:3] == [
        (0.25, "step 1: sampled 50 of 100 tokens"),
        (0.5, "step 1: sampled 120 of 120 tokens"),
        (0.625, "step 1: trained 2 of 8 rows"),
    ]
    assert seen[3] == (1.25, "step 2: sampled 50 of 100 tokens")
    assert progress.bar.n == 2
    SILENT.expect(tokens=1), SILENT.sampled(1), SILENT.trained(1)


def test_there_is_no_bar_in_a_file(capsys):
    for _ in Progress(1, 3).steps():
        pass
    assert capsys.readouterr().err == ""


def shown_steps(capsys, last, **changes):
    progress = Progress(1, last)
    for step in progress.steps():
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
        assert rest == ([] if metrics["updates"] else ["      all weights are zero: no update"])
    assert step_line(METRICS | {"step": 3, "eval_accuracy": 0.5}).endswith(" 0.500")
    assert cell(1234.5, 7, 3) == " 1234.5"
    assert cell(-0.5, 7, 3) == " -0.500"


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
