"""A user's own problems and reward: whatever shows the run tells of the same rise, of the same
quantity."""

import json
import re
from pathlib import Path

import pytest
from conftest import parse_train

import eval
import train
from lib.files import read_rows
from lib.plots import read_metrics

FLAGS = """--task story.jsonl --reward my_rewards.short_sentences --steps 12 --prompts_per_step 16
    --group_size 8 --max_new_tokens 24 --eval_every 6 --eval_problems 30 --lr 1e-3 --device cpu"""


@pytest.mark.slow
def test_a_story_run_tells_one_story(base, capsys):
    Path("my_rewards.py").write_text("""
def short_sentences(prompt, response, answer):
    return max(0.0, 1 - len(response) / 20)
""")
    prompts = [f"{a}+{b}=" for a in range(10, 60) for b in range(10, 20)]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    Path("story.jsonl").write_text("".join(lines))
    run = train.main(parse_train("--model", base, *FLAGS.split()))
    shown = capsys.readouterr().out
    assert "accuracy" not in shown

    before, after = (json.loads((run / name).read_text()) for name in ("before.json", "after.json"))
    for kind in ("greedy", "sampled"):
        means = [result["mean_reward"][kind]["mean"] for result in (before, after)]
        assert means[1] > means[0] + 0.1
        pattern = rf"mean_reward {kind} +{means[0]:.3f} .* {means[1]:.3f} "
        assert re.search(pattern, shown)
        assert re.search(pattern, (run / "checkpoint" / "README.md").read_text())
    last = read_rows(run / "metrics.jsonl")[-1]
    assert not {"eval_accuracy", "accuracy", "all_wrong"} & set(last)
    curve = [row["eval_mean_reward"] for row in read_metrics(run) if "eval_mean_reward" in row]
    assert [curve[0], curve[-1]] == means and len(curve) == 3

    found = eval.main(eval.Config(samples=2), [str(run)])
    shown = capsys.readouterr().out
    assert "accuracy" not in shown
    [pair] = found["comparisons"]
    for kind in ("greedy", "sampled"):
        assert (pair[kind]["difference"] > 0.1, pair[kind]["verdict"]) == (True, "better")
        assert f"{kind:7}  {pair[kind]['difference']:+.3f}" in shown
