"""Samples several responses to each prompt from a policy.

    python sample.py runs/add "48+27=" --samples 8      # a run, a folder or a model's name
    python sample.py Qwen/Qwen2.5-0.5B-Instruct --chat  # a conversation

`generate` is the sampler in its plain form. train.py and eval.py mostly use engine/generate.py,
which samples the same tokens faster. Both call `policy_distribution` and `sample_token`: a
change there is a change of both.
"""

import math
import sys
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.checks import CACHE, check_prompts, context_length
from lib.flags import UserError, check_range, flag, run_script
from policy import DEVICES, load_policy, pick_device, stop_ids
from tasks import NO_TASK, Problem, prompt_ids


@dataclass(frozen=True)
class Sampling:
    """What decides the distribution. The sampler and the learner must get the same one, so it is
    passed whole: train.py has it as config.sampling."""

    temperature: float = 1.0  # 0 takes the most likely token


@dataclass
class Rollout:
    """B rows, prompt-major: row b answers prompt b // G. Padding is on the right.
    T, N: tokens of the longest row and of the longest response"""

    ids: Tensor  # (B, T) prompt, response, padding
    prompt_lengths: Tensor  # (B,) tokens
    lengths: Tensor  # (B,) tokens of prompt and response, the stop token included
    response_mask: Tensor  # (B, N) bool: tokens to train on, which the policy wrote; not padding
    old_logprobs: Tensor  # (B, N) float32, under the policy that sampled; 0 outside the mask
    finished: Tensor  # (B,) bool: ended by a stop token; False: truncated

    @property
    def response_lengths(self) -> Tensor:
        """(B,) tokens that the policy wrote"""
        return self.response_mask.sum(1)

    def rows(self, index) -> "Rollout":
        """A rollout of some of the rows."""
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def samples(self, problems, tokenizer, with_tokens=False) -> list[dict]:
        """A dict for each row: prompt, response, answer, length (tokens), finished, and if wanted
        tokens (the text of each)."""
        group_size = len(self.ids) // len(problems)
        rows = [problem for problem in problems for _ in range(group_size)]
        columns = rows, self.responses(tokenizer), self.response_lengths.tolist()
        samples = []
        for problem, response, length, finished in zip(*columns, self.finished.tolist()):
            sample = {"prompt": problem.prompt, "response": response, "answer": problem.answer}
            samples.append({**sample, "length": length, "finished": finished})
        if with_tokens:
            for sample, ids in zip(samples, self.response_ids()):
                sample["tokens"] = tokenizer.batch_decode([[token] for token in ids])
        return samples

    def response_ids(self) -> list[list[int]]:
        spans = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [ids[start:end] for ids, start, end in spans]

    def responses(self, tokenizer) -> list[str]:
        """The response of each row as text, for rewards and people. It is never tokenised again.
        UserError: the numbers of the policy are nan, so its tokens mean nothing"""
        if self.old_logprobs.isnan().any():
            raise UserError(
                "the model's log-probs are nan: its parameters are damaged, or --lr was too high"
            )
        return tokenizer.batch_decode(self.response_ids(), skip_special_tokens=True)


def join(rollouts) -> Rollout:
    """Concatenates rollouts, padded on the right to the longest."""
    columns = []
    for field in fields(rollouts[0]):
        parts = [getattr(rollout, field.name) for rollout in rollouts]
        width = max(part.shape[-1] for part in parts)
        if parts[0].dim() == 2:
            parts = [pad(part, (0, width - part.shape[1])) for part in parts]
        columns.append(torch.cat(parts))
    return type(rollouts[0])(*columns)


def policy_distribution(logits, sampling) -> Tensor:
    """(R, V) logits of the model -> (R, V) float32 logits of the distribution that is sampled from
    and learned.

    A cut such as top-p (docs/edits.md) goes here. Subtract a large number rather than set -inf, so
    that the entropy stays finite. On CUDA this becomes part of a CUDA graph: do not look at values
    (no .item(), no boolean index)."""
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    return logits


def sample_token(logits, uniforms, sampling) -> tuple[Tensor, Tensor]:
    """(R, V) logits, overwritten, (R,) float64 random numbers in [0, 1) -> (R,) tokens, (R,) their
    log-probs.

    Inverse transform sampling: the token is the first whose cumulative probability exceeds the
    random number. It is looked up among blocks of about sqrt(V) tokens and then within the block:
    a cumulative sum over V would be slow."""
    logits = policy_distribution(logits, sampling)
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]

    probs = torch.softmax(logits, -1, out=logits)  # in place: V may be large
    V = probs.shape[1]
    size = math.isqrt(V)  # tokens in a block; the last block has fewer, or none
    whole = V - V % size
    block_sums = probs[:, :whole].unflatten(1, (-1, size)).sum(-1)
    block_sums = torch.cat([block_sums, probs[:, whole:].sum(1, keepdim=True)], 1)
    block, uniforms = inverse_cdf(block_sums, uniforms)

    tokens = block[:, None] * size + torch.arange(size, device=block.device)  # (R, size)
    in_block = probs.gather(1, tokens.clamp(max=V - 1)).where(tokens < V, 0.0)
    offset, _ = inverse_cdf(in_block, uniforms)
    token = (block * size + offset).clamp(max=V - 1)  # beyond it only where probs are nan
    prob = probs.gather(1, token[:, None])[:, 0]
    return token, (prob / block_sums.sum(1)).log()


def inverse_cdf(weights, uniforms) -> tuple[Tensor, Tensor]:
    """(R, K) weights, (R,) in [0, 1) -> (R,) index of the weight in which the number falls, (R,)
    where within it, [0, 1)

    [[1, 0, 3]], [0.5] -> [2], [1/3]. A weight of 0 is never chosen."""
    # float64: in float32 a sum over a large V loses the rare tokens
    weights = weights.to(uniforms.dtype)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # below total, to which the product may round up
    target = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    # the part of the chosen weight that is below the target
    within = (target - cumulative.gather(1, index) + weight) / weight
    return index[:, 0], within[:, 0].clamp(0, 1 - 2**-53)


@torch.no_grad()
def generate(
    policy, prompts, group_size, max_new_tokens, stop, seeds,
    sampling=Sampling(), rows_at_once=None, buffers=None,
) -> Rollout:  # fmt: skip
    """Samples `group_size` responses to each of P prompts (token ids), one prompt at a time.

    stop:     ids of the tokens that end a response
    seeds:    (P,) a prompt's responses depend on its own seed, not on the other prompts
    rows_at_once: most responses sampled in parallel; None: no limit
    buffers:  for the fast form, which keeps its KV cache and CUDA graphs there between calls
    UserError: a prompt is empty, or too long for the model together with max_new_tokens
    """
    check_prompts(policy, prompts, max_new_tokens)
    rollouts = []
    for prompt, seed in zip(prompts, seeds):
        uniforms = uniform_numbers(seed, group_size, max_new_tokens, policy.device)
        for rows in uniforms.split(rows_at_once or group_size):
            rollouts.append(sample_rows(policy, prompt, rows, stop, sampling))
    return join(rollouts)


def sample_rows(policy, prompt, uniforms, stop, sampling) -> Rollout:
    """R responses to one prompt, with random numbers (R, max_new_tokens): all rows have the same
    length, so there is no attention mask. Right for every architecture; engine/generate.py has the
    fast form."""
    R, max_new_tokens = uniforms.shape
    ids = torch.tensor(prompt, device=policy.device).repeat(R, 1)
    stop_tokens = ids.new_tensor(stop)
    finished = torch.zeros(R, dtype=torch.bool, device=policy.device)
    logprobs, real = [], []
    new, cache = ids, None
    for n in range(max_new_tokens):
        output = policy(new, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        token, logprob = sample_token(output.logits[:, -1], uniforms[:, n], sampling)
        ids = torch.cat([ids, token[:, None]], 1)
        logprobs.append(logprob)
        real.append(~finished)  # what follows a stop token is padding
        finished = finished | torch.isin(token, stop_tokens)
        if finished.all():
            break
        new, cache = token[:, None], output[CACHE]

    real = torch.stack(real, 1)  # (R, N) tokens; the rest is padding
    mask = real  # without the tokens of a tool, if you add one
    logprobs = torch.stack(logprobs, 1).where(mask, 0.0)
    ids[:, len(prompt) :] *= real
    prompt_lengths = torch.full_like(ids[:, 0], len(prompt))
    return Rollout(ids, prompt_lengths, prompt_lengths + real.sum(1), mask, logprobs, finished)


def uniform_numbers(seed, rows, columns, device) -> Tensor:
    """(rows, columns) random numbers in [0, 1): the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    if device.type == "mps":  # it has no float64
        numbers = numbers.float()
    return numbers.to(device)


@dataclass(frozen=True)
class Config:
    samples: int = flag(4, "responses to the prompt")
    chat: bool = flag(False, "a conversation: read a line, print a response, and so on")
    temperature: float = flag(1.0, "0 takes the most likely token")
    max_new_tokens: int = flag(256, "tokens after which a response is truncated")
    seed: int = flag(0, "same seed, same responses")
    device: Literal[DEVICES] = flag("auto", "auto: the first of the others that is available")


def main(config, model, prompt=None) -> None:
    check_range(config, 1, "samples max_new_tokens", most=1e6)
    check_range(config, 0, "seed temperature")
    if prompt is None and not config.chat:
        raise UserError(
            f"{model}: is taken for the model, and a prompt is missing (or --chat): "
            'python sample.py MODEL "PROMPT"'
        )
    policy, tokenizer = load_policy(model, pick_device(config.device))
    room = context_length(policy) or 10**9
    stop = stop_ids(policy, tokenizer)

    def encode(prompt):
        return prompt_ids(NO_TASK, Problem(prompt, ""), tokenizer)

    def respond(prompt, samples):
        ids = encode(prompt)
        limit = max(1, min(config.max_new_tokens, room - len(ids)))
        sampling = Sampling(config.temperature)
        rollout = generate(policy, [ids], samples, limit, stop, [config.seed], sampling)
        return rollout.responses(tokenizer)

    if not config.chat:
        print("\n".join(respond(prompt, config.samples)))
        return
    turns = []  # the conversation; a model without a chat template sees only the line
    print("> ", end="", flush=True)
    for line in filter(str.strip, sys.stdin):
        turns.append({"role": "user", "content": line.strip()})
        prompt = turns if tokenizer.chat_template else line.strip()
        while len(turns) > 1 and 2 * len(encode(prompt)) > room:  # half of it is for the response
            del turns[:2]
        [text] = respond(prompt, 1)
        turns.append({"role": "assistant", "content": text})
        print(f"{text}\n> ", end="", flush=True)


if __name__ == "__main__":
    model = dict(help="model folder, run folder or Hugging Face name")
    prompt = dict(nargs="?", help="the text to respond to")
    run_script(main, Config, __doc__, model=model, prompt=prompt)
