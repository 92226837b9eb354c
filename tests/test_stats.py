import random
from itertools import combinations
from statistics import fmean

import pytest

from lib.stats import (
    bootstrap,
    compare_values,
    maj_at_k,
    majority,
    mean_interval,
    paired_difference,
    pass_at_k,
    wilson,
)


@pytest.mark.parametrize(
    "line", ["8 10 .4902 .9433", "0 0 0 1", "81 263 .2553 .3662", "0 20 0 .1611"]
)
def test_wilson_intervals_by_hand_and_of_a_published_table(line):
    """8 of 10: (0.8 + z2 / 20) / (1 + z2 / 10) is the middle, 0.71674, with z2 = 3.84146. The last
    two: Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    successes, n, *interval = map(float, line.split())
    assert wilson(successes, n) == pytest.approx(interval, abs=5e-5)


def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one():
    for right in range(7):
        for k in range(1, 7):
            choices = list(combinations([i < right for i in range(6)], k))
            assert pass_at_k(right, 6, k) == pytest.approx(fmean(map(any, choices)))
    assert pass_at_k(1, 100_000, 50_000) == pytest.approx(0.5)  # its binomials would overflow


def test_the_majority_and_its_ties():
    cases = {("7", "8", "8", "7"): True, ("8", "7", "7", "8"): False}  # a tie: the first counts
    cases |= {(None, None, None, "7"): True, (None, None): False}
    for answers, expected in cases.items():
        assert majority(answers, [answer == "7" for answer in answers]) is expected


def test_maj_at_k_is_a_mean_over_blocks():
    """By threes 7 7 8 is right, 8 8 7 is wrong, and the last 7 is left over. Of all, four say 7."""
    right = [answer == "7" for answer in "7788877"]
    assert maj_at_k("7788877", right, 3) == 0.5
    assert maj_at_k("7788877", right, 7) == 1.0


def test_bootstrap_intervals_are_those_of_theory():
    """The mean of 400 numbers, half of them 0 and half of them 3, has a standard error of 0.075."""
    assert bootstrap([0.0, 3.0] * 200) == pytest.approx((1.353, 1.647), abs=0.015)
    assert bootstrap([0.5] * 5) == (0.5, 0.5)


def test_means_of_right_and_wrong_have_wilson_intervals_and_others_are_bootstrapped():
    assert mean_interval([1, 1, 0, 1])["interval"] == wilson(3, 4)
    assert mean_interval([True] * 20)["interval"] == wilson(20, 20)
    assert mean_interval([0] * 27)["interval"] == wilson(0, 27)  # not [0, 0]
    # another run has 0.5 somewhere: the reward is no proportion, though it looks like one here
    assert mean_interval([1.0] * 20, proportion=False)["interval"] == (1, 1)
    many = [0.25, 0.5] * 15
    assert mean_interval(many) == {"mean": 0.375, "interval": bootstrap(many)}


def test_a_few_values_have_the_interval_of_student():
    """By the bootstrap two equal models differed in half of the comparisons on two problems."""
    low, high = mean_interval([1, 0.5, 0])["interval"]  # 0.5 +- 4.303 * 0.5 / sqrt(3)
    assert (low, high) == pytest.approx((-0.742, 1.742), abs=1e-3)
    assert compare_values([0.5], [2])["verdict"] == "no difference seen"
    rng = random.Random(0)
    for n in (2, 3, 8):
        draws = [[[rng.gauss(0, 1) for _ in range(n)] for _ in range(2)] for _ in range(400)]
        verdicts = [compare_values(*draw)["verdict"] for draw in draws]
        wrong = 1 - verdicts.count("no difference seen") / len(draws)
        assert 0.02 < wrong < 0.09


def test_the_interval_of_a_paired_difference_by_hand():
    """20 gained, 8 lost of 98: 0.21 - 0.09 = 0.12, variance (0.30 - 0.0144) / 100."""
    half = 1.959964 * (0.2856 / 100) ** 0.5
    assert paired_difference(20, 8, 98) == pytest.approx((0.12 - half, 0.12 + half))


def test_right_and_wrong_answers_are_compared_by_their_paired_interval():
    """Gained alone: 6 of 16 are better than chance, 4 of 16 are not."""
    before, after = [False] * 6 + [True] * 10, [True] * 16
    found = compare_values(before, after)
    assert (found["difference"], found["gained"], found["lost"]) == (6 / 16, 6, 0)
    assert (found["interval"], found["verdict"]) == (paired_difference(6, 0, 16), "better")
    assert compare_values(after, before)["verdict"] == "worse"
    assert compare_values(before[3:], after[3:])["verdict"] == "no difference seen"


@pytest.mark.parametrize("n", [5, 40, 300])
def test_a_verdict_never_disagrees_with_its_interval(n):
    for lost in range(4):
        for gained in range(n - lost):
            after = [1] * gained + [0] * (n - gained)
            before = [0] * (n - lost) + [1] * lost
            found = compare_values(before, after)
            low, high = found["interval"]
            assert (found["verdict"] == "no difference seen") == (low <= 0 <= high)


def test_shares_are_compared_problem_by_problem():
    """The same half gained on every problem is no noise, however much the problems differ."""
    before, after = [0.0, 0.5] * 8, [0.5, 1.0] * 8
    found = compare_values(before, after)
    assert (found["difference"], found["interval"], found["verdict"]) == (0.5, (0.5, 0.5), "better")
    assert (found["gained"], found["lost"]) == (16, 0)
    # 1 gained on half of them, 0 on the others: 0.5 +- 1.96 * 0.5 / 4
    found = compare_values(before, after[::-1])
    assert found["interval"] == pytest.approx((0.255, 0.745), abs=0.07)
    assert compare_values(before, before[::-1])["verdict"] == "no difference seen"
