import pytest
import torch
from conftest import parse_train

from lib.flags import UserError
from loss import DENOMINATORS, LOSSES, NORMALISERS, RECIPES, group_weights, k2, k3, select

PAIR, MIXED, ONE = [1.0, 0, 0, 1], [0.2, 0.4, 0.9, 0.9], [0.0, 0, 1, 0]
CENTRED = "mean zscore loo batch_std maxrl softmax rank"


class Flags:
    """Those of train.py's Config that the pieces of the loss look at."""

    softmax_beta, top_share, max_new_tokens, prompts_per_step = 0.5, 0.5, 10, 1
    clip_low, clip_high, cispo_cap = 0.2, 0.28, 1.5

    def __init__(self, **changes):
        self.__dict__ |= changes


def normalise(name, rewards, **flags):
    """(P, G) rewards -> (P, G) weights"""
    groups = torch.as_tensor(rewards)
    weights = group_weights([*groups], Flags(normaliser=name, **flags))
    return weights.view_as(groups)


def numbers(text):
    return torch.tensor(list(map(float, text.split())))


# Means are 0.5, 0.6, 0.25 and deviations 0.5, 0.3082, 0.4330.
# softmax: 4 e^(r / 0.5) / (their sum) - 1
BY_HAND = """
mean     | 0.5 -0.5 -0.5 0.5         | -0.4 -0.2 0.3 0.3         | -0.25 -0.25 0.75 -0.25
zscore   | 1 -1 -1 1                 | -1.298 -0.649 0.973 0.973 | -0.577 -0.577 1.732 -0.577
loo      | 0.667 -0.667 -0.667 0.667 | -0.533 -0.267 0.4 0.4     | -0.333 -0.333 1 -0.333
maxrl    | 1 -1 -1 1                 | -0.667 -0.333 0.5 0.5     | -1 -1 3 -1
softmax  | 0.762 -0.762 -0.762 0.762 | -0.623 -0.437 0.530 0.530 | -0.615 -0.615 1.845 -0.615
rank     | 0.667 -0.667 -0.667 0.667 | -1 -0.333 0.667 0.667     | -0.333 -0.333 1 -0.333
best     | 0.5 0 0 0.5               | 0 0 0.5 0.5               | 0 0 1 0
positive | 1 0 0 1                   | 0.2 0.4 0.9 0.9           | 0 0 1 0
raw      | 1 0 0 1                   | 0.2 0.4 0.9 0.9           | 0 0 1 0"""


@pytest.mark.parametrize("line", BY_HAND.strip().splitlines())
def test_normalisers_worked_out_by_hand(line):
    """Three groups at once: each is taken by itself. And a group of one."""
    name, *expected = line.split("|")
    name = name.strip()
    found = normalise(name, [PAIR, MIXED, ONE])
    # eps is 1e-4
    torch.testing.assert_close(
        found, torch.stack(list(map(numbers, expected))), atol=1.5e-3, rtol=0
    )
    assert normalise(name, [[3.0]]).item() == {"best": 1, "positive": 3, "raw": 3}.get(name, 0)


def test_two_more_by_hand():
    """PAIR and MIXED together: mean 0.55, mean square 3.82 / 8 = 0.4775, deviation sqrt(0.175)."""
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.4, -0.2, 0.3, 0.3]]) / 0.175**0.5
    torch.testing.assert_close(normalise("batch_std", [PAIR, MIXED]), expected, atol=5e-4, rtol=0)
    assert normalise("positive", [[-1.0, 2]]).tolist() == [[0, 2]]


@pytest.mark.parametrize("name", CENTRED.split())
def test_only_differences_within_a_group_count(name):
    """Seven rewards of 0.1 have a mean that is not quite 0.1: divided by a tiny eps, that was a
    weight once. Rewards around a million are exact in float32."""
    for value in (0.1, 0.7, 1e6 + 0.3, -3.3, 0.0):
        if name == "maxrl" and value < 0:
            continue  # refused
        assert not normalise(name, [[value] * 7]).any()
    assert not NORMALISERS["zscore"](torch.full((7,), 0.1), eps=1e-12).any()
    far = normalise(name, [[reward + 1e6 for reward in ONE]])
    near = normalise(name, [ONE])
    if name == "maxrl":  # it divides by the mean
        near = near * 0.25 / 1e6
    torch.testing.assert_close(far, near, atol=1e-9, rtol=1e-3)
    assert abs(normalise(name, [MIXED, ONE]).sum(1)).max() < 1e-5


def test_identities_of_the_normalisers():
    rewards = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[::2] = rewards[::2].round()  # half of the groups have ties
    others = (rewards.sum(1, keepdim=True) - rewards) / 5
    torch.testing.assert_close(normalise("loo", rewards), rewards - others)
    flat = normalise("softmax", rewards, softmax_beta=1e6)
    torch.testing.assert_close(1e6 * flat, normalise("mean", rewards), atol=1e-4, rtol=0)
    sharp = normalise("softmax", rewards, softmax_beta=1e-5)
    torch.testing.assert_close((sharp + 1) / 6, normalise("best", rewards))


FILTERED = """
none        0.5  | 1111 1111 1111
informative 0.5  | 1111 0000 1111
resample    0.5  | 1111 0000 0000
finished    0.5  | 1010 1010 1010
top         0.5  | 1001 1111 0011
top         0.75 | 1111 1111 0111
top         0.01 | 1001 1111 0011"""


@pytest.mark.parametrize("line", FILTERED.strip().splitlines())
def test_filters(line):
    """Of the best of a group also those that tie with the last one."""
    name, share, _, *expected = line.split()
    rewards = torch.tensor([PAIR, [0.7] * 4, MIXED])
    finished = torch.tensor([True, False, True, False] * 3)
    found = select([*rewards], finished, Flags(filter=name, top_share=float(share)))
    assert ["".join(map(str, row)) for row in found.view(3, 4).int().tolist()] == expected


def test_groups_may_differ_in_size():
    groups = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])]
    found = group_weights(groups, Flags(normaliser="mean"))
    assert found.tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5, -0.5, 0.5, 0.0])
    found = select(groups, torch.ones(7, dtype=torch.bool), Flags(filter="top", top_share=0.4))
    assert found.tolist() == [True, False, True, False, False, True, False]


def test_denominators_of_rows_of_2_and_6_tokens():
    """All 8 tokens alike; each row half, so 1/4 and 1/12 a token; 2 rows of at most 10 tokens."""
    expected = {"token": [1 / 8, 1 / 8], "sequence": [1 / 4, 1 / 12], "constant": [1 / 20, 1 / 20]}
    for name, scale in expected.items():
        found = DENOMINATORS[name](torch.tensor([2, 6]), Flags()).tolist()
        assert found == pytest.approx(scale)


RATIOS = [[1, 1, 9], [0.5, 1.6, 9], [1.6, 1.6, 9], [0.5, 0.5, 9]]
# of two tokens of each row, with weight 1 and then with weight -1; *: clipped
LOSSES_BY_HAND = """
logprob | 1 1 1 1 1 1 1 1 | -1 -1 -1 -1 -1 -1 -1 -1
clip    | -1 -1 -0.5 -1.28* -1.28* -1.28* -0.5 -0.5 | 1 1 0.8* 1.6 1.6 1.6 0.8* 0.8*
cispo   | 1 1 0.5 1.5* 1.5* 1.5* 0.5 0.5 | -1 -1 -0.5 -1.5* -1.5* -1.5* -0.5 -0.5
gspo    | -1 -1 -0.8944 -0.8944 -1.28* -1.28* -0.5 -0.5 | 1 1 0.8944 0.8944 1.6 1.6 0.8* 0.8*"""


@pytest.mark.parametrize("line", LOSSES_BY_HAND.strip().splitlines())
def test_losses_worked_out_by_hand(line):
    """Log-probs of -1, and padding after two tokens. A token that is clipped has no gradient, save
    with cispo. gspo: the ratio of the row is sqrt(0.5 * 1.6); a token's derivative is its half in
    both tokens."""
    name, *cells = line.split("|")
    name = name.strip()
    mask = torch.tensor([[True, True, False]] * 4)
    for weight, cell in zip((1.0, -1.0), cells):
        now = torch.full((4, 3), -1.0, requires_grad=True)
        old = -1 - torch.tensor(RATIOS).log()
        found, clipped = LOSSES[name](now, old, torch.full((4, 1), weight), mask, Flags())
        found[:, :2].sum().backward()
        expected = numbers(cell.replace("*", "")).view(4, 2)
        stars = ["*" in number for number in cell.split()]
        slope = -expected
        if name in ("clip", "gspo"):
            slope = expected.where(~clipped[:, :2], 0)
        torch.testing.assert_close(found[:, :2], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(now.grad[:, :2], slope, atol=1e-4, rtol=0)
        assert clipped[mask].tolist() == stars and not clipped[~mask].any()


def test_weights_of_each_token():
    """(B, N) weights: each column by itself. gspo, which cannot, refuses."""
    now, old, weights = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 7, dtype=torch.bool)
    for name in ("logprob", "clip", "cispo"):
        found, _ = LOSSES[name](now, old, weights, mask, Flags())
        third, _ = LOSSES[name](now[:, 3:4], old[:, 3:4], weights[:, 3:4], mask[:, 3:4], Flags())
        assert torch.equal(found[:, 3:4], third)
    with pytest.raises(UserError, match="gspo: has one ratio per response"):
        LOSSES["gspo"](now, old, weights, mask, Flags())


def test_k2_has_the_gradient_of_kl_and_k3_that_of_the_other_direction():
    """Five tokens, sums over all of them: E[grad k2] = grad KL(pi || ref), E[grad k3] = grad
    KL(ref || pi), while the mean of k3 is KL(pi || ref) itself."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.0, -0.4], requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.2, 1.0, -1.5]).log_softmax(0)
    logprobs = logits.log_softmax(0)
    sampled = logprobs.exp().detach()  # the expectation is over samples, which carry no gradient
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    reverse = (reference.exp() * (reference - logprobs)).sum()
    assert (sampled * k3(logprobs, reference)).sum().item() == pytest.approx(kl.item(), abs=1e-6)
    for estimate, exact in ((k2, kl), (k3, reverse)):
        mean = (sampled * estimate(logprobs, reference)).sum()
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (mean, exact)]
        torch.testing.assert_close(*gradients)


def test_a_recipe_fills_in_what_was_not_given():
    chosen = parse_train("--recipe", "dapo")
    assert (chosen.filter, chosen.denominator, chosen.loss) == ("resample", "token", "clip")
    assert (chosen.clip_low, chosen.clip_high, chosen.recipe) == (0.2, 0.28, "dapo")
    assert chosen.max_new_tokens == 32  # the task's preset stays where the recipe says nothing
    mine = parse_train("--recipe", "dapo", "--clip_high", 0.5, "--filter", "none")
    assert (mine.clip_high, mine.filter, mine.loss) == (0.5, "none", "clip")
    assert parse_train().loss == "logprob"
    for name in RECIPES:
        assert parse_train("--recipe", name).loss == RECIPES[name]["loss"]
