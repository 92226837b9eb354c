import sys
from pathlib import Path
from unittest.mock import Mock, call

import pytest
from conftest import parse_train

import train
from lib.files import read_rows
from lib.flags import UserError
from lib.run import Tracker


@pytest.fixture
def package(monkeypatch):
    """A stand-in for all three packages, which records what it is told."""
    package = Mock()
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, package)
    return package


def test_a_run_sends_what_it_records(base, package):
    flags = "--tracker wandb --name sent --steps 2 --prompts_per_step 2 --group_size 4"
    flags += " --max_new_tokens 8 --eval_problems 5 --eval_every 1 --device cpu"
    run = train.main(parse_train("--model", base, *flags.split()))
    options = package.init.call_args.kwargs
    assert (options["name"], options["dir"], options["mode"]) == ("sent", run, "offline")
    expected = []
    for row in read_rows(run / "metrics.jsonl"):
        del row["eval_accuracy_interval"]  # no number
        expected.append(call(row, step=row.pop("step")))
    assert package.init().log.mock_calls == expected


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_each_tracker_is_told_in_its_own_words(package, monkeypatch, kind):
    monkeypatch.setenv("WANDB_MODE", "online")  # the only way to make it use the network
    tracker = Tracker(kind)
    tracker.send(Path("a"), {}, {"step": 1, "reward": 0.5, "eval_accuracy_interval": [0.1, 0.2]})
    tracker.send(Path("a"), {}, {"step": 2, "reward": 0.6})
    if kind == "tensorboard":
        package.SummaryWriter.assert_called_once_with(Path("a/tensorboard"))
        calls = package.SummaryWriter().add_scalar.mock_calls
        assert calls == [call("reward", 0.5, 1), call("reward", 0.6, 2)]
        return
    package.init.assert_called_once()
    assert (package.init.call_args.kwargs.get("mode") == "online") == (kind == "wandb")
    calls = package.init().log.mock_calls
    assert calls == [call({"reward": 0.5}, step=1), call({"reward": 0.6}, step=2)]


def test_a_missing_package_is_said_before_anything_is_made(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--tracker wandb: .* not installed: pip install wandb"):
        train.main(parse_train("--model", base, "--tracker", "wandb"))
    assert not Path("runs").exists()
