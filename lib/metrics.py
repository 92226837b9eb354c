"""The numbers of a step, for metrics.jsonl and the screen. docs/metrics.md defines each."""

import math
from itertools import chain
from statistics import fmean

import torch

from lib.processes import gather


def rollout_metrics(batch, samples, rewards) -> dict:
    """The responses of a step in numbers. A number without a meaning (NaN) is omitted, such as the
    mean length of truncated responses if there are none.

    batch:   train.Batch; weights are 0 for responses that were filtered out
    samples: B = P * G dicts with "response", "reward", "true_reward", "parts", and "accuracy" where
             the true rewards say right or wrong
    rewards: (P, G)
    """
    lengths = batch.response_lengths.cpu()
    finished = batch.finished.cpu()
    sizes = batch.row_weights().abs().cpu()

    def column(key):  # float32 would round 0.99999999 to 1
        values = [sample[key] for sample in samples]
        return torch.tensor(values, dtype=torch.float64).view_as(rewards)

    numbers = {
        "reward": column("reward"),
        "reward_std": rewards.std(1, correction=0),
        "reward_std_between": rewards.mean(1).std(correction=0),
        "informative": rewards.amax(1) != rewards.amin(1),
        "true_reward": column("true_reward"),
        "thinking": torch.tensor(["</think>" in sample["response"] for sample in samples]),
        "response_length": lengths,
        "response_length_finished": lengths[finished],
        "response_length_truncated": lengths[~finished],
        "finished": finished,
        "entropy": -batch.old_logprobs[batch.response_mask].cpu(),  # its mean: an estimate
        "effective_samples": sizes.sum() ** 2 / sizes.square().sum(),
    }
    if "accuracy" in samples[0]:
        right = column("accuracy") == 1
        numbers |= {"accuracy": right, "all_right": right.all(1), "all_wrong": ~right.any(1)}
    for part in samples[0]["parts"]:
        numbers[f"reward/{part}"] = torch.tensor([sample["parts"][part] for sample in samples])
    means = {name: values.double().mean().item() for name, values in numbers.items()}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


class UpdateStatistics:
    """One optimizer step in numbers, collected over its micro-batches.

    on_policy: the ratios are 1 because they are to the policy itself, so there are none to report
    loss:      sum of the losses of the micro-batches
    grad_norm: set by the caller after the step; not finite if the step was skipped
    """

    def __init__(self, on_policy=False):
        self.on_policy = on_policy
        self.loss = 0.0
        self.grad_norm = 0.0
        self.columns = []  # ratios, clipped and entropies of each micro-batch, (K,) with K tokens

    @torch.no_grad()
    def add(self, loss, logprobs, old_logprobs, clipped, mask, entropy=None):
        """loss: a number. The others: (R, N), of which only the tokens in the mask count."""
        self.loss += float(loss)
        columns = [(logprobs - old_logprobs)[mask].exp(), clipped[mask].float()]
        if entropy is not None:
            columns.append(entropy[mask])
        self.columns.append(columns)

    def gather(self):
        """Adds those of the rows that other processes had."""
        losses, columns = zip(*gather((self.loss, self.columns)))
        self.loss = sum(losses)
        self.columns = [*chain(*columns)]

    def summary(self):
        """Means over the response tokens, except loss, grad_norm and ratio_max."""
        ratio, clipped, *entropy = map(torch.cat, zip(*self.columns))
        numbers = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "clip_share": clipped.mean().item(),
        }
        if entropy:
            numbers["entropy"] = entropy[0].mean().item()
        return numbers


def update_metrics(updates) -> dict:
    """The UpdateStatistics of one rollout: means over them, except the largest ratio.

    Skipped steps (a gradient that is not finite) are only counted. Ratios are left out if there is
    a single step on the policy that sampled.
    """
    done = [update.summary() for update in updates if math.isfinite(update.grad_norm)]
    counts = {"updates": len(done), "skipped": len(updates) - len(done)}
    if not done:
        return {**counts, "loss": 0.0, "grad_norm": 0.0}
    means = {key: fmean(update[key] for update in done) for key in done[0]}
    means["ratio_max"] = max(update["ratio_max"] for update in done)
    if len(updates) == 1 and updates[0].on_policy:
        for key in ("ratio_mean", "ratio_max", "clip_share"):
            del means[key]
    return {**counts, **means}


def is_idle(rows) -> bool:
    """Whether the last ten steps had nothing to learn from: equal rewards in every group."""
    recent = [row["informative"] for row in rows[-10:]]
    return recent == [0.0] * 10


def hint(rows) -> str:
    """What to look at when a run goes nowhere, or ''. rows: metrics of at least 11 steps"""
    if rows[-1]["step"] == 3 and not any(row["finished"] for row in rows[-3:]):
        return (
            "no response has ended by itself in three steps: look at samples.jsonl. Is the prompt "
            "what the model expects, are the tokens that end a response right (see the start), "
            "is --max_new_tokens large enough?"
        )
    if is_idle(rows) and not is_idle(rows[:-1]):
        return (
            "nothing to learn from in ten steps: all rewards of a group are equal. If they are "
            "high, stop (Ctrl-C saves) or give harder problems; if they are low, easier ones or a "
            "larger --group_size"
        )
    return ""


def tokens_per_second(metrics, responses) -> dict:
    """How fast a step sampled and trained, in response tokens. A prompt is not counted.

    {"response_length": 10, "trained": 0.5, "seconds_sample": 2, "seconds": 6}, 100 responses
    -> 1,000 tokens: sampled 500 per second, trained 500 / 4 = 125 per second
    """
    tokens = metrics["response_length"] * responses
    sampling = metrics["seconds_sample"]
    training = metrics["seconds"] - sampling
    return {
        "tokens_per_second_sampled": tokens / max(sampling, 1e-9),
        "tokens_per_second_trained": tokens * metrics["trained"] / max(training, 1e-9),
    }
