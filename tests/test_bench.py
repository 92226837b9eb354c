import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import engine.choose
import train
from engine.learner import Learner
from engine.memory import Memory
from lib.estimate import shape
from sample import Rollout, generate
from tools import bench


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape("tiny")).eval()


def test_operations_and_bytes_are_those_counted_by_hand(model):
    """One prompt of 3 tokens, responses of 2 and 1."""
    body = 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128  # attention, MLP, norms; last norm
    head = 100 * 128
    mask = torch.tensor([[True, True], [True, False]])
    lengths = torch.tensor([3, 3])
    rollout = Rollout(mask, lengths, lengths + mask.sum(1), mask, mask, mask)
    attended = (3 + 4) + 3  # keys that the response tokens see, the first being the prompt's last
    in_prompt = 1 + 2
    operations = 2 * body * (2 + 3) + 2 * head * 3
    operations += 2 * 2 * 128 * 4 * (attended + in_prompt)  # 2 products of 128 in 4 layers
    moved = 2 * 4 * (body + head)  # the parameters, in 2 steps
    moved += attended * 2 * 4 * 128 * 4  # keys and values of 4 layers
    assert bench.least_work(model, rollout, 1) == (moved, operations)


def test_tokens_after_the_first_stop_are_not_counted():
    responses = torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 0, 0, 0]])
    assert bench.count_tokens(responses, [9]) == 2 + 4 + 1


def test_model_generate_ends_at_stop_tokens_and_nowhere_else(model):
    for stop in ([], list(range(50, 100))):
        responses = bench.transformers_generate(model, [[5, 6, 7], [8, 9, 10]], 8, 6, stop)
        assert (bench.count_tokens(responses, stop) == 2 * 8 * 6) == (stop == [])


def test_an_update_has_gradients_and_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    gradients = []
    model.lm_head.weight.register_hook(gradients.append)
    rollout = generate(model, [[5, 6, 7]], 4, 6, [], [0])
    forms, memory = engine.choose.Forms(), Memory({}, micro_batch_tokens=64)
    bench.update(Learner(model, forms, memory, train.Config()), rollout)
    assert gradients[0].any()
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_the_table_has_rates_and_the_best_possible_times(monkeypatch, capsys):
    """200 bytes at 100 a second take longer than 300 operations at 300 a second: at best 2 s. An
    update has three times the operations: 3 s. Each run has 2 x 2 responses of 4 tokens."""
    monkeypatch.setattr(bench, "timed", lambda function, device: 4.0)
    monkeypatch.setattr(bench, "machine_speed", lambda *_: (100.0, 300.0))
    monkeypatch.setattr(bench, "least_work", lambda *_: (200.0, 300.0))
    monkeypatch.setattr(bench, "peak_memory", lambda device: 1.0)
    sizes = dict(prompts_per_step=2, group_size=2, prompt_length=3, max_new_tokens=4, repeats=1)
    bench.main(bench.Config(device="cpu", **sizes))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:6]] == [
        ["generate", "4", "4.0000", "1.00", "2.0000", "0.50"],
        ["update", "4", "4.0000", "1.00", "3.0000", "0.75"],
        ["model.generate", "4", "4.0000", "1.00"],
    ]
    assert "generate is 1.00 times as fast" in lines[6]
