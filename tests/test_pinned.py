"""The first ten steps of the built-in task, pinned: an accidental change of behaviour shows here.

    python tests/test_pinned.py    # after a change that is meant: writes tests/pinned.json anew

The model has learnt nothing yet, and its numbers are small: what it samples must not depend on the
last bits of its weights, which differ between processors and versions of torch. Metrics are
compared to 1 part in 1,000.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

TESTS = Path(__file__).parent
PINNED = TESTS / "pinned.json"
FLAGS = """--model untaught --device cpu --steps 10 --prompts_per_step 4 --group_size 8
--max_new_tokens 12 --eval_every 5 --eval_problems 20 --lr 1e-3 --reward"""
REWARD = "exact + 0.1*length + my_rewards.ones"
ONES = "def ones(prompt, response, answer):\n    return float('1' in response)\n"


def first_ten():
    """The metrics of ten steps, run in the current folder."""
    from conftest import parse_train

    import lib.run
    import train
    from lib.files import read_rows
    from policy import save_policy
    from tools import pretrain

    torch.manual_seed(0)
    tokenizer = pretrain.make_tokenizer()
    save_policy(pretrain.make_model(tokenizer), tokenizer, Path("untaught"))
    Path("my_rewards.py").write_text(ONES)
    with patch.object(lib.run, "plot_run"):  # slow
        folder = train.main(parse_train(*FLAGS.split(), REWARD))
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: row[key] for key in row if "second" not in key} for row in rows]


def test_the_first_ten_steps_are_what_they_were():
    """A metric that is new is not compared."""
    pinned = json.loads(PINNED.read_text())
    for found, before in zip(first_ten(), pinned, strict=True):
        del before["sampler_gap"]  # rounding errors
        assert found["sampler_gap"] < 1e-5
        found = {key: found.get(key) for key in before}
        expected = {key: pytest.approx(before[key], rel=1e-3, abs=1e-5) for key in before}
        assert found == expected, before["step"]


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = first_ten()
    PINNED.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
