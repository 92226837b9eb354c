import gc
import os
import re
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from conftest import CPU, parse_train
from tiny import make_folder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import engine.start
import train
from engine.memory import Memory, enable_gradient_checkpointing, is_out_of_memory
from engine.optimizer import Optimizer
from lib.estimate import (
    activation_bytes,
    cache_bytes,
    device_memory,
    estimate,
    memory_table,
    peak,
    shape,
)
from lib.flags import parse
from lib.lora import add_adapter
from policy import load_policy
from tools import memory


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_the_shapes_are_those_of_the_published_models(name, parameters):
    with FakeTensorMode():
        assert AutoModelForCausalLM.from_config(shape(name)).num_parameters() == parameters


def test_the_cache_by_hand():
    # 2 * 24 layers * 2 KV heads * 64 * 2 bytes
    assert cache_bytes(shape("qwen2.5-0.5b"), 2) == 12_288


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_cache_is_as_large_as_said(load, architecture):
    model, _ = load(architecture)
    cache = model(torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == 3 * 5 * cache_bytes(model.config, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_is_as_large_as_said(dtype):
    """Float32 parameters are their own masters, bfloat16 ones have masters in float32. As a file.
    Another optimizer may keep less for some of them, never more."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=dtype)
    torch.save(Optimizer(model, 0.0).state_dict(), "optimizer.pt")
    parts = estimate(train.Config(), model, 0, 1)
    kept = Path("optimizer.pt").stat().st_size
    assert 0.5 * parts["optimizer"] < kept < 1.02 * parts["optimizer"]


def test_the_optimizer_in_8_bits_is_as_large_as_said():
    """Layers of the tiny shape are small, and a table of 256 numbers comes with each tensor."""
    pytest.importorskip("bitsandbytes")
    size = dict(num_hidden_layers=1, hidden_size=1024, intermediate_size=4096)
    model = AutoModelForCausalLM.from_config(shape("tiny", **size), dtype=torch.bfloat16)
    torch.save(Optimizer(model, 0.0, in_8_bits=True).state_dict(), "optimizer.pt")
    parts = estimate(train.Config(adam_8bit=True), model, 0, 1)
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


CELL = r"(`[^`]+`|\(default\)) \| ([\d.]+) \|"  # flags and GB
SMALL = dict(
    hidden_size=256, intermediate_size=1024, num_attention_heads=4, head_dim=64, num_hidden_layers=4
)


class PeakOfStorages(TorchDispatchMode):
    """The most bytes that tensors made within the block, and not freed, have at one time."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 8}, {"lora_rank": 8, "load_in_4bit": True}])
def test_a_pass_and_its_gradients_take_what_is_estimated(tmp_path, flags, checkpointing):
    """Measured with real tensors. Gradients of parameters go to the masters at once: other lines of
    the estimate."""
    pytest.importorskip("bitsandbytes" if "load_in_4bit" in flags else "peft")
    make_folder(tmp_path, "qwen2", **SMALL)
    model, _ = load_policy(str(tmp_path), CPU, "bfloat16", "load_in_4bit" in flags)
    add_adapter(model, flags.get("lora_rank", 0))
    activations = activation_bytes(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with PeakOfStorages(model.parameters()) as used:
        states = model.base_model(torch.zeros(4, 128, dtype=torch.long), use_cache=False)[0]
        states.backward(torch.ones_like(states))
    sizes = dict(micro_batch_tokens=512, max_new_tokens=96, gradient_checkpointing=checkpointing)
    parts = estimate(train.Config(**sizes, **flags), model, activations, 32)
    unpacked = 256 * 1024 * 2 if "load_in_4bit" in flags else 0  # stands under weights
    estimated = parts["update: activations"] + unpacked
    assert used.peak < estimated < 1.25 * used.peak


def test_weights_in_4_bits_are_as_large_as_said(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    make_folder(tmp_path, "qwen2", **SMALL)
    model, _ = load_policy(str(tmp_path), CPU, "bfloat16", in_4_bits=True)
    add_adapter(model, 8)
    tensors = [*model.parameters()]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.state2.absmax]
    parts = estimate(train.Config(lora_rank=8, load_in_4bit=True), model, 0, 1)
    unpacked = 256 * 1024 * 2
    assert parts["weights"] - unpacked == pytest.approx(sum(t.nbytes for t in tensors), rel=1e-3)


def test_activations_are_counted_before_they_are_recomputed(base):
    counted = []
    flags = f"--model {base} --steps 1 --eval_problems 0 --gradient_checkpointing"
    with patch.object(
        engine.start,
        "memory_table",
        lambda flags, model, *_: counted.append(activation_bytes(model)) or "",
    ):
        train.main(parse_train(*flags.split()))
    whole = activation_bytes(load_policy(base, CPU)[0])
    assert counted == [whole]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.5B", "1.5B", "3B", "7B"])
def test_the_table_of_cards_is_what_the_estimate_says(name, capsys):
    page = Path(__file__).parent.parent / "docs" / "memory.md"
    rows = re.findall(rf"(?m)^\| (\d+) GB \| {name} \|(.*)$", page.read_text())
    fits = [(card, *cell) for card, row in rows for cell in re.findall(CELL, row)]
    assert len(rows) == 4 and len(fits) >= 3
    for card, flags, gigabytes in fits:
        words = [f"--memory_gb={card}", *flags.strip("`").replace("(default)", "").split()]
        memory.main(parse(memory.Config, "", words)[0], f"qwen2.5-{name.lower()}")
        table = capsys.readouterr().out
        assert "This" not in table
        needed = float(re.search("at one time +(.*)", table)[1])
        assert needed == pytest.approx(float(gigabytes), abs=0.06)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # of a CUDA graph
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_has_several_names(error, expected):
    assert is_out_of_memory(error) == expected
    memory, calls = Memory({}, rows=4), []

    def work(rows):
        calls.append(rows)
        if rows > 1:
            raise error

    if expected:
        memory.run(work, "rows")
        assert calls == [4, 2, 1]
    else:
        with pytest.raises(type(error)):
            memory.run(work, "rows")


def test_estimate_by_hand():
    """The tiny shape in bfloat16: 829,568 parameters, 2 x 4 rows of 10 + 30 tokens, 1,000 bytes
    kept per token, micro-batches of 100 tokens."""
    model = AutoModelForCausalLM.from_config(shape("tiny"), dtype=torch.bfloat16)

    def needed(**changes):
        flags = dict(prompts_per_step=2, group_size=4, max_new_tokens=30, micro_batch_tokens=100)
        return peak(estimate(train.Config(**flags, **changes), model, 1000, 10))

    n = 829_568
    cache = 2048 * 40  # of a row; and the prompts by themselves
    # 100 tokens are 2.5 rows of 40, to two prompts: 2 * 10 + 2.5 * 30 = 95 tokens, and the keys and
    # values of 2.5 whole rows
    logits = 95 * 100 * 12 + 128 * 100 * 6  # of the tokens; the gradient of the head
    # weights, masters, moments and gradients; sampling needs less than the update
    half_a_layer = 95 * 1000 / 4 / 2  # its gradients
    activations = 95 * 1000 + half_a_layer + 100 * 2048
    prompts = 2048 * 2 * 10
    graph = 100 * (4 + 2)  # logits of one row
    in_update = activations + logits
    assert needed() == (2 + 12 + 4) * n + 8 * (cache + graph) + prompts + in_update
    assert needed(log_kl=True) == needed() + 2 * n
    assert needed(rows_at_once=5) == needed() - 3 * (cache + graph)
    assert needed(offload=True) == needed() - 12 * n
    assert needed(adam_8bit=True) == needed() - 8 * n + 2 * n * (1 + 4 / 256)
    # 2.5 whole rows: prompts are not shared where activations are recomputed
    recomputed = 100 * (4 * 128 * 2 + 1000 / 4 + 1000 / 4 / 2) + 5 * 100 * 12
    assert needed(gradient_checkpointing=True) == needed() - activations + recomputed
    rank_1 = 4 * (4 * (128 + 128) + 3 * (128 + 352))  # without the head, which has no gradient
    saved = 16 * n - 18 * 8 * rank_1 + 128 * 100 * 6
    # without its adapter the policy is its own reference
    assert needed(lora_rank=8, log_kl=True) == needed() - saved
    packed = 4 * (4 * 128 * 128 + 3 * 128 * 352)  # without head and embeddings
    saved = packed * (2 - 0.515869140625) - 2 * 128 * 352  # one layer at a time is unpacked
    assert needed(lora_rank=8, load_in_4bit=True) == needed(lora_rank=8) - saved


def test_available_on_a_cpu_is_what_no_other_program_uses(monkeypatch):
    """40 kB are left by all programs, and two pages are used by this one."""
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   40 kB\n",
        "/proc/self/statm": "9 2 1",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert device_memory(CPU) == 40 * 1024 + 2 * os.sysconf("SC_PAGE_SIZE")


def test_on_a_cpu_the_program_counts(load):
    """A line more, and more at most at one time."""
    model, _ = load("llama")
    plain, with_program = (
        memory_table(train.Config(), model, 1.0, 20, program) for program in (0, 5_000_000_000)
    )
    least, most = (
        float(re.search("at one time +(.*)", table)[1]) for table in (plain, with_program)
    )
    assert most - least == pytest.approx(5, abs=0.011)
    assert "program                         5.00" in with_program and "program" not in plain


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


@pytest.mark.parametrize("more", ["", "--dtype=bfloat16 --kl_beta=0.1 --loss=clip --minibatches=2"])
def test_a_run_leaves_nothing_in_memory(base, more):
    """Of each run in a notebook the whole model once stayed, held by the estimate of its memory."""

    def alive():
        for _ in range(3):
            gc.collect()
        return sum(one.numel() for one in gc.get_objects() if torch.is_tensor(one))

    flags = """--steps=2 --prompts_per_step=2 --group_size=2 --max_new_tokens=4 --eval_problems=2
        --device=cpu"""
    found = []
    for _ in range(2):
        train.main(parse_train(f"--model={base}", *flags.split(), *more.split()))
        found.append(alive())
    assert found[0] == found[1]
