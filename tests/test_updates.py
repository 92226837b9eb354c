"""What train.py does with weights, losses and sizes: reused rollouts, filters, KL and entropy, lack
of memory, metrics."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CPU
from test_train import assert_equal, cut_and_resume, metrics_of, run, weights_of

import engine.choose
import engine.start
import lib.run
import loss
import sample
import train
from engine.learner import Learner
from engine.sampler import LocalSampler
from lib.files import read_rows
from lib.flags import UserError
from lib.metrics import UpdateStatistics, rollout_metrics, update_metrics
from loss import token_weights, zscore
from policy import load_policy
from sample import Rollout, Sampling


def use_forms(monkeypatch, generate=sample.generate, token_logprobs=loss.token_logprobs):
    monkeypatch.setattr(
        engine.start, "choose", lambda *arguments: engine.choose.Forms(generate, token_logprobs)
    )


def log_all(monkeypatch):
    """samples.jsonl keeps every response, in the order of the rows."""
    every = lambda samples, *rest: [{**sample, "group": 0} for sample in samples]  # noqa: E731
    monkeypatch.setattr(lib.run, "logged_groups", every)


def changed_sampler(change):
    """-> a plain sampler with a change of each of its rollouts, a list that gets the rollouts"""
    rollouts = []

    def generate(*arguments, **options):
        rollouts.append(sample.generate(*arguments, **options))
        change(rollouts[-1])
        return rollouts[-1]

    return generate, rollouts


def sampler_off_by(gap):
    """A sampler whose log-probs are that much too low."""

    def lower(rollout):
        rollout.old_logprobs -= gap * rollout.response_mask

    return changed_sampler(lower)[0]


def test_a_reused_rollout_has_ratios_and_clips(base):
    """3 epochs of 2 optimizer steps. Those of a single step are 1: its policy is the one that
    sampled. A loss without ratios has none to report."""
    flags = "--reward noisy --loss clip --clip_low 0.01 --clip_high 0.01 --steps 2"
    rows = metrics_of(run(base, flags, "--updates_per_rollout 3 --minibatches 2"))
    for row in rows:
        assert row["updates"] == 6 and 0 < row["sampler_gap"] < 1e-5
        assert 0.5 < row["ratio_mean"] < 1.5 and row["ratio_max"] > 1.01
        assert 0 < row["clip_share"] < 0.9
    once = metrics_of(run(base, flags))
    assert [row["updates"] for row in once] == [1, 1]
    assert once[0]["ratio_max"] == pytest.approx(1, abs=1e-4) and once[0]["clip_share"] == 0
    assert "ratio_mean" not in metrics_of(run(base, "--reward noisy --steps 1"))[0]
    free = metrics_of(run(base, "--reward noisy --steps 1 --updates_per_rollout 6"))
    assert free[0]["clip_share"] == 0 and free[0]["ratio_max"] > rows[0]["ratio_max"]


def test_a_minibatch_has_a_part_of_every_group_and_is_divided_by_its_own_tokens(base, monkeypatch):
    sums, backward = [], train.backward

    def spy(batch, *rest):
        groups = Counter(map(tuple, batch.ids[:, :6].tolist()))
        assert set(groups.values()) <= {2, 3}  # of the 8 rows of each of 4 groups
        sums.append((batch.loss_scale[:, 0] * batch.response_lengths).sum().item())
        return backward(batch, *rest)

    monkeypatch.setattr(train, "backward", spy)
    run(base, "--reward noisy --steps 1 --minibatches 3 --updates_per_rollout 2")
    assert sums == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("denominator", ["token", "sequence"])
def test_tokens_that_the_policy_did_not_write_are_not_counted(base, monkeypatch, denominator):
    """Holes in the mask, as the tokens of a tool would leave: every row has as many as its number
    modulo 3."""

    def make_holes(rollout):
        for row, mask in enumerate(rollout.response_mask):
            mask[1 : 1 + row % 3] = False
        rollout.old_logprobs *= rollout.response_mask

    generate, rollouts = changed_sampler(make_holes)
    use_forms(monkeypatch, generate)
    flags = f"--normaliser raw --reward same --denominator {denominator} --steps 1"
    [row] = metrics_of(run(base, flags))
    [rollout] = rollouts
    counts = rollout.response_mask.sum(1)
    assert (counts < rollout.lengths - rollout.prompt_lengths).any()
    means = rollout.old_logprobs.sum() / counts.sum()
    if denominator == "sequence":
        means = (rollout.old_logprobs.sum(1) / counts).mean()
    assert row["loss"] == pytest.approx(-0.7 * means.item(), abs=1e-5)
    assert row["response_length"] == pytest.approx(counts.float().mean().item())


@pytest.mark.parametrize("name", ["finished", "top"])
def test_weights_are_normalised_over_the_whole_group_before_the_filter(base, monkeypatch, name):
    flags = f"--filter {name} --top_share 0.25 --reward noisy --steps 1"
    log_all(monkeypatch)
    samples = read_rows(run(base, flags) / "samples.jsonl")
    rewards = torch.tensor([row["reward"] for row in samples]).view(4, 8)
    expected = torch.stack([*map(zscore, rewards)])
    kept = rewards >= rewards.topk(2).values[:, -1:]
    if name == "finished":
        kept = torch.tensor([row["finished"] for row in samples]).view(4, 8)
    weights = torch.tensor([row["weight"] for row in samples]).view(4, 8)
    torch.testing.assert_close(weights, expected * kept, atol=1e-4, rtol=0)
    assert 0 < kept.sum() < 32


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_logprobs_of_another_sampler_give_real_ratios(base, monkeypatch, mode):
    """Those of the first update were once taken for known: the ratio was 1 whatever they held."""

    class Shifted(LocalSampler):
        def __call__(self, *arguments):
            rollout = super().__call__(*arguments)
            rollout.old_logprobs += 0.5 * rollout.response_mask
            return rollout

    monkeypatch.setattr(train, "LocalSampler", Shifted)
    flags = "--loss clip --reward noisy --steps 1 --lr 1e-9 --eval_problems 0 --fast"
    [row] = metrics_of(run(base, flags, mode))
    assert row["ratio_mean"] == pytest.approx(math.exp(-0.5), abs=1e-4)
    assert row["ratio_max"] == pytest.approx(math.exp(-0.5), abs=1e-4)


@pytest.mark.parametrize(("name", "skipped"), [("logprob", 0), ("clip", 2)])
def test_an_infinite_ratio_skips_only_updates_of_losses_that_use_it(
    base, monkeypatch, name, skipped
):
    use_forms(monkeypatch, sampler_off_by(200))
    flags = f"--loss {name} --reward noisy --steps 1 --updates_per_rollout 2"
    folder = run(base, flags)
    [row] = metrics_of(folder)
    assert (row["skipped"], row["updates"]) == (skipped, 2 - skipped)
    assert torch.equal(weights_of(base), weights_of(folder / "checkpoint")) == (name == "clip")


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 1), ("float32", math.exp(0.1))])
def test_bfloat16_ratios_are_to_the_learners_own_logprobs(base, monkeypatch, dtype, ratio):
    """A bfloat16 sampler rounds otherwise than a forward pass: here it is 0.1 off. With this
    learning rate nothing moves, so both ratios are those before the update."""
    use_forms(monkeypatch, sampler_off_by(0.1))
    flags = "--loss clip --reward noisy --steps 1 --updates_per_rollout 2 --lr 1e-12"
    [row] = metrics_of(run(base, flags, "--dtype", dtype))
    assert row["ratio_mean"] == pytest.approx(ratio, abs=1e-4)
    assert row["sampler_gap"] == pytest.approx(0.1, abs=0.05)


FILTERED = """
--reward same -> 0
--filter finished --reward noisy --max_new_tokens 1 --seed 1 -> 0
--filter informative --reward same --kl_beta 0.1 -> 0
--reward same --kl_beta 0.1 -> 1"""


@pytest.mark.parametrize("line", FILTERED.strip().splitlines())
def test_a_filter_that_leaves_nothing_makes_no_update(base, capfd, line):
    """With a KL term rows of weight 0 have a gradient, but not rows that were filtered out."""
    flags, trained = line.split(" -> ")
    trained = int(trained)
    folder = run(base, flags, "--steps 2")
    for row in metrics_of(folder):
        assert row["trained"] == row["updates"] == trained
        assert trained or row["grad_norm"] == 0
        assert "effective_samples" not in row  # no weight at all
    assert capfd.readouterr().out.count("no update") == (0 if trained else 2)
    if not trained:
        assert torch.equal(weights_of(base), weights_of(folder / "checkpoint"))


def test_resampling_goes_on_until_enough_groups_have_a_signal(base):
    flags = "--reward seven --filter resample --resample_tries 3 --steps 5"
    rows, seen = metrics_of(run(base, flags)), 0
    for row in rows:
        batches = row["batches_drawn"]
        seen += 4 * batches
        assert row["prompts_seen"] == seen and 1 <= batches <= 3
        assert round(row["informative"] * 4 * batches) >= 4 or batches == 3
        informative = round(row["informative"] * 4 * batches)
        assert row["trained"] == pytest.approx(min(4, informative) / (4 * batches))  # P groups
    assert len({row["batches_drawn"] for row in rows}) > 1


def test_the_kl_term_holds_the_policy_where_it_was(base):
    """To log the KL changes nothing that is learnt."""
    flags = "--reward seven --steps 9"
    extra = "--log_kl", "--kl_beta=1", "--filter=none"
    free, held, silent = [run(base, flags, flag) for flag in extra]
    kl = [row["kl"] for row in metrics_of(free)]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 0.05 and min(kl) > -1e-9
    assert metrics_of(held)[-1]["kl"] < kl[-1] / 3
    assert torch.equal(weights_of(free / "checkpoint"), weights_of(silent / "checkpoint"))
    assert "kl" not in metrics_of(silent)[0]


def test_an_entropy_term_trains_on_every_row_and_raises_the_entropy(base, monkeypatch):
    """With a constant reward all weights are 0: the entropy is all that is left of the loss, and
    its metric is exact, where -log pi of the sampled tokens is an estimate."""
    generate, rollouts = changed_sampler(id)
    use_forms(monkeypatch, generate)
    rows = metrics_of(run(base, "--reward same --entropy_coef 0.5 --steps 8"))
    policy, _ = load_policy(base, CPU)
    first = rollouts[0]
    with torch.no_grad():
        _, entropy = loss.token_logprobs(policy, first, Sampling())
    tokens = first.response_lengths.sum().item()
    exact = entropy.sum().item() / tokens
    assert rows[0]["entropy"] == pytest.approx(exact, abs=1e-5)
    assert rows[0]["loss"] == pytest.approx(-0.5 * exact, abs=1e-5)
    assert abs(exact + first.old_logprobs.sum().item() / tokens) > 0.01
    assert all(row["trained"] == 1 for row in rows)
    assert rows[-1]["entropy"] > exact + 0.3


@pytest.mark.parametrize("entropy_coef", [0, 0.1])
def test_a_row_of_weight_0_gets_no_forward_pass_without_such_a_term(
    base, monkeypatch, entropy_coef
):
    passed = []

    def token_logprobs(policy, rollout, *rest, **options):
        if torch.is_grad_enabled():
            passed.append(len(rollout.ids))
        return loss.token_logprobs(policy, rollout, *rest, **options)

    use_forms(monkeypatch, token_logprobs=token_logprobs)
    flags = f"--normaliser raw --reward low --steps 1 --entropy_coef {entropy_coef}"
    [row] = metrics_of(run(base, flags))
    assert 0 < row["reward"] < 1
    assert sum(passed) == (32 if entropy_coef else 32 * row["reward"])


# ------------------------------------------------------------------------------ lack of memory


def starve(monkeypatch, place):
    """Memory runs out once, when work is done: in the first sampling or in the second pass of
    another kind."""
    calls = []
    fatal = 1 if place == "sampling" else 2

    def work(kind):
        calls.append(kind)
        if kind == place and calls.count(kind) == fatal:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def token_logprobs(policy, rollout, *rest, **options):
        found = loss.token_logprobs(policy, rollout, *rest, **options)
        if torch.is_grad_enabled():
            work("update")
        elif len(rollout.ids) > 2:  # a forward pass of two rows is the check of the sampler
            work("no gradient")
        return found

    generate, _ = changed_sampler(lambda rollout: work("sampling"))
    use_forms(monkeypatch, generate, token_logprobs)


OUT_OF_MEMORY = """
sampling | --rows_at_once 8 | --rows_at_once 4
update | --micro_batch_tokens 128 | --micro_batch_tokens 64
no gradient | --micro_batch_tokens 128 --kl_beta 0.1 | --micro_batch_tokens 64
no gradient | --micro_batch_tokens 128 --dtype bfloat16 --loss clip | --micro_batch_tokens 64"""


@pytest.mark.parametrize("line", OUT_OF_MEMORY.strip().splitlines())
def test_out_of_memory_halves_the_size_and_counts_nothing_twice(base, monkeypatch, line):
    """The end is that of a run with half the size from the start, also after a resume, which once
    forgot the size."""
    place, flags, size = line.split(" | ")
    flags += " --reward noisy --steps 2 --save_every 1"
    use_forms(monkeypatch)
    expected = run(base, flags, size)
    starve(monkeypatch, place)
    found = cut_and_resume(2, base, flags)
    assert_equal(found, expected)


def test_halving_stops_at_the_longest_row(base, monkeypatch):
    def starved(batch, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def update(learner, backward, batch, *rest, update=Learner.update):
        lengths.append(batch.lengths.max().item())
        return update(learner, backward, batch, *rest)

    lengths = []
    monkeypatch.setattr(train, "backward", starved)
    monkeypatch.setattr(Learner, "update", update)
    with pytest.raises(UserError, match="out of memory, and less would not help") as error:
        run(base, "--reward noisy --steps 1 --micro_batch_tokens 100")
    assert f"--micro_batch_tokens {lengths[0]}:" in str(error.value)


def test_offload_changes_no_number(base):
    """In micro-batches, whose gradients add up in the host's memory."""
    flags = "--reward noisy --steps 2 --micro_batch_tokens 128 --save_every 1"
    here, there = run(base, flags), cut_and_resume(2, base, flags, "--offload")
    assert_equal(here, there)


# ------------------------------------------------------------------------------ metrics


def test_the_numbers_of_a_step_by_hand():
    """Two groups of two. Deviations are 0.5 and 0; means are 0.5 and 1, 0.25 from their mean.
    Weights: 4^2 / 6."""
    lengths = torch.tensor([3, 5, 4, 8])
    mask = torch.arange(8) < lengths[:, None]
    finished = torch.tensor([True, True, True, False])
    rollout = Rollout(mask.long(), lengths, lengths, mask, -0.5 * mask, finished)
    rows = (
        ("a</think>b", 1.0, 1.0, 2.0),
        ("", 0.0, 0.5, 0.0),
        ("a", 1.0, 1.0, 0.0),
        ("", 1.0, 1.0, 1.0),
    )
    samples = [
        {"response": text, "reward": reward, "true_reward": true, "parts": {"number": part}}
        for text, reward, true, part in rows
    ]
    for row in samples:
        row["accuracy"] = row["true_reward"]
    expected = json.loads("""{"reward": 0.75, "reward_std": 0.25, "reward_std_between": 0.25,
        "reward/number": 0.75, "informative": 0.5, "true_reward": 0.875, "accuracy": 0.75,
        "thinking": 0.25, "all_right": 0.5, "all_wrong": 0.0, "response_length": 5.0,
        "response_length_finished": 4.0, "response_length_truncated": 8.0, "finished": 0.75,
        "entropy": 0.5, "effective_samples": 2.6666667}""")

    def numbers(weights):
        rewards = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
        weights = torch.tensor(weights)
        batch = train.Batch(*vars(rollout).values(), weights, mask, weights)
        return rollout_metrics(batch, samples, rewards)

    found = numbers([[2.0], [-1], [1], [0]])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    rollout.finished[:] = True
    found = numbers([[2.0] + 7 * [-1.0], [-1.0] * 8, [1.0] * 8, [0.0] * 8])
    # the weights of tokens: their means are 0, -1, 1 and 0
    assert found["effective_samples"] == 2
    for row in samples:
        del row["accuracy"]
    found = numbers([[0.0]] * 4)
    absent = "response_length_truncated effective_samples accuracy all_right all_wrong"
    assert not {*absent.split()} & {*found}


def test_the_numbers_of_the_updates_by_hand():
    """The first in two micro-batches, of 3 tokens and of 1: ratios 1, 1, 1.5 and 0.5, one of them
    clipped."""
    mask = torch.tensor([[True, True, True, False]])

    def statistics(grad_norm, *micro_batches, on_policy=False):
        update = UpdateStatistics(on_policy)
        for value, ratios, mask in micro_batches:
            ratio = torch.tensor([ratios])
            update.add(value, ratio.log(), torch.zeros(1, 4), ratio > 1.2, mask, 2 * ratio)
        update.grad_norm = grad_norm
        return update

    one = statistics(2.0, (0.75, [1, 1, 1.5, 9], mask), (0.25, [9, 9, 9, 0.5], ~mask))
    two = statistics(1.0, (0.0, [1.0, 1, 1, 9], mask))
    bad = statistics(math.nan, (7.0, [7.0, 7, 7, 7], mask))
    first = {"updates": 1, "skipped": 1, "loss": 1.0, "grad_norm": 2.0, "entropy": 2.0}
    both = {"updates": 2, "skipped": 0, "loss": 0.5, "grad_norm": 1.5, "entropy": 2.0}
    both |= {"ratio_mean": 1.0, "ratio_max": 1.5, "clip_share": 0.125}
    for updates, expected in (([one, bad], first), ([one, two], both), ([], {"updates": 0})):
        found = update_metrics(updates)
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        assert ("ratio_max" in found) == (updates != [])
    known = statistics(1.0, (0.0, [1.0, 1, 1, 9], mask), on_policy=True)
    assert "ratio_max" not in update_metrics([known])  # they are to the policy itself
    assert "ratio_max" in update_metrics([known, two])


def test_a_token_has_its_part_of_the_weight_with_its_sign():
    """In proportion to the sizes of the numbers, 1 on average; tokens outside the mask have none.
    Signs were once lost: a line of value -1 was pushed like one of 1."""
    mask = torch.tensor([[True] * 4, [True] * 4, [True, False, True, False], [True] * 4])
    numbers = [[0, 0, 1, 1], [0, -1, 0, 0], [3, 5, 1], None]
    expected = [[0, 0, 2, 2], [0, 4, 0, 0], [1.5, 0, 0.5, 0], [1, 1, 1, 1]]
    for weight in (1.0, -0.5):
        weights = torch.full((4, 1), weight)
        found = token_weights(weights, numbers, mask)
        assert found.tolist() == (weight * torch.tensor(expected)).tolist()
        assert token_weights(weights, [None] * 4, mask) is weights
        both = token_weights(weights[:1], [[3, 0, 0, -1]], mask[:1])
        assert both.tolist() == [[3 * abs(weight), 0, 0, -abs(weight)]]


def test_a_reward_may_return_a_number_for_each_token(base, monkeypatch):
    """Digits only: the update gets the weights token by token, the samples those of responses."""
    Path("mine.py").write_text("""
def digits(prompt, response, answer, tokens):
    assert "".join(tokens).removesuffix("<eos>") == response
    return [float(token.isdigit()) for token in tokens]
""")
    seen, backward = [], train.backward

    def spy(batch, *rest):
        seen.append(batch)
        return backward(batch, *rest)

    monkeypatch.setattr(train, "backward", spy)
    log_all(monkeypatch)
    folder = run(base, "--reward mine.digits --steps 1 --normaliser raw")
    [rollout] = seen
    weights = rollout.weights
    lengths = rollout.response_lengths.tolist()
    for b, text in enumerate(rollout.responses(load_policy(base, CPU)[1])):
        digits = [float(character.isdigit()) for character in text]
        if "<" not in text:  # a character is a token; the response's weight is its count of digits
            expected = [lengths[b] * digit for digit in digits]
            assert weights[b, : len(digits)].tolist() == pytest.approx(expected)
    for row in read_rows(folder / "samples.jsonl"):
        assert row["weight"] == pytest.approx(row["reward"]) and "tokens" not in row
    with pytest.raises(UserError, match="--loss gspo"):
        run(base, "--reward mine.digits --steps 1 --loss gspo")
