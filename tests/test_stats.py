from itertools import combinations
from statistics import fmean

import pytest
import torch

from lib.stats import bootstrap, maj_at_k, majority, mcnemar, paired_difference, pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        (8, 10, (0.4902, 0.9433)),  # 0.71674 -+ 0.22659
        (0, 0, (0.0, 1.0)),
        (81, 263, (0.2553, 0.3662)),
        (0, 20, (0.0, 0.1611)),
    ],
)
def test_wilson_intervals_by_hand_and_of_a_published_table(successes, n, interval):
    """8 of 10: (0.8 + z2 / 20) / (1 + z2 / 10) is the middle, with z2 = 3.84146. The last two:
    Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
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
    """The mean of 400 coins, half of them heads, has a standard error of 0.025; of their doubles,
    0.05."""
    coins = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(200)[:, None]
    single, double = bootstrap(torch.cat([coins, 2 * coins], 1))
    assert single == pytest.approx((0.451, 0.549), abs=0.005)
    assert double[1] == pytest.approx(2 * single[1])
    assert bootstrap(torch.ones(5, 1)) == [(1.0, 1.0)]


def test_mcnemar_by_hand_and_on_the_textbook_example():
    """6 to 0: 2 / 2^6. Agresti's approval ratings, 150 lost to 86: R's exact2x2 says 3.716e-05."""
    assert mcnemar(6, 0) == mcnemar(0, 6) == 0.03125
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert mcnemar(150, 86) == pytest.approx(3.716e-05, abs=5e-9)


def test_the_interval_of_a_paired_difference_by_hand():
    """20 gained, 8 lost of 98: 0.21 - 0.09 = 0.12, variance (0.30 - 0.0144) / 100."""
    half = 1.959964 * (0.2856 / 100) ** 0.5
    assert paired_difference(20, 8, 98) == pytest.approx((0.12 - half, 0.12 + half))
