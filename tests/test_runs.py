"""tools.runs: runs side by side."""

import csv
import io
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from lib.files import write_json, write_rows
from lib.flags import UserError
from lib.stats import mean_over_runs, student, unpaired_difference
from tools import runs


def make_run(name, after=None, done=4, saved=None, problems="", **flags):
    """A run of 4 steps that took 30 s each, from 0.25 [0.2, 0.3] to `after` plus or minus 0.05."""
    folder = Path("runs") / name
    (folder / "code").mkdir(parents=True)
    config = asdict(train.Config(name=name, steps=4, **flags))
    write_json(folder / "config.json", {"config": config, "problems": problems})
    rows = [{"step": step, "seconds": 30.0} for step in range(1, done + 1)]
    if after is not None:
        before = {"sampled": {"mean": 0.25, "interval": [0.2, 0.3]}}
        write_json(folder / "before.json", {"accuracy": before})
        interval = [round(after - 0.05, 3), round(after + 0.05, 3)]
        rows[-1] |= {"eval_accuracy": after, "eval_accuracy_interval": interval}
    write_rows(folder / "metrics.jsonl", rows)
    if saved:
        (folder / "checkpoint").mkdir()
        torch.save({"step": saved}, folder / "checkpoint" / "state.pt")
    return str(folder)


def listed(capsys, *names, **flags):
    runs.main(runs.Config(**flags), names)
    return capsys.readouterr().out


def test_seeds_that_tie_keep_the_interval_over_problems(capsys):
    """Over the seeds it has no width, and any other setting was better or worse."""
    for seed in (0, 1):
        make_run(f"a-{seed}", 0.5, lr=1e-4, seed=seed)
        make_run(f"b-{seed}", 0.51, lr=1e-3, seed=seed)
    said = listed(capsys)
    assert "0.500 [0.450, 0.550]" in said and "no difference seen" in said


def test_runs_on_other_problems_are_neither_pooled_nor_compared(capsys):
    """The .jsonl file was edited between the two."""
    make_run("one", 0.5, problems="aaaaaaaabb", task="my.jsonl")
    make_run("two", 0.75, problems="ccccccccdd", task="my.jsonl", seed=1)
    _, two, one = listed(capsys).splitlines()
    assert "problems=cccccccc" in two and "problems=aaaaaaaa" in one and "seeds" not in one + two


def test_a_line_per_run_the_best_first_with_the_flags_that_differ(capsys):
    make_run("low", 0.5, lr=1e-4)
    make_run("high", 0.75, lr=1e-3)
    Path("runs/eval").mkdir()  # is no run
    head, high, low, _, title, verdict, *note = listed(capsys).splitlines()
    assert head.split("  ")[0] == "run" and "flags that differ" in head
    assert " ".join(high.split()) == (
        "high lr=0.001 4/4 finished accuracy 0.250 [0.200, 0.300] 0.750 [0.700, 0.800] 2:00"
    )
    assert low.split()[:2] == ["low", "lr=0.0001"]
    # 0.05 * sqrt(2) = 0.0707
    assert title == "high against the others:"
    assert verdict == "    low  +0.250 [+0.179, +0.321]  better"
    assert "another seed may differ" in note[0]


def test_seeds_are_pooled_with_the_interval_over_seeds(capsys):
    """Mean 0.6, standard deviation 0.1, three seeds: 0.6 +- 4.303 * 0.1 / sqrt(3) = 0.248."""
    for seed, after in enumerate([0.5, 0.6, 0.7]):
        make_run(f"lr-{seed}", after, seed=seed)
    make_run("lr-9", 0.7, seed=9, done=3, saved=3)  # not finished: a line of its own
    _, stopped, pooled, *rest = listed(capsys).splitlines()
    assert pooled.startswith("lr (3 seeds)")
    assert "0.600 [0.352, 0.848]" in pooled and "seed" not in pooled.partition("seeds)")[2]
    assert "stopped" in stopped and "3/4" in stopped
    assert rest[2].endswith("no difference seen")
    assert "0.250 [0.200, 0.300]" in pooled  # before: the same model in each run


def test_a_run_without_evaluations_is_measured_by_its_first_and_last_quarter(capsys):
    """(0.1, 0.3) and (0.8, 1): 0.2 and 0.9, with 12.706 * 0.1 on both sides. Of two seeds 0.2, which
    tie, so as of one, and 0.8 with 12.706 * 0.1."""

    def add_run(seed, first, last):
        folder = Path(make_run(f"lr-{seed}", seed=seed))
        rows = [{"step": step, "seconds": 1, "reward": 0.5} for step in range(1, 9)]
        for row, reward in zip([*rows[:2], *rows[-2:]], [*first, *last]):
            row["reward"] = reward
        write_rows(folder / "metrics.jsonl", rows)

    add_run(0, [0.1, 0.3], [0.8, 1.0])
    assert "reward of steps  0.200 [-1.071, 1.471]  0.900 [-0.371, 2.171]" in listed(capsys)
    add_run(1, [0.2, 0.2], [0.6, 0.8])
    assert "0.200 [-1.071, 1.471]  0.800 [-0.471, 2.071]" in listed(capsys)


def test_only_runs_of_the_same_code_and_other_seeds_are_pooled(capsys):
    """An edit makes another row, which says so, and so does the same seed again."""
    for name, code, seed in (("a", "1", 0), ("a-2", "1", 1), ("a-3", "2", 2), ("a-4", "1", 1)):
        folder = make_run(name, 0.5, seed=seed)
        Path(folder, "code", "train.py").write_text(code)
    _, *rows = listed(capsys).splitlines()[:4]
    names = [re.match(r"a(-\d)?( \(2 seeds\))?", row)[0] for row in rows]
    assert sorted(names) == ["a (2 seeds)", "a-3", "a-4"]
    edited, *others = {re.search("code=(.{8})", row)[1] for row in rows if "a-3" in row}
    assert not others and edited not in "".join(row for row in rows if "a-3" not in row)


def test_curves_of_pooled_runs_and_flags_that_differ(capsys, monkeypatch):
    for seed in range(2):
        make_run(f"grpo-{seed}", 0.2, seed=seed, lr=1e-5)
    make_run("b", 0.9, lr=3e-5)
    drawn = []
    monkeypatch.setattr(runs, "plot_runs", lambda *arguments: drawn.extend(arguments))
    listed(capsys, plot="compare.png", x="responses")
    groups, path, x = drawn
    assert (str(path), x) == ("compare.png", "responses")
    names = {name: [folder.name for folder in folders] for name, folders in groups.items()}
    assert names == {"b lr=3e-05": ["b"], "grpo (2 seeds) lr=1e-05": ["grpo-0", "grpo-1"]}
    with pytest.raises(UserError, match=r"--plot a.xyz: must end in .png"):
        runs.main(runs.Config(plot="a.xyz"), [])


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_states(capsys):
    make_run("finished")
    make_run("stopped", done=2, saved=2)
    make_run("killed", done=3, saved=2)
    make_run("early", done=1)
    running = make_run("running", done=2, saved=2)
    command = [sys.executable, "-c", HOLD, f"{running}/lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        shown = listed(capsys)
        process.stdin.close()
    states = dict(line.split()[:1] + line.split()[2:3] for line in shown.splitlines()[1:])
    failed = {"killed": "failed", "early": "failed"}
    assert states == {"finished": "finished", "stopped": "stopped", "running": "running", **failed}


def test_csv_has_a_column_for_each_number(capsys):
    make_run("one", 0.5, lr=1e-4)
    make_run("two", lr=1e-3)
    one, two = csv.DictReader(io.StringIO(listed(capsys, csv=True)))
    numbers = {"lr": "0.0001", "before_low": "0.2", "after": "0.5", "after_high": "0.55"}
    assert numbers.items() <= one.items() and one["seconds"] == "120.0"
    assert (two["run"], two["after"], two["state"]) == ("two", "", "finished")


def test_no_verdict_over_different_tasks(capsys):
    make_run("one", 0.5)
    make_run("two", 0.9, task="countdown")
    shown = listed(capsys)
    assert "against" not in shown
    assert shown.index("one") < shown.index("two")  # tasks apart, not by their accuracies
    make_run("three", 0.7, task="countdown", lr=1e-3)
    make_run("four", 0.6, task="countdown", lr=1e-4)
    shown = listed(capsys)
    assert shown.count("against") == 1 and "two against the others:" in shown
    assert len(re.findall(r"(?m)^    (three|four) +\+0.[23]00 ", shown)) == 2


def test_what_follows_from_a_recipe_is_not_listed(capsys):
    make_run("plain", 0.5)
    make_run("named", 0.6, recipe="dr_grpo", **train.RECIPES["dr_grpo"])
    make_run("changed", 0.4, recipe="dr_grpo", **train.RECIPES["dr_grpo"] | {"clip_low": 0.1})
    _, named, plain, changed, *_ = listed(capsys).splitlines()
    assert re.findall(r"\w+=\S+", named) == ["recipe=dr_grpo"]
    assert re.findall(r"\w+=\S+", changed) == ["recipe=dr_grpo", "clip_low=0.1"]
    assert "normaliser=zscore" in plain


def test_without_runs_there_is_a_sentence():
    with pytest.raises(UserError, match="no run there"):
        runs.main(runs.Config(), [])
    with pytest.raises(UserError, match="runs/none: no run there"):
        runs.main(runs.Config(), ["runs/none"])


def test_intervals_over_runs():
    """Student's t by tables: 12.706, 2.228, 2.201, 2.042 at 1, 10, 11 and 30 degrees of freedom."""
    for n, quantile in {2: 12.706, 11: 2.228, 12: 2.201, 31: 2.042}.items():
        assert student(n) == pytest.approx(quantile, abs=3e-3)
    assert mean_over_runs([0.9, 1.0], shares=True) == {
        "mean": pytest.approx(0.95),
        "interval": (pytest.approx(0.95 - 12.706 * 0.05), 1.0),
    }


def test_the_interval_of_an_unpaired_difference():
    """Newcombe (1998), table II: 56/70 against 48/80, Wilson intervals -> 0.0524 to 0.3339."""
    after = {"mean": 56 / 70, "interval": (0.6916, 0.8772)}
    before = {"mean": 48 / 80, "interval": (0.4906, 0.6999)}
    found = unpaired_difference(before, after)
    assert found["difference"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx((0.0524, 0.3339), abs=3e-4)
    assert found["verdict"] == "better"
