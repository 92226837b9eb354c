"""Fast or plain: `choose` compares each fast form with its plain form on the run's own model, and
picks. So a model that a fast form does not fit still trains, by the plain form. An edit of a plain
form takes effect where it shows in the first 16 tokens, or in log-probs or gradients by more than
TOLERANCE; an edit of a function that both forms call (policy_distribution, sample_token,
token_stats) takes effect in any case. --fast off asks for the plain forms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from tqdm import tqdm

import engine.generate
import engine.logprobs
import loss
import sample
from lib.flags import name_error
from lib.progress import phase

# largest relative difference between the forms that is allowed
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2}
# tokens of a row that are compared: all its logits are held at once
LONGEST = 1024
# what a model raises that a fast form does not fit
MISFIT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


@dataclass(frozen=True)
class Forms:
    """The two functions that have a plain and a fast form."""

    generate: Callable = sample.generate
    token_logprobs: Callable = loss.token_logprobs


@phase("comparing the fast forms with the plain ones")
def choose(policy, prompts, stop, sampling, max_new_tokens, mode="auto") -> Forms:
    """Tries the fast forms on the first and the last of the prompts (token ids; longest first),
    four responses each, and takes each one that agrees with its plain form. The first prompt is
    repeated until its rows are as long as those of the run, at most LONGEST: a model may attend
    otherwise beyond a window. mode 'off': the plain forms."""
    if mode == "off":
        return Forms()
    by_hand = engine.logprobs.token_logprobs
    by_autograd = partial(by_hand, by_hand=False)
    try:
        tokens = min(16, max_new_tokens)
        length = max(len(prompts[0]), min(LONGEST, len(prompts[0]) + max_new_tokens) - tokens)
        prompts = [(prompts[0] * length)[:length], prompts[-1]]
        arguments = policy, prompts, 4, tokens, stop, [0, 1], sampling
        rollout = sample.generate(*arguments)
        few = rollout.rows([0, 1, -2, -1])  # two of each prompt: all logits are held at once
        expected = values_and_gradients(loss.token_logprobs, policy, few, sampling)

        def compare_sampler(generate):
            return sampler_difference(generate(*arguments), rollout, policy, sampling)

        def compare_logprobs(token_logprobs):
            found = values_and_gradients(token_logprobs, policy, few, sampling)
            return difference(found, expected)

        generate = pick(policy, sample.generate, [engine.generate.generate], compare_sampler)
        token_logprobs = pick(policy, loss.token_logprobs, [by_hand, by_autograd], compare_logprobs)
    except torch.OutOfMemoryError:  # says nothing about the forms
        return Forms(engine.generate.generate, by_hand)
    return Forms(generate, token_logprobs)


def pick(policy, plain, candidates, compare) -> Callable:
    """The first candidate that `compare` finds close enough to the plain form, else the plain
    form, and a line that says so."""
    # without them a row's numbers would depend on its neighbours
    if "position_ids" not in signature(policy.forward).parameters:
        candidates, reason = [], "the model takes no position_ids"
    for form in candidates:
        try:
            gap = compare(form)
        except torch.OutOfMemoryError:
            raise
        except MISFIT as error:
            reason = name_error(error)
            continue
        if gap <= TOLERANCE[policy.dtype]:
            return form
        reason = f"they differ by {gap:.1g}"
    model, name = type(policy).__name__, f"{plain.__module__}.{plain.__name__}"
    tqdm.write(f"{model} does not fit the fast form of {name} ({reason}): the plain form is used")
    return plain


def sampler_difference(found, expected, policy, sampling) -> float:
    """Float32: all tokens must be the same, and the log-probs close. In bfloat16 rounding leads to
    other tokens: most first tokens must be the same, and log-probs those of a forward pass."""
    if policy.dtype == torch.float32:
        for name in ("ids", "lengths", "response_mask", "finished"):
            if not torch.equal(getattr(found, name), getattr(expected, name)):
                return math.inf
        return difference([found.old_logprobs], [expected.old_logprobs])
    first = found.prompt_lengths[:, None]
    same = (found.ids.gather(1, first) == expected.ids.gather(1, first)).float().mean()
    if same < 0.5:
        return math.inf
    rows = torch.arange(len(found.ids), device=policy.device)
    with torch.no_grad():
        logprobs, _ = loss.token_logprobs(policy, found, rows, sampling)
    return ((logprobs - found.old_logprobs).abs().sum() / found.response_mask.sum()).item()


def values_and_gradients(token_logprobs, policy, rollout, sampling) -> list[Tensor]:
    """Log-probs and entropies of a rollout, and the gradients of two losses, one of them with the
    entropies, by a few of the parameters."""
    rows = torch.arange(len(rollout.ids), device=policy.device)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    watched = trained[:: max(1, len(trained) // 8)]
    found = []
    for with_entropy in (False, True):
        logprobs, entropy = token_logprobs(
            policy, rollout, rows, sampling, with_entropy=with_entropy
        )
        weights = torch.linspace(-1, 2, logprobs.numel(), device=policy.device).view_as(logprobs)
        total = (weights * logprobs).sum()
        if with_entropy:
            total = total + entropy.sum()
            found.append(entropy.detach())
        found.append(logprobs.detach())
        found += torch.autograd.grad(total, watched, allow_unused=True, materialize_grads=True)
    return found


def difference(found, expected) -> float:
    """The largest relative difference (of norms) between tensors; inf for nan. Where the plain form
    gives nan too, the model is to blame, not the fast form."""
    gaps = [0.0]
    for one, other in zip(found, expected, strict=True):
        norm, gap = other.float().norm().item(), (one.float() - other.float()).norm().item()
        if not math.isnan(norm):
            gaps.append(math.inf if math.isnan(gap) else gap / max(norm, 1e-12))
    return max(gaps)
