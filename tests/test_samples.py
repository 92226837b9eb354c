from statistics import fmean

import pytest

from lib.samples import logged_groups


def make_step(*groups):
    """Samples of a step from the rewards of its groups; a weight is the distance from the mean."""
    samples = []
    for rewards in groups:
        for reward in rewards:
            samples.append({"reward": reward, "weight": reward - fmean(rewards)})
    return samples, [len(rewards) for rewards in groups]


def test_the_group_of_the_largest_spread_and_one_other():
    """Groups of different sizes; the middle one has the largest spread."""
    samples, sizes = make_step([0, 0, 1], [0, 4, 0, 4, 1], [2, 2])
    seen = set()
    for step in range(20):
        rows = logged_groups(samples, sizes, 5, step, seed=0)
        assert rows == logged_groups(samples, sizes, 5, step, seed=0)
        assert [row["reward"] for row in rows[:5]] == [4, 4, 1, 0, 0]
        assert {(row["group"], row["group_size"]) for row in rows[:5]} == {(1, 5)}
        drawn = [row["group"] for row in rows if row["drawn"]]
        assert drawn == drawn[:1] * sizes[drawn[0]]  # one whole group
        assert len(rows) == 5 + (sizes[drawn[0]] if drawn[0] != 1 else 0)
        seen.add(drawn[0])
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(("count", "rewards"), [(0, []), (1, [9]), (2, [9, 1]), (3, [9, 5, 1])])
def test_both_ends_of_the_weights_are_kept(count, rewards):
    samples, sizes = make_step([3, 1, 9, 7, 5])
    rows = logged_groups(samples, sizes, count, step=1, seed=0)
    assert [row["reward"] for row in rows] == rewards


def test_drawn_groups_show_failures_at_their_true_rate():
    """3 of 4 groups fail whole, and of the last one half: 7 of 8 responses fail. The widest group
    alone would show a half. 2,000 draws: the standard error of the rate is 0.005."""
    samples, sizes = make_step([0, 0], [0, 0], [0, 0], [0, 1])
    failures = {True: [], False: []}
    for step in range(2000):
        for row in logged_groups(samples, sizes, 2, step, seed=7):
            failures[row["drawn"]].append(row["reward"] == 0)
    assert fmean(failures[True]) == pytest.approx(7 / 8, abs=0.02)
    assert fmean(failures[False]) == 0.5
