"""What makes sampling and the update cheap changes no number, and is really done."""

import copy
import sys

import pytest
import tiny
import torch
from conftest import CPU, parse_train
from test_policy import flat_gradient, gradient, plain_gradient

import decode
import track
import train
import update
from flags import UserError
from policy import Optimizer, adapter_off, add_adapter, load_policy, response_logprobs
from sample import choose_sampler, generate, generate_by_transformers
from update import Learner, within_memory

STOP = list(range(100, 200))
PROMPTS = [list(range(5, 25)), [8], [9, 10, 11] * 4]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_prompt_run_once_for_its_group_has_the_gradient_of_whole_rows(load, architecture):
    """Prompts of 20, 1 and 12 tokens, two architectures with a window of 8, one with soft-capped logits."""
    model, _ = load(architecture)
    rollout = generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3], 0.8)
    weights, shapes = torch.linspace(-1, 2, 12), []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    shared = gradient(model, rollout, weights, 10**6, temperature=0.8)
    hook.remove()
    assert shapes[-2:] == [(3, 19), (12, rollout.response_lengths.max())]  # the prompts, then what is each row's own
    whole = plain_gradient(model, rollout, weights, temperature=0.8)
    assert ((shared - whole).norm() / whole.norm()).item() < 3e-6
    learned = Learner(model, 0.8).logprobs(rollout, 10**6)
    torch.testing.assert_close(learned, rollout.logprobs, atol=1e-5, rtol=0)


def test_rows_of_weight_0_are_not_run(base, monkeypatch):
    """The rows that the update's forward passes see are those with a weight: `trained` of all."""
    seen, states = [], Learner.states
    monkeypatch.setattr(Learner, "states", lambda self, rollout, rows: seen.append(len(rows)) or states(
        self, rollout, rows))
    config = parse_train("--model", base, "--steps", 2, "--eval_problems", 0, "--prompts_per_step", 8)
    rows = track.read_rows(train.main(config) / "metrics.jsonl")
    assert sum(seen) == sum(round(row["trained"] * 128) for row in rows) < 256


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_tiles_of_the_head_change_no_gradient(load, monkeypatch, dtype, tolerance):
    model = copy.deepcopy(load("qwen2")[0]).to(dtype)  # its head is its embedding table too
    rollout = generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3])
    monkeypatch.setitem(update.TILE, "cpu", 5)
    tiles, whole = gradient(model, rollout, torch.ones(12), 10**6), plain_gradient(model, rollout, torch.ones(12))
    assert Learner(model).linear
    assert ((tiles - whole).norm() / whole.norm()).item() < tolerance


@pytest.mark.parametrize("more", ["halved", "bias"])
def test_a_head_that_is_more_than_a_product_is_left_to_the_model(load, more):
    """Halving the logits behind the head's back: the body is then the whole model, and the numbers are still right."""
    model = copy.deepcopy(load("llama")[0])
    assert Learner(model).linear
    if more == "halved":
        model.register_forward_hook(lambda module, args, out: out.__setitem__("logits", out.logits / 2))
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    rollout = generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3])
    assert not Learner(model).linear
    ours, whole = gradient(model, rollout, torch.ones(12), 60), plain_gradient(model, rollout, torch.ones(12))
    assert ((ours - whole).norm() / whole.norm()).item() < 3e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(load, architecture):
    """GPT-2 has dropout, which train mode would turn on: only the layers that recompute may be in it."""
    model, _ = load(architecture)
    model = copy.deepcopy(model)
    rollout = generate(model, PROMPTS, 4, 12, STOP, [1, 2, 3])
    plain, calls = plain_gradient(model, rollout, torch.ones(12)), []
    block = next(layer for layer in model.modules() if isinstance(layer, torch.nn.ModuleList))[0]
    hook = next(block.children()).register_forward_hook(lambda *arguments: calls.append(1))
    model.zero_grad()
    then = rollout.logprobs
    learner = Learner(model, gradient_checkpointing=True)
    calls.clear()
    factors = torch.full((12,), 1 / rollout.response_lengths.sum())
    learner.backward(rollout, torch.arange(12), lambda now, *others: (-others[2] * now, now > 0), then, then,
                     torch.ones(12), factors, 10**6)
    hook.remove()
    assert len(calls) == 2  # forward, and again on the way back
    assert not any(layer.training for layer in model.modules())
    assert ((flat_gradient(model) - plain).norm() / plain.norm()).item() < 3e-6


def record_by_stand_in(monkeypatch):
    """CUDA's recording played by running the step again: what is replayed must read nothing but tensors that stay where
    they are. -> [steps recorded, steps replayed]"""
    counts = [0, 0]

    class Recorded(decode.Steps):
        def __init__(self, device):
            super().__init__(device)
            self.record = self.stand_in

        def stand_in(self, step):
            def replay():
                counts[1] += 1
                step()

            counts[0] += 1
            return replay

    monkeypatch.setattr(decode, "Steps", Recorded)
    return counts


def test_a_recorded_step_is_replayed_and_does_the_same(load, monkeypatch):
    model, _ = load("llama")
    plain = [generate(model, PROMPTS, 4, 20, STOP, seeds, max_rows=7) for seeds in ([1, 2, 3], [4, 5, 6])]
    counts, kept = record_by_stand_in(monkeypatch), {}
    for expected, seeds in zip(plain, ([1, 2, 3], [4, 5, 6])):
        again = generate(model, PROMPTS, 4, 20, STOP, seeds, max_rows=7, kept=kept)
        assert torch.equal(again.ids, expected.ids)
        torch.testing.assert_close(again.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert len(kept) == 1 and 0 < counts[0] < counts[1]


def test_steps_are_recorded_again_only_where_something_has_moved(load, monkeypatch):
    """They were once recorded again for each batch with another longest prompt, and never when weights had moved."""
    record_by_stand_in(monkeypatch)
    model, kept = copy.deepcopy(load("llama")[0]), {}

    def sample(prompts):
        generate(model, prompts, 4, 20, [], list(range(len(prompts))), kept=kept)
        [work] = kept.values()
        return work.steps

    first = sample(PROMPTS)
    assert sample([prompt[:3] for prompt in PROMPTS]) is first  # shorter: there is room
    longer = sample([[5] * 40] * 3)
    assert longer is not first and sample(PROMPTS) is longer
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
    assert sample(PROMPTS) is not longer


def out_of_memory(times, function):
    """`function`, but its first calls run out of memory, once they have done their work."""
    left = [times]

    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    return failing


def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(base, monkeypatch, capsys):
    flags = ("--model", base, "--steps", 2, "--eval_problems", 0, "--name")
    plain = track.read_rows(train.main(parse_train(*flags, "plain")) / "metrics.jsonl")
    monkeypatch.setattr(train, "choose_sampler", lambda *args: out_of_memory(2, generate))
    monkeypatch.setattr(Learner, "backward", out_of_memory(1, Learner.backward))
    rows = track.read_rows(train.main(parse_train(*flags, "starved")) / "metrics.jsonl")
    said = capsys.readouterr().out
    assert said.count("out of memory") == 3
    assert "--rows_at_once is 128" in said and "--micro_batch_tokens is 2048" in said
    assert [row["rows_at_once"] for row in rows] == [128, 128] and rows[0]["micro_batch_tokens"] == 2048
    for key in ("reward", "loss", "grad_norm", "entropy"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain], rel=1e-5)


def test_too_little_memory_for_one_row_is_said_in_a_sentence():
    tried, undone = [], []

    def never(size):
        tried.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="--rows_at_once: out of memory even at 1; --gradient_checkpointing"):
        within_memory(never, 5, "--rows_at_once", lambda: undone.append(1))
    assert tried == [5, 2, 1] and len(undone) == 2


def test_model_generate_samples_where_it_is_asked_to_or_where_slots_are_wrong(load, monkeypatch, capsys):
    model, _ = load("llama")
    assert choose_sampler(model, PROMPTS, 8, STOP) is generate
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(decode, "attention_masks", lambda model, positions, columns: torch.zeros(
        len(positions), 1, 1, columns.shape[1]))  # looks at what is not there
    assert choose_sampler(model, PROMPTS, 8, STOP) is generate_by_transformers
    assert "does not fit LlamaForCausalLM (log-probs are off by" in capsys.readouterr().out
    monkeypatch.setattr(decode.Slots, "update", lambda *args: [])
    assert choose_sampler(model, PROMPTS, 8, STOP) is generate_by_transformers
    assert "ValueError" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_slow_sampler_keeps_order_lengths_and_logprobs(load, architecture):
    model, _ = load(architecture)
    rollout = generate_by_transformers(model, PROMPTS, 4, 12, STOP, [1, 2, 3], 0.8)
    assert rollout.prompt_lengths.tolist() == [20] * 4 + [1] * 4 + [12] * 4
    for row in range(12):
        start, end = rollout.prompt_lengths[row].item(), rollout.lengths[row].item()
        response = rollout.ids[row, start:end].tolist()
        assert rollout.ids[row, :start].tolist() == PROMPTS[row // 4]
        assert (response[-1] in STOP) == rollout.finished[row].item() and not set(response[:-1]) & set(STOP)
        assert rollout.finished[row] or len(response) == 12
    plain = response_logprobs(model, rollout.ids, rollout.prompt_lengths, rollout.lengths, 0.8)
    torch.testing.assert_close(rollout.logprobs, plain.detach(), atol=1e-5, rtol=0)
    greedy = generate_by_transformers(model, PROMPTS, 1, 12, STOP, [1, 2, 3], 0.0)
    assert torch.equal(greedy.ids, generate(model, PROMPTS, 1, 12, STOP, [1, 2, 3], 0.0).ids)


def test_offloaded_masters_make_the_same_steps(load):
    """The copies in the host's memory are other tensors than the weights, and the weights follow them."""
    models = [copy.deepcopy(load("llama")[0]) for _ in range(2)]
    optimizers = [Optimizer(model, 0.1, offload) for model, offload in zip(models, (False, True))]
    for model, optimizer in zip(models, optimizers):
        for _ in range(3):
            model(torch.arange(5, 15)[None]).logits.square().mean().backward()
            assert all(weight.grad is None for weight in model.parameters()) == (optimizer is optimizers[1])
            optimizer.step(1e-2, 1.0)
    for one, other, master in zip(models[0].parameters(), models[1].parameters(), optimizers[1].masters):
        assert torch.equal(one, other) and torch.equal(other, master) and other.data_ptr() != master.data_ptr()


def test_adapters_need_peft_and_say_so(load, monkeypatch):
    model, _ = load("llama")  # first: transformers looks for peft once
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="--lora_rank 4: needs the package peft, install it by: pip install peft"):
        add_adapter(model, 4)


def test_a_run_of_adapters_learns_resumes_and_saves_both_forms(base, monkeypatch):
    """Runs where peft is installed: .ci/run installs it. Stopped after the record of step 3, with a checkpoint of 2."""
    pytest.importorskip("peft")
    flags = ("--model", base, "--lora_rank", 4, "--eval_problems", 0, "--lr", 1e-2, "--log_kl", "--save_every", 2,
             "--steps", 4, "--name")
    whole, append = train.main(parse_train(*flags, "whole")), track.append

    def stop_at_3(path, rows):
        append(path, rows)
        if rows[0]["step"] == 3:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(track, "append", stop_at_3)
        train.main(parse_train(*flags, "parts"))
    parts = train.main(parse_train("--name", "parts", "--resume"))
    rows, again = (track.read_rows(folder / "metrics.jsonl") for folder in (whole, parts))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert abs(rows[0]["kl"]) < 1e-9 < 1e-4 < rows[-1]["kl"]  # the reference is the policy without its adapter

    (merged, _), (start, _), (adapted, _) = (load_policy(name, CPU) for name in (str(whole), base, base))
    add_adapter(adapted, 4, whole / "checkpoint" / "adapter")
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in start.named_parameters()]
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
        assert (merged(ids).logits - start(ids).logits).abs().max() > 1e-2
        with adapter_off(adapted):
            assert torch.equal(adapted(ids).logits, start(ids).logits)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
