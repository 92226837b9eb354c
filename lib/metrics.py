"""The numbers of a step, for metrics.jsonl and the screen. docs/metrics.md defines each."""

import math
from itertools import chain
from statistics import fmean

import torch

from lib.processes import gather


def rollout_metrics(batch, samples, groups) -> dict:
    """The responses of a step in numbers. A number without a meaning (NaN) is omitted, such as the
    mean length of truncated responses if there are none.

    batch:   train.Batch; weights are 0 for responses that were filtered out
    samples: B dicts with "response", "reward", "true_reward", "parts", and "accuracy" where the
             true rewards say right or wrong
    groups:  the rewards of each group. A mean is that of the groups' means
    """
    sizes = [len(rewards) for rewards in groups]
    lengths = batch.response_lengths.cpu()
    finished = batch.finished.cpu()
    weights = batch.row_weights().abs().cpu()

    def by_group(values):  # float32 would round 0.99999999 to 1
        return torch.as_tensor(values, dtype=torch.float64).split(sizes)

    def mean(values):
        return torch.stack([group.mean() for group in by_group(values)]).mean()

    def share(is_so, groups):
        return torch.tensor([float(is_so(group)) for group in groups]).mean()

    numbers = {
        "reward_std": torch.stack([rewards.std(correction=0) for rewards in groups]).mean(),
        "reward_std_between": torch.stack([rewards.mean() for rewards in groups]).std(correction=0),
        "informative": share(lambda rewards: rewards.max() != rewards.min(), groups),
        "thinking": mean(["</think>" in sample["response"] for sample in samples]),
        "response_length": mean(lengths),
        "response_length_finished": lengths[finished].double().mean(),
        "response_length_truncated": lengths[~finished].double().mean(),
        "finished": mean(finished),
        # its mean: an estimate
        "entropy": -batch.old_logprobs[batch.response_mask].double().mean().cpu(),
        "effective_samples": weights.sum() ** 2 / weights.square().sum(),
    }
    for name in ("reward", "true_reward"):
        numbers[name] = mean([sample[name] for sample in samples])
    if "accuracy" in samples[0]:
        is_right = [sample["accuracy"] == 1 for sample in samples]
        right = by_group(is_right)
        numbers["accuracy"] = mean(is_right)
        numbers["all_right"] = share(torch.all, right)
        numbers["all_wrong"] = share(lambda group: not group.any(), right)
    for part in samples[0]["parts"]:
        numbers[f"reward/{part}"] = mean([sample["parts"][part] for sample in samples])
    numbers = {name: number.item() for name, number in numbers.items()}
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


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
    """Whether each group of the last ten steps had equal rewards."""
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
            "in ten steps all rewards of each group were equal: no response is better than the "
            "others. If the rewards are high, stop (Ctrl-C saves) or give harder problems; if they "
            "are low, easier ones or a larger --group_size"
        )
    return ""


def no_update(metrics) -> str:
    """Why a step made no update: 'all rewards of each group are equal (all wrong)'."""
    if metrics.get("informative", 0) > 0:
        return "all weights are 0, by --normaliser or --filter"
    reason = "all rewards of each group are equal"
    if metrics.get("all_wrong") == 1:
        reason += " (all wrong)"
    if metrics.get("all_right") == 1:
        reason += " (all right)"
    return reason


def stood_still(rows) -> str:
    """A warning if none of the steps made an update, or ''. rows: the metrics of a run"""
    if not rows or any(row.get("updates", 1) or row.get("skipped") for row in rows):
        return ""
    return (
        f"warning: nothing was learned, because none of the {len(rows)} steps made an update: "
        f"{no_update(rows[-1])}. What to do: docs/troubleshooting.md"
    )


def collapse(rewards) -> str:
    """A warning if the rewards of a run (a mean for each step) fell to nothing and stayed there, or
    ''. Measured over a tenth of the steps, at least five: the last are below a tenth of the best,
    and not above the first."""
    width = max(5, len(rewards) // 10)
    if len(rewards) < 3 * width:
        return ""
    windows = [fmean(rewards[i : i + width]) for i in range(len(rewards) - width + 1)]
    best = max(windows)
    if best <= 0 or windows[-1] > windows[0] or windows[-1] >= 0.1 * best:
        return ""
    step = windows.index(best) + width // 2 + 1
    return (
        f"warning: the mean reward was {best:.3g} around step {step} and is {windows[-1]:.3g} at "
        "the end: the policy has collapsed. Start again with a third of the --lr, or --kl_beta 0.01"
    )


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
