"""Fits a reward model to preferences: of two responses to a prompt, which is the better one?

    python train_reward.py pairs.jsonl --model FOLDER               # lines of "prompt", "chosen", "rejected"
    python train_reward.py --task add --label exact                 # pairs from samples of a policy, judged by a reward
    python train_reward.py runs/add/samples.jsonl --label exact     # pairs from what a run sampled
    python train.py --reward 'model("runs/rm")' --normaliser mean --lr 5e-5 --true_reward exact

The base may be any causal language model: its last hidden state at the last token is turned into one number, the score.
The loss is -log sigmoid(score of chosen - score of rejected) (Bradley-Terry), + 0.01 (sum of the two)^2, which keeps
scores near 0. One pair in ten, by prompt, is held out. The result is an ordinary Hugging Face folder.
"""

import json
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch.nn.functional import logsigmoid
from tqdm import tqdm, trange
from transformers.hf_argparser import HfArg

import track
from flags import UserError, need, run_script
from policy import Optimizer, load_policy, pick_device, save_policy, stop_ids
from reward import RewardModel, load_reward, read_samples, score
from sample import generate
from stats import wilson
from tasks import digest, hold_out, is_prompt, load_task, prompt_ids, read_jsonl, stream


@dataclass(frozen=True)
class Config:
    output: str = HfArg(default="runs/rm", help="folder to write")
    model: str = HfArg(default="", help="base to fit: Hugging Face name or folder; default: the policy")
    # where pairs come from, if not from a file of pairs
    task: str = HfArg(default="add", help="task whose training problems the policy answers")
    data_dir: str = HfArg(default="", help="folder with the task's files, if it needs some")
    policy: str = HfArg(default="models/add", help="model or run folder that answers them")
    label: str = HfArg(default="", help="reward that stands in for the person who prefers; default: the task's rule")
    prompts: int = HfArg(default=512, help="problems to answer")
    group_size: int = HfArg(default=16, help="responses to each")
    max_new_tokens: int = HfArg(default=32, help="tokens after which a response is cut")
    pairs_per_prompt: int = HfArg(default=8, help="at most so many pairs of a prompt")
    # the fit
    epochs: int = HfArg(default=4, help="times that each pair is seen, on average")
    batch_size: int = HfArg(default=64, help="pairs a step")
    lr: float = HfArg(default=0.0, help="highest learning rate; 0 takes 1e-3 under 10 M parameters, else 1e-5")
    seed: int = HfArg(default=0, help="same seed, same model")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")


@dataclass(frozen=True)
class Pair:
    prompt: str | list
    chosen: str
    rejected: str


def pairs_of(groups: dict[str, dict[str, float]], most: int, rng: random.Random) -> list[Pair]:
    """{prompt as JSON: {response: value}} -> pairs of a better with a worse response, at most so many a prompt."""
    pairs = []
    for prompt, values in groups.items():
        unequal = [(one, other) for one in values for other in values if values[one] > values[other]]
        pairs += [Pair(json.loads(prompt), *pair) for pair in rng.sample(unequal, min(most, len(unequal)))]
    return pairs


def sample(config: Config, device: torch.device) -> tuple[list, list[str], list[str], list[int]]:
    """Prompts, the policy's responses, answers, lengths in tokens: of training problems of the task."""
    policy, tokenizer = load_policy(config.policy, device)
    task, responses, lengths = load_task(config.task, config.data_dir), [], []
    problems = stream(task.train, 0, min(config.prompts, len(task.train)), config.seed)
    for start in tqdm(range(0, len(problems), 32), desc="sampling", dynamic_ncols=True):
        batch = problems[start : start + 32]
        rollout = generate(policy, [prompt_ids(task, problem, tokenizer) for problem in batch], config.group_size,
                           config.max_new_tokens, stop_ids(policy, tokenizer),
                           [digest(f"{config.seed}/pairs/{start + i}") for i in range(len(batch))])
        responses += rollout.responses(tokenizer)
        lengths += rollout.response_lengths.tolist()
    rows = [problem for problem in problems for _ in range(config.group_size)]
    return [row.prompt for row in rows], responses, [row.answer for row in rows], lengths


def read_pairs(config: Config, source: str | None, device: torch.device) -> list[Pair]:
    """Pairs from a file of pairs, from a file of samples, or from fresh samples of the policy."""
    def is_string(value) -> bool:
        return isinstance(value, str)

    if source and "chosen" in read_jsonl(Path(source), {"prompt": is_prompt})[0]:
        rows = read_jsonl(Path(source), {"prompt": is_prompt, "chosen": is_string, "rejected": is_string})
        return [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    prompts, responses, *rest = read_samples(Path(source)) if source else sample(config, device)
    label = config.label or load_task(config.task, config.data_dir).reward
    values, _ = score(load_reward(label, device), prompts, responses, *rest, config.max_new_tokens)
    groups = defaultdict(dict)
    for prompt, response, value in zip(prompts, responses, values):
        groups[json.dumps(prompt)][response] = value
    return pairs_of(groups, config.pairs_per_prompt, random.Random(config.seed))


def encode(judge: RewardModel, pairs: list[Pair]) -> list[list[int]]:
    """N pairs -> 2 N rows of token ids: chosen, rejected, chosen, rejected ..."""
    return [judge.ids(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]


@torch.no_grad()
def accuracy(judge: RewardModel, rows: list[list[int]]) -> float:
    """Share of the pairs in which the judge prefers the chosen one. A tie counts half."""
    chosen, rejected = judge.scores(rows).view(-1, 2).unbind(1)
    return (0.5 * (chosen >= rejected) + 0.5 * (chosen > rejected)).mean().item()


def longer_wins(pairs: list[Pair]) -> float:
    """The accuracy of the rule that the longer text is the better one."""
    gaps = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    return sum(0.5 * (gap >= 0) + 0.5 * (gap > 0) for gap in gaps) / len(gaps)


def main(config: Config, source: str | None = None) -> Path:
    """Fits, measures, writes; returns the folder."""
    need(config, 1, "prompts group_size max_new_tokens pairs_per_prompt epochs batch_size", most=1e6)
    need(config, 0, "seed")
    need(config, 0, "lr", most=1)
    output, device, started = Path(config.output), pick_device(config.device), time.perf_counter()
    if output.exists():
        raise UserError(f"--output {output}: is there already, delete it or choose another")
    pairs = read_pairs(config, source, device)
    if len({json.dumps(pair.prompt) for pair in pairs}) < 10:
        raise UserError(f"{source or config.policy}: fewer than 10 prompts on which one response is better than "
                        "another: give more --prompts or a larger --group_size (a run keeps --log_samples a step)")
    held_out, pairs = hold_out(pairs, 0.1)
    base = config.model or config.policy
    torch.manual_seed(config.seed)  # of the new head
    judge = RewardModel(str(Path(base) / "checkpoint") if track.is_run(Path(base)) else base, device, num_labels=1)
    lr = config.lr or (1e-3 if judge.model.num_parameters() < 10e6 else 1e-5)
    optimizer, rng, curve = Optimizer(judge.model, 0.0), random.Random(config.seed), []
    rows, held_rows = encode(judge, pairs), encode(judge, held_out)
    steps = config.epochs * -(-len(pairs) // config.batch_size)
    for step in (bar := trange(1, steps + 1, desc=f"fitting {output}", dynamic_ncols=True)):
        batch = rng.sample(range(len(pairs)), min(config.batch_size, len(pairs)))
        chosen, rejected = judge.scores([rows[2 * i + k] for i in batch for k in (0, 1)]).view(-1, 2).unbind(1)
        loss = (-logsigmoid(chosen - rejected) + 0.01 * (chosen + rejected) ** 2).mean()
        if not loss.isfinite():
            raise UserError(f"--lr {lr}: the loss is {loss.item()} at step {step}, lower it")
        loss.backward()
        optimizer.step(lr * min(step / 10, 1 - 0.9 * step / steps), 1.0)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        curve.append({"step": step, "loss": loss.item()})
        if step == steps or step % max(1, steps // 8) == 0:
            curve[-1]["accuracy"] = accuracy(judge, held_rows)
    right, longer = curve[-1]["accuracy"], longer_wins(held_out)
    low, high = wilson(right * len(held_out), len(held_out))
    with torch.no_grad():
        mean_chosen = judge.scores(rows[::2]).mean().item()
    judge.model.config.mean_chosen_score = mean_chosen  # model("...") subtracts it
    judge.model.config.get_text_config().pad_token_id = judge.tokenizer.pad_token_id
    aside = output.with_name(f"{output.name}.{os.getpid()}.part")
    save_policy(judge.model, judge.tokenizer, aside)
    track.write_json(aside / "fit.json", {"config": asdict(config), "source": source, "pairs": len(pairs),
                                          "held_out": len(held_out), "accuracy": right, "interval": [low, high],
                                          "longer_wins": longer, "mean_chosen_score": mean_chosen, "curve": curve})
    plot(curve, aside / "curve.png")
    aside.rename(output)
    print(f"\n{len(held_out)} held-out pairs (fitted to {len(pairs)}), {time.perf_counter() - started:.0f} s in all\n"
          f"the reward model prefers the chosen one in {right:.3f} [{low:.3f}, {high:.3f}]\n"
          f"the longer one is the chosen one in         {longer:.3f}\n\n"
          f"{output}/: a Hugging Face folder, curve.png, fit.json\n\n"
          f"    python train.py --reward 'model(\"{output}\")' --normaliser mean --lr 5e-5")
    return output


def plot(curve: list[dict], path: Path) -> None:
    """The loss of each step, and the accuracy on held-out pairs."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    left = figure.subplots()
    left.plot([row["step"] for row in curve], [row["loss"] for row in curve], color="C0", alpha=0.6)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    points = [(row["step"], row["accuracy"]) for row in curve if "accuracy" in row]
    right = left.twinx()
    right.plot(*zip(*points), "o-", color="C1", markersize=4)
    right.set(ylabel="accuracy on held-out pairs (dots)", ylim=(0.45, 1.02))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main, Config, __doc__, source=dict(nargs="?", help="pairs.jsonl, or samples.jsonl of a run"))
