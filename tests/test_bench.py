import json
from pathlib import Path

import pytest
import torch
from conftest import CPU
from transformers import AutoModelForCausalLM

import bench
from bench import Config, count, others, report, timed, tokens, updates
from flags import UserError
from memory import shape
from sample import Rollout, generate

SMALL = dict(prompts_per_step=2, group_size=2, prompt_length=3, max_new_tokens=4, repeats=1, device="cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape("tiny")).eval()


def test_operations_and_bytes_are_those_counted_by_hand(model):
    """One prompt of 3 tokens, responses of 2 and 1."""
    body = 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128  # 4 layers: attention, MLP, two norms; the last norm
    head = 100 * 128
    rollout = Rollout(torch.zeros(2, 5), torch.tensor([3, 3]), torch.tensor([5, 4]), None, None)
    looks = (3 + 4) + 3  # of the response tokens at keys; each look is 2 products of 128 in 4 layers
    prompt_looks = 1 + 2  # the prompt's last token is the first that a response runs
    operations = 2 * body * (2 + 3) + 2 * head * 3 + 2 * 2 * 128 * 4 * (looks + prompt_looks)
    read = 2 * 4 * (body + head) + looks * 2 * 4 * 128 * 4  # the weights in 2 steps; keys and values of 4 layers
    assert count(model, rollout, 1) == {"generate": {"operations": operations, "bytes": read},
                                        "backward": {"operations": 3 * operations}}


def test_tokens_after_the_first_stop_are_not_counted():
    assert tokens(torch.tensor([[5, 9, 5, 9], [5, 5, 5, 5], [9, 0, 0, 0]]), [9, 8]) == 2 + 4 + 1


def test_both_samplers_do_the_same_work_and_the_update_leaves_the_model_alone(model):
    """With stop ids, responses of model.generate end at them too; without, all have the full length."""
    assert model.generation_config.eos_token_id is None  # else model.generate would end rows at it
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for stop, full in (([], True), (list(range(50, 100)), False)):
        arguments = model, [[5, 6, 7], [8, 9, 10]], 8, 6, stop, [0, 1]
        rollout = generate(*arguments)
        theirs = others(Config(), arguments)["model.generate"]()
        assert theirs.shape[0] == 16
        assert (tokens(theirs, stop) == 96, tokens(rollout, stop) == 96) == (full, full)
    gradients = []
    for name, function in updates(Config(), model, rollout).items():
        if name == "optimizer":
            gradients = [weight.grad.abs().max().item() for weight in model.parameters()]
        function()
    assert min(gradients) > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_run_writes_its_numbers_and_the_table_follows_from_them(capsys):
    bench.main(Config(against=str(Path(bench.__file__).parent), **SMALL))
    table = capsys.readouterr().out
    found = json.loads(Path("bench.json").read_text())
    assert set(found["seconds"]) == {"generate", "backward", "optimizer", "model.generate", "against"}
    for name, (seconds,) in found["seconds"].items():
        assert found["tokens/s"][name][0] * seconds == pytest.approx(2 * 2 * 4)
    assert 0 < found["memory"]["generate"] <= found["memory"]["backward"]
    for shares in found["busiest"].values():
        assert 0 < sum(shares.values()) <= 1
    assert "times as fast as model.generate" in table and "times as fast as against" in table


def test_the_floor_is_the_slower_of_moving_and_computing(model):
    """200 bytes at 100 a second take longer than 300 operations at 300 a second: 2 s of 4 s is a share of 0.5."""
    names = "generate", "backward", "optimizer"
    found = {"seconds": {name: [4.0, 4.0, 9.0] for name in names}, "tokens/s": {name: [7.0] for name in names},
             "memory": dict.fromkeys(names, 1.0), "machine": {"bytes": 100.0, "operations": 300.0}, "busiest": {},
             "needs": {"generate": {"operations": 300.0, "bytes": 200.0}, "backward": {"operations": 300.0}}}
    lines = {line.split()[0]: line.split()[1:] for line in report(Config(), model, found).splitlines()}
    assert lines["generate"] == ["7", "4.0000", "2.0000", "0.50", "1.00"]
    assert lines["backward"] == ["7", "4.0000", "1.0000", "0.25", "1.00"]


def test_seconds_are_those_of_the_process_on_a_cpu(monkeypatch):
    monkeypatch.setattr("time.process_time", iter([5.0, 7.5]).__next__)
    assert timed(lambda: "result", CPU) == (2.5, "result")


def test_a_folder_without_a_sampler_is_a_sentence(model):
    with pytest.raises(UserError, match="--against nowhere: there is no sample"):
        others(Config(against="nowhere"), (model, [[1]], 1, 1, [2], [0]))
