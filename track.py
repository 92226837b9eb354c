"""The run folder: what a run leaves on disk.

    runs/<name>/config.json     every flag, versions, device, git commit
                metrics.jsonl   one object a step; the README defines each key
                samples.jsonl   a few responses a step, with rewards and weights
                code/           the scripts as they ran
                checkpoint/     the policy as a Hugging Face folder, and state.pt to go on from
                curves.png      drawn by plot.py while it runs

Plain files, written by plain functions: the first argument is the folder.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import matplotlib
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from flags import UserError

HERE = Path(__file__).parent


def new_run(parent: str, name: str, task: str) -> Path:
    """Makes parent/name; without a name task, task-2, task-3 ... UserError if the name is taken."""
    stem = Path(task).stem
    names = iter([name] if name else [stem, *(f"{stem}-{number}" for number in range(2, 10_000))])
    for folder in (Path(parent) / name for name in names):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--runs_dir {parent}: {folder} cannot be made: {error.strerror}") from None
    raise UserError(f"--name {name}: {Path(parent) / name} is there already: choose another name, or --resume")


def record_start(folder: Path, config, device: torch.device) -> None:
    """Writes config.json and code/: what ran, on what."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=HERE, capture_output=True,
                            text=True, check=False).stdout.strip()
    write_json(folder / "config.json", {
        "config": asdict(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
                     "matplotlib": matplotlib.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    })
    (folder / "code").mkdir(exist_ok=True)
    for script in HERE.glob("*.py"):
        shutil.copy(script, folder / "code")


class Tracker:
    """Sends metrics on to a program that draws them: tensorboard (files in the run folder), trackio (a local database)
    or wandb (files in the run folder; WANDB_MODE=online sends them to its server). 'none' does nothing."""

    def __init__(self, kind: str):
        """UserError if its package is missing."""
        self.kind, self.writer = kind, None
        try:
            if kind != "none":
                self.module = importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(kind, kind))
        except ImportError:
            raise UserError(f"--tracker {kind}: the package is not installed: pip install {kind}") from None

    def send(self, run: Path, config, metrics: dict) -> None:
        if self.kind == "none":
            return
        if self.writer is None and self.kind == "tensorboard":
            self.writer = self.module.SummaryWriter(run / "tensorboard")
        elif self.writer is None:
            local = dict(dir=run, mode=os.environ.get("WANDB_MODE", "offline")) if self.kind == "wandb" else {}
            self.writer = self.module.init(project="grpo-basics", name=run.name, config=asdict(config), **local)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float)) and key != "step"}
        if self.kind == "tensorboard":
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, metrics["step"])
            self.writer.flush()
        else:
            self.writer.log(numbers, step=metrics["step"])


def is_run(folder: Path) -> bool:
    return (folder / "config.json").exists() and (folder / "code").is_dir()


def read_config(folder: Path) -> dict:
    """The flags of a run. UserError if `folder` holds none."""
    try:
        return json.loads((folder / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: no run there (its config.json cannot be read)") from None


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def append(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, numbers in full, so that two runs can be compared to the last bit."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file, if it exists. One cut short by a crash can only be the last: it is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def rewind(folder: Path, step: int) -> None:
    """Takes what was written after `step` out of metrics.jsonl and samples.jsonl: those steps are done again."""
    for path in (folder / "metrics.jsonl", folder / "samples.jsonl"):
        aside = path.with_name(path.name + ".part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))
        aside.replace(path)


@contextmanager
def new_checkpoint(folder: Path, name: str = "checkpoint") -> Iterator[Path]:
    """A folder to write into, which takes the place of folder/name only when the block has ended well."""
    final, aside, old = (folder / f"{name}{state}" for state in ("", ".part", ".old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path:
    """folder/checkpoint; after a crash between two renames, the one before it. UserError if there is none."""
    final, old = folder / "checkpoint", folder / "checkpoint.old"
    if not final.exists() and old.exists():
        old.rename(final)
    if not (final / "state.pt").exists():
        raise UserError(f"{folder}: no checkpoint to resume from")
    return final


def watch(folder: Path, every: int) -> bool:
    """Whether the mean true reward of the last `every` steps is the best so far. Warns where the two have parted: the
    reward has risen since the true one was at its best, while the true one has fallen by more than 0.05."""
    rows = read_rows(folder / "metrics.jsonl")
    blocks = [rows[start : start + every] for start in range(0, len(rows), every)]
    reward, true = ([sum(row[key] for row in block) / len(block) for block in blocks]
                    for key in ("reward", "true_reward"))
    best = true.index(max(true))
    if reward[-1] > reward[best] and true[-1] < true[best] - 0.05:
        tqdm.write(f"warning: since step {blocks[best][-1]['step']} the reward has risen from {reward[best]:.3f} to "
                   f"{reward[-1]:.3f}, but the true reward has fallen from {true[best]:.3f} to {true[-1]:.3f}: the "
                   f"policy learns what the reward likes, not what is right. {folder}/best is the policy at its best")
    return best == len(blocks) - 1


def describe(samples: list[dict], rewards: Tensor, weights: Tensor, lengths: Tensor, finished: Tensor) -> dict:
    """A step's responses in numbers; one without a meaning (how long cut responses are, where none is) is left out.
    rewards: (P, G); weights (0 where filtered), lengths, finished: (B,), as the samples."""
    true_rewards = torch.tensor([sample["true_reward"] for sample in samples], dtype=torch.float64).view_as(rewards)
    right = true_rewards == 1
    numbers = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(1, correction=0).mean(),
        "reward_std_between": rewards.mean(1).std(correction=0),
        **{f"reward/{part}": torch.tensor([sample["parts"][part] for sample in samples]).mean()
           for part in samples[0]["parts"]},
        "informative": (rewards.amax(1) != rewards.amin(1)).float().mean(),
        "true_reward": true_rewards.mean(),
        "accuracy": right.double().mean(),
        "all_right": right.all(1).float().mean(),
        "all_wrong": (~right).all(1).float().mean(),
        "thinking": torch.tensor(["</think>" in sample["response"] for sample in samples]).double().mean(),
        "response_length": lengths.float().mean(),
        "response_length_finished": lengths[finished].float().mean(),
        "response_length_cut": lengths[~finished].float().mean(),
        "finished": finished.float().mean(),
        "effective_samples": weights.abs().sum() ** 2 / weights.square().sum(),
    }
    return {name: number.item() for name, number in numbers.items() if not number.isnan()}


def summarise(updates: list[dict[str, float]]) -> dict[str, float]:
    """The optimizer steps of a step: means over them, but for ratio_max. The sampler is the learner in the first alone;
    ratios say something from the second."""
    if not updates:
        return {"updates": 0, "loss": 0.0, "grad_norm": 0.0}
    means = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
    means |= {"sampler_gap": updates[0]["sampler_gap"], "ratio_max": max(update["ratio_max"] for update in updates)}
    hidden = ("ratio_mean", "ratio_max", "clip_share") if len(updates) == 1 else ()
    return {"updates": len(updates)} | {key: value for key, value in means.items() if key not in hidden}


def one_line(metrics: dict) -> str:
    """A step for the screen."""
    line = (f"step {metrics['step']:4d}  reward {metrics['reward']:.3f}  informative {metrics['informative']:.2f}  "
            f"thinking {metrics['thinking']:.2f}  length {metrics['response_length']:.1f}  "
            f"entropy {metrics['entropy']:.3f}  grad {metrics['grad_norm']:.2f}  {metrics['seconds']:.2f} s")
    line += "" if metrics["updates"] else "  no response carries a weight: no update"
    return line + (f"  held-out accuracy {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else "")


def shorten(text: str | list, limit: int = 300) -> str:
    """One line for the screen: white space folded, at most `limit` characters."""
    line = " ".join((text if isinstance(text, str) else json.dumps(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def align(rows: list[list[str]]) -> str:
    """Columns for the screen, as wide as their widest cell: [["a", "b"], ["long", "c"]] -> 'a     b\\nlong  c'"""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
