import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from conftest import CPU
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import train
from fast.memory import activation_bytes, cache_bytes, estimate, memory_table, peak, shape
from fast.optimizer import Optimizer
from lib.flags import parse
from tools import memory


def test_the_shape_is_that_of_the_published_model():
    config = shape("qwen2.5-0.5b")
    with FakeTensorMode():
        assert AutoModelForCausalLM.from_config(config).num_parameters() == 494_032_768
    assert cache_bytes(config, 2) == 12_288  # 2 * 24 layers * 2 KV heads * 64 * 2 bytes


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_cache_is_as_large_as_said(load, architecture):
    model, _ = load(architecture)
    cache = model(torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == 3 * 5 * cache_bytes(model.config, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_is_as_large_as_said(dtype):
    """Float32 parameters are their own masters, bfloat16 ones have masters in float32. As a
    file."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=dtype)
    torch.save(Optimizer(model, 0.0).state_dict(), "optimizer.pt")
    parts = estimate(train.Config(), model, 0, 1)
    assert Path("optimizer.pt").stat().st_size == pytest.approx(parts["optimizer"], rel=0.02)


def test_what_a_forward_pass_keeps_is_counted():
    """A token of exp(linear(embedding)): exp keeps its result (8 float32), the linear layer its
    input (4), the embedding the id (an int64)."""

    class Small(torch.nn.Sequential):
        device = CPU

        def forward(self, ids, **options):
            return super().forward(ids).exp()

    model = Small(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 8))
    assert activation_bytes(model) == 8 * 4 + 4 * 4 + 8


def test_estimate_by_hand():
    """The tiny shape in bfloat16: 829,568 parameters, 2 x 4 rows of 10 + 30 tokens, 1,000 bytes
    kept per token, micro-batches of 100 tokens."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=torch.bfloat16)

    def needed(**changes):
        flags = dict(prompts_per_step=2, group_size=4, max_new_tokens=30, micro_batch_tokens=100)
        return peak(estimate(train.Config(**flags, **changes), model, 1000, 10))

    n = 829_568
    cache = 2048 * 40  # of a row
    logits = 100 * 100 * 12 + 128 * 100 * 6  # of 100 tokens; the gradient of the head
    # weights, masters, moments and gradients; sampling needs less than the update
    assert needed() == (2 + 12 + 4) * n + 8 * cache + 100 * 1000 + logits
    assert needed(log_kl=True) == needed() + 2 * n
    assert needed(rows_at_once=5) == needed() - 3 * cache
    assert needed(offload=True) == needed() - 16 * n
    recomputed = 100 * (4 * 128 * 2 + 1000 / 4)
    assert needed(gradient_checkpointing=True) == needed() - 100 * 1000 + recomputed
    rank_1 = 4 * (4 * (128 + 128) + 3 * (128 + 352))  # without the head, which has no gradient
    saved = 16 * (n - 8 * rank_1) + 128 * 100 * 6
    # without its adapter the policy is its own reference
    assert needed(lora_rank=8, log_kl=True) == needed() - saved


def test_with_the_flags_that_are_suggested_it_fits(capsys):
    memory.main(memory.Config(memory_gb=12), "qwen2.5-0.5b")
    suggested = re.search("This may not fit. With (.*) it takes", capsys.readouterr().out)[1]
    flags = ["--memory_gb=12", *suggested.split()]
    memory.main(parse(memory.Config, "", flags)[0], "qwen2.5-0.5b")
    table = capsys.readouterr().out
    assert "at most at one time" in table and "This" not in table


def test_what_no_flag_can_mend_is_said_and_what_fits_easily_is_not(load):
    table = partial(memory_table, train.Config(), load("llama")[0], longest_prompt=20)
    assert "take a smaller model" in table(1e6) and table(1e12) == ""
