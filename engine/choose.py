"""Fast or plain: `choose` compares each fast form with its plain form on the run's own model, and
picks. So a model that a fast form does not fit still trains, by the plain form.

How much may they differ? By FLOOR, which is far above the rounding of float32. In bfloat16 rounding
depends on the model, so it is measured: the plain form runs again while each layer's result is off
by up to half a unit in its last place, at random. The fast form may be off by MULTIPLE times as
much. (python docs/precision.py forms --model FOLDER: both beside those of faults) A token may
differ where the random number is at its border: see `token_gap`.

An edit of a plain form takes effect where it shows in the first tokens, or in log-probs or
gradients by more than that; an edit of a function that both forms call (policy_distribution,
sample_token, token_stats) takes effect in any case. --fast off asks for the plain forms, --fast
compile for a sampler whose forward pass torch.compile has compiled (docs/gpu.md).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from engine.memory import is_out_of_memory
from lib.checks import without_keys
from lib.flags import name_error
from lib.progress import phase

# the fast form may differ by this many times the noise, which is relative and measured ...
MULTIPLE = 2
# ... or by this much
FLOOR = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
# tokens of a row that are compared: at least, at most, and what a forward pass holds in bytes
SHORTEST, LONGEST, LOGITS = 8, 1024, 5e8
# what the comparison may take on a slow machine, and about how many forward passes it takes
SECONDS, PASSES = 5, 16
# what a model raises that a fast form does not fit
MISFIT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


@dataclass(frozen=True)
class Forms:
    """The two functions that have a plain and a fast form."""

    generate: Callable = sample.generate
    token_logprobs: Callable = loss.token_logprobs


@phase("comparing the fast forms with the plain ones")
def choose(policy, prompts, stop, sampling, max_new_tokens, mode="auto") -> Forms:
    """Tries the fast forms on the first and the last of the prompts (token ids; longest first), and
    takes each one that agrees with its plain form.

    mode: 'off': the plain forms; 'compile': the decode step of the sampler is compiled
    """
    if mode == "off":
        return Forms()
    longest = min(LONGEST, len(prompts[0]) + max_new_tokens)
    for affordable in (affordable_tokens, lambda *arguments: SHORTEST):
        try:
            tokens = min(longest, affordable(policy, longest))
            return compare_forms(policy, prompts, stop, sampling, max_new_tokens, tokens, mode)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # outside the except block, which keeps tensors alive
    tqdm.write("out of memory: the fast forms were not compared with the plain ones, but are used")
    return Forms(engine.generate.generate, engine.logprobs.token_logprobs)


def affordable_tokens(policy, longest) -> int:
    """How long the rows may be if the comparison shall take about SECONDS."""
    config = policy.config.get_text_config()
    ids = torch.zeros(3, SHORTEST, dtype=torch.long, device=policy.device)
    for rows in (ids[:1], ids):  # the first warms up
        began = time.perf_counter()
        with torch.no_grad():
            policy(rows, use_cache=False).logits.sum().item()
        seconds = time.perf_counter() - began
    affordable = SHORTEST * SECONDS / (PASSES * seconds)
    fits = LOGITS / (len(ids) * config.vocab_size * 4)  # in float32: lib/head.py
    # a model may attend otherwise beyond a window, and only `sliding_window` is known to us
    window = getattr(config, "window_size", None)
    if isinstance(window, int) and window < longest:
        affordable = max(affordable, window + SHORTEST)
    return max(SHORTEST, int(min(affordable, fits)))


def compare_forms(policy, prompts, stop, sampling, max_new_tokens, longest, mode) -> Forms:
    """Compares four responses to each of two prompts. The first prompt is truncated or repeated, so
    that its rows have `longest` tokens."""
    tokens = min(16, max_new_tokens, longest // 2)
    length = longest - tokens
    prompts = [(prompts[0] * length)[:length], prompts[-1][:length]]
    arguments = policy, prompts, 4, tokens, stop, [0, 1], sampling
    rollout = sample.generate(*arguments)
    few = rollout.rows([0, 1, -1])  # two share a prompt
    expected = values_and_gradients(loss.token_logprobs, policy, few, sampling)
    noise = [0.0] * len(expected)
    if policy.dtype != torch.float32:  # in float32 it is far below FLOOR
        with rounded_otherwise(policy):
            again = values_and_gradients(loss.token_logprobs, policy, few, sampling)
        noise = differences(again, expected)

    def compare_sampler(generate):
        found = generate(*arguments)
        return sampler_difference(found, rollout, policy, sampling, noise[0])

    def compare_logprobs(token_logprobs):
        found = values_and_gradients(token_logprobs, policy, few, sampling)
        return times_noise(differences(found, expected), noise, policy.dtype)

    by_hand = engine.logprobs.token_logprobs
    by_autograd = partial(by_hand, by_hand=False)
    token_logprobs = pick(policy, loss.token_logprobs, [by_hand, by_autograd], compare_logprobs)
    if mode == "compile":
        began = time.perf_counter()
        compiled = partial(engine.generate.generate, forward=compile_policy(policy))
        reason = misfit(policy, compiled, compare_sampler)
        if not reason:
            tqdm.write(f"the decode step was compiled in {time.perf_counter() - began:.0f} s")
            return Forms(compiled, token_logprobs)
        tqdm.write(f"--fast compile: the decode step is not compiled ({reason})")
    generate = pick(policy, sample.generate, [engine.generate.generate], compare_sampler)
    return Forms(generate, token_logprobs)


def compile_policy(policy) -> Callable:
    """For any number of slots and attended columns; for a single slot it is compiled again."""
    # or numbers that were equal at first would have to stay so
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(policy, dynamic=True)


def pick(policy, plain, candidates, compare) -> Callable:
    """The first candidate that fits, else the plain form, and a line that says so."""
    reason = "there is none"
    for form in candidates:
        reason = misfit(policy, form, compare)
        if not reason:
            return form
    model, name = type(policy).__name__, f"{plain.__module__}.{plain.__name__}"
    tqdm.write(f"{model} does not fit the fast form of {name} ({reason}): the plain form is used")
    return plain


def misfit(policy, form, compare) -> str:
    """Why a form cannot be used: it raises an error, or it differs from the plain form by more than
    1 as `compare` has it. '' where it fits."""
    # without them a row's numbers would depend on its neighbours
    if "position_ids" not in signature(policy.forward).parameters:
        return "the model takes no position_ids"
    try:
        gap = compare(form)
    except MISFIT as error:
        if is_out_of_memory(error):
            raise
        return without_keys(policy) or name_error(error)
    return "" if gap <= 1 else f"they differ by {gap:.1g} times what rounding explains"


@contextmanager
def rounded_otherwise(policy) -> Iterator[None]:
    """Within the block the result of each layer is off by up to half a unit in its last place, at
    random, as if it had been summed in another order."""
    generator = torch.Generator(policy.device).manual_seed(0)

    def nudge(module, arguments, output):
        if torch.is_tensor(output) and output.is_floating_point():
            half_a_unit = torch.finfo(output.dtype).eps / 2
            noise = torch.rand(output.shape, generator=generator, device=output.device)
            return (output * (1 + (2 * noise - 1) * half_a_unit)).to(output.dtype)

    innermost = [module for module in policy.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(nudge) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sampler_difference(found, expected, policy, sampling, noise) -> float:
    """In multiples of what is allowed. Up to the first token of a row that differs the log-probs
    are the same, and rounding explains that token.

    noise: relative difference of log-probs that rounding makes
    """
    width = min(found.response_mask.shape[1], expected.response_mask.shape[1])
    logprobs = [rollout.old_logprobs[:, :width].clone() for rollout in (found, expected)]
    gaps = []
    for row, (one, other) in enumerate(zip(found.parts(), expected.parts(), strict=True)):
        if one != other:
            place = first_difference(one[1], other[1])
            for each in logprobs:
                each[row, place:] = 0
            if place == min(len(one[1]), len(other[1])):  # only one of the two has ended
                return math.inf
            ids = expected.ids[row, : expected.prompt_lengths[row] + place]
            gap = token_gap(policy, ids, one[1][place], other[1][place], sampling)
            gaps.append(gap / 10)  # a single token may be off by more than their mean
    # log-probs near 0, of tokens that are nearly certain, are compared as if they were near 1
    smallest = math.sqrt(logprobs[1].numel())
    gaps += differences(logprobs[:1], logprobs[1:], smallest)
    return times_noise(gaps, [noise] * len(gaps), policy.dtype)


def first_difference(one, other) -> int:
    """[5, 6, 7], [5, 6, 9, 9] -> 2"""
    pairs = zip(one, other)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.no_grad()
def token_gap(policy, ids, one, other, sampling) -> float:
    """(T,) ids of a row so far, and two tokens that may come next -> how far apart these are: the
    probability of all tokens between them, or if the sampling is greedy the difference of their
    log-probs.

    Near 0: rounding decides between the two, because the random number is at their border. With a
    large vocabulary that happens once in a thousand tokens, in float32 too.
    """
    logits = policy(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1:]
    logprobs = sample.policy_distribution(logits, sampling).log_softmax(-1)[0]
    low, high = sorted([one, other])
    if sampling.temperature == 0:
        return (logprobs[low] - logprobs[high]).abs().item()
    return logprobs[low + 1 : high].exp().sum().item()


def values_and_gradients(token_logprobs, policy, rollout, sampling) -> list[Tensor]:
    """Log-probs of a rollout and their gradients by a few of the parameters. Then log-probs with
    entropies of the last row, and the gradients of both by the last parameters: the layers before
    were compared already."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    spread = trained[:: max(1, len(trained) // 8)]
    found = []
    last_row = rollout.rows([-1])
    for part, with_entropy, watched in ((rollout, False, spread), (last_row, True, trained[-2:])):
        logprobs, entropy = token_logprobs(policy, part, sampling, with_entropy=with_entropy)
        weights = torch.linspace(-1, 2, logprobs.numel(), device=policy.device).view_as(logprobs)
        total = (weights * logprobs).sum()
        found.append(logprobs.detach())
        if with_entropy:
            total = total + entropy.sum()
            found.append(entropy.detach())
        found += torch.autograd.grad(total, watched, allow_unused=True, materialize_grads=True)
    return found


def differences(found, expected, smallest=1e-12) -> list[float]:
    """The relative difference (of norms) of each tensor; inf for nan. Where the plain form gives
    nan too, the model is to blame, not the fast form.

    smallest: a norm below it counts as that
    """
    gaps = []
    for one, other in zip(found, expected, strict=True):
        norm = other.float().norm().item()
        gap = (one.float() - other.float()).norm().item()
        if math.isnan(norm):
            gaps.append(0.0)
        else:
            gaps.append(math.inf if math.isnan(gap) else gap / max(norm, smallest))
    return gaps


def times_noise(gaps, noise, dtype) -> float:
    """The largest of the gaps in multiples of what is allowed.

    [0.1, 0.3], [0.05, 0.05] -> 0.3 / (2 * 0.05) = 3
    """
    return max(gap / max(FLOOR[dtype], MULTIPLE * one) for gap, one in zip(gaps, noise))
