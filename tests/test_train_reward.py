import json
import random
from pathlib import Path

import pytest
import torch
from conftest import CPU, parse_train

import train
from lib.files import write_rows
from lib.flags import UserError
from lib.reward_model import RewardModel
from reward import load_reward, score
from tools import train_reward
from tools.train_reward import Config, Pair, longer_wins, make_pairs


def fit_to(rows, **flags):
    """Fits a reward model to a file, or to responses of a policy -> what its fit.json says."""
    write_rows(Path("rows.jsonl"), rows)
    config = Config(prompts=20, batch_size=16, max_new_tokens=6, epochs=2, device="cpu", **flags)
    folder = train_reward.main(config, rows and "rows.jsonl")
    return json.loads((folder / "fit.json").read_text())


def rewards(reward, responses):
    samples = [{"prompt": "say 9", "response": text, "answer": ""} for text in responses]
    return [found["reward"] for found in score(load_reward(reward), samples)]


def test_a_score_is_bounded_unless_raw(folders):
    judge = RewardModel(folders("llama"), CPU, num_labels=1)
    judge.model.config.mean_chosen_score = 0.7
    judge.model.save_pretrained("judge")
    judge.tokenizer.save_pretrained("judge")
    raw = torch.tensor(rewards('raw_model("judge")', ["4", "no"]))
    bounded = torch.sigmoid(raw - 0.7).tolist()
    assert rewards('model("judge")', ["4", "no"]) == pytest.approx(bounded, abs=1e-6)


def test_pairs_put_the_better_one_first():
    groups = {'"p"': {"a": 1.0, "b": 0.0, "c": 0.0}, '["q"]': {"x": 2.5, "y": 2.5, "z": -1.0}}
    pairs = make_pairs(groups, 9, random.Random(0))
    assert set(pairs[:2]) == {Pair("p", "a", "b"), Pair("p", "a", "c")}
    assert [pair.rejected for pair in pairs[2:]] == ["z", "z"]
    assert len(make_pairs(groups, 1, random.Random(0))) == 2


def test_the_rule_that_the_longer_one_wins():
    """The chosen one is longer in one of four, and as long in one: (1 + 1/2) / 4."""
    pairs = [Pair("p", "aaa", other) for other in ("b", "bbb", "bbbb", "bbbbb")]
    assert longer_wins(pairs) == 0.375


def test_a_fit_learns_who_is_polite(folders):
    rows = [
        {"prompt": f"say {i}", "chosen": f"{i} please", "rejected": f"{i} now, and be quick"}
        for i in range(200)
    ]
    fit = fit_to(rows, output="judge", model=folders("llama"))
    assert (fit["pairs"], fit["held_out"], fit["longer_wins"]) == (181, 19, 0.0)
    assert fit["accuracy"] > 0.9
    polite, rude = rewards('model("judge")', ["9 please", "9 now, and be quick"])
    assert rude < 0.3 < polite < 0.7  # a chosen one has 0.5 on average
    with pytest.raises(UserError, match="--output judge: exists already"):
        fit_to(rows, output="judge")


def test_pairs_are_made_from_responses_of_a_policy_or_of_a_run(base):
    assert fit_to([], output="fresh", policy=base, label="length")["longer_wins"] > 0.9
    rows = [
        {"prompt": f"{i}+1=", "response": response, "answer": "1"}
        for i in range(20)
        for response in "123"
    ]
    fit = fit_to(rows, output="again", policy=base, label="number")
    assert fit["pairs"] == 19 * 2  # 1 is better than 2 and 3; one prompt is held out
    with pytest.raises(UserError, match="fewer than 10 prompts on which one response is better"):
        fit_to(rows, output="none", label="format")


def test_the_responses_of_a_run_are_judged_by_its_reward(base, capsys):
    """Not by the rule of the default task, and the base is the model of the run."""
    flags = "--steps 8 --prompts_per_step 4 --group_size 8 --max_new_tokens 6 --eval_problems 0"
    run = train.main(parse_train("--model", base, "--reward=-1*length", *flags.split()))
    config = Config(output="short", epochs=1, device="cpu")
    fit = json.loads(
        (train_reward.main(config, str(run / "samples.jsonl")) / "fit.json").read_text()
    )
    said = capsys.readouterr().out
    assert f"more of --label -1*length\nbase: {base}\n" in said
    assert fit["longer_wins"] < 0.1
