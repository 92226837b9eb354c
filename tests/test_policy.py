from pathlib import Path

import pytest
import torch
from conftest import CPU, parse_train
from transformers import AutoConfig, AutoModelForCausalLM

import train
from engine.optimizer import Optimizer
from lib.batching import micro_batches
from lib.estimate import shape
from lib.flags import UserError
from lib.head import float32_logits
from lib.run import read_config
from loss import token_logprobs
from policy import default_learning_rate, default_warmup, load_policy, stop_ids
from sample import Rollout, Sampling

SMOLLM2 = dict(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def test_micro_batches_hold_every_row_once_and_keep_to_the_limit():
    for limit, lengths, expected in [
        (21, [5, 30, 7, 7, 12, 1], [[1], [4], [2, 3], [0, 5]]),
        # 7 < 0.75 * 10: padding would cost as much as tokens
        (100, [10, 9, 8, 7, 6], [[0, 1, 2], [3, 4]]),
        (200, [10, 9, 8, 7, 6], [[0, 1, 2, 3, 4]]),  # too little for two
        (21, [], []),
    ]:
        lengths = torch.tensor(lengths, dtype=torch.long)
        assert [batch.tolist() for batch in micro_batches(lengths, limit)] == expected


def test_the_stop_token_is_trained_on_even_where_pad_equals_eos(load):
    """gpt2 here pads with its end-of-text token: masks made from token ids would leave it out of
    the loss."""
    model, tokenizer = load("gpt2")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos and stop_ids(model, tokenizer) == [eos]
    ids = torch.tensor([[40, 41, 42, eos, eos, eos]])
    mask = torch.tensor([[True, True, False, False]])
    zeros = torch.zeros(1, 4)
    rollout = Rollout(ids, torch.tensor([2]), torch.tensor([4]), mask, zeros, mask[:, 0])
    logprobs, _ = token_logprobs(model, rollout, Sampling())
    assert torch.equal(logprobs != 0, mask)
    head = model.get_output_embeddings().weight
    [gradient] = torch.autograd.grad(logprobs.sum(), head)
    assert gradient[eos].abs().max() > 0.01


@pytest.fixture
def bfloat16_model(folders):
    """With its optimizer."""
    model, _ = load_policy(folders("llama"), CPU, "bfloat16")
    return model, Optimizer(model, weight_decay=0.0)


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(bfloat16_model):
    """And their gradients are those of autograd, rounded once."""
    model, _ = bfloat16_model
    weight = model.lm_head.weight
    states = torch.linspace(-2, 2, 3 * weight.shape[1]).view(3, -1).bfloat16().requires_grad_()
    logits = model.lm_head(states)
    wide = [tensor.detach().float().requires_grad_() for tensor in (states, weight)]
    expected = wide[0] @ wide[1].T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits.bfloat16().float(), logits)
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    gradient = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    # the optimizer takes a gradient from the parameter as soon as it is there
    found = torch.autograd.grad(logits, [states, weight], gradient)
    for one, other in zip(found, torch.autograd.grad(expected, wide, gradient)):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 0.01 * other.norm()


def test_heads_of_other_kinds_stay_as_they_are(folders):
    model, _ = load_policy(folders("llama"), CPU, "bfloat16")
    del model.lm_head.forward
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(model.lm_head.weight)).bfloat16())
    float32_logits(model)
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    model.float()
    float32_logits(model)
    assert "forward" not in vars(model.lm_head)


def test_bfloat16_weights_follow_their_float32_masters(bfloat16_model):
    """Weights of 1: an AdamW step of 1e-5 is far below bfloat16's resolution; 200 of them are
    not."""
    model, optimizer = bfloat16_model
    weight = model.model.norm.weight
    [master] = [
        master
        for parameter, master in zip(optimizer.parameters, optimizer.masters)
        if parameter is weight
    ]
    before = weight.detach().float()
    for _ in range(200):
        weight.sum().backward()
        optimizer.step(1e-5, max_grad_norm=1e9)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(before - master, torch.full_like(before, 2e-3), rtol=0, atol=5e-5)
    assert (weight - master).abs().max() < 1 / 256  # the parameter is a neighbour of its master
    assert (weight != before).any()


def test_bfloat16_gradients_of_micro_batches_add_up_in_float32(bfloat16_model):
    """1 + 2**-9 is 1 in bfloat16: adding up there would lose every later micro-batch."""
    model, optimizer = bfloat16_model
    for scale in (1.0, 2.0**-9):
        (model.model.norm.weight.sum() * scale).backward()
    assert model.model.norm.weight.grad is None
    assert optimizer.step(0.0, max_grad_norm=1e9) == pytest.approx(8 * (1 + 2.0**-9), abs=1e-5)


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
    config = train.Config(lr=1.0, warmup_steps=10, steps=20)
    rates = [train.learning_rate(step, config) for step in (1, 5, 10, 15, 20)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1])


def test_the_warm_up_is_a_tenth_of_the_steps_and_at_most_ten():
    assert [default_warmup(steps) for steps in (1, 5, 16, 60, 200)] == [1, 1, 2, 6, 10]


def test_the_default_rate_falls_with_size_and_an_adapter_wants_more():
    """Of models without storage: 0.5 M, 135 M, 494 M and 1.5 G parameters."""
    small = AutoConfig.for_model("llama", **SMOLLM2)
    rates = []
    for config in (shape("tiny"), small, shape("qwen2.5-0.5b"), shape("qwen2.5-1.5b")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rates.append((default_learning_rate(model, 0), default_learning_rate(model, 16)))
    assert rates == [(2e-4, 2e-4), (3e-5, 3e-4), (1e-5, 1e-4), (5e-6, 3e-5)]


@pytest.mark.parametrize(("flag", "warmup_steps"), [("", 1), ("--warmup_steps 0", 0)])
def test_a_run_records_the_rate_and_the_warm_up_that_it_took(base, flag, warmup_steps):
    Path("my.jsonl").write_text(
        "\n".join(f'{{"prompt": "{i}+1=", "answer": "2"}}' for i in range(9))
    )
    sizes = "--prompts_per_step 1 --group_size 2 --max_new_tokens 2 --eval_problems 0"
    flags = f"--model {base} --task my.jsonl --steps 2 {sizes} {flag}".split()
    config = read_config(train.main(parse_train(*flags)))
    assert (config["lr"], config["warmup_steps"]) == (2e-4, warmup_steps)
