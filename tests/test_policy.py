import pytest
import torch
from conftest import CPU, parse_train

from fast.optimizer import Optimizer
from lib.batching import micro_batches
from lib.flags import UserError
from loss import token_logprobs
from policy import learning_rate, load_policy, stop_ids
from sample import Rollout, Sampling


def test_micro_batches_hold_every_row_once_and_keep_to_the_limit():
    lengths = torch.tensor([5, 30, 7, 7, 12, 1])
    batches = micro_batches(lengths, 21)
    assert sorted(row for batch in batches for row in batch.tolist()) == [0, 1, 2, 3, 4, 5]
    assert [batch.tolist() for batch in batches] == [[1], [4], [2, 3], [0, 5]]
    lengths = torch.tensor([10, 9, 8, 7, 6])  # 7 < 0.75 * 10: padding would cost as much as tokens
    assert [batch.tolist() for batch in micro_batches(lengths, 100)] == [[0, 1, 2], [3, 4]]
    assert [batch.tolist() for batch in micro_batches(lengths, 200)] == [
        [0, 1, 2, 3, 4]
    ]  # too little for two
    assert micro_batches(torch.tensor([], dtype=torch.long), 21) == []


def test_the_stop_token_is_trained_on_even_where_pad_equals_eos(load):
    """gpt2 here pads with its end-of-text token: masks made from token ids would leave it out of the loss."""
    model, tokenizer = load("gpt2")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos and stop_ids(model, tokenizer) == [eos]
    ids = torch.tensor([[40, 41, 42, eos, eos, eos], [40, 41, 42, 43, 44, eos]])
    prompt_lengths, lengths = torch.tensor([2, 2]), torch.tensor([4, 6])
    mask = torch.arange(4) < (lengths - prompt_lengths)[:, None]
    rollout = Rollout(
        ids, prompt_lengths, lengths, mask, torch.zeros(2, 4), torch.ones(2, dtype=torch.bool)
    )
    logprobs, _ = token_logprobs(model, rollout, torch.arange(2), Sampling())
    assert torch.equal(logprobs != 0, mask)
    model.zero_grad()
    logprobs[0].sum().backward()
    assert model.get_output_embeddings().weight.grad[eos].abs().max() > 0.01
    model.zero_grad()


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
    master = next(m for w, m in zip(optimizer.parameters, optimizer.masters) if w is weight)
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
    master = next(m for w, m in zip(optimizer.parameters, optimizer.masters) if w is weight)
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


def test_the_learning_rate_rises_and_then_falls_to_a_tenth():
    rates = [learning_rate(step, 1.0, warmup_steps=10, steps=20) for step in (1, 5, 10, 15, 20)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1])


def test_flags_not_given_suit_the_task_and_given_ones_stay():
    assert parse_train("--task", "add").max_new_tokens == 32
    assert parse_train("--task", "add", "--max_new_tokens", 50).max_new_tokens == 50
    assert parse_train("--task", "gsm8k").max_new_tokens == 512
