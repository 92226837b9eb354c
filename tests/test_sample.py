import io
import runpy
import sys

import pytest
import tiny
import torch

import fast.generate
import sample
from fast.generate import generate
from lib.flags import UserError
from loss import token_logprobs
from policy import stop_ids
from sample import Sampling, join, sample_token

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
    [300],
    [40, 41, 42],
    [77, 78, 79, 80, 81],
]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_is_that_of_model_generate_on_prompts_of_mixed_length(load, architecture):
    """Prompts of 13, 1, 3 and 5 tokens in one batch, against each of them alone in transformers' own generate: token
    for token, with a sliding window of 8 in two of the architectures."""
    model, tokenizer = load(architecture)
    stop = [
        *stop_ids(model, tokenizer),
        *range(400, 420),
    ]  # some more, so that rows end at different times
    rollout = generate(model, PROMPTS, 1, 24, stop, [0] * 4, sampling=Sampling(0))
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=stop,
            pad_token_id=0,
        )[0].tolist()
        assert rollout.ids[row, : rollout.lengths[row]].tolist() == expected
        assert rollout.finished[row].item() == (expected[-1] in stop)
    assert len(set(rollout.response_lengths.tolist())) > 1 or architecture == "gemma2"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_samplers_logprobs_are_the_learners(load, architecture):
    model, _ = load(architecture)
    rollout = generate(
        model, PROMPTS, 3, 20, list(range(400, 440)), [1, 2, 3, 4], sampling=Sampling(0.8)
    )
    with torch.no_grad():
        learned, _ = token_logprobs(model, rollout, torch.arange(12), Sampling(0.8))
    torch.testing.assert_close(rollout.old_logprobs, learned, atol=1e-5, rtol=0)
    assert (rollout.old_logprobs < 0).sum() == rollout.response_lengths.sum()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_response_does_not_depend_on_its_neighbours(load, architecture):
    """Alone, among longer prompts, in another place: the same tokens, sampled from the prompt's own seed."""
    model, _ = load(architecture)
    stop = list(range(400, 420))
    together = generate(model, PROMPTS, 3, 20, stop, [1, 2, 3, 4])
    backwards = generate(model, PROMPTS[::-1], 3, 20, stop, [4, 3, 2, 1])
    for p, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 3, 20, stop, [p + 1])
        for g in range(3):
            expected = alone.ids[g, : alone.lengths[g]].tolist()
            for rollout, row in ((together, 3 * p + g), (backwards, 3 * (3 - p) + g)):
                assert rollout.ids[row, : rollout.lengths[row]].tolist() == expected


def test_responses_of_a_group_differ_and_seeds_matter(load):
    model, _ = load("llama")
    first = generate(model, [[5, 6]], 8, 10, [], [1])
    assert len(set(map(tuple, first.ids.tolist()))) == 8
    assert not torch.equal(first.ids, generate(model, [[5, 6]], 8, 10, [], [2]).ids)
    assert torch.equal(first.ids, generate(model, [[5, 6]], 8, 10, [], [1]).ids)


def test_a_prompt_is_run_once_for_its_group(load):
    """One prefill of P rows, whatever G; then a step of the rows still going for each token, fewer as they end."""
    model, _ = load("llama")
    shapes = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape))
    )
    rollout = generate(model, PROMPTS, 6, 30, list(range(100, 160)), [1, 2, 3, 4])
    hook.remove()
    assert shapes[0] == (4, 12)  # without the last token
    assert shapes[1] == (24, 1) and all(width == 1 for _, width in shapes[1:])
    assert len(shapes) - 1 == rollout.response_lengths.max()
    assert shapes[-1][0] < 12  # rows that had ended were dropped


def test_the_stop_token_ends_a_response_and_belongs_to_it(load):
    model, _ = load("llama")
    stop = list(range(100, 160))
    rollout = generate(model, PROMPTS, 8, 12, stop, [1, 2, 3, 4])
    assert 0 < rollout.finished.sum() < 32
    for row in range(32):
        start, end = rollout.prompt_lengths[row], rollout.lengths[row]
        response = rollout.ids[row, start:end].tolist()
        assert (response[-1] in stop) == rollout.finished[row].item()
        assert not set(response[:-1]) & set(stop)
        assert rollout.finished[row] or len(response) == 12
        assert (
            not rollout.ids[row, end:].any()
            and not rollout.old_logprobs[row, len(response) :].any()
        )


def test_draws_follow_the_distribution_and_never_have_probability_zero():
    """20,000 draws of 6 tokens against their probabilities: chi-square of 3 degrees under 16.3 (p 0.001); the draws
    0 and just under 1 must not fall on the tokens of probability 0 at either end."""
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
def test_draws_over_several_blocks_are_those_of_multinomial(V):
    """200,000 draws of 700 tokens, which are two blocks of 256 and a rest, every third of probability 0, against
    torch.multinomial's by a chi-square of two samples: its mean is V' - 1 and its deviation sqrt(2 (V' - 1))."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(V, generator=generator)
    logits[::3] = -float("inf")

    def draw():
        uniforms = torch.rand(5000, dtype=torch.float64, generator=generator)
        return sample_token(logits.repeat(5000, 1), uniforms, Sampling())[0]

    ours = torch.cat([draw() for _ in range(40)]).bincount(minlength=V).double()
    theirs = (
        logits.softmax(0)
        .multinomial(200_000, True, generator=generator)
        .bincount(minlength=V)
        .double()
    )
    assert ours[::3].sum() == 0
    both = (ours + theirs) > 0
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[both].sum()
    freedom = both.sum().item() - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_that_wait_for_a_slot_get_the_same_responses(load, architecture):
    """24 rows in 5 slots: each slot takes several rows in turn, over what the one before left in the cache."""
    model, _ = load(architecture)
    stop, seeds = list(range(300, 400)), [1, 2, 3, 4]
    together = generate(model, PROMPTS, 6, 20, stop, seeds)
    batches = []
    hook = model.register_forward_hook(lambda module, args, out: batches.append(len(out.logits)))
    waited = generate(model, PROMPTS, 6, 20, stop, seeds, rows_at_once=5)
    hook.remove()
    assert max(batches[1:]) == 5 and sum(batches[1:]) < 24 * 20
    assert torch.equal(waited.ids, together.ids) and torch.equal(waited.finished, together.finished)
    torch.testing.assert_close(waited.old_logprobs, together.old_logprobs, atol=1e-5, rtol=0)


def test_looking_seldom_at_what_has_ended_changes_nothing(load, monkeypatch):
    """On a GPU rows that have ended go on for up to 15 steps before anyone looks: what they do must leave no trace."""
    model, _ = load("llama")
    stop, seeds = list(range(300, 400)), [1, 2, 3, 4]
    often = generate(model, PROMPTS, 6, 20, stop, seeds, rows_at_once=9)
    monkeypatch.setitem(fast.generate.CHECK_EVERY, "cpu", 16)
    monkeypatch.setitem(fast.generate.LENGTH_MULTIPLE, "cpu", 64)
    seldom = generate(model, PROMPTS, 6, 20, stop, seeds, rows_at_once=9)
    assert torch.equal(seldom.ids, often.ids) and torch.equal(seldom.lengths, often.lengths)
    torch.testing.assert_close(seldom.old_logprobs, often.old_logprobs, atol=1e-5, rtol=0)


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
    arguments = (model, PROMPTS, 5, 20, list(range(400, 440)), [1, 2, 3, 4], Sampling(0.8))
    expected = generate(*arguments)
    for found in (sample.generate(*arguments), sample.generate(*arguments, rows_at_once=2)):
        for name in ("ids", "prompt_lengths", "lengths", "response_mask", "finished"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        torch.testing.assert_close(found.old_logprobs, expected.old_logprobs, atol=1e-5, rtol=0)


def test_nothing_is_taken_from_generation_config_but_stop_tokens(load):
    """These settings once took part in sampling, and changed accuracies without a word."""
    model, tokenizer = load("llama")
    arguments = (model, PROMPTS, 4, 20, list(range(400, 440)), [1, 2, 3, 4])
    before = [form(*arguments).ids for form in (generate, sample.generate)]
    settings = dict(
        num_beams=4,
        min_p=0.5,
        repetition_penalty=5.0,
        epsilon_cutoff=0.5,
        min_new_tokens=20,
        top_k=1,
        temperature=0.01,
        suppress_tokens=list(range(300)),
    )
    try:
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        model.generation_config.eos_token_id = [7, 8]
        assert stop_ids(model, tokenizer) == [0, 7, 8]
        after = [form(*arguments).ids for form in (generate, sample.generate)]
    finally:
        model.generation_config = type(model.generation_config)()
    assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_rows_of_a_rollout_and_a_mask_with_holes(load):
    """Tokens that an environment wrote are in the row and out of the mask: nothing counts them."""
    model, tokenizer = load("llama")
    rollout = sample.generate(model, PROMPTS, 2, 6, [], [1, 2, 3, 4])
    rollout.response_mask[3, 1:3] = False
    assert rollout.response_lengths.tolist() == [6, 6, 6, 4, 6, 6, 6, 6]
    part = rollout.rows(torch.tensor([3, 0]))
    assert part.response_lengths.tolist() == [4, 6] and part.prompt_lengths.tolist() == [1, 13]
    assert part.responses(tokenizer) == [rollout.responses(tokenizer)[i] for i in (3, 0)]
    parts = join([part, rollout.rows(torch.arange(2))])
    assert torch.equal(
        parts.response_mask, torch.cat([part.response_mask, rollout.response_mask[:2]])
    )


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

    def recorded(policy, ids, *arguments):
        rollout = generate(policy, ids, *arguments)
        prompts.append(tokenizer.decode(ids[0]))
        responses.extend(rollout.responses(tokenizer))
        return rollout

    monkeypatch.setattr(sample, "generate", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    sample.main(sample.Config(chat=True, max_new_tokens=6, device="cpu"), folders("qwen2"))
    assert capsys.readouterr().out == "> {}\n> {}\n> ".format(*responses)
    assert "hello" in prompts[0] and "then" not in prompts[0]
    assert prompts[1].startswith(prompts[0]) and "and then?" in prompts[1]
