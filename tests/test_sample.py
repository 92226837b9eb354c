import contextlib
import copy
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import CPU, parse_train

import engine.generate
import sample
import train
from engine.generate import generate
from lib.files import write_rows
from lib.flags import UserError
from loss import token_logprobs
from policy import load_policy, stop_ids
from sample import Sampling, join, sample_token

PROMPTS = [list(range(5, 18)), [300], [40, 41, 42], [77, 78, 79, 80, 81]]
SEEDS = [1, 2, 3, 4]
SOME = list(range(300, 400))  # a sixth of the tokens: rows end at different times


def rows_of(rollout):
    """The tokens of each row, without padding."""
    return [ids[:length] for ids, length in zip(rollout.ids.tolist(), rollout.lengths.tolist())]


def assert_same(found, expected):
    for name, value in vars(expected).items():
        if name != "old_logprobs":
            assert torch.equal(getattr(found, name), value), name
    torch.testing.assert_close(found.old_logprobs, expected.old_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_is_that_of_model_generate_on_prompts_of_mixed_length(load, architecture):
    """Prompts of 13, 1, 3 and 5 tokens in one batch, against each of them alone in transformers'
    own generate: token for token, with a sliding window of 8 in two of the architectures."""
    model, tokenizer = load(architecture)
    stop = [*stop_ids(model, tokenizer), *range(400, 420)]
    rollout = generate(model, PROMPTS, 1, 24, stop, SEEDS, Sampling(0))
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": stop, "pad_token_id": 0}
    for prompt, found in zip(PROMPTS, rows_of(rollout)):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        assert found == expected
    assert len(set(rollout.response_lengths.tolist())) > 1 or architecture == "gemma2"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_samplers_logprobs_are_the_learners(load, architecture):
    model, _ = load(architecture)
    rollout = generate(model, PROMPTS, 3, 20, SOME, SEEDS, Sampling(0.8))
    with torch.no_grad():
        learned, _ = token_logprobs(model, rollout, Sampling(0.8))
    torch.testing.assert_close(rollout.old_logprobs, learned, atol=1e-5, rtol=1e-5)
    assert (rollout.old_logprobs < 0).sum() == rollout.response_lengths.sum()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_response_does_not_depend_on_its_neighbours(load, architecture):
    """Alone, among longer prompts, in another place: the same tokens, from the prompt's own
    seed."""
    model, _ = load(architecture)
    together = rows_of(generate(model, PROMPTS, 3, 20, SOME, SEEDS))
    backwards = rows_of(generate(model, PROMPTS[::-1], 3, 20, SOME, SEEDS[::-1]))
    for p, prompt in enumerate(PROMPTS):
        alone = rows_of(generate(model, [prompt], 3, 20, SOME, [p + 1]))
        assert together[3 * p :][:3] == backwards[9 - 3 * p :][:3] == alone


def test_responses_of_a_group_differ_and_seeds_matter(load):
    model, _ = load("llama")
    first = generate(model, [[5, 6]], 8, 10, [], [1])
    assert len(set(map(tuple, first.ids.tolist()))) == 8
    assert not torch.equal(first.ids, generate(model, [[5, 6]], 8, 10, [], [2]).ids)
    assert torch.equal(first.ids, generate(model, [[5, 6]], 8, 10, [], [1]).ids)


def test_a_prompt_is_run_once_for_its_group(load):
    """One prefill of P rows, whatever G; then a step of the rows still going for each token, fewer
    as they end."""
    model, _ = load("llama")
    shapes = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape))
    )
    rollout = generate(model, PROMPTS, 6, 30, list(range(100, 160)), SEEDS)
    hook.remove()
    assert shapes[0] == (4, 12)  # without the last token
    assert shapes[1] == (24, 1) and all(width == 1 for _, width in shapes[1:])
    assert len(shapes) - 1 == rollout.response_lengths.max()
    assert shapes[-1][0] < 12  # rows that had ended were dropped


def test_the_stop_token_ends_a_response_and_belongs_to_it(load):
    model, _ = load("llama")
    stop = set(range(100, 160))
    rollout = generate(model, PROMPTS, 8, 12, list(stop), SEEDS)
    assert 0 < rollout.finished.sum() < 32
    for row, ids in enumerate(rows_of(rollout)):
        *before, last = ids[rollout.prompt_lengths[row] :]
        assert (last in stop) == rollout.finished[row]
        assert not stop & set(before)
        assert last in stop or len(before) == 11
        assert not rollout.ids[row, len(ids) :].any()
        assert not rollout.old_logprobs[row, len(before) + 1 :].any()


def test_draws_follow_the_distribution_and_never_have_probability_zero():
    """20,000 draws of 6 tokens against their probabilities: chi-square of 3 degrees under 16.3 (p
    0.001); the draws 0 and just under 1 must not fall on the tokens of probability 0 at either
    end."""
    logits = torch.tensor([-float("inf"), 0.0, 1.0, -1.0, 2.0, -float("inf")])
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    token, logprob = sample_token(logits.repeat(20_000, 1), uniform, Sampling(0.5))
    probabilities = (logits / 0.5).softmax(0)
    torch.testing.assert_close(logprob, probabilities.log()[token])
    counts = token.bincount(minlength=6)
    assert counts[0] == counts[5] == 0
    expected = 20_000 * probabilities[1:5]
    assert ((counts[1:5] - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.parametrize("V", [700, 512])
def test_draws_over_several_blocks_follow_the_distribution(V):
    """200,000 draws of 700 tokens, which are 26 blocks of 26 and a rest, every third of probability
    0, by a chi-square: its mean is the number of the others - 1, its deviation sqrt(2 mean)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(V, generator=generator)
    logits[::3] = -float("inf")

    uniforms = torch.rand(40, 5000, dtype=torch.float64, generator=generator)
    draws = [sample_token(logits.repeat(5000, 1), part, Sampling())[0] for part in uniforms]
    counts = torch.cat(draws).bincount(minlength=V)
    assert counts[::3].sum() == 0
    expected = 200_000 * logits.softmax(0)
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    freedom = (expected > 0).sum().item() - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("often", [True, False])
def test_rows_that_wait_for_a_slot_get_the_same_responses(load, monkeypatch, architecture, often):
    """24 rows in 5 slots: each slot takes several rows in turn, over what the one before left in
    the cache. On a GPU rows that have ended go on for up to 15 steps before anyone looks."""
    model, _ = load(architecture)
    together = generate(model, PROMPTS, 6, 20, SOME, SEEDS)
    if not often:
        monkeypatch.setitem(engine.generate.CHECK_EVERY, "cpu", 16)
        monkeypatch.setitem(engine.generate.LENGTH_MULTIPLE, "cpu", 64)
    batches = []
    hook = model.register_forward_hook(lambda module, args, out: batches.append(len(out.logits)))
    waited = generate(model, PROMPTS, 6, 20, SOME, SEEDS, rows_at_once=5)
    hook.remove()
    assert max(batches[1:]) == 5 and sum(batches[1:]) < 24 * 20
    assert_same(waited, together)


def test_prompts_that_do_not_fit_are_refused(load):
    model, _ = load("llama")
    with pytest.raises(
        UserError, match=r"13 tokens and --max_new_tokens 1524 do not fit .* context of 1536"
    ):
        generate(model, PROMPTS, 1, 1524, [], [0] * 4)
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, [[1], []], 1, 4, [], [0] * 2)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_plain_and_the_fast_form_sample_the_same(load, architecture):
    """Token for token, from prompts of 13, 1, 3 and 5 tokens; with fewer rows at once too."""
    model, _ = load(architecture)
    arguments = model, PROMPTS, 5, 20, list(range(400, 440)), SEEDS, Sampling(0.8)
    expected = generate(*arguments)
    assert_same(sample.generate(*arguments), expected)
    assert_same(sample.generate(*arguments, rows_at_once=2), expected)


def test_nothing_is_taken_from_generation_config_but_stop_tokens(load):
    """These settings once took part in sampling, and changed accuracies without a word."""
    model, tokenizer = load("llama")
    model = copy.deepcopy(model)
    arguments = model, PROMPTS, 4, 20, SOME, SEEDS
    before = [form(*arguments).ids for form in (generate, sample.generate)]
    settings = json.loads("""{"num_beams": 4, "min_p": 0.5, "repetition_penalty": 5.0, "top_k": 1,
        "epsilon_cutoff": 0.5, "min_new_tokens": 20, "temperature": 0.01,
        "eos_token_id": [7, 8]}""")
    model.generation_config.update(**settings, suppress_tokens=list(range(300)))
    assert stop_ids(model, tokenizer) == [0, 7, 8]
    after = [form(*arguments).ids for form in (generate, sample.generate)]
    assert all(map(torch.equal, before, after))


def test_rows_of_a_rollout_and_a_mask_with_holes(load):
    """Tokens that an environment wrote are in the row and out of the mask: nothing counts them."""
    model, tokenizer = load("llama")
    rollout = sample.generate(model, PROMPTS, 2, 6, [], SEEDS)
    rollout.response_mask[3, 1:3] = False
    assert rollout.response_lengths.tolist() == [6, 6, 6, 4, 6, 6, 6, 6]
    part = rollout.rows(torch.tensor([3, 0]))
    assert part.response_lengths.tolist() == [4, 6] and part.prompt_lengths.tolist() == [1, 13]
    texts = rollout.responses(tokenizer)
    assert part.responses(tokenizer) == [texts[3], texts[0]]
    assert tokenizer.decode(rollout.ids[3, 1:]).startswith(texts[3])


def test_joined_rollouts_are_the_rollout_of_all_prompts(load):
    model, _ = load("llama")
    arguments = [PROMPTS, SEEDS], [PROMPTS[1:2], [2]], [PROMPTS[2:], [3, 4]], [PROMPTS[:1], [1]]
    expected, *parts = (
        sample.generate(model, prompts, 4, 12, SOME, seeds) for prompts, seeds in arguments
    )
    assert_same(join([parts[2], parts[0], parts[1]]), expected)


def test_the_script_prints_responses_to_a_prompt(folders, load, monkeypatch, capsys):
    folder = folders("llama")
    flags = ["--samples", "3", "--max_new_tokens", "8", "--seed", "5", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample.py", folder, "2+2=", *flags])
    runpy.run_path(sample.__file__, run_name="__main__")
    policy, tokenizer = load("llama")
    ids = tokenizer("2+2=")["input_ids"]
    rollout = generate(policy, [ids], 3, 8, stop_ids(policy, tokenizer), [5])
    assert capsys.readouterr().out == "\n".join(rollout.responses(tokenizer)) + "\n"


def test_a_chat_answers_each_line_and_remembers_the_lines_before(
    folders, load, monkeypatch, capsys
):
    _, tokenizer = load("qwen2")  # has a chat template
    prompts, responses = [], []

    def recorded(policy, ids, *arguments, **options):
        rollout = generate(policy, ids, *arguments, **options)
        prompts.append(tokenizer.decode(ids[0]))
        responses.extend(rollout.responses(tokenizer))
        return rollout

    monkeypatch.setattr(sample, "generate", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    sample.main(sample.Config(chat=True, max_new_tokens=6, device="cpu"), folders("qwen2"))
    assert capsys.readouterr().out == "> {}\n> {}\n> ".format(*responses)
    assert "hello" in prompts[0] and "then" not in prompts[0]
    assert prompts[1].startswith(prompts[0]) and "and then?" in prompts[1]


def test_a_run_is_asked_as_its_problems_were(folders, monkeypatch, capsys):
    """Each brings the same system message and an option for the template."""
    shutil.copytree(folders("qwen2"), "model")
    template = Path("model/chat_template.jinja")
    template.write_text("{{ note }}" + template.read_text())
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": f"{i}?"}],
            "answer": str(i),
            "chat_template_kwargs": {"note": "(noted)"},
        }
        for i in range(30)
    ]
    write_rows(Path("my.jsonl"), rows)
    flags = "--steps 1 --prompts_per_step 2 --group_size 2 --max_new_tokens 4 --eval_problems 0"
    model = ["--model=./model", "--task=my.jsonl", "--reward=length", "--device=cpu"]
    run = train.main(parse_train(*model, *flags.split()))
    said = capsys.readouterr().out
    trained_on = re.findall(r"(?m)^    \| (.*)$", said)
    prompts = []
    monkeypatch.setattr(sample, "generate", lambda policy, ids, *rest, **more: prompts.extend(ids))
    for chat in (False, True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("7?\n"))
        config = sample.Config(chat=chat, device="cpu")
        with contextlib.suppress(AttributeError):  # there is no rollout
            sample.main(config, str(run), "7?")
    _, tokenizer = load_policy(str(run), CPU)
    for prompt in prompts:
        asked = tokenizer.decode(prompt).rstrip("\n").split("\n")
        assert [re.sub(r"\d+\?", "7?", line) for line in trained_on if line] == asked
    assert len(prompts) == 2 and asked[0].startswith("(noted)") and "Be brief." in asked[1]


# ------------------------------------------------------------------------- tokens of somebody else


def beginnings_and_second_turns(response, finished):
    """Each response begins with 7, 8; one that ends at a token below 410 goes on once, after 9."""
    if not response:
        return [7, 8]
    return [9] if finished and response[-1] < 410 and 9 not in response else []


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_others_may_write_tokens_in_both_samplers(load, architecture):
    """They are in the row, out of the mask, and the policy goes on after them."""
    model, _ = load(architecture)
    stop = list(range(400, 420))
    arguments = model, PROMPTS, 6, 20, stop, SEEDS, Sampling(), 5
    plain = sample.generate(*arguments, interject=beginnings_and_second_turns)
    fast = generate(*arguments, interject=beginnings_and_second_turns)
    for name in ("ids", "lengths", "response_mask", "finished"):
        assert torch.equal(getattr(plain, name), getattr(fast, name))
    torch.testing.assert_close(plain.old_logprobs, fast.old_logprobs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        learned, _ = token_logprobs(model, fast, Sampling())
    torch.testing.assert_close(fast.old_logprobs, learned, atol=1e-5, rtol=1e-5)
    second_turns = 0
    for ids, mask in zip(fast.response_ids(), fast.response_mask.tolist()):
        written = [token for token, by_policy in zip(ids, mask) if not by_policy]
        assert ids[:2] == [7, 8] and written in ([7, 8], [7, 8, 9])
        if 9 in written:
            second_turns += 1
            assert ids[ids.index(9) - 1] in range(400, 410)
    assert second_turns > 0 and fast.finished.any()


def test_what_others_write_ends_at_the_limit(load):
    model, _ = load("llama")
    for form in (sample.generate, generate):
        rollout = form(model, PROMPTS[:1], 2, 4, [], [0], interject=lambda ids, end: [5, 6, 7])
        assert [ids[:3] for ids in rollout.response_ids()] == [[5, 6, 7]] * 2
        assert rollout.response_mask.tolist() == [[False, False, False, True]] * 2
        assert not rollout.finished.any()
