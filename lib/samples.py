"""Which responses of a step samples.jsonl keeps: whole groups, because a weight says something only
beside the other responses to its prompt."""

import random
from itertools import accumulate
from statistics import pstdev


def logged_groups(samples, group_sizes, log_samples, step, seed) -> list[dict]:
    """Two groups of a step: the one with the largest spread of rewards, and one drawn evenly over
    all, which may be the same. Rows from the largest to the smallest weight, with three keys more:

    group:      the group's place in the step, from 0
    group_size: how many responses the group has, including those not logged
    drawn:      the group is the one drawn evenly. The others show success too often

    samples:     rows of the step with "reward" and "weight", group after group
    group_sizes: how many of them each group has
    log_samples: most rows of each group; the largest and the smallest weight are always among them
    """
    ends = list(accumulate(group_sizes))
    groups = [samples[end - size : end] for end, size in zip(ends, group_sizes)]
    spreads = [pstdev(sample["reward"] for sample in group) for group in groups]
    widest = spreads.index(max(spreads))
    drawn = random.Random(f"{seed}/{step}").randrange(len(groups))
    rows = []
    for g in dict.fromkeys([widest, drawn]):
        keys = {"group": g, "group_size": group_sizes[g], "drawn": g == drawn}
        ranked = sorted(groups[g], key=lambda row: (row["weight"], row["reward"]), reverse=True)
        rows += [{**row, **keys} for row in spread_out(ranked, log_samples)]
    return rows


def spread_out(items, count) -> list:
    """At most `count` of the items at even distances, the first and the last among them.

    [9, 8, 7, 6, 5], 3 -> [9, 7, 5]
    """
    if len(items) <= count:
        return items
    last = len(items) - 1
    gaps = max(1, count - 1)
    return [items[round(i * last / gaps)] for i in range(count)]
