"""The first ten steps of the built-in task, pinned: an accidental change of behaviour is seen here first.

    python tests/test_pinned.py          # after a change that is meant, writes tests/pinned.json anew

The model is the built-in one before it has learnt anything, with small numbers, since what a policy samples must not
hang on the last bits of its weights: those differ between processors and versions of torch. All metrics but times are
compared, to 1 part in 1,000.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINNED = Path(__file__).with_name("pinned.json")
FLAGS = ["--device=cpu", "--steps=10", "--prompts_per_step=4", "--group_size=8", "--max_new_tokens=12",
         "--eval_every=5", "--eval_problems=20", "--lr=1e-3", "--reward=exact + 0.1*length + contains('1')"]


def first_ten(folder: Path) -> list[dict]:
    """The metrics of ten steps in the current folder."""
    import torch

    import pretrain
    import track
    import train
    from flags import parse
    from policy import save_policy

    torch.manual_seed(0)
    tokenizer = pretrain.make_tokenizer()
    save_policy(pretrain.make_model(tokenizer), tokenizer, folder / "untaught")
    flags = [f"--runs_dir={folder}", *FLAGS, f"--model={folder / 'untaught'}"]
    run = train.main(parse(train.Config, train.HELP, flags, train.fill)[0])
    return [{key: value for key, value in row.items() if not key.startswith("seconds")}
            for row in track.read_rows(run / "metrics.jsonl")]


def test_the_first_ten_steps_are_what_they_were(tmp_path):
    import pytest

    pinned = json.loads(PINNED.read_text())
    for now, then in zip(first_ten(tmp_path), pinned, strict=True):
        assert now.pop("sampler_gap") < 1e-5 and then.pop("sampler_gap") < 1e-5  # round-off itself
        assert list(now) == list(then)
        assert now == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in then.items()}, then["step"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        rows = first_ten(Path(folder))
    PINNED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
