"""From rewards to the loss: how much each response should gain or lose, and what is minimised.

    L = - sum over rows and tokens of  w_row * log pi(token) / denominator

With one update per rollout the gradients of PPO, GRPO and their kin are all -w * grad log pi: they differ in the
weights w (NORMALISERS), in the rows that count (FILTERS) and in the denominator (AGGREGATIONS). Each is a small
function chosen by name; to try your own, write one and add it to its table.
"""

import torch
from torch import Tensor

# NORMALISERS: rewards (P, G) -> weights (P, G), a group a row.


def zscore(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """How many standard deviations above its group's mean each reward is. GRPO, arXiv 2402.03300.

    (1, 0, 0, 1) -> (1, -1, -1, 1). A group of equal rewards gets exactly 0: round-off over eps would be weights made
    of nothing.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    weights = centred / (rewards.std(1, correction=0, keepdim=True) + eps)
    return torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, weights)


def mean(rewards: Tensor) -> Tensor:
    """How far above its group's mean each reward is: small differences stay small. Dr. GRPO, arXiv 2503.20783.

    (1, 0, 0, 1) -> (0.5, -0.5, -0.5, 0.5). A group of equal rewards gets exactly 0, as above.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))


NORMALISERS = {"zscore": zscore, "mean": mean}
BASELINED = {"zscore", "mean"}  # compare a response with its group: pointless with a group of one


# FILTERS: rewards (P, G), finished (P, G) -> which rows count, (P, G) bool. The baseline was taken before.


def everything(rewards: Tensor, finished: Tensor) -> Tensor:
    """All rows count. (Those of weight 0 need no forward pass, but their tokens stay in the denominator.)"""
    return torch.ones_like(finished)


FILTERS = {"none": everything}


# AGGREGATIONS: response lengths (B,) of the rows that count, most tokens N -> factor (B,) of each token's loss.
# Fixed for the whole optimizer step before it is split, so that the size of a micro-batch trades memory only.


def token(lengths: Tensor, most: int) -> Tensor:
    """Every token of the step weighs the same. DAPO, arXiv 2503.14476."""
    return (1.0 / lengths.sum()).expand(len(lengths))


AGGREGATIONS = {"token": token}


# LOSSES: log-probs (R, N), log-probs of the policy that sampled (R, N), weights (R, 1) -> loss of each token (R, N).


def logprob(logprobs: Tensor, sampled_logprobs: Tensor, weights: Tensor) -> Tensor:
    """-w log pi: the objective itself."""
    return -weights * logprobs


LOSSES = {"logprob": logprob}
