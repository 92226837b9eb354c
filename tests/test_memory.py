import re
from dataclasses import fields

import pytest
import tiny
import torch
from conftest import CPU
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import memory
import train
from flags import UserError, parse
from memory import Config, cache_bytes, estimate, kept_bytes, peak, shape, table, trained_parameters
from policy import Optimizer


@pytest.mark.parametrize(("name", "parameters", "cache"), [
    ("tiny", 829_568, 2 * 4 * 4 * 32 * 2),
    ("qwen2.5-0.5b", 494_032_768, 12_288),  # 2 * 24 layers * 2 KV heads * 64 * 2 bytes
    ("qwen2.5-1.5b", 1_543_714_304, 28_672),  # 2 * 28 * 2 * 128 * 2
])
def test_shapes_are_those_of_the_published_models(name, parameters, cache):
    with FakeTensorMode():
        assert AutoModelForCausalLM.from_config(shape(name)).num_parameters() == parameters
    assert cache_bytes(shape(name), 2) == cache


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_cache_is_as_large_as_said(load, architecture):
    model, _ = load(architecture)
    cache = model(torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == 3 * 5 * cache_bytes(model.config, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_and_gradients_are_as_large_as_said(dtype):
    """Float32 weights are their own masters; bfloat16 ones have float32 copies, and their gradients are float32 too."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=dtype).eval()
    optimizer = Optimizer(model, 0.0)
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    parts = estimate(Config(), model, 0, 1)
    assert parts["update: gradients"] == sum(master.grad.nbytes for master in optimizer.masters)
    optimizer.step(1e-3, 1.0)
    moments = [state[name].nbytes for state in optimizer.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    copies = [master.nbytes for weight, master in zip(optimizer.weights, optimizer.masters) if weight is not master]
    assert parts["optimizer"] == sum(moments) + sum(copies)
    assert parts["weights"] == sum(weight.nbytes for weight in model.parameters())


def test_what_a_forward_pass_keeps_is_counted():
    """exp keeps its result (8 float32), the linear layer its input (4), the embedding the ids (an int64): 56 bytes."""
    class Small(torch.nn.Module):
        device = CPU

        def __init__(self):
            super().__init__()
            self.embedding, self.linear = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 8)

        def forward(self, ids, **options):
            return self.linear(self.embedding(ids)).exp()

    assert kept_bytes(Small()) == 8 * 4 + 4 * 4 + 8


def test_without_storage_it_is_about_the_same(load):
    model, _ = load("gpt2")
    with memory.FakeTensorMode():
        empty = AutoModelForCausalLM.from_config(model.config).eval()
        without = kept_bytes(empty)
    assert without == pytest.approx(kept_bytes(model), rel=0.1)


def test_estimate_by_hand():
    """The tiny shape in bfloat16: 829,568 parameters; 2 x 4 rows, 10 + 30 tokens; 1,000 bytes kept of each."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=torch.bfloat16)
    flags = dict(prompts_per_step=2, group_size=4, max_new_tokens=30, micro_batch_tokens=100)
    logits = 100 * 100 * 12 + 128 * 100 * 6  # of 100 tokens; the head's gradient
    parts = estimate(Config(**flags), model, 1000, 10)
    assert parts == {
        "weights": 2 * 829_568, "optimizer": 12 * 829_568, "keys and values": 8 * 40 * 2048,
        "sampling: logits": 8 * 100 * 6, "update: gradients": 4 * 829_568, "update: activations": 100 * 1000,
        "update: logits": logits}
    assert peak(parts) == 18 * 829_568 + 8 * 40 * 2048 + 100_000 + logits  # the update needs more than sampling does
    changed = Config(gradient_checkpointing=True, offload=True, log_kl=True, rows_at_once=5, **flags)
    assert peak(estimate(changed, model, 1000, 10)) == (  # the weights twice; no optimizer, no gradients
        4 * 829_568 + 5 * 40 * 2048 + 100 * (4 * 128 * 2 + 1000 / 4) + logits)
    rank = 4 * (4 * (128 + 128) + 3 * (128 + 352))  # of each layer, without the head
    assert trained_parameters(model, 1) == rank
    adapted = estimate(Config(lora_rank=8, log_kl=True), model, 0, 1)
    assert adapted["optimizer"] == 12 * 8 * rank
    assert adapted["weights"] == 2 * 829_568  # without its adapters it is its own reference


@pytest.mark.parametrize(("name", "gigabytes"), [("qwen2.5-0.5b", 12), ("tiny", 0.27)])
def test_with_the_flags_that_are_suggested_it_fits(name, gigabytes, capsys):
    memory.main(Config(memory_gb=gigabytes), name)
    suggested = re.search("This may not fit. With (.*) it takes", capsys.readouterr().out)[1]
    memory.main(parse(Config, "", [f"--memory_gb={gigabytes}", *suggested.split()])[0], name)
    table = capsys.readouterr().out
    assert "M parameters, 8 x 16 rows of up to 256 + 512 tokens" in table and "This" not in table


def test_what_no_flag_can_mend_is_said(capsys):
    memory.main(Config(memory_gb=0.001), "tiny")
    assert "take a smaller model" in capsys.readouterr().out


def test_a_tiny_model_on_a_cpu_gets_no_table(load):
    assert table(train.Config(), load("llama")[0], CPU, 20) == ""


def test_flags_have_the_defaults_of_train():
    shared = {field.name: field.default for field in fields(Config)}
    differ = {field.name for field in fields(train.Config) if shared.get(field.name, field.default) != field.default}
    assert differ == {"dtype"}  # what is planned for is a GPU


def test_a_name_that_is_no_model_is_a_sentence():
    with pytest.raises(UserError, match=r"nowhere: neither one of tiny, .* nor a model"):
        memory.main(Config(), "nowhere")
