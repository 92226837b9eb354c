"""How sure a number is: intervals, and whether two models differ. The bootstrap seed is fixed."""

import math
from collections import Counter
from statistics import fmean, stdev

import torch

Z = 1.959964  # a normal variable is within this many standard deviations in 95 % of cases
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1 to 10 degrees


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
    """A value for each problem -> the 95 % interval of their mean.

    The problems are resampled with replacement (percentile method: Efron, 1979). If all values are
    equal the interval has no width.
    """
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(resamples))
    means = [values[draw].mean() for draw in draws]
    low, high = torch.stack(means).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def paired_difference(gained, lost, n):
    """The 95 % interval of the difference of two proportions, measured on the same n problems: one
    model has `gained` more of them right, the other `lost`.

    Bonett and Price, 2012: Wald's interval with one problem more of each kind, so that it has a
    width where nothing was gained or lost.
    """
    up = (gained + 1) / (n + 2)
    down = (lost + 1) / (n + 2)
    difference = up - down
    half = Z * math.sqrt((up + down - difference**2) / (n + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)


def right_or_wrong(values) -> bool:
    """Whether each value is 0 or 1: the mean is then a proportion."""
    return set(values) <= {0, 1}


def mean_interval(values, proportion=True):
    """A value for each problem -> their mean and its 95 % interval. Wilson's where each value is 0
    or 1; otherwise by `interval_of_mean`, since several responses to one problem are alike.

    proportion: False: a run that this one is compared with has other values than 0 and 1
    """
    if proportion and right_or_wrong(values):
        interval = wilson(sum(values), len(values))
    else:
        interval = interval_of_mean(values)
    return {"mean": fmean(values), "interval": interval}


def interval_of_mean(values):
    """The 95 % interval: by `bootstrap`, but Student's for fewer than 30 values, for which the
    bootstrap is too narrow. A single value could as well be 0, so its half width is 12.7 times its
    size."""
    n = len(values)
    if n >= 30:
        return bootstrap(values)
    half = student(max(n, 2)) * (stdev(values) / math.sqrt(n) if n > 1 else abs(values[0]))
    return fmean(values) - half, fmean(values) + half


def at_k(votes, right):
    """Several answers to each problem -> pass@k (one of k is right) and maj@k (the majority of k is
    right) for k = 1, 2, 4 ... and all."""
    n = len(right[0])
    pass_at = {}
    maj_at = {}
    for k in [2**i for i in range(20) if 2**i < n] + [n]:
        pass_at[k] = mean_interval([pass_at_k(sum(each), n, k) for each in right])
        maj_at[k] = mean_interval([maj_at_k(*pair, k) for pair in zip(votes, right)])
    return {"pass_at": pass_at, "maj_at": maj_at}


def compare_values(before, after):
    """Two models, a value for each problem -> the mean difference and its 95 % interval, how many
    problems went up and down, and a verdict: whether 0 is in the interval.

    The interval is of differences on the same problem: what both models find hard is no noise.
    """
    differences = [new - old for old, new in zip(before, after)]
    gained = sum(difference > 0 for difference in differences)
    lost = sum(difference < 0 for difference in differences)
    if right_or_wrong([*before, *after]):
        low, high = paired_difference(gained, lost, len(before))
    else:
        low, high = interval_of_mean(differences)
    numbers = {"difference": fmean(differences), "gained": gained, "lost": lost}
    return {**numbers, **verdict_of(low, high)}


def student(n) -> float:
    """The 97.5 % quantile of Student's t for n values: n - 1 degrees of freedom. 3 -> 4.303"""
    degrees = n - 1
    if degrees <= len(T):
        return T[degrees - 1]
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def mean_over_runs(values, shares=False):
    """The results of several seeds -> their mean and its 95 % interval, Student's. With one seed
    the interval is infinite; shares are from 0 to 1."""
    mean = fmean(values)
    half = math.inf
    if len(values) > 1:
        half = student(len(values)) * stdev(values) / math.sqrt(len(values))
    low, high = mean - half, mean + half
    if shares:
        low, high = max(0.0, low), min(1.0, high)
    return {"mean": mean, "interval": (low, high)}


def unpaired_difference(before, after):
    """Two {"mean", "interval"} -> the difference, its 95 % interval and a verdict. Newcombe, 1998,
    method 10: from the distance of each mean to the ends of its own interval."""
    difference = after["mean"] - before["mean"]
    (before_low, before_high), (after_low, after_high) = before["interval"], after["interval"]
    down = math.hypot(after["mean"] - after_low, before_high - before["mean"])
    up = math.hypot(after_high - after["mean"], before["mean"] - before_low)
    return {"difference": difference, **verdict_of(difference - down, difference + up)}


def verdict_of(low, high):
    """Whether 0 is in the interval of a difference."""
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    return {"interval": (low, high), "verdict": verdict}
