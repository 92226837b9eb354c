"""Fit a reward model to preferences: of two responses to a prompt, which is the better one?

    python -m tools.train_reward --task add --label exact               # a policy answers
    python -m tools.train_reward runs/add/samples.jsonl --label exact   # a run has answered
    python -m tools.train_reward pairs.jsonl --model FOLDER             # a person has preferred
    python train.py --reward 'model("runs/rm")' --normaliser mean --lr 5e-5 --true_reward exact

Each line of pairs.jsonl has "prompt", "chosen" and "rejected". The base may be any causal language
model. Its last hidden state at the last token becomes one number, the score. The loss is that of
Bradley and Terry, -log sigmoid(score of chosen - score of rejected), plus 0.01 (sum of the two
scores)^2, which keeps scores near 0. One prompt in ten is held out, with its pairs. The result is
an ordinary Hugging Face folder.
"""

import json
import math
import random
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs from any folder

import engine.choose
from engine.optimizer import Optimizer
from lib.files import is_prompt, is_string, read_jsonl, whole, write_json
from lib.flags import UserError, check_range, flag, run_script
from lib.reward_model import RewardModel
from lib.run import is_run, read_config
from lib.stats import wilson
from policy import DEVICES, load_policy, pick_device, save_policy, stop_ids
from reward import load_reward, read_samples, score
from sample import Sampling, sampling_of
from tasks import hold_out, load_task, prompt_ids, stable_hash, take_problems


@dataclass(frozen=True)
class Config:
    output: str = flag("runs/rm", "folder to write")
    model: str = flag("", "base: Hugging Face name or folder; default: the policy's or the run's")
    # where pairs come from without a file of pairs
    task: str = flag("add", "task whose training problems the policy answers")
    data_dir: str = flag("", "folder with the task's files, if it needs any")
    policy: str = flag("models/add", "model or run folder that answers them")
    label: str = flag("", "reward that decides which is better; default: the run's or task's")
    prompts: int = flag(512, "problems to answer")
    group_size: int = flag(16, "responses to each problem")
    max_new_tokens: int = flag(32, "tokens after which a response is truncated")
    pairs_per_prompt: int = flag(8, "most pairs to take from one prompt")
    # the fit
    epochs: int = flag(4, "times that each pair is seen, on average")
    batch_size: int = flag(64, "pairs per step")
    lr: float = flag(0.0, "highest learning rate; 0: 1e-3 below 10 M parameters, else 1e-5")
    seed: int = flag(0, "same seed, same model")
    device: Literal[DEVICES] = flag("auto", "auto: the first of these that is available")


@dataclass(frozen=True)
class Pair:
    prompt: str | list
    chosen: str
    rejected: str


def make_pairs(groups, most, rng) -> list[Pair]:
    """Prompts (as JSON) with their responses and values -> at most `most` pairs for each prompt.

    {'"2+2="': {"4": 1.0, "5": 0.0, "6": 0.0}} -> Pair("2+2=", "4", "5"), Pair("2+2=", "4", "6")
    """
    pairs = []
    for prompt, values in groups.items():
        unequal = [(a, b) for a in values for b in values if values[a] > values[b]]
        for chosen, rejected in rng.sample(unequal, min(most, len(unequal))):
            pairs.append(Pair(json.loads(prompt), chosen, rejected))
    return pairs


def sample_responses(config, device) -> list[dict]:
    """Samples for `score`: the policy's responses to training problems of the task."""
    policy, tokenizer = load_policy(config.policy, device)
    task = load_task(config.task, config.data_dir)
    problems = take_problems(task.train, 0, config.prompts, config.seed)
    prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
    seeds = [stable_hash(f"{config.seed}/pairs/{i}") for i in range(len(problems))]
    is_a_run = is_run(Path(config.policy))
    sampling = sampling_of(read_config(Path(config.policy))) if is_a_run else Sampling()
    stop = stop_ids(policy, tokenizer, sampling.stop)
    G, N = config.group_size, config.max_new_tokens
    print(f"sampling {G} responses to each of {len(problems)} prompts")
    forms = engine.choose.choose(policy, prompts[:8], stop, sampling, N)
    rollout = forms.generate(policy, prompts, G, N, stop, seeds, sampling, rows_at_once=512)
    return rollout.samples(problems, tokenizer)


def read_pairs(config, source, device) -> list[Pair]:
    """Pairs from a file of pairs, from a file of samples, or from new responses of the policy."""
    if source and "chosen" in read_jsonl(Path(source), {"prompt": is_prompt})[0]:
        fields = {"prompt": is_prompt, "chosen": is_string, "rejected": is_string}
        rows = read_jsonl(Path(source), fields)
        return [Pair(*map(row.get, fields)) for row in rows]
    samples, flags = read_samples(source) if source else (sample_responses(config, device), {})
    label = config.label or flags.get("true_reward") or flags.get("reward")
    flags = {**asdict(config), **flags}
    label = label or load_task(flags["task"], flags["data_dir"]).reward
    print(f"the better response is the one with more of --label {label}")
    reward = load_reward(label, device)
    groups = defaultdict(dict)
    for sample, found in zip(samples, score(reward, samples, flags["max_new_tokens"])):
        groups[json.dumps(sample["prompt"])][sample["response"]] = found["reward"]
    return make_pairs(groups, config.pairs_per_prompt, random.Random(config.seed))


def encode(reward_model, pairs) -> list[list[list[int]]]:
    """The token ids of each pair: [chosen, rejected]"""
    rows = []
    for pair in pairs:
        rows.append([reward_model.ids(pair.prompt, text) for text in (pair.chosen, pair.rejected)])
    return rows


def pair_scores(reward_model, rows) -> Tensor:
    """M rows from `encode` -> (2, M) scores of the chosen, scores of the rejected."""
    return reward_model.scores([ids for pair in rows for ids in pair]).view(-1, 2).T


def longer_wins(pairs) -> float:
    """The accuracy of the rule that the longer response is the better one."""
    lengths = [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    return share_higher(*torch.tensor(lengths).T)


def share_higher(chosen, rejected) -> float:
    """Share of the pairs in which the chosen one has more. A tie counts half.

    (0, 1, 2, 3), (1, 1, 0, 0) -> 0.625
    """
    return (((chosen - rejected).sign() + 1) / 2).mean().item()


def fit(reward_model, rows, held_out, config) -> list[dict]:
    """Trains on pairs (rows from `encode`) -> step, loss and sometimes accuracy of each step."""
    lr = config.lr
    if lr == 0:
        lr = 1e-3 if reward_model.model.num_parameters() < 10e6 else 1e-5
    optimizer = Optimizer(reward_model.model, weight_decay=0.0)
    rng = random.Random(config.seed)
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    curve = []
    for step in trange(1, steps + 1, desc=f"fitting {config.output}", dynamic_ncols=True):
        batch = rng.sample(rows, min(config.batch_size, len(rows)))
        chosen, rejected = pair_scores(reward_model, batch)
        preference = -logsigmoid(chosen - rejected)
        offset = (chosen + rejected) ** 2  # the preference does not fix where 0 is
        loss = (preference + 0.01 * offset).mean()
        if not loss.isfinite():
            raise UserError(f"--lr {lr}: the loss is {loss.item()} at step {step}, lower it")
        loss.backward()
        schedule = min(step / 10, 1 - 0.9 * step / steps)  # a warm-up of 10 steps, then down
        optimizer.step(lr * schedule, max_grad_norm=1.0)
        curve.append({"step": step, "loss": loss.item()})
        if step == steps or step % max(1, steps // 8) == 0:
            with torch.no_grad():
                scores = pair_scores(reward_model, held_out)
            curve[-1]["accuracy"] = share_higher(*scores)
    return curve


def main(config, source=None) -> Path:
    """Fits, measures, writes; returns the folder."""
    at_least_1 = "prompts group_size max_new_tokens pairs_per_prompt epochs batch_size"
    check_range(config, 1, at_least_1, most=1e6)
    check_range(config, 0, "seed")
    check_range(config, 0, "lr", most=1)
    device = pick_device(config.device)
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already, delete it or choose another")

    pairs = read_pairs(config, source, device)
    if len({json.dumps(pair.prompt) for pair in pairs}) < 10:
        raise UserError(
            f"{source or config.policy}: fewer than 10 prompts on which one response is better "
            "than another: give more --prompts or a larger --group_size (a run keeps --log_samples "
            "per step)"
        )
    held_out, pairs = hold_out(pairs, 0.1)
    run = Path(source or "").parent  # whose responses they are
    base = config.model or (read_config(run)["model"] if is_run(run) else config.policy)
    if is_run(Path(base)):
        base = f"{base}/checkpoint"
    print(f"base: {base}")
    torch.manual_seed(config.seed)  # the head for the score starts at random
    reward_model = RewardModel(base, device, num_labels=1)
    rows = encode(reward_model, pairs)
    curve = fit(reward_model, rows, encode(reward_model, held_out), config)

    right = curve[-1]["accuracy"]
    low, high = wilson(right * len(held_out), len(held_out))
    longer = longer_wins(held_out)
    model = reward_model.model
    with torch.no_grad():
        mean_score = reward_model.scores([chosen for chosen, _ in rows]).mean().item()
    model.config.mean_chosen_score = mean_score  # model("...") subtracts it
    model.config.get_text_config().pad_token_id = reward_model.tokenizer.pad_token_id
    result = {
        "config": asdict(config),
        "source": source,
        "pairs": len(pairs),
        "held_out": len(held_out),
        "accuracy": right,
        "interval": [low, high],
        "longer_wins": longer,
        "mean_chosen_score": mean_score,
        "curve": curve,
    }

    with whole(output) as folder:
        save_policy(model, reward_model.tokenizer, folder)
        write_json(folder / "fit.json", result)
    print(f"""
{len(held_out)} held-out pairs (fitted to {len(pairs)})
the reward model prefers the chosen one in {right:.3f} [{low:.3f}, {high:.3f}]
the longer one is the chosen one in         {longer:.3f}

{output}/: a Hugging Face folder, and fit.json

    python train.py --reward 'model("{output}")' --normaliser mean --lr 5e-5""")
    return output


if __name__ == "__main__":
    source = {"nargs": "?", "help": "pairs.jsonl, or samples.jsonl of a run"}
    run_script(main, Config, __doc__, source=source)
