import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import parse_train

import track
import train
from flags import UserError


@pytest.fixture
def calls(monkeypatch):
    """What the stand-ins of the three packages were told."""
    told = []

    class Writer:
        def __init__(self, *where, **options):
            told.append(("start", where, options))

        def log(self, numbers, step):
            told.append((step, numbers))

        def add_scalar(self, key, value, step):
            told.append((step, {key: value}))

        def flush(self):
            told.append("flush")

    for name, entry in (("wandb", "init"), ("trackio", "init"), ("torch.utils.tensorboard", "SummaryWriter")):
        module = ModuleType(name)
        setattr(module, entry, Writer)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_a_run_sends_what_it_records(base, calls):
    run = train.main(parse_train(
        "--model", base, "--tracker", "wandb", "--steps", 2, "--prompts_per_step", 2, "--group_size", 4,
        "--max_new_tokens", 8, "--eval_problems", 5, "--eval_every", 1, "--name", "sent", "--device", "cpu"))
    start, *steps = calls
    assert start[2]["name"] == "sent" and start[2]["config"]["group_size"] == 4
    assert (start[2]["mode"], start[2]["dir"]) == ("offline", run)
    rows = track.read_rows(run / "metrics.jsonl")
    hidden = {"step", "eval_interval"}
    assert steps == [(row["step"], {key: row[key] for key in row if key not in hidden}) for row in rows]
    assert "eval_accuracy" in steps[0][1]


def test_each_tracker_is_told_in_its_own_words(calls, monkeypatch):
    config, run = parse_train("--name", "a"), Path("runs/a")
    monkeypatch.setenv("WANDB_MODE", "online")  # the one way to make it send anything over the network
    for kind in ("trackio", "wandb", "tensorboard", "none"):
        tracker = track.Tracker(kind)
        tracker.send(run, config, {"step": 1, "reward": 0.5, "eval_interval": [0.1, 0.2]})
        tracker.send(run, config, {"step": 2, "reward": 0.6})
    both = [(1, {"reward": 0.5}), (2, {"reward": 0.6})]
    assert calls[0][2].keys() == {"project", "name", "config"}
    assert calls[1:3] == calls[4:6] == both and calls[3][2]["mode"] == "online"
    assert calls[6:] == [("start", (run / "tensorboard",), {}), both[0], "flush", both[1], "flush"]


def test_a_missing_package_is_said_before_anything_is_made(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--tracker wandb: the package is not installed: pip install wandb"):
        train.main(parse_train("--model", base, "--tracker", "wandb"))
    assert not Path("runs").exists()
