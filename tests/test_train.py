import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import plot
import policy
import reward
import track
import train
from checkpoint import find_checkpoint, new_checkpoint
from flags import UserError, parse
from policy import learning_rate

ROOT = Path(__file__).parent.parent


def config(*flags):
    return parse(train.Config, train.HELP, [str(flag) for flag in flags], train.fill)[0]


def run(base, *flags):
    return train.main(
        config(
            "--model",
            base,
            "--device",
            "cpu",
            "--lr",
            1e-3,
            "--prompts_per_step",
            4,
            "--group_size",
            8,
            "--max_new_tokens",
            8,
            "--eval_problems",
            20,
            *flags,
        )
    )


def metrics_of(folder, *drop):
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds")}
        for row in track.read_rows(folder / "metrics.jsonl")
    ]


def test_a_run_leaves_everything_that_the_readme_says(base, monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "sevens", lambda prompt, response, answer: response.count("7") / 8)
    folder = run(base, "--name", "demo", "--steps", 3, "--eval_every", 2, "--reward", "sevens")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "code",
        "checkpoint",
        "curves.png",
        "before.json",
        "after.json",
        "lock",
    }
    recorded = json.loads((folder / "config.json").read_text())
    assert recorded["config"]["group_size"] == 8 and recorded["config"]["name"] == "demo"
    assert set(recorded["versions"]) >= {"python", "torch", "transformers"} and recorded["device"].startswith(
        "cpu"
    )
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [("eval_accuracy" in row) for row in rows] == [False, True, True]
    assert [row["drawn"] for row in rows] == [4, 8, 12]
    assert all(0 < row["sampler_gap"] < 1e-5 and row["grad_norm"] > 0 for row in rows)
    readme = (ROOT / "README.md").read_text()
    assert [
        key
        for row in track.read_rows(folder / "metrics.jsonl")
        for key in row
        if f"`{key.replace('/sevens', '/PART')}`" not in readme
    ] == []
    samples = track.read_rows(folder / "samples.jsonl")
    assert len(samples) == 12 and set(samples[0]) == {
        "step",
        "prompt",
        "response",
        "answer",
        "length",
        "reward",
        "parts",
        "true_reward",
        "weight",
    }
    assert (folder / "code" / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(AutoTokenizer.from_pretrained(folder / "checkpoint")) == 101
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint").num_parameters() > 4e5


def test_resumed_equals_straight_to_the_last_bit(base, monkeypatch):
    """Stopped in step 6 after the checkpoint of step 4: steps 5 and 6 are done again, not recorded twice. The reward
    draws from Python's generator, whose state must come back too."""
    monkeypatch.setitem(reward.REWARDS, "noisy", lambda *row: len(row[1]) + random.random())
    flags = "--reward", "noisy", "--steps", 8, "--save_every", 2, "--eval_every", 3
    straight = run(base, "--name", "straight", *flags)

    class PowerCut(Exception):
        pass

    def append(path, rows, append=track.append):
        append(path, rows)
        if path.name == "metrics.jsonl" and rows[0]["step"] == 5:
            raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(track, "append", append)
        run(base, "--name", "cut", *flags)
    assert [row["step"] for row in metrics_of(Path("runs/cut"))] == [1, 2, 3, 4, 5]
    random.seed("elsewhere")
    resumed = train.main(config("--name", "cut", "--resume"))
    assert metrics_of(resumed) == metrics_of(straight)
    assert track.read_rows(resumed / "samples.jsonl") == track.read_rows(straight / "samples.jsonl")
    with pytest.raises(UserError, match="has done its 8 steps"):
        train.main(config("--name", "cut", "--resume"))
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (straight, resumed)]
    assert weights[0] == weights[1]


def test_the_reward_rises_on_something_that_can_be_learnt(base, monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "sevens", lambda prompt, response, answer: response.count("7") / 8)
    rows = metrics_of(run(base, "--reward", "sevens", "--steps", 25))
    assert rows[0]["reward"] < 0.15
    assert sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.3


def test_the_parts_of_a_mixture_are_recorded_each(base):
    folder = run(base, "--reward", "2*exact - 0.1*length", "--true_reward", "number", "--steps", 2)
    for row in metrics_of(folder):
        assert row["reward"] == pytest.approx(2 * row["reward/exact"] - 0.1 * row["reward/length"], abs=1e-6)
        assert row["reward/length"] == row["response_length"] > 1
        assert row["reward/exact"] <= row["true_reward"] == row["accuracy"]
    for sample in track.read_rows(folder / "samples.jsonl"):
        assert sample["reward"] == pytest.approx(2 * sample["parts"]["exact"] - 0.1 * sample["length"])


def test_the_curves_show_the_parts_and_the_true_reward(monkeypatch, tmp_path):
    figures = []

    def savefig(figure, path, **_):
        figures.append(figure)
        path.write_bytes(b"")

    monkeypatch.setattr(plot.Figure, "savefig", savefig)
    row = dict.fromkeys(plot.CURVES, 0.5) | {"eval_interval": [0.4, 0.6], "true_reward": 0.5}
    for parts in ({}, {"true_reward": 0.2, "reward/exact": 0.3, "reward/length": 9.0}):
        rows = [{"step": step, **row, **parts} for step in (1, 2)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot.plot(tmp_path)
    lines = [[list(line.get_ydata()) for axes in figure.axes for line in axes.lines] for figure in figures]
    assert [0.2, 0.2] not in lines[0] and [0.2, 0.2] in lines[1]
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert not any("part of" in title for title in titles[0])
    assert {"part of the reward: exact", "part of the reward: length"} < set(titles[1])
    assert [9.0, 9.0] in lines[1]


def test_a_reward_that_fails_stops_the_run_and_the_checkpoint_stays(base):
    """At step 3 it returns NaN once: what the checkpoint of step 2 holds must be there, whole, to go on from."""
    Path("mine.py").write_text(
        "seen = []\n"
        "def broken(prompt, response, answer):\n"
        "    seen.append(response)\n"
        "    return float('nan') if len(seen) == 2 * 32 + 5 else len(response)\n"
    )
    with pytest.raises(UserError, match=r"--reward mine.broken: returned nan, not a finite number \(prompt: .*=; resp"):
        run(base, "--name", "broken", "--reward", "mine.broken", "--steps", 4, "--save_every", 1)
    assert [row["step"] for row in metrics_of(Path("runs/broken"))] == [1, 2]
    resumed = train.main(config("--name", "broken", "--resume"))
    assert [row["step"] for row in metrics_of(resumed)] == [1, 2, 3, 4]


def rows_of(*pairs):
    return [{"step": i + 1, "reward": reward, "true_reward": true} for i, (reward, true) in enumerate(pairs)]


def test_the_run_warns_when_reward_and_true_reward_part(capsys, tmp_path):
    track.append(tmp_path / "metrics.jsonl", rows_of((0.1, 0.3), (0.3, 0.5)))
    assert track.watch(tmp_path, 1)
    track.append(tmp_path / "metrics.jsonl", rows_of((0.2, 0.4)))  # both fell
    assert not track.watch(tmp_path, 1) and capsys.readouterr().out == ""
    track.append(tmp_path / "metrics.jsonl", rows_of((0.4, 0.4)))
    assert not track.watch(tmp_path, 1)
    warning = capsys.readouterr().out
    assert "risen from 0.300 to 0.400, but the true reward has fallen from 0.500 to 0.400" in warning


def test_the_best_policy_by_the_true_reward_is_kept(base):
    """The reward wants what the true one does not, so the first policy is the best, and the last is another."""
    Path("mine.py").write_text(
        "def sevens(prompt, response, answer): return response.count('7') / 8\n"
        "def others(prompt, response, answer): return 1 - response.count('7') / 8\n"
    )
    flags = "--reward", "mine.sevens", "--save_every", 5, "--eval_problems", 0
    folder = run(base, *flags, "--true_reward", "mine.others", "--steps", 10, "--name", "parted")
    rows = metrics_of(folder)
    assert sum(row["true_reward"] for row in rows[:5]) > sum(row["true_reward"] for row in rows[5:])
    five = run(base, *flags, "--steps", 5)
    best, last, five = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()["model.norm.weight"]
        for path in (folder / "best", folder / "checkpoint", five / "checkpoint")
    )
    assert (best == five).all() and not (best == last).all()


def test_random_rewards_move_nothing_and_real_ones_do(base, monkeypatch):
    """The rule that measures: the response begins with a digit below 5 (about half do). Learning from it moves that
    share; learning from noise of the same size must not. Noise tied to the response by a mistake would."""
    monkeypatch.setitem(
        reward.REWARDS, "exact", lambda prompt, response, answer: float(response[:1] in list("01234"))
    )
    noise = random.Random(0)
    monkeypatch.setitem(reward.REWARDS, "noise", lambda *row: float(noise.random() < 0.5))
    moved = {}
    for name in ("exact", "noise"):
        folder = run(base, "--reward", name, "--steps", 15, "--eval_problems", 400, "--lr", 3e-4)
        before, after = (json.loads((folder / f"{when}.json").read_text()) for when in ("before", "after"))
        moved[name] = after["sampled"]["accuracy"] - before["sampled"]["accuracy"]
    assert moved["exact"] > 0.2
    assert abs(moved["noise"]) < 0.1


def test_groups_without_a_signal_are_not_run_and_change_nothing(base, monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "same", lambda *row: 0.7)
    monkeypatch.setattr(policy, "response_logprobs", None)  # calling it would fail
    folder = run(base, "--reward", "same", "--steps", 2, "--eval_problems", 0)
    assert [(row["trained"], row["grad_norm"], row["informative"]) for row in metrics_of(folder)] == [
        (0, 0, 0)
    ] * 2
    assert not (folder / "before.json").exists()
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, folder / "checkpoint")
    )
    assert all((before[name] == after[name]).all() for name in before)


def test_the_learning_rate_rises_and_then_falls_to_a_tenth():
    rates = [round(learning_rate(step, 1.0, warmup_steps=10, steps=20), 9) for step in (1, 5, 10, 15, 20)]
    assert rates == [0.1, 0.5, 1.0, 0.55, 0.1]


def test_flags_not_given_suit_the_task_and_given_ones_stay():
    assert (config().max_new_tokens, config().prompts_per_step) == (32, 32)
    assert config("--max_new_tokens", "50").max_new_tokens == 50
    assert config("--task", "gsm8k").max_new_tokens == 512


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gms8k"], "--task gms8k: not one of add, countdown, gsm8k, nor a .jsonl file"),
        (["--reward", "exakt"], "--reward exakt: not one of exact, number"),
        (["--group_size", "1"], "--group_size 1: --normaliser zscore compares"),
        (["--prompts_per_step", "0"], "--prompts_per_step 0: must be at least 1"),
        (["--temperature", "nan"], "--temperature nan: must be at least 0.0001"),
        (["--lr", "-1"], "--lr -1.0: must be at least 0"),
        (["--minibatches", "0"], "--minibatches 0: must be at least 1"),
        (["--filter", "top", "--keep", "1.5"], "--keep 1.5: must be at most 1"),
        (["--clip_low", "-0.1"], "--clip_low -0.1: must be at least 0"),
        (["--recipe", "grop"], "argument --recipe: invalid choice: 'grop'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--model", "no/such/folder"], "--model no/such/folder: cannot be loaded"),
    (["--model", "./no/such"], "--model ./no/such: there is no such folder"),
        (["--max_new_tokens", "200"], "do not fit into the model's context of 128"),
        (["--resume"], "--resume: say which run"),
        (["--resume", "--name", "gone"], "runs/gone: no run there"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(base, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *(() if "--model" in flags else ("--model", base)), *flags])
    with pytest.raises(SystemExit) as exit:
        train.run_script(train.main, train.Config, train.HELP, train.fill)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("train.py: error: ") and message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_a_name_that_is_taken_is_refused_and_kept(base):
    folder = run(base, "--name", "demo", "--steps", 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--name demo: runs/demo is there already"):
        run(base, "--name", "demo", "--steps", 1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(base, "--steps", 1).name == "add" and run(base, "--steps", 1).name == "add-2"


def test_a_crash_while_a_checkpoint_is_written_keeps_the_one_before(tmp_path):
    with new_checkpoint(tmp_path) as folder:
        (folder / "state.pt").write_text("first")
    with pytest.raises(ZeroDivisionError), new_checkpoint(tmp_path) as folder:
        (folder / "state.pt").write_text("half")
        raise ZeroDivisionError
    assert (find_checkpoint(tmp_path) / "state.pt").read_text() == "first"
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # as between the two renames
    assert (find_checkpoint(tmp_path) / "state.pt").read_text() == "first"


def test_scripts_work_as_commands(base, folders):
    """Each as a user calls it, in a process of its own, from another folder."""

    def command(*words):
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)

    for script in ("train", "sample", "eval", "pretrain", "reward", "train_reward"):
        shown = command(ROOT / f"{script}.py", "--help")
        assert shown.returncode == 0 and "python " + script in shown.stdout, shown.stderr
    trained = command(ROOT / "train.py", "--model", base, "--steps", 1, "--eval_problems", 10, "--name", "x")
    assert trained.returncode == 0, trained.stderr
    assert "step    1  reward 0." in trained.stdout and "\nbefore  0." in trained.stdout
    assert "held-out problems" in trained.stdout and "runs/x" in trained.stdout
    evaluated = command(ROOT / "eval.py", "runs/x", "--limit", 30)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "30 test problems of add" in evaluated.stdout and evaluated.stdout.count("[") == 6
    scored = command(ROOT / "reward.py", "--reward", "exact - 0.5*length", "runs/x/samples.jsonl")
    assert scored.returncode == 0 and scored.stdout.split()[:3] == ["reward", "exact", "length"], scored.stderr
    sampled = command(ROOT / "sample.py", "runs/x", "48+27=", "--samples", 3)
    assert sampled.returncode == 0 and sampled.stdout.count("\n") == 3, sampled.stderr
    wrong = command(ROOT / "eval.py", base)
    assert wrong.returncode == 2 and wrong.stderr.startswith("eval.py: error: --task: ")
