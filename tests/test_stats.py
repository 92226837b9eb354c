from itertools import combinations

import pytest
import torch

from stats import bootstrap, maj_at_k, majority, mcnemar, paired_difference, pass_at_k, wilson


def test_wilson_intervals_worked_out_by_hand():
    """8 of 10: middle (0.8 + z2/20) / (1 + z2/10) = 0.71674, half width 0.22659, with z2 = 3.84146."""
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718),
])
def test_wilson_intervals_of_a_published_table(successes, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(1, 100_000, 50_000) == pytest.approx(0.5)  # its binomials have thirty thousand digits


def test_the_majority_and_its_ties():
    right = {"7": True, "8": False}
    for answers, expected in [
        (["7", "8", "8", "7"], True), (["8", "7", "7", "8"], False), (["8", "8", "7"], False),
        ([None, None, None, "7"], True), ([None, None], False),
    ]:
        assert majority(answers, [right.get(answer, False) for answer in answers]) is expected


def test_maj_at_k_is_a_mean_over_blocks():
    """7 7 8 | 8 8 7 | 7 by threes: right, wrong, and the last left over. All seven together: four say 7."""
    answers = ["7", "7", "8", "8", "8", "7", "7"]
    right = [answer == "7" for answer in answers]
    assert maj_at_k(answers, right, 3) == 0.5
    assert maj_at_k(answers, right, 1) == pytest.approx(4 / 7)
    assert maj_at_k(answers, right, 7) == 1.0


def test_bootstrap_intervals_are_those_of_theory():
    """The mean of 400 coins, half of them heads, has a standard error of 0.025; of their doubles, 0.05."""
    coins = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(200)[:, None]
    (low, high), doubles = bootstrap(torch.cat([coins, 2 * coins], 1))
    assert (low, high) == pytest.approx((0.5 - 0.049, 0.5 + 0.049), abs=0.005)
    assert doubles == pytest.approx((2 * low, 2 * high))
    assert bootstrap(torch.ones(5, 1)) == [(1.0, 1.0)]


def test_mcnemar_by_hand_and_on_the_textbook_example():
    """6 to 0: 2 / 2^6. Agresti's approval ratings of 1,600 voters, 150 lost to 86: R's exact2x2 gives 3.716e-05."""
    assert [mcnemar(6, 0), mcnemar(0, 6), mcnemar(3, 3), mcnemar(0, 0)] == [0.03125, 0.03125, 1.0, 1.0]
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(150, 86) == pytest.approx(3.716e-05, abs=5e-9)


def test_the_interval_of_a_paired_difference_by_hand():
    """20 gained, 8 lost of 98: 0.21 - 0.09 = 0.12, variance (0.30 - 0.0144) / 100."""
    half = 1.959964 * (0.2856 / 100) ** 0.5
    assert paired_difference(20, 8, 98) == pytest.approx((0.12 - half, 0.12 + half))
    low, high = paired_difference(0, 0, 98)
    assert low == -high == pytest.approx(-1.959964 * 0.02**0.5 / 10)
