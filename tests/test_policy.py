import copy
import math

import pytest
import tiny
import torch
from conftest import CPU

from flags import UserError
from loss import AGGREGATIONS, LOSSES
from policy import Optimizer, load_policy, response_logprobs, stop_ids
from sample import generate
from update import Learner, micro_batches


def double_loop(model, ids, prompt_length, length, temperature):
    """The log-prob of each response token from one plain forward pass a token, summed up in Python's float64."""
    values = []
    for end in range(prompt_length, length):
        logits = model(torch.tensor([ids[:end]])).logits[0, -1].tolist()
        scaled = [logit / temperature for logit in logits]
        top = max(scaled)
        total = sum(math.exp(value - top) for value in scaled)
        values.append(scaled[ids[end]] - top - math.log(total))
    return values


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logprobs_equal_a_double_loop_in_float64(load, architecture):
    model, _ = load(architecture)
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(1)
    prompt_lengths, lengths = [3, 12, 1, 5], [9, 13, 2, 20]
    ids = torch.randint(4, 500, (4, 20), generator=generator)
    with torch.no_grad():
        got = response_logprobs(model, ids, torch.tensor(prompt_lengths), torch.tensor(lengths), 0.7)
        for row, start, end, values in zip(ids.tolist(), prompt_lengths, lengths, got.tolist()):
            expected = double_loop(model, row, start, end, 0.7)
            assert values[: end - start] == pytest.approx(expected, abs=1e-5)
            assert values[end - start :] == [0.0] * (len(values) - end + start)


def test_micro_batches_hold_every_row_once_and_keep_to_the_limit():
    lengths = torch.tensor([5, 30, 7, 7, 12, 1])
    batches = micro_batches(lengths, 21)
    assert sorted(row for batch in batches for row in batch.tolist()) == [0, 1, 2, 3, 4, 5]
    assert [batch.tolist() for batch in batches] == [[1], [4], [2, 3], [0, 5]]
    lengths = torch.tensor([10, 9, 8, 7, 6])  # 7 < 0.75 * 10: padding would cost as much as tokens
    assert [batch.tolist() for batch in micro_batches(lengths, 100)] == [[0, 1, 2], [3, 4]]
    assert [batch.tolist() for batch in micro_batches(lengths, 200)] == [[0, 1, 2, 3, 4]]  # too little for two
    assert micro_batches(torch.tensor([], dtype=torch.long), 21) == []


def token_losses(now, then, start, weights, inside):
    return LOSSES["logprob"](now, then, weights, inside)


def flat_gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def plain_gradient(model, rollout, weights, temperature=1.0):
    """The gradient of one step by plain autograd: rows whole, all logits at once, no tiles, no shared prompts."""
    model.zero_grad()
    logprobs = response_logprobs(model, rollout.ids, rollout.prompt_lengths, rollout.lengths, temperature)
    factors = AGGREGATIONS["token"](rollout.response_lengths, 99)
    (-weights[:, None] * logprobs * factors[:, None]).sum().backward()
    return flat_gradient(model)


def gradient(model, rollout, weights, tokens, temperature=1.0):
    """The same in micro-batches of `tokens`, as train.py forms it."""
    model.zero_grad()
    factors, then = AGGREGATIONS["token"](rollout.response_lengths, 99), rollout.logprobs
    rows = torch.arange(len(weights))
    Learner(model, temperature).backward(rollout, rows, token_losses, then, then, weights, factors, tokens)
    return flat_gradient(model)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_gradients_do_not_depend_on_the_micro_batch_size(load, architecture):
    """Each micro-batch divided by its own token count is the mistake this keeps out."""
    model, _ = load(architecture)
    rollout = generate(model, [[5, 6, 7], [8], [9, 10]], 4, 12, list(range(100, 200)), [1, 2, 3])
    assert len(set(rollout.response_lengths.tolist())) > 3  # else any split would do
    weights = torch.linspace(-1, 2, 12)
    whole = plain_gradient(model, rollout, weights)
    for tokens in (1, 20, 50, 10**6):
        torch.testing.assert_close(gradient(model, rollout, weights, tokens), whole, rtol=0,
                                   atol=2e-6 * whole.abs().max().item())


def test_the_stop_token_is_trained_on_even_where_pad_equals_eos(load):
    """gpt2 here pads with its end-of-text token: masks made from token ids would leave it out of the loss."""
    model, tokenizer = load("gpt2")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos and stop_ids(model, tokenizer) == [eos]
    ids = torch.tensor([[40, 41, 42, eos, eos, eos], [40, 41, 42, 43, 44, eos]])
    logprobs = response_logprobs(model, ids, torch.tensor([2, 2]), torch.tensor([4, 6]))
    assert (logprobs[0] != 0).tolist() == [True, True, False, False]
    assert (logprobs[1] != 0).all()
    model.zero_grad()
    logprobs[0].sum().backward()
    assert model.get_output_embeddings().weight.grad[eos].abs().max() > 0.01


def test_bfloat16_weights_follow_their_float32_masters(folders):
    """One AdamW step of 1e-6 is far below bfloat16's resolution of these weights; 2,000 of them are not."""
    model, _ = load_policy(folders("llama"), CPU, "bfloat16")
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimizer = Optimizer(model, weight_decay=0.0)
    for _ in range(2000):
        weight.grad = None
        for master in optimizer.masters:
            master.grad = torch.ones_like(master)
        optimizer.step(1e-6, max_grad_norm=1e9)
    master = next(m for w, m in zip(optimizer.weights, optimizer.masters) if w is weight)
    moved = before.float() - master
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-3), rtol=0.02, atol=0)
    assert torch.equal(weight, master.bfloat16())


def test_bfloat16_gradients_of_micro_batches_add_up_in_float32(folders):
    """1 + 2**-9 is 1 in bfloat16: adding up there would lose every later micro-batch."""
    model, _ = load_policy(folders("llama"), CPU, "bfloat16")
    optimizer = Optimizer(model, weight_decay=0.0)
    weight = model.model.norm.weight
    for scale in (1.0, 2.0**-9):
        (weight.sum() * scale).backward()
    master = next(m for w, m in zip(optimizer.weights, optimizer.masters) if w is weight)
    assert weight.grad is None and (master.grad == 1 + 2.0**-9).all()


def test_folders_that_cannot_be_loaded_get_one_sentence(folders, tmp_path):
    for name in ("nowhere/at/all", str(tmp_path)):
        with pytest.raises(UserError, match="cannot be loaded as a causal language model") as error:
            load_policy(name, CPU)
        assert "\n" not in str(error.value)
    broken = tmp_path / "broken"
    load_policy(folders("llama"), CPU)[0].save_pretrained(broken)
    with pytest.raises(UserError, match="there is no tokenizer in the folder"):
        load_policy(str(broken), CPU)
