"""A run from start to end: what it leaves, resuming, learning, warnings and mistakes."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from unittest.mock import patch

import pytest
import torch
from conftest import CPU, parse_train
from safetensors.torch import load_file

import lib.run
import policy
import reward
import train
from lib.files import append_rows, read_rows
from lib.flags import UserError, run_script
from lib.run import Run, after_mistake, read_config
from policy import load_policy
from tasks import load_task, take_problems

ROOT = Path(__file__).parent.parent
WHEN = "before", "after"
SMALL = """--device cpu --lr 1e-3 --prompts_per_step 4 --group_size 8 --max_new_tokens 8
    --eval_problems 0 --eval_every 50"""
RULES = {
    "sevens": lambda p, response, a: response.count("7") / 8,
    "others": lambda p, response, a: 1 - response.count("7") / 8,
    # rare: many groups of 8 have none
    "seven": lambda p, response, a: float(response[:1] == "7"),
    # about half of the responses
    "low": lambda p, response, a: float(response[:1] in list("01234")),
    "same": lambda p, response, a: 0.7,
    "coin": lambda p, response, a: float(random.random() < 0.5),
    "noisy": lambda p, response, a: random.random() + torch.rand(1).item(),
}


def start(*flags):
    """train.py with RULES, and without curves, which take most of the time of a short run. Flags:
    "--steps 3" """
    flags = " ".join(map(str, flags)).split()
    with patch.dict(reward.REWARDS, RULES), patch.object(lib.run, "plot_run"):
        return train.main(parse_train(*flags))


def run(base, *flags):
    return start("--model", base, SMALL, *flags)


def metrics_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: row[key] for key in row if "second" not in key} for row in rows]


def weights_of(folder):
    [path] = Path(folder).glob("*.safetensors")  # of a model or an adapter
    weights = load_file(path)
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def cut_and_resume(step, base, *flags):
    """A run that dies as it records `step`, resumed from its last checkpoint."""

    def append(path, rows):
        append_rows(path, rows)
        if path.name == "metrics.jsonl" and rows[0]["step"] == step:
            raise InterruptedError

    with patch.object(lib.run, "append_rows", append), pytest.raises(InterruptedError):
        run(base, "--name cut", *flags)
    assert len(metrics_of(Path("runs/cut"))) == step
    random.seed("elsewhere")
    torch.manual_seed(99)
    return start("--name cut --resume")


def assert_equal(one, other):
    """Metrics, samples and weights of two runs, to the last bit."""
    assert metrics_of(one) == metrics_of(other)
    assert read_rows(one / "samples.jsonl") == read_rows(other / "samples.jsonl")
    assert torch.equal(weights_of(one / "checkpoint"), weights_of(other / "checkpoint"))


def test_a_run_leaves_what_it_should(base):
    flags = "--name demo --steps 3 --eval_every 2 --eval_problems 20 --reward length"
    folder = train.main(parse_train("--model", base, *SMALL.split(), *flags.split()))
    config = read_config(folder)
    assert (config["group_size"], config["name"], config["reward"]) == (8, "demo", "length")
    rows = metrics_of(folder)
    assert ["eval_accuracy" in row for row in rows] == [False, True, True]
    assert [row["prompts_seen"] for row in rows] == [4, 8, 12]
    assert all(0 < row["sampler_gap"] < 1e-5 and row["grad_norm"] > 0 for row in rows)
    problems = take_problems(load_task("add").train, 0, 12, seed=0)
    groups = defaultdict(list)
    for sample in read_rows(folder / "samples.jsonl"):
        assert sample["prompt_index"] == 4 * (sample["step"] - 1) + sample["group"]
        assert sample["prompt"] == problems[sample["prompt_index"]].prompt
        groups[sample["step"], sample["group"]].append(sample)
    assert {len(group) for group in groups.values()} == {8}  # whole groups, one or two a step
    assert {step for step, _ in groups} == {1, 2, 3} and 3 < len(groups) <= 6
    for row in rows:
        logged = [group for (step, _), group in groups.items() if step == row["step"]]
        widest = max(pstdev(sample["reward"] for sample in group) for group in logged)
        assert widest >= row["reward_std"] > 0
    before, after = (json.loads((folder / f"{when}.json").read_text()) for when in WHEN)
    assert len(before["responses"]) == len(after["responses"]) == 20
    measured = after["mean_reward"]
    assert rows[-1]["eval_mean_reward"] == measured["sampled"]["mean"] != measured["greedy"]["mean"]
    card = (folder / "checkpoint" / "README.md").read_text()
    for text in (f"{base}, trained by GRPO: 3 steps", "the reward `length`", "accuracy sampled"):
        assert text in card
    for script in ("train.py", "engine/generate.py"):
        assert (folder / "code" / script).read_text() == (ROOT / script).read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    load_policy(str(folder), CPU)
    assert not torch.equal(weights_of(base), weights_of(folder / "checkpoint"))


def test_resumed_equals_straight_to_the_last_bit(base):
    """Dies in step 5, after the checkpoint of step 4. The reward draws from the random states of
    Python and of torch: a state of torch that was saved wrongly once went unnoticed."""
    flags = "--reward noisy --steps 7 --save_every 2 --eval_every 3 --eval_problems 10"
    resumed = cut_and_resume(5, base, flags)
    assert_equal(resumed, run(base, flags))


def test_with_everything_on_resumed_equals_straight(base):
    """The reference is the model that the run started from, not the checkpoint; prompts that
    resampling took are not taken again."""
    flags = """--reward seven --recipe dapo --updates_per_rollout 2 --minibatches 2 --kl_beta 0.05
        --steps 5 --save_every 2"""
    resumed = cut_and_resume(3, base, flags)
    assert_equal(resumed, run(base, flags))
    rows = metrics_of(resumed)
    assert rows[-1]["kl"] > 1e-3 and max(row["batches_drawn"] for row in rows) > 1
    assert read_config(resumed)["clip_high"] == 0.28


def test_the_reward_rises_on_something_learnable_without_hints(base, capsys):
    rows = metrics_of(run(base, "--reward sevens --steps 20"))
    assert rows[0]["reward"] < 0.15
    assert fmean(row["reward"] for row in rows[-3:]) > rows[0]["reward"] + 0.25
    shown = capsys.readouterr().out
    assert "nothing to learn" not in shown and "by itself" not in shown


def test_each_part_of_a_mixture_is_recorded(base):
    folder = run(base, "--reward 2*exact-0.1*length --true_reward number --steps 2")
    for row in metrics_of(folder):
        expected = 2 * row["reward/exact"] - 0.1 * row["reward/length"]
        assert row["reward"] == pytest.approx(expected, abs=1e-6)
        assert row["reward/length"] == row["response_length"] > 1
        assert row["reward/exact"] <= row["true_reward"] <= 1
        assert "accuracy" not in row  # by `exact`, the rule of the task, in evaluations
    for sample in read_rows(folder / "samples.jsonl"):
        expected = 2 * sample["parts"]["exact"] - 0.1 * sample["length"]
        assert sample["reward"] == pytest.approx(expected)


def test_a_reward_that_fails_stops_the_run_and_the_checkpoint_stays(base):
    """It returns nan once, in step 3."""
    Path("mine.py").write_text("""seen = []
def broken(prompt, response, answer):
    seen.append(response)
    return float('nan') if len(seen) == 2 * 32 + 5 else len(response)
""")
    flags = "--name broken --reward mine.broken --steps 4 --save_every 1"
    with pytest.raises(UserError, match=r"--reward mine.broken: returned nan, not a finite number"):
        run(base, flags)
    assert len(metrics_of(Path("runs/broken"))) == 2
    resumed = start("--name broken --resume")
    assert [row["step"] for row in metrics_of(resumed)] == [1, 2, 3, 4]


def test_the_run_warns_when_reward_and_true_reward_diverge(capsys):
    """In step 3 both fall, in step 4 the reward is higher than in step 2 and the true reward
    lower."""
    run = Run(parse_train("--name=x"))
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").touch()
    for step, value, true in (1, 0.1, 0.3), (2, 0.3, 0.5), (3, 0.2, 0.4), (4, 0.4, 0.4):
        assert capsys.readouterr().out == ""
        row = {"step": step, "reward": value, "true_reward": true}
        append_rows(run.folder / "metrics.jsonl", [row])
        assert run.track_true_reward(1) == (step <= 2)
    warning = "risen from 0.300 to 0.400, but the true reward has fallen from 0.500 to 0.400"
    assert warning in capsys.readouterr().out


def test_the_best_policy_by_the_true_reward_is_kept(base):
    """The true reward falls as the reward rises: the first policy that is saved is the best."""
    flags = "--reward sevens --true_reward others --steps 8 --save_every 4 --warmup_steps 1"
    folder = run(base, flags)
    assert not torch.equal(weights_of(folder / "best"), weights_of(folder / "checkpoint"))
    assert torch.equal(weights_of(folder / "best"), weights_of(folder / "checkpoint.old"))


def test_random_rewards_move_nothing_and_real_ones_do(base):
    """The share of responses that begin with a digit below 5. Noise that some mistake ties to the
    responses would move it."""
    moved = {}
    for name in ("low", "coin"):
        flags = f"--reward {name} --true_reward low --steps 15 --lr 3e-4"
        shares = [row["true_reward"] for row in metrics_of(run(base, flags))]
        moved[name] = fmean(shares[-4:]) - fmean(shares[:4])
    assert moved["low"] > 0.3
    assert abs(moved["coin"]) < 0.15


MISTAKES = """
--task gms8k -> --task gms8k: not one of add, countdown, gsm8k
--reward exakt -> --reward exakt: not one of exact, number
--group_size 1 -> --group_size 1: --normaliser zscore needs at least 2
--temperature nan -> --temperature nan: must be at least 0.0001
--filter top --top_share 1.5 -> --top_share 1.5: must be at most 1
--recipe grop -> argument --recipe: invalid choice: 'grop'
--model no/such/folder -> model no/such/folder: cannot be loaded
--max_new_tokens 200 -> do not fit into the model's context of 128
--resume -> --resume: say which run
--resume --name gone -> runs/gone: no run there
--no_such_flag -> unrecognized arguments: --no_such_flag"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_a_mistake_gets_one_sentence_and_status_2(base, capsys, monkeypatch, line):
    flags, message = line.split(" -> ")
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", base, *flags.split()])
    with pytest.raises(SystemExit) as exit:
        run_script(train.main, train.Config, train.__doc__, train.fill, train.HELP, after_mistake)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert error.startswith("train.py: error: ") and message in error
    assert not Path("runs").exists()


def test_a_taken_name_is_refused_and_nothing_there_changes(base):
    folder = run(base, "--name demo --steps 1")
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    with pytest.raises(UserError, match="--name demo: runs/demo is there already"):
        run(base, "--name demo --steps 1")
    assert [path.read_bytes() for path in files] == before
    assert [run(base, "--steps 1").name for _ in range(2)] == ["add", "add-2"]


@pytest.mark.slow
def test_scripts_work_as_commands(base):
    """Each in a process of its own, from another folder."""
    commands = {
        f"train.py --model {base} --steps 1 --eval_problems 10 --name x": "eval.py runs/x",
        "eval.py runs/x --limit 30": "30 test problems of add",
        "reward.py runs/x/samples.jsonl --reward exact-length": "length",
        "sample.py runs/x 48+27= --samples 1": "",
    }
    for command, expected in commands.items():
        script, *words = command.split()
        words = [sys.executable, ROOT / script, *words]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_a_run_says_at_its_start_what_it_is_about_to_do(base, capsys):
    run(base, "--reward number --steps 1 --eval_problems 7")
    shown = capsys.readouterr().out
    for text in (
        "7 held out to evaluate on, 843 for eval.py",
        "7 held-out problems tell little: a share of 0.5 has the interval [0.20, 0.80]",
        "number; evaluations measure mean_reward by number and accuracy by exact",
        "float32 on cpu, --lr 0.001",
        "4 prompts x 8 of at most 8 tokens per step, ended by '<eos>'",
    ):
        assert text in shown


def test_cheap_checks_come_before_the_model_is_loaded(monkeypatch):
    """Loading may take minutes, or fetch gigabytes."""
    monkeypatch.setattr(policy, "load_policy", None)
    taken = Path("runs", "taken")
    taken.mkdir(parents=True)
    (taken / "config.json").touch()
    for flags in ("--name taken", "--task nope", "--reward nope", "--temperature 0"):
        with pytest.raises(UserError, match=flags):
            train.main(parse_train(*flags.split()))
    with pytest.raises(UserError, match="--reward nope"):
        train.main(parse_train("--true_reward", "2*nope"))


def test_a_run_that_goes_nowhere_says_so_once_and_stops_sampling_more(base, capsys):
    """Every response gets the same reward. --filter resample tries three batches in each of the
    first ten steps, and one after that, also when resumed."""
    flags = "--reward same --filter resample --resample_tries 3 --prompts_per_step 2 --group_size 2"
    folder = run(base, flags, "--steps 13 --max_new_tokens 1 --save_every 11")
    drawn = [row["batches_drawn"] for row in metrics_of(folder)]
    assert drawn == [3] * 10 + [1] * 3
    shown = capsys.readouterr().out
    assert shown.count("in ten steps all rewards of each group were equal") == 1
    assert shown.count("no response has ended by itself in three steps") == 1
    start("--name add --resume --steps 14")
    assert metrics_of(folder)[-1]["batches_drawn"] == 1


@pytest.mark.parametrize(("save_every", "left"), [(1, "cut"), (9, "cut.failed")])
def test_a_reward_that_fails_says_how_to_go_on(base, capsys, monkeypatch, save_every, left):
    """It fails in step 2. With a checkpoint of step 1: by --resume. Without: the name is free."""
    Path("mine.py").write_text("""
seen = []
def broken(prompt, response, answer):
    seen.append(response)
    return 1 / (len(seen) < 40)
""")
    flags = f"--name cut --reward mine.broken --steps 4 --save_every {save_every}"
    words = ["train.py", "--model", base, *SMALL.split(), *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        run_script(train.main, train.Config, train.__doc__, train.fill, train.HELP, after_mistake)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "ZeroDivisionError" in said
    assert ("python train.py --name cut --resume" in said) == (left == "cut")
    assert [path.name for path in Path("runs").iterdir()] == [left]
    assert len(metrics_of(Path("runs") / left)) == 1
