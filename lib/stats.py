"""How sure a number is: intervals, and whether two models differ. The bootstrap seed is fixed."""

import math
from collections import Counter
from statistics import fmean

import torch

Z = 1.959964  # a normal variable is within this many standard deviations in 95 % of cases


def wilson(successes, n):
    """The 95 % score interval of a proportion (Wilson, 1927), which is honest at 0 and 1 too.

    wilson(8, 10) -> (0.490, 0.943)
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    spread = Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(right, n, k):
    """The chance that at least one of k responses is right, from n responses of which some are.

    1 - C(n - right, k) / C(n, k), which is unbiased (arXiv 2107.03374), as a product because the
    binomials overflow. pass_at_k(1, 4, 2) -> 0.5
    """
    if n - right < k:
        return 1.0
    return 1 - math.prod(1 - k / i for i in range(n - right + 1, n + 1))


def majority(answers, right):
    """Whether the most frequent answer is right. In a tie, the answer that was given first counts.

    None is no answer and has no vote: of ['7', None, '8', '8', '7'] the majority is '7'.
    """
    votes = Counter(answers)
    del votes[None]
    if not votes:
        return False
    winner = max(votes, key=votes.get)  # the first of equals: a Counter keeps the order
    return right[answers.index(winner)]


def maj_at_k(answers, right, k):
    """How often the majority of k responses is right: mean over n // k consecutive blocks of k."""
    starts = range(0, len(answers) - k + 1, k)
    return fmean(majority(answers[i : i + k], right[i : i + k]) for i in starts)


def bootstrap(values, resamples=2000):
    """(n, K) K numbers of each of n problems -> K 95 % intervals of their means.

    The problems are resampled with replacement (percentile method: Efron, 1979), all columns alike.
    If all problems agree, as when all are solved, the interval has no width.
    """
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(resamples):
        chosen = torch.randint(n, (n,), generator=generator)
        means.append(values[chosen].mean(0))
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return list(zip(*torch.stack(means).quantile(ends, 0).tolist()))


def mcnemar(gained, lost):
    """The exact two-sided p-value of McNemar's test, from the problems on which two models differ.

    The probability of a split at least this uneven if both models are equally good: one has
    `gained` more of these problems right, the other `lost`. mcnemar(6, 0) -> 0.03125
    """
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(gained, lost, n):
    """The 95 % interval of the difference of two proportions, measured on the same n problems.

    Bonett and Price, 2012: Wald's interval with one problem more of each kind, so that it has a
    width where nothing was gained or lost.
    """
    up = (gained + 1) / (n + 2)
    down = (lost + 1) / (n + 2)
    difference = up - down
    half = Z * math.sqrt((up + down - difference**2) / (n + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)


def bootstrapped(values):
    """One value per problem -> their mean, and its interval by `bootstrap`."""
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    return {"accuracy": fmean(values), "interval": bootstrap(column)[0]}


def at_k(votes, right):
    """Several answers to each problem -> pass@k (one of k is right) and maj@k (the majority of k is
    right) for k = 1, 2, 4 ... and all."""
    n = len(right[0])
    pass_at = {}
    maj_at = {}
    for k in [2**i for i in range(20) if 2**i < n] + [n]:
        pass_at[k] = bootstrapped([pass_at_k(sum(each), n, k) for each in right])
        maj_at[k] = bootstrapped([maj_at_k(*pair, k) for pair in zip(votes, right)])
    return {"pass_at": pass_at, "maj_at": maj_at}


def compare_greedy(before, after):
    """Two models, one answer to each problem, right or wrong -> the difference of their accuracies,
    its interval, and a verdict by McNemar's exact test."""
    pairs = Counter(zip(before, after))
    gained = pairs[False, True]
    lost = pairs[True, False]
    p = mcnemar(gained, lost)
    return {
        "difference": (gained - lost) / len(before),
        "interval": paired_difference(gained, lost, len(before)),
        "gained": gained,
        "lost": lost,
        "p": p,
        "verdict": verdict(gained - lost, p < 0.05),
    }


def compare_sampled(before, after):
    """Two models, the share of right answers to each problem -> the same, with a verdict by whether
    0 is in the interval. It is bootstrapped over problems: what both find hard is no noise."""
    found = bootstrapped([new - old for old, new in zip(before, after)])
    low, high = found["interval"]
    return {
        "difference": found["accuracy"],
        "interval": (low, high),
        "verdict": verdict(found["accuracy"], low > 0 or high < 0),
    }


def verdict(difference, significant):
    if not significant:
        return "no difference seen"
    return "better" if difference > 0 else "worse"
