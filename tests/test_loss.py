import torch

from loss import AGGREGATIONS, LOSSES, NORMALISERS


def test_zscore_of_one_zero_zero_one_is_plus_and_minus_one():
    weights = NORMALISERS["zscore"](torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, -1.0, -1.0, 1.0]]), atol=3e-4, rtol=0)


def test_zscore_takes_each_group_by_itself():
    """(2, 0, 0, 0) has mean 0.5 and deviation sqrt(0.75); the other group must not move it."""
    weights = NORMALISERS["zscore"](torch.tensor([[2.0, 0, 0, 0], [100.0, -3, 8, 8]]), eps=0.0)
    torch.testing.assert_close(weights[0], torch.tensor([3.0, -1, -1, -1]) / 3**0.5)


def test_a_group_of_equal_rewards_gets_exact_zeros():
    """Seven rewards of 0.1 have a mean that is not quite 0.1: divided by a tiny eps that became a weight once."""
    rewards = torch.tensor([[0.1] * 7, [1e6 + 0.3] * 7])
    assert NORMALISERS["zscore"](rewards, eps=1e-12).tolist() == [[0.0] * 7] * 2


def test_loss_of_three_tokens():
    """Two rows, of 2 and 1 tokens, weights 1 and -1: -(1 * (-0.5 - 0.25) - 1 * -2) / 3 = -1.25 / 3"""
    logprobs = torch.tensor([[-0.5, -0.25], [-2.0, 0.0]], requires_grad=True)
    factors = AGGREGATIONS["token"](torch.tensor([2, 1]), 99)
    per_token = LOSSES["logprob"](logprobs, logprobs.detach(), torch.tensor([[1.0], [-1.0]]))
    loss = (per_token.sum(1) * factors).sum()
    assert abs(loss.item() + 1.25 / 3) < 1e-6
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) / 3)
