"""bfloat16 parameters that are rounded at random follow their float32 masters; --offload changes no
number."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import CPU
from transformers import AutoModelForCausalLM

from engine.optimizer import Optimizer, round_stochastically
from lib.estimate import shape
from lib.flags import UserError
from policy import load_policy


@pytest.mark.parametrize(
    "value",
    # between 1 and 2 bfloat16 has steps of 1/128; the last is a subnormal, with steps of 2**-133
    [1 + 0.25 / 128, -1 - 0.75 / 128, 3e-3, 4.25 * 2.0**-133],
)
def test_the_mean_of_what_is_rounded_is_the_value(value):
    """20,000 draws: only the two neighbours, each as often as the value is near to it, to five
    standard errors."""
    n = 20_000
    found = round_stochastically(torch.full((n,), value), 7).double()
    low, high = found.unique().tolist()
    assert low < value < high
    share = (value - low) / (high - low)
    error = 5 * (share * (1 - share) / n) ** 0.5
    assert (found == high).double().mean().item() == pytest.approx(share, abs=error)


def test_what_bfloat16_has_stays_as_it_is():
    largest = torch.finfo(torch.bfloat16).max
    numbers = [0.0, -0.0, 1.0, -2.5, 2.0**-133, -(2.0**-126), largest, -largest]
    numbers += [float("inf"), -float("inf")]
    exact = torch.tensor(numbers * 1000)
    assert torch.equal(round_stochastically(exact, 0).float(), exact)
    # all bits set: the next number would be -0
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000] * 1000, dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nans, 0).isnan().all()


def test_a_large_tensor_is_rounded_in_pieces_with_other_noise_in_each():
    numbers = torch.full((3, 50_000), 1 + 0.5 / 128)  # more than two pieces
    pieces = round_stochastically(numbers, 1, 2).float().flatten()[:131_072].view(2, -1)
    assert not torch.equal(*pieces)
    assert pieces.mean(1).tolist() == pytest.approx([1 + 0.5 / 128] * 2, abs=1e-4)


def test_the_noise_is_a_function_of_its_key():
    numbers = torch.rand(1000)
    first = round_stochastically(numbers, 0, 5, 3)
    torch.rand(1)  # the global generator has no part in it
    assert torch.equal(first, round_stochastically(numbers, 0, 5, 3))
    for key in ((1, 5, 3), (0, 6, 3), (0, 5, 4)):
        assert not torch.equal(first, round_stochastically(numbers, *key))


def train(model, steps, optimizer=None, **options):
    """Updates from two micro-batches each, with gradients that depend on the parameters."""
    optimizer = optimizer or Optimizer(model, 0.01, **options)
    generator = torch.Generator().manual_seed(optimizer.steps)
    for _ in range(steps):
        for _ in range(2):
            ids = torch.randint(100, (2, 8), generator=generator)
            model(ids, labels=ids).loss.backward()
        assert optimizer.step(1e-3, 1.0) > 0
    return optimizer


def resume(model, **options):
    """Two more updates, with a new optimizer that goes on from the file."""
    for parameter in model.parameters():
        parameter._post_accumulate_grad_hooks = None  # those of the first one
    optimizer = Optimizer(model, 0.01, **options)
    optimizer.load_state_dict(torch.load("optimizer.pt", weights_only=True))
    train(model, 2, optimizer)


def tiny(dtype):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape("tiny"), dtype=dtype)


def assert_equal_parameters(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_changes_no_number(dtype):
    here = tiny(dtype)
    there = copy.deepcopy(here)
    train(here, 3)
    optimizer = train(there, 3, offload=True)
    assert optimizer.masters[0] is not optimizer.parameters[0]
    assert_equal_parameters(there, here)


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_optimizer_rounds_as_the_straight_one(offload):
    straight = tiny(torch.bfloat16)
    resumed = copy.deepcopy(straight)
    train(straight, 2, train(straight, 2, seed=1, offload=offload))
    before = train(resumed, 2, seed=1, offload=offload)
    torch.save(before.state_dict(), "optimizer.pt")
    resume(resumed, seed=1, offload=offload)
    assert_equal_parameters(resumed, straight)


def test_moments_in_8_bits_learn_resume_and_are_small():
    """Four updates with them end within 5 % of where those with float32 moments do."""
    pytest.importorskip("bitsandbytes")
    plain = tiny(torch.bfloat16)
    straight, resumed = copy.deepcopy(plain), copy.deepcopy(plain)
    before = plain.lm_head.weight.detach().clone()
    train(plain, 2, train(plain, 2))
    train(straight, 2, train(straight, 2, in_8_bits=True))
    gap = (straight.lm_head.weight - plain.lm_head.weight).float().norm()
    moved = (plain.lm_head.weight - before).float().norm()
    assert 0 < gap < 0.05 * moved
    torch.save(train(resumed, 2, in_8_bits=True).state_dict(), "optimizer.pt")
    # 4 bytes of a master, and little more than 1 of each moment
    assert Path("optimizer.pt").stat().st_size < 6.5 * resumed.num_parameters()
    resume(resumed, in_8_bits=True)
    assert_equal_parameters(resumed, straight)


def test_moments_in_8_bits_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        Optimizer(tiny(torch.float32), 0.0, in_8_bits=True)


def test_another_seed_rounds_otherwise():
    one = tiny(torch.bfloat16)
    other = copy.deepcopy(one)
    train(one, 1, seed=0)
    train(other, 1, seed=1)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_small_updates_reach_bfloat16_parameters_on_average(folders):
    """Weights of 1, 30 updates of 1e-5 each: to the nearest, none of them would move, since
    bfloat16 has steps of 1/256 below 1. So 30e-5 * 256 = 7.7 % of them have moved by a step."""
    model, _ = load_policy(folders("llama"), CPU, "bfloat16")
    optimizer = Optimizer(model, weight_decay=0.0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.fill_(1)
        optimizer.masters[0].fill_(1)
    for _ in range(30):
        embedding.sum().backward()
        optimizer.step(1e-5, max_grad_norm=1e9)
    moved = 1 - embedding.detach().float()
    assert moved.unique().tolist() == [0, 1 / 256]
    assert moved.mean().item() == pytest.approx(3e-4, rel=0.1)


def test_the_file_of_an_optimizer_is_that_of_its_masters_and_moments():
    """The buffer of --offload is not part of it."""
    model = tiny(torch.bfloat16)
    torch.save(train(model, 1, offload=True).state_dict(), "optimizer.pt")
    assert Path("optimizer.pt").stat().st_size < 1.02 * 12 * model.num_parameters()


def test_an_optimizer_is_freed_with_its_model_and_a_second_one_works():
    """The hooks of the parameters once kept everything alive: tools.gpu ran out of memory."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=torch.bfloat16)
    first = Optimizer(model, 0.0)
    master = weakref.ref(first.masters[0])
    del first
    gc.collect()
    assert master() is None
    second = Optimizer(model, 0.0)
    model(torch.tensor([[1, 2, 3]])).logits.float().square().mean().backward()
    assert second.step(1e-4, 1.0) > 0
