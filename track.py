"""The run folder: what a run leaves on disk.

    runs/<name>/config.json     every flag, versions, device, git commit
                metrics.jsonl   one object a step; the README defines each key
                samples.jsonl   a few responses a step, with rewards and weights
                code/           the scripts as they ran
                checkpoint/     the policy as a Hugging Face folder, state.pt to go on from, and checksums.json
                checkpoint.old/ the one before it
                curves.png      drawn by plot.py while it runs
                lock            held while a process is at work on the run

Plain files, written by plain functions: the first argument is the folder. checkpoint.py says how they stay whole.
"""

import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import matplotlib
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from checkpoint import lock, write_json, write_text, writing
from flags import UserError

HERE = Path(__file__).parent


def new_run(parent: str, name: str, task: str) -> tuple[Path, TextIO]:
    """Makes parent/name and locks it; without a name task, task-2, task-3 ... UserError if the name is taken."""
    if name != Path(name).name:
        raise UserError(f"--name {name}: is not the name of a folder; --runs_dir says where it stands")
    stem = Path(task).stem
    names = [name] if name else [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    for folder in (Path(parent) / name for name in names):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            left = {path.name for path in folder.iterdir()} - {"lock", "config.json.part"}  # of one killed at once
            if not left:
                return folder, lock(folder)
        except (FileExistsError, UserError):  # a file has the name, or another process is about to begin there
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
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no run there (its config.json cannot be read)") from None


def append(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, numbers in full, so that two runs can be compared to the last bit."""
    with writing(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> list[dict]:
    """The whole lines of a .jsonl file, if it exists, and of each the keys that are wanted. One cut short by a crash
    can only be the last: it is left out. A long run reads its own metrics again and again, and must not grow with them:
    so line by line, and rows share their keys."""
    rows = []
    if path.exists():
        with path.open(errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                try:
                    rows.append({sys.intern(key): value for key, value in json.loads(line).items() if wanted(key)})
                except (ValueError, AttributeError) as error:  # no JSON, or no object
                    raise UserError(f"{path}, line {number}: is damaged ({error}): mend or delete that line") from None
    return rows


def rewind(folder: Path, step: int) -> None:
    """Takes what was written after `step` out of metrics.jsonl and samples.jsonl: those steps are done again."""
    kept = {path: [row for row in read_rows(path) if row["step"] <= step]
            for path in (folder / "metrics.jsonl", folder / "samples.jsonl")}
    if [row["step"] for row in kept[folder / "metrics.jsonl"]] != list(range(1, step + 1)):
        raise UserError(f"{folder}/metrics.jsonl: does not have each of the steps 1 to {step}: put the file back, or "
                        f"begin a new run with --model {folder}")
    for path, rows in kept.items():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def record(folder: Path, metrics: dict, samples: list[dict], weights: Tensor, most: int) -> None:
    """Appends a step to metrics.jsonl, without what is not finite (it is no JSON), and at most `most` of its samples,
    from best to worst, to samples.jsonl. weights: (B,). Then looks for trouble: UserError from `give_up`."""
    append(folder / "metrics.jsonl", [{key: value for key, value in metrics.items()
                                       if not isinstance(value, float) or math.isfinite(value)}])
    spread = weights.argsort(descending=True)[:: max(1, len(samples) // max(1, most))][:most].tolist()
    append(folder / "samples.jsonl", [{"step": metrics["step"], **samples[row], "weight": weights[row].item()}
                                      for row in spread])
    if metrics["step"] % WINDOW == 0:
        warn_of_collapse(folder)
    if metrics["skipped"] and [row["skipped"] > 0 for row in read_rows(folder / "metrics.jsonl")[-3:]] == [True] * 3:
        give_up(folder, metrics["step"], samples, weights)


def watch(folder: Path, every: int) -> bool:
    """Whether the mean true reward of the last `every` steps is the best so far. Warns where the two have parted: the
    reward has risen since the true one was at its best, while the true one has fallen by more than 0.05."""
    rows = read_rows(folder / "metrics.jsonl", {"step", "reward", "true_reward"}.__contains__)
    blocks = [rows[start : start + every] for start in range(0, len(rows), every)]
    reward, true = ([sum(row[key] for row in block) / len(block) for block in blocks]
                    for key in ("reward", "true_reward"))
    best = true.index(max(true))
    if reward[-1] > reward[best] and true[-1] < true[best] - 0.05:
        tqdm.write(f"warning: since step {blocks[best][-1]['step']} the reward has risen from {reward[best]:.3f} to "
                   f"{reward[-1]:.3f}, but the true reward has fallen from {true[best]:.3f} to {true[-1]:.3f}: the "
                   f"policy learns what the reward likes, not what is right. {folder}/best is the policy at its best")
    return best == len(blocks) - 1


WINDOW = 10  # steps that are averaged to see a collapse


def warn_of_collapse(folder: Path) -> None:
    """Warns where the last 10 steps, for the first time, have under a twentieth of the entropy of the first 10, though
    under 0.9 right, or a reward below that of the best 10 by more than noise, a fifth, and half of the gain."""
    rows = read_rows(folder / "metrics.jsonl", {"entropy", "reward", "accuracy"}.__contains__)
    rows = [row for row in rows if "entropy" in row]
    blocks = [rows[start : start + WINDOW] for start in range(0, len(rows) - WINDOW + 1, WINDOW)]
    entropy, reward, right = ([sum(row[key] for row in block) / WINDOW for block in blocks]
                              for key in ("entropy", "reward", "accuracy"))
    silent = [value < entropy[0] / 20 and share < 0.9 for value, share in zip(entropy, right)]
    fallen, best = [], 0
    for i, value in enumerate(reward):
        best = i if value > reward[best] else best
        noise = math.sqrt(sum((row["reward"] - reward[best]) ** 2 for row in blocks[best]) / WINDOW)
        limit = max(3 * noise, abs(reward[best]) / 5, (reward[best] - reward[0]) / 2)
        fallen.append(reward[best] - value > limit)
    if silent[-1:] == [True] and sum(silent) == 1:
        tqdm.write(f"warning: the entropy has fallen from {entropy[0]:.3f} to {entropy[-1]:.3f} nats: the policy says "
                   "nearly the same each time and finds nothing new; lower --lr, or hold it with --kl_beta 0.01")
    if fallen[-1:] == [True] and sum(fallen) == 1:
        tqdm.write(f"warning: the reward has fallen from {reward[best]:.3f} to {reward[-1]:.3f}: lower --lr, or hold "
                   "the policy with --kl_beta 0.01")


def give_up(folder: Path, step: int, samples: list[dict], weights: Tensor) -> None:
    """Writes all samples of a step whose numbers have gone bad to bad-step.jsonl, and raises UserError."""
    rows = [{"step": step, **sample, "weight": weight} for sample, weight in zip(samples, weights.tolist())]
    write_text(folder / "bad-step.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    raise UserError(f"step {step}: the third in a row with a loss, a gradient or log-probs that are not finite; those "
                    f"updates were skipped. {folder}/bad-step.jsonl has the samples: --resume with a lower --lr")


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
    ratios say something from the second. Those skipped for numbers that are not finite are counted, no more."""
    made = [update for update in updates if math.isfinite(update["grad_norm"])]
    counts, updates = {"updates": len(made), "skipped": len(updates) - len(made)}, made
    if not updates:
        return counts | {"loss": 0.0, "grad_norm": 0.0}
    means = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
    means |= {"sampler_gap": updates[0]["sampler_gap"], "ratio_max": max(update["ratio_max"] for update in updates)}
    hidden = ("ratio_mean", "ratio_max", "clip_share") if len(updates) == 1 else ()
    return counts | {key: value for key, value in means.items() if key not in hidden}


def one_line(metrics: dict) -> str:
    """A step for the screen."""
    line = (f"step {metrics['step']:4d}  reward {metrics['reward']:.3f}  informative {metrics['informative']:.2f}  "
            f"thinking {metrics['thinking']:.2f}  length {metrics['response_length']:.1f}  "
            f"entropy {metrics['entropy']:.3f}  grad {metrics['grad_norm']:.2f}  {metrics['seconds']:.2f} s")
    if metrics["skipped"]:
        line += f"  {metrics['skipped']} updates skipped: their numbers are not finite"
    elif not metrics["updates"]:
        line += "  no response carries a weight: no update"
    return line + (f"  held-out accuracy {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else "")


def shorten(text: str | list, limit: int = 300) -> str:
    """One line for the screen: white space folded, at most `limit` characters."""
    line = " ".join((text if isinstance(text, str) else json.dumps(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def align(rows: list[list[str]]) -> str:
    """Columns for the screen, as wide as their widest cell: [["a", "b"], ["long", "c"]] -> 'a     b\\nlong  c'"""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
