import math
import random

import pytest
import torch
from conftest import parse_train

from lib.flags import UserError
from loss import BASELINED, DENOMINATORS, FILTERS, LOSSES, NORMALISERS, RECIPES, k2, k3

PAIR, MIXED, EQUAL, ONE = [1.0, 0, 0, 1], [0.2, 0.4, 0.9, 0.9], [0.7] * 4, [0.0, 0, 1, 0]


class Flags:
    """Those of train.py's Config that the pieces of the loss look at."""

    softmax_beta, top_share, max_new_tokens = 0.5, 0.5, 10
    clip_low, clip_high, cispo_cap = 0.2, 0.28, 1.5

    def __init__(self, **changes):
        self.__dict__ |= changes


CENTRED = sorted(BASELINED - {"best"})
t2, t3, s = 2 / 3, 3**0.5, 0.095**0.5  # 0.095 is the variance of MIXED, whose mean is 0.6
BY_HAND = {
    "mean": ([0.5, -0.5, -0.5, 0.5], [-0.4, -0.2, 0.3, 0.3], [-0.25, -0.25, 0.75, -0.25]),
    "zscore": (
        [1, -1, -1, 1],
        [-0.4 / s, -0.2 / s, 0.3 / s, 0.3 / s],
        [-1 / t3, -1 / t3, t3, -1 / t3],
    ),
    "loo": ([t2, -t2, -t2, t2], [-1.6 / 3, -0.8 / 3, 0.4, 0.4], [-1 / 3, -1 / 3, 1, -1 / 3]),
    "batch_std": (
        [1, -1, -1, 1],
        [-0.4 / s, -0.2 / s, 0.3 / s, 0.3 / s],
        [-1 / t3, -1 / t3, t3, -1 / t3],
    ),
    "maxrl": ([1, -1, -1, 1], [-t2, -1 / 3, 0.5, 0.5], [-1, -1, 3, -1]),
    # 4 e^(r / 0.5) / (their sum) - 1, for MIXED with e^0.4 = 1.491825, e^0.8 = 2.225541 and twice e^1.8 = 6.049647
    "softmax": (
        [0.761594, -0.761594, -0.761594, 0.761594],
        [-0.622721, -0.437165, 0.529943, 0.529943],
        [-0.614979, -0.614979, 1.844938, -0.614979],
    ),
    "rank": ([t2, -t2, -t2, t2], [-1, -1 / 3, t2, t2], [-1 / 3, -1 / 3, 1, -1 / 3]),
    "best": ([0.5, 0, 0, 0.5], [0, 0, 0.5, 0.5], [0, 0, 1, 0]),
    "positive": (PAIR, MIXED, ONE),
    "raw": (PAIR, MIXED, ONE),
}


def normalise(name, *groups, dtype=torch.float32):
    return NORMALISERS[name](torch.tensor(groups, dtype=dtype), Flags())


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_worked_out_by_hand(name):
    for group, expected in zip((PAIR, MIXED, ONE), BY_HAND[name], strict=True):
        torch.testing.assert_close(
            normalise(name, group),
            torch.tensor([expected], dtype=torch.float32),
            atol=1.5e-3,
            rtol=0,
        )  # eps is 1e-4
    alone = normalise(name, [3.0]).item()
    assert alone == {"best": 1, "positive": 3, "raw": 3}.get(name, 0)
    assert normalise("positive", [-1.0, 2]).tolist() == [[0, 2]]


@pytest.mark.parametrize("name", NORMALISERS)
def test_far_from_zero_nothing_is_lost(name):
    """Rewards around a million, whole numbers, exact in float32: what compares with the group must not see it."""
    shifted = normalise(name, [reward + 1e6 for reward in ONE])
    unmoved = {
        "maxrl": [[-2.5e-7, -2.5e-7, 7.5e-7, -2.5e-7]],
        "positive": [[1e6, 1e6, 1e6 + 1, 1e6]],
    }
    expected = torch.tensor(
        unmoved.get("positive" if name == "raw" else name, normalise(name, ONE).tolist())
    )
    torch.testing.assert_close(shifted, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", CENTRED)
def test_a_group_of_equal_rewards_gets_exact_zeros(name):
    """Seven rewards of 0.1 have a mean that is not quite 0.1: divided by a tiny eps that became a weight once."""
    for value in (0.1, 0.7, 1e6 + 0.3, -3.3, 0.0):
        assert normalise(name, [value] * 7).tolist() == [[0.0] * 7]
    assert (
        normalise("zscore", [0.1] * 7).tolist()
        == NORMALISERS["zscore"](torch.full((1, 7), 0.1), eps=1e-12).tolist()
    )


@pytest.mark.parametrize("name", sorted(set(NORMALISERS) - {"batch_std"}))
def test_groups_are_taken_each_by_itself(name):
    torch.testing.assert_close(
        normalise(name, MIXED, [100.0, -3, 8, 8])[:1], normalise(name, MIXED)
    )


def test_batch_std_has_one_scale_for_all_groups():
    """PAIR and MIXED together: mean 0.55, mean square 3.82 / 8 = 0.4775, deviation sqrt(0.175)."""
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.4, -0.2, 0.3, 0.3]]) / 0.175**0.5
    torch.testing.assert_close(normalise("batch_std", PAIR, MIXED), expected, atol=5e-4, rtol=0)


def test_identities_of_the_normalisers():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    rewards[::2] = rewards[::2].round()  # half of the groups have ties
    apply = {name: lambda r, name=name: NORMALISERS[name](r, Flags()) for name in NORMALISERS}
    large, small = Flags(softmax_beta=1e6), Flags(softmax_beta=1e-5)
    for name in CENTRED:
        assert apply[name](rewards).sum(1).abs().max() < 1e-9, name
        if name != "maxrl":  # it divides by the mean
            torch.testing.assert_close(apply[name](rewards + 17.25), apply[name](rewards), msg=name)
    torch.testing.assert_close(
        apply["zscore"](rewards * 8), apply["zscore"](rewards), rtol=0, atol=2e-2
    )
    torch.testing.assert_close(
        NORMALISERS["zscore"](rewards[1::2] * 8, eps=0.0),
        NORMALISERS["zscore"](rewards[1::2], eps=0.0),
    )
    assert torch.equal(apply["rank"](rewards * 8), apply["rank"](rewards))
    assert apply["rank"](rewards).abs().max() == 1
    torch.testing.assert_close(apply["loo"](rewards), apply["mean"](rewards) * 6 / 5)
    others = (rewards.sum(1, keepdim=True) - rewards) / 5
    torch.testing.assert_close(apply["loo"](rewards), rewards - others)
    torch.testing.assert_close(apply["best"](rewards).sum(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(
        1e6 * NORMALISERS["softmax"](rewards, large), apply["mean"](rewards), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        (NORMALISERS["softmax"](rewards, small) + 1) / 6, apply["best"](rewards)
    )


def test_filters():
    rewards = torch.tensor([PAIR, EQUAL, MIXED])
    finished = torch.tensor([[True, False, True, False]] * 3)
    yes, no = [True] * 4, [False] * 4
    assert FILTERS["none"](rewards, finished).tolist() == [yes, yes, yes]
    assert FILTERS["informative"](rewards, finished).tolist() == [yes, no, yes]
    assert FILTERS["resample"](rewards, finished).tolist() == [yes, no, yes]
    assert FILTERS["finished"](rewards, finished).tolist() == finished.tolist()
    half = FILTERS["top"](rewards, finished, Flags()).tolist()
    assert half == [[True, False, False, True], yes, [False, False, True, True]]
    assert FILTERS["top"](rewards[2:], finished, Flags(top_share=0.75)).tolist() == [
        [False, True, True, True]
    ]
    assert FILTERS["top"](
        torch.tensor([[1.0, 2, 3]]), finished, Flags(top_share=0.01)
    ).tolist() == [[False, False, True]]


def test_denominators_of_rows_of_2_and_6_tokens():
    """All 8 tokens alike; each row half, so 1/4 and 1/12 a token; 2 rows of at most 10 tokens."""
    factors = {name: f(torch.tensor([2, 6]), Flags()).tolist() for name, f in DENOMINATORS.items()}
    assert factors["token"] == [1 / 8, 1 / 8]
    assert factors["sequence"] == pytest.approx([1 / 4, 1 / 12])
    assert factors["constant"] == pytest.approx([1 / 20, 1 / 20])


def test_loss_of_three_tokens():
    """Two rows, of 2 and 1 tokens, weights 1 and -1: -(1 * (-0.5 - 0.25) - 1 * -2) / 3 = -1.25 / 3"""
    now = torch.tensor([[-0.5, -0.25], [-2.0, 0.0]], requires_grad=True)
    inside = torch.tensor([[True, True], [True, False]])
    losses, clipped = LOSSES["logprob"](now, now.detach(), torch.tensor([[1.0], [-1.0]]), inside)
    loss = (losses.sum(1) * DENOMINATORS["token"](torch.tensor([2, 1]))).sum()
    assert abs(loss.item() + 1.25 / 3) < 1e-6 and not clipped.any()
    loss.backward()
    torch.testing.assert_close(now.grad, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) / 3)


LOSS_SETTINGS = {
    "logprob": {},
    "clip": {"low": 0.2, "high": 0.28},
    "cispo": {"cap": 1.5},
    "gspo": {"low": 0.1, "high": 0.15},
}


def flags_of(name):
    names = {"low": "clip_low", "high": "clip_high", "cap": "cispo_cap"}
    return Flags(**{names[key]: value for key, value in LOSS_SETTINGS[name].items()})


def token_loss_by_hand(name, change, logprob, weight, row_change, low=0.0, high=0.0, cap=0.0):
    """-> loss of a token, its derivative by the token's log-prob in the sum over the row, whether it is clipped"""
    if name == "logprob":
        return -weight * logprob, -weight, False
    if name == "cispo":
        ratio = min(math.exp(change), cap)
        return -ratio * weight * logprob, -ratio * weight, math.exp(change) > cap
    ratio = math.exp(row_change if name == "gspo" else change)
    if weight > 0 and ratio > 1 + high:
        return -(1 + high) * weight, 0.0, True
    if weight < 0 and ratio < 1 - low:
        return -(1 - low) * weight, 0.0, True
    return -ratio * weight, -ratio * weight, False


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_a_double_loop_in_float64(name):
    """60 rows of 1 to 9 tokens, ratios from 0.4 to 2.5, weights of either sign: value, gradient and what is clipped. A
    gspo token's derivative is that of the row's shared ratio, a length-th of it in each of the row's tokens."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [rng.randint(1, 9) for _ in range(60)]
    inside = torch.arange(9) < torch.tensor(lengths)[:, None]
    then = -3 * torch.rand(60, 9, generator=generator, dtype=torch.float64) * inside
    drift = torch.linspace(-0.5, 0.5, 60, dtype=torch.float64)[
        torch.randperm(60, generator=generator), None
    ]
    change = drift + 0.8 * (torch.rand(60, 9, generator=generator, dtype=torch.float64) - 0.5)
    now = ((then + change) * inside).requires_grad_()
    weights = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    losses, clipped = LOSSES[name](now, then, weights, inside, flags_of(name))
    losses.sum().backward()
    seen = set()
    for row, length in enumerate(lengths):
        changes = [(now[row, n] - then[row, n]).item() for n in range(length)]
        weight = weights[row].item()
        assert not losses[row, length:].any() and not clipped[row, length:].any()
        for n in range(length):
            value, slope, is_clipped = token_loss_by_hand(
                name,
                changes[n],
                now[row, n].item(),
                weight,
                sum(changes) / length,
                **LOSS_SETTINGS[name],
            )
            assert losses[row, n].item() == pytest.approx(value, rel=1e-12)
            assert now.grad[row, n].item() == pytest.approx(slope, rel=1e-12)
            assert clipped[row, n].item() == is_clipped
            seen.add((weight > 0, is_clipped, changes[n] > 0))
    assert len(seen) >= (4 if name == "logprob" else 6)  # both signs, on both sides of the clip


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_at_the_first_update_the_gradients_of_all_losses_are_equal(denominator):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 4, 7, 7])
    inside = torch.arange(7) < lengths[:, None]
    then = -torch.rand(4, 7, generator=generator) * inside
    weights, gradients = torch.tensor([[1.0], [-2.0], [0.5], [-0.1]]), {}
    for name in LOSSES:
        now = then.clone().requires_grad_()
        losses, clipped = LOSSES[name](now, then, weights, inside, flags_of(name))
        (
            losses.sum(1) * DENOMINATORS[denominator](lengths, Flags(max_new_tokens=9))
        ).sum().backward()
        gradients[name] = now.grad * inside
        assert not clipped.any()
    assert gradients["logprob"].abs().max() > 0.01
    for name in ("clip", "cispo", "gspo"):
        torch.testing.assert_close(gradients[name], gradients["logprob"], atol=1e-6, rtol=0)


def test_k2_has_the_gradient_of_kl_and_k3_that_of_the_other_direction():
    """Five tokens, sums over all of them, float64: E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi),
    while the mean of k3 is KL(pi || ref) itself."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.2, 1.0, -1.5], dtype=torch.float64).log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logprobs = logits.log_softmax(0)
    pi, sampled = (
        logprobs.exp(),
        logprobs.exp().detach(),
    )  # the expectation is over samples, which carry no gradient
    kl = (pi * (logprobs - reference)).sum()
    reverse = (reference.exp() * (reference - logprobs)).sum()
    assert (sampled * k3(logprobs, reference)).sum().item() == pytest.approx(kl.item(), abs=1e-12)
    k2_gradient = gradient((sampled * k2(logprobs, reference)).sum())
    k3_gradient = gradient((sampled * k3(logprobs, reference)).sum())
    torch.testing.assert_close(k2_gradient, gradient(kl))
    torch.testing.assert_close(k3_gradient, gradient(reverse))
    assert (k3_gradient - k2_gradient).abs().max() > 0.05


def test_weights_of_each_token(name="clip"):
    """(B, N) weights, here those of a row spread over it: the same numbers; gspo, which cannot, refuses."""
    generator = torch.Generator().manual_seed(2)
    now, then, weights = (torch.randn(4, 7, generator=generator) for _ in range(3))
    inside = torch.arange(7) < torch.tensor([[1], [4], [7], [7]])
    for name in ("logprob", "clip", "cispo"):
        spread, _ = LOSSES[name](now, then, weights[:, :1].expand(4, 7), inside, Flags())
        assert torch.equal(spread, LOSSES[name](now, then, weights[:, :1], inside, Flags())[0])
        each, _ = LOSSES[name](now, then, weights, inside, Flags())
        one, _ = LOSSES[name](now[:, 3:4], then[:, 3:4], weights[:, 3:4], inside[:, 3:4], Flags())
        assert torch.equal(each[:, 3:4], one)
    with pytest.raises(UserError, match="gspo: has one ratio per response"):
        LOSSES["gspo"](now, then, weights, inside, Flags())


def test_a_recipe_fills_in_what_was_not_given():
    chosen = parse_train("--recipe", "dapo")
    assert (chosen.filter, chosen.denominator, chosen.loss) == ("resample", "token", "clip")
    assert (chosen.clip_low, chosen.clip_high, chosen.recipe) == (0.2, 0.28, "dapo")
    assert chosen.max_new_tokens == 32  # the task's preset stays where the recipe says nothing
    mine = parse_train("--recipe", "dapo", "--clip_high", 0.5, "--filter", "none")
    assert (mine.clip_high, mine.filter, mine.loss) == (0.5, "none", "clip")
    assert parse_train().recipe is None and parse_train().loss == "logprob"
    for name, flags in RECIPES.items():
        recorded = vars(parse_train("--recipe", name))
        assert {flag: recorded[flag] for flag in flags} == flags
