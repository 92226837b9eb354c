"""How sure a number is: intervals, and whether two models differ. Chance comes in by a fixed seed alone."""

import math
from collections import Counter

import torch
from torch import Tensor

Z = 1.959964  # a normal variable stays within so many standard deviations in 95 %


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927): honest at 0 and 1 too. wilson(8, 10) -> (0.490, 0.943)"""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(right: int, n: int, k: int) -> float:
    """The chance that of k out of n responses, some of them right, one is: 1 - C(n - right, k) / C(n, k), which is
    unbiased (arXiv 2107.03374), as a product, since the binomials overflow. pass_at_k(1, 4, 2) -> 0.5"""
    if n - right < k:
        return 1.0
    return 1 - math.prod(1 - k / i for i in range(n - right + 1, n + 1))


def majority(answers: list[str | None], right: list[bool]) -> bool:
    """Whether the answer given most often is right; of those given equally often, the one that was given first counts.
    None is no answer and has no vote. ['7', None, '8', '8', '7'] -> '7'"""
    votes = Counter(answer for answer in answers if answer is not None)  # in the order in which they were given
    return bool(votes) and right[answers.index(max(votes, key=votes.get))]  # the first of equals


def maj_at_k(answers: list[str | None], right: list[bool], k: int) -> float:
    """How often k responses vote for the right answer: mean over the n // k blocks of k, one behind the other."""
    starts = range(0, len(answers) - k + 1, k)
    return sum(majority(answers[i : i + k], right[i : i + k]) for i in starts) / len(starts)


def bootstrap(values: Tensor, resamples: int = 2000) -> list[tuple[float, float]]:
    """(n, K) K numbers of each of n problems -> K 95 % intervals of their means, from problems drawn again with
    replacement (percentile method: Efron, 1979). All columns see the same draws. Where all problems agree, as when all
    are solved, it has nothing to draw and its interval has no width."""
    generator, n = torch.Generator().manual_seed(0), len(values)
    means = [values[torch.randint(n, (n,), generator=generator)].mean(0) for _ in range(resamples)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), 0)
    return list(zip(low.tolist(), high.tolist()))


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely it is that of the problems on which two models differ
    one gets so many more right than the other, if both are as good. mcnemar(6, 0) -> 0.03125"""
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def paired_difference(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two proportions of the same n problems, of which some were gained and some
    lost (Bonett and Price, 2012: Wald's with one problem more of each kind, so that it has a width at 0 too)."""
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)
