"""From rewards to the loss: how much each response should gain or lose, and what is minimised.

    L = - sum over rows and tokens of  w_row * log pi(token) / denominator

With one update per rollout the gradients of PPO, GRPO and their kin are all -w * grad log pi: they differ in the
weights w (NORMALISERS), in the rows that count (FILTERS) and in the denominator (AGGREGATIONS). What LOSSES adds,
ratios and clips, acts from the second update on the same rollout. RECIPES are whole methods as published. Each piece is
a small function chosen by name; to try your own, write one and add it to its table.
"""

from functools import partial

import torch
from torch import Tensor

# NORMALISERS: rewards r (P, G) -> weights (P, G), a group a row. Below, m and s are a group's mean and deviation.


def mean(rewards: Tensor) -> Tensor:
    """r - m. (1, 0, 0, 1) -> (0.5, -0.5, -0.5, 0.5). Dr. GRPO, arXiv 2503.20783.

    Distances from the lowest, so that a group of equal rewards gets exactly 0: dividing round-off by a small deviation
    would make weights of nothing.
    """
    above = rewards - rewards.amin(1, keepdim=True)
    return above - above.mean(1, keepdim=True)


def zscore(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - m) / s: a rare success weighs more than a common one. (1, 0, 0, 1) -> (1, -1, -1, 1), (1, 0, 0, 0) ->
    (1.73, -0.58, -0.58, -0.58). GRPO, arXiv 2402.03300."""
    return mean(rewards) / (rewards.std(1, correction=0, keepdim=True) + eps)


def loo(rewards: Tensor) -> Tensor:
    """r - mean of the other rewards = (r - m) * G / (G - 1): a baseline that the response has no part in, so without
    bias. (1, 0, 0, 1) -> (2/3, -2/3, -2/3, 2/3). RLOO, arXiv 2402.14740."""
    return mean(rewards) * rewards.shape[1] / max(1, rewards.shape[1] - 1)


def batch(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - m) / deviation over all groups: one scale for all, so that a group that hardly differs is not blown up.
    Lite PPO, arXiv 2508.08221."""
    return mean(rewards) / (rewards.std(correction=0) + eps)


def maxrl(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - m) / m, for rewards from 0 up: the gradient of log m, the likelihood of success, where `mean` has that of m.
    (1, 0, 0, 0) -> (3, -1, -1, -1), (1, 0, 0, 1) -> (1, -1, -1, 1). MaxRL, arXiv 2602.02710."""
    return mean(rewards) / (rewards.mean(1, keepdim=True) + eps)


def softmax(rewards: Tensor, beta: float) -> Tensor:
    """G * softmax(r / beta) - 1: reward-weighted regression, centred. beta * weights -> `mean` for a large beta;
    (weights + 1) / G -> `best` for a small one."""
    shares = ((rewards - rewards.amax(1, keepdim=True)) / beta).exp()
    return shares / shares.mean(1, keepdim=True) - 1


def rank(rewards: Tensor) -> Tensor:
    """(how many of the group are below - how many are above) / (G - 1): only the order counts.
    (0.2, 0.4, 0.9, 0.9) -> (-1, -1/3, 2/3, 2/3)."""
    return (rewards[:, :, None] - rewards[:, None, :]).sign().sum(2) / max(1, rewards.shape[1] - 1)


def best(rewards: Tensor) -> Tensor:
    """1 for the best of the group, shared between ties, else 0. (0.2, 0.4, 0.9, 0.9) -> (0, 0, 0.5, 0.5). Best of n."""
    top = (rewards == rewards.amax(1, keepdim=True)).to(rewards.dtype)
    return top / top.sum(1, keepdim=True)


def positive(rewards: Tensor) -> Tensor:
    """max(r, 0): imitate what was good, learn nothing from the rest. Fast, but entropy collapses. RAFT, 2504.11343."""
    return rewards.clamp(min=0)


def none(rewards: Tensor) -> Tensor:
    """r itself: REINFORCE without a baseline."""
    return rewards


NORMALISERS = {"zscore": zscore, "mean": mean, "loo": loo, "batch": batch, "maxrl": maxrl, "softmax": softmax,
               "rank": rank, "best": best, "positive": positive, "none": none}
BASELINED = set(NORMALISERS) - {"positive", "none"}  # compare a response with its group: pointless with a group of one


# FILTERS: rewards (P, G), finished (P, G) -> which rows count, (P, G) bool. Baselines were taken over all of them.


def everything(rewards: Tensor, finished: Tensor) -> Tensor:
    """All rows count. (Those of weight 0 need no forward pass, but their tokens stay in the denominator.)"""
    return torch.ones_like(finished)


def informative(rewards: Tensor, finished: Tensor) -> Tensor:
    """Groups whose rewards differ. With centred weights this changes the denominator alone. Reinforce-Rej, 2504.11343.
    (`resample` keeps the same, after train.py has drawn prompts until P groups are left. DAPO, 2503.14476.)"""
    return (rewards.amax(1, keepdim=True) != rewards.amin(1, keepdim=True)).expand_as(rewards)


def ended(rewards: Tensor, finished: Tensor) -> Tensor:
    """Rows that ended by themselves: being cut says little about what was written so far. DAPO's overlong filter."""
    return finished


def top(rewards: Tensor, finished: Tensor, share: float) -> Tensor:
    """The best `share` of each group, at least one, and what ties with the last of them. Rejection sampling."""
    return rewards >= rewards.topk(max(1, round(share * rewards.shape[1])), 1).values[:, -1:]


FILTERS = {"none": everything, "informative": informative, "resample": informative, "finished": ended, "top": top}


# AGGREGATIONS: response lengths (B,) of the rows that count, most tokens N -> factor (B,) of each token's loss.
# Fixed for the whole optimizer step before it is split, so that the size of a micro-batch trades memory only.


def token(lengths: Tensor, most: int) -> Tensor:
    """1 / all tokens: every token of the step weighs the same, a long response more than a short one. DAPO."""
    return (1.0 / lengths.sum()).expand(len(lengths))


def sequence(lengths: Tensor, most: int) -> Tensor:
    """1 / (rows * tokens of the row): every response weighs the same, so a token of a long one less: long mistakes are
    cheap. GRPO as published, 2402.03300."""
    return 1.0 / (lengths * len(lengths))


def constant(lengths: Tensor, most: int) -> Tensor:
    """1 / (rows * N): the sum over a response's tokens, as the gradient has it, whatever its length. Dr. GRPO."""
    return torch.full(lengths.shape, 1.0 / (len(lengths) * most))


AGGREGATIONS = {"token": token, "sequence": sequence, "constant": constant}


# LOSSES: log-probs (R, N) now, the same when they were sampled, weights (R, 1), which columns are tokens (R, N) bool
# -> loss of each token (R, N), which tokens were clipped (R, N) bool. The ratio is pi / pi_old = exp(now - then).


def logprob(now: Tensor, then: Tensor, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """-w log pi: the objective itself. It takes no notice of how old the rollout is."""
    return -weights * now, torch.zeros_like(inside)


def clip(now: Tensor, then: Tensor, weights: Tensor, inside: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio w, clip(ratio, 1 - low, 1 + high) w): once a token has moved that far in its direction, it has no
    gradient. PPO, arXiv 1707.06347; GRPO; DAPO with high > low, to leave rare tokens room to rise."""
    ratio = (now - then).exp()
    free, bounded = ratio * weights, ratio.clamp(1 - low, 1 + high) * weights
    return -torch.minimum(free, bounded) * inside, (bounded < free) & inside


def cispo(now: Tensor, then: Tensor, weights: Tensor, inside: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """-stopgrad(min(ratio, cap)) w log pi: importance sampling with a bound; no token loses its gradient.
    MiniMax-M1, arXiv 2506.13585."""
    ratio = (now - then).exp().detach()
    return -ratio.clamp(max=cap) * weights * now, (ratio > cap) & inside


def gspo(now: Tensor, then: Tensor, weights: Tensor, inside: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`clip` with one ratio for the response, (pi / pi_old)^(1 / length): the reward is of the response, so is the
    ratio. It hardly moves, so low and high are small. arXiv 2507.18071."""
    mean_change = ((now - then) * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    return clip(mean_change.expand_as(now), torch.zeros_like(now), weights, inside, low, high)


LOSSES = {"logprob": logprob, "clip": clip, "cispo": cispo, "gspo": gspo}


# How far the policy is from a reference: estimates of KL(pi || ref) of each token, for tokens sampled from pi.


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: the one to train on, its mean gradient is that of KL(pi || ref)."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi): the one to log, unbiased and never below 0. In a loss its mean gradient would be
    that of KL(ref || pi)."""
    return (reference - logprobs).expm1() - (reference - logprobs)


# RECIPES: methods as published, as flags of train.py. Not in them: KL terms (GRPO's is 0.04 k3), how often rollouts are
# reused, and rewards: Reinforce-Rej takes -1 for what is wrong; with 0 it learns from what is right alone.

CLIP = {"loss": "clip", "clip_low": 0.2, "clip_high": 0.2}
RECIPES = {
    "grpo": {"normaliser": "zscore", "aggregation": "sequence", **CLIP},
    "dr_grpo": {"normaliser": "mean", "aggregation": "constant", **CLIP},
    "dapo": {"normaliser": "zscore", "filter": "resample", "aggregation": "token", **CLIP, "clip_high": 0.28},
    "lite_ppo": {"normaliser": "batch", "aggregation": "token", **CLIP},
    "gspo": {"normaliser": "zscore", "aggregation": "sequence", "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"normaliser": "zscore", "aggregation": "token", "loss": "cispo", "cispo_cap": 5.0},
    "rloo": {"normaliser": "loo", "aggregation": "constant", "loss": "logprob"},
    "maxrl": {"normaliser": "maxrl", "aggregation": "token", "loss": "logprob"},
    "raft": {"normaliser": "positive", "aggregation": "sequence", "loss": "logprob"},
    "reinforce_rej": {"normaliser": "none", "filter": "informative", "aggregation": "sequence", "loss": "logprob"},
    "expert_iteration": {"normaliser": "best", "filter": "informative", "aggregation": "sequence", "loss": "logprob"},
}


def choose(config) -> tuple:
    """The functions that train.py's flags name, with their settings: normalise(rewards), select(rewards, finished),
    aggregate(lengths), token_losses(now, then, start, weights, inside), start being the reference's log-probs."""
    bounds = {"low": config.clip_low, "high": config.clip_high}
    settings = {"softmax": {"beta": config.softmax_beta}, "top": {"share": config.keep}, "clip": bounds, "gspo": bounds,
                "cispo": {"cap": config.cispo_cap}}
    normalise, select, policy_losses = (partial(table[name], **settings.get(name, {})) for table, name in (
        (NORMALISERS, config.normaliser), (FILTERS, config.filter), (LOSSES, config.loss)))

    def token_losses(now: Tensor, then: Tensor, start: Tensor, weights: Tensor, inside: Tensor):
        losses, clipped = policy_losses(now, then, weights, inside)
        return (losses + config.kl_beta * k2(now, start) if config.kl_beta else losses), clipped

    return normalise, select, partial(AGGREGATIONS[config.aggregation], most=config.max_new_tokens), token_losses
