"""Adapters (--lora_rank), alone and on a base model in 4 bits: training, checkpoints, merging."""

import shutil
import sys
from statistics import fmean
from unittest.mock import patch

import pytest
import torch
from conftest import CPU, parse_train
from test_train import assert_equal, cut_and_resume, metrics_of, run
from transformers import AutoModelForCausalLM

import eval
import lib.lora
import train
from lib.flags import UserError
from lib.lora import adapted_layers, adapter_off, add_adapter
from policy import load_policy, save_policy
from tools import merge

IDS = torch.arange(20)[None]
FLAGS = "--lora_rank 4 --lr 1e-2 --reward sevens"


def skip_without_packages(in_4_bits=False):
    pytest.importorskip("peft")
    if in_4_bits:
        pytest.importorskip("bitsandbytes")


def adapted(folder, in_4_bits=False):
    """A model with an adapter that changes something."""
    skip_without_packages(in_4_bits)
    model, tokenizer = load_policy(folder, CPU, in_4_bits=in_4_bits)
    add_adapter(model, 4)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model, tokenizer


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--load_in_4bit", "--load_in_4bit --gradient_checkpointing"])
def test_an_adapter_learns_and_resumes_to_the_last_bit(base, more, capsys):
    skip_without_packages(more)
    flags = f"{FLAGS} {more} --log_kl --steps 15 --save_every 4"
    resumed = cut_and_resume(6, base, flags)
    assert_equal(resumed, run(base, flags))
    rows = metrics_of(resumed)
    assert fmean(row["reward"] for row in rows[-3:]) > rows[0]["reward"] + 0.2
    # the reference is the model without the adapter
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[-1]["kl"] > 0.05
    assert max(row["sampler_gap"] for row in rows) < 1e-5
    assert "does not fit" not in capsys.readouterr().out  # the fast forms ran


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("in_4_bits", [False, True])
def test_a_checkpoint_is_the_adapter_and_loads_like_a_model(
    folders, tmp_path, architecture, in_4_bits
):
    model, tokenizer = adapted(folders(architecture), in_4_bits)
    folder = tmp_path / "run" / "checkpoint"
    save_policy(model, tokenizer, folder)
    assert not list(folder.glob("model*"))
    expected = logits_of(model)
    assert torch.equal(logits_of(load_policy("run", CPU)[0]), expected)

    merge.main(merge.Config(), "run")
    merged = AutoModelForCausalLM.from_pretrained("run/merged")
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-3, rtol=0)
    with adapter_off(model):
        assert (logits_of(model) - expected).abs().max() > 0.1
    with pytest.raises(UserError, match="--output run/merged: is there already"):
        merge.main(merge.Config(), "run")
    with pytest.raises(UserError, match="holds no adapter"):
        merge.main(merge.Config(output="new"), "run/merged")
    if not in_4_bits:
        from peft import AutoPeftModelForCausalLM

        theirs = AutoPeftModelForCausalLM.from_pretrained(folder)
        count = min(len(tokenizer), 600)  # peft resizes to the tokenizer
        torch.testing.assert_close(logits_of(theirs)[..., :count], expected[..., :count])


def test_the_merged_model_has_the_dtype_of_the_base_model(folders, tmp_path):
    model, tokenizer = load_policy(folders("llama"), CPU, "bfloat16")
    save_policy(model, tokenizer, tmp_path / "half")
    save_policy(*adapted("half"), tmp_path / "adapter")
    merge.main(merge.Config(output="merged"), "adapter")
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16


def test_a_small_change_survives_in_the_merged_bfloat16_model(folders, tmp_path):
    """3e-4 of the base weights: to the nearest, it would mostly be lost. The part of the
    change that is in the merged weights: their difference from the base, along the change."""
    model, tokenizer = load_policy(folders("llama"), CPU, "bfloat16")
    save_policy(model, tokenizer, tmp_path / "half")
    model, tokenizer = adapted("half")
    layer = model.model.layers[0].mlp.up_proj
    base = layer.base_layer.weight.float()
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(
            3e-4 * base.norm() / layer.get_delta_weight("default").norm()
        )
    change = layer.get_delta_weight("default").float()
    save_policy(model, tokenizer, tmp_path / "adapter")

    def survives(weight):
        return ((weight.float() - base) * change).sum() / (change * change).sum()

    assert survives((base + change).bfloat16()) < 0.5
    for dtype, error in (("auto", 0.15), ("float32", 1e-3)):
        merge.main(merge.Config(output=dtype, dtype=dtype), "adapter")
        merged = AutoModelForCausalLM.from_pretrained(dtype, dtype="auto")
        assert survives(merged.model.layers[0].mlp.up_proj.weight).item() == pytest.approx(
            1, abs=error
        )
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_in_4_bits_only_the_adapter_has_a_gradient_and_all_of_it(folders, architecture):
    """Also after a pass without a gradient, in which bitsandbytes would repack the weights for some
    CPUs: they would have no gradient from then on."""
    model, _ = adapted(folders(architecture), in_4_bits=True)
    before = logits_of(model)
    logits = model(IDS).logits
    assert torch.equal(logits, before)
    logits.logsumexp(-1).sum().backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in reached)
    for layer in adapted_layers(model).values():
        assert type(layer.base_layer).__name__ == "Linear4bit"
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.dtype == torch.float32


def test_in_4_bits_the_adapter_has_the_dtype_of_the_model(folders):
    skip_without_packages(in_4_bits=True)
    model, _ = load_policy(folders("llama"), CPU, "bfloat16", in_4_bits=True)
    add_adapter(model, 4)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {torch.uint8, torch.bfloat16}


def test_a_run_in_4_bits_is_compared_with_its_base_model_in_4_bits(base):
    skip_without_packages(in_4_bits=True)
    folder = str(run(base, "--lora_rank 4 --load_in_4bit --steps 1"))
    loaded = []

    def load(*arguments):
        loaded.append(load_policy(*arguments))
        return loaded[-1]

    with patch.object(eval, "load_policy", load):
        eval.main(eval.Config(limit=5, device="cpu"), [folder])
    assert [model.is_loaded_in_4bit for model, _ in loaded] == [True, True]


def test_a_run_starts_from_a_whole_model(base):
    skip_without_packages()
    folder = run(base, FLAGS, "--steps 1")
    for flags in (FLAGS, ""):
        with pytest.raises(UserError, match=f"python -m tools.merge {folder}"):
            run(folder, flags, "--steps 1")


def test_a_base_model_that_is_gone_is_named(folders, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folders("llama"), moved)
    save_policy(*adapted(str(moved)), tmp_path / "adapter")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"model adapter: .* {moved}, is not there"):
        load_policy("adapter", CPU)


def test_missing_packages_are_named(load, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora_rank.* pip install peft"):
        add_adapter(load("llama")[0], 4)
    missing = patch.object(lib.lora, "is_bitsandbytes_available", lambda: False)
    with missing, pytest.raises(UserError, match=r"--load_in_4bit.* pip install bitsandbytes"):
        load_policy(folders("llama"), CPU, in_4_bits=True)


def test_4_bits_are_for_adapters():
    with pytest.raises(UserError, match=r"--load_in_4bit: .* add --lora_rank"):
        train.check(parse_train("--load_in_4bit"))
