"""Samples several responses to each prompt from a policy.

    python sample.py runs/add "48+27=" --samples 8      # a run, a folder or a model's name
    python sample.py Qwen/Qwen2.5-0.5B-Instruct --chat  # a conversation

`generate` is the sampler in its plain form. train.py and eval.py mostly use engine/generate.py,
which samples the same tokens (except for rounding) faster. Both call `policy_distribution` and
`sample_token`: a change there is a change of both.
"""

import math
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lib.checks import CACHE, check_prompts, context_length
from lib.flags import UserError, check_range, flag, run_script
from lib.prompts import shared_prompting
from lib.run import is_run, read_config
from lib.texts import response_text, token_texts
from policy import DEVICES, load_policy, pick_device, stop_ids
from tasks import NO_TASK, Problem, load_task, prompt_ids


@dataclass(frozen=True)
class Sampling:
    """What decides the distribution. The sampler and the learner must get the same one, so it is
    passed whole: train.py has it as config.sampling."""

    temperature: float = 1.0  # 0 takes the most likely token
    stop: str = ""  # more tokens that end a response: --stop


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

    @classmethod
    def from_lists(cls, prompts, responses, logprobs, finished, written=None) -> "Rollout":
        """A rollout of B rows, from whoever sampled them.

        prompts, responses: B lists of token ids
        logprobs: a number for each token of a response, under the policy that sampled it
        finished: B times whether the last token is a stop token
        written:  whether the policy wrote each token of a response; None: all
        """
        rows = [torch.tensor([*prompt, *ids]) for prompt, ids in zip(prompts, responses)]
        written = written or [[True] * len(ids) for ids in responses]
        mask = pad_sequence([torch.tensor(each) for each in written], batch_first=True)
        old_logprobs = pad_sequence([torch.tensor(each) for each in logprobs], batch_first=True)
        return cls(
            pad_sequence(rows, batch_first=True),
            torch.tensor([len(prompt) for prompt in prompts]),
            torch.tensor([len(row) for row in rows]),
            mask,
            old_logprobs.float().where(mask, 0.0),
            torch.tensor(finished),
        )

    def to(self, device) -> "Rollout":
        return type(self)(*(column.to(device) for column in vars(self).values()))

    @property
    def response_lengths(self) -> Tensor:
        """(B,) tokens that the policy wrote"""
        return self.response_mask.sum(1)

    def rows(self, index) -> "Rollout":
        """A rollout of some of the rows."""
        return type(self)(*(column[index] for column in vars(self).values()))

    def samples(self, problems, tokenizer, with_tokens=False) -> list[dict]:
        """A dict for each row: prompt, response, answer, length (tokens), finished, columns (what
        else the problem has), and if wanted tokens (the text of each)."""
        group_size = len(self.ids) // len(problems)
        rows = [problem for problem in problems for _ in range(group_size)]
        columns = rows, self.responses(tokenizer), self.response_lengths.tolist()
        samples = []
        for problem, response, length, finished in zip(*columns, self.finished.tolist()):
            sample = {"prompt": problem.prompt, "response": response, "answer": problem.answer}
            sample |= {"length": length, "finished": finished}
            if problem.columns:
                sample["columns"] = problem.columns
            samples.append(sample)
        if with_tokens:
            for sample, parts in zip(samples, self.parts()):
                sample["tokens"] = token_texts(tokenizer, *parts)
        return samples

    def response_ids(self) -> list[list[int]]:
        return [response for _, response, _ in self.parts()]

    def parts(self) -> list[tuple[list[int], list[int], bool]]:
        """The prompt and the response of each row, as ids, and whether it ended by a stop token."""
        ends = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), self.finished.tolist())
        rows = zip(self.ids.tolist(), ends)
        return [(ids[:start], ids[start:end], finished) for ids, (start, end, finished) in rows]

    def responses(self, tokenizer) -> list[str]:
        """The response of each row as text, for rewards and people. It is never tokenised again.
        UserError: the numbers of the policy are nan, so its tokens mean nothing"""
        if self.old_logprobs.isnan().any():
            raise UserError(
                "the model's log-probs are nan: its parameters are damaged, or --lr was too high"
            )
        return [response_text(tokenizer, *parts) for parts in self.parts()]


def sampling_of(flags) -> Sampling:
    """How a run samples, by its flags; one that is older than a field of Sampling does not have
    it."""
    known = {field.name for field in fields(Sampling)} & flags.keys()
    return Sampling(**{name: flags[name] for name in known})


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


# A function of yours that writes tokens in the place of the policy: the result of a tool, the other
# side of a conversation, the beginning of a response. It is called before the first token of each
# response, and after each token that the policy writes:
#
#     def interject(response, finished, tokenizer, sampling) -> list of token ids, mostly []
#
# response: the ids so far; finished: the last of them is a stop token. If it returns some, the
# response continues after them. They are in the row, and out of response_mask.
interject = None


def interjection(tokenizer, sampling):
    """`interject` as `generate` wants it, or None."""
    return interject and partial(interject, tokenizer=tokenizer, sampling=sampling)


@torch.no_grad()
def generate(
    policy, prompts, group_size, max_new_tokens, stop, seeds,
    sampling=Sampling(), rows_at_once=None, buffers=None, interject=None, report=None,
) -> Rollout:  # fmt: skip
    """Samples `group_size` responses to each of P prompts (token ids), one prompt at a time.

    stop:     ids of the tokens that end a response
    seeds:    (P,) a prompt's responses depend on its own seed, not on the other prompts
    rows_at_once: most responses sampled in parallel; None: no limit
    buffers:  for the fast form, which keeps its KV cache and CUDA graphs there between calls
    report:   is called with the number of new tokens now and then
    UserError: a prompt is empty, or too long for the model together with max_new_tokens
    """
    check_prompts(policy, prompts, max_new_tokens)
    rollouts = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        uniforms = uniform_numbers(seed, group_size, max_new_tokens, policy.device)
        for numbers in uniforms.split(rows_at_once or group_size):
            rollouts.append(sample_rows(policy, prompt, numbers, stop, sampling, interject))
            if report:
                report(int(rollouts[-1].response_lengths.sum()))
    return join(rollouts)


def sample_rows(policy, prompt, uniforms, stop, sampling, interject=None) -> Rollout:
    """R responses to one prompt, with random numbers (R, max_new_tokens): all rows have the same
    length, so there is no attention mask. Right for every architecture; engine/generate.py has the
    fast form."""
    R, max_new_tokens = uniforms.shape
    responses, logprobs, written = ([[] for _ in range(R)] for _ in range(3))
    # tokens to come that something other than the policy writes
    forced = [interject([], False) if interject else [] for _ in range(R)]
    finished = [False] * R
    new, cache = torch.tensor([prompt] * R, device=policy.device), None
    for n in range(max_new_tokens):
        output = policy(new, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        tokens, token_logprobs = sample_token(output.logits[:, -1], uniforms[:, n], sampling)
        tokens, token_logprobs = tokens.tolist(), token_logprobs.tolist()
        for r in range(R):
            if finished[r]:
                continue  # what follows a stop token is padding
            by_policy = not forced[r]
            if forced[r]:
                tokens[r] = forced[r].pop(0)
            responses[r].append(tokens[r])
            logprobs[r].append(token_logprobs[r])
            written[r].append(by_policy)
            if by_policy:
                finished[r] = tokens[r] in stop
                if interject:
                    forced[r] = interject(responses[r], finished[r])
                    finished[r] = finished[r] and not forced[r]
        if all(finished):
            break
        new, cache = torch.tensor(tokens, device=policy.device)[:, None], output[CACHE]
    rollout = Rollout.from_lists([prompt] * R, responses, logprobs, finished, written)
    return rollout.to(policy.device)


def sample_and_score(
    problems, seeds, group_size, max_new_tokens, sampling, task, tokenizer, sampler, rewards
) -> tuple[Rollout, list[dict]]:
    """`group_size` responses to each problem, in the order of the problems, and the same as dicts
    with their rewards: see `Rollout.samples` and reward.Rewards. For training and evaluation.

    sampler: see engine/sampler.py
    """
    prompts = [prompt_ids(task, problem, tokenizer) for problem in problems]
    rollout = sampler(prompts, group_size, max_new_tokens, seeds, sampling)
    samples = rollout.samples(problems, tokenizer, rewards.wants_tokens)
    return rollout, rewards.score(samples, max_new_tokens, group_size)


def uniform_numbers(seed, rows, columns, device) -> Tensor:
    """(rows, columns) random numbers in [0, 1): the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    return numbers.to(float64(device)).to(device)


def float64(device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


@dataclass(frozen=True)
class Config:
    samples: int = flag(4, "responses to the prompt")
    chat: bool = flag(False, "a conversation: read a line, print a response, and so on")
    temperature: float = flag(-1.0, "0 takes the most likely token; default: the run's, or 1")
    max_new_tokens: int = flag(256, "tokens after which a response is truncated")
    stop: str = flag("", "more tokens that end a response, such as <|im_end|>")
    seed: int = flag(0, "same seed, same responses")
    device: Literal[DEVICES] = flag("auto", "auto: the first of the others that is available")


def main(config, model, prompt=None) -> None:
    check_range(config, 1, "samples max_new_tokens", most=1e6)
    check_range(config, 0, "seed")
    check_range(config, -1, "temperature")
    if prompt is None and not config.chat:
        raise UserError(
            f"{model}: is taken for the model, and a prompt is missing (or --chat): "
            'python sample.py MODEL "PROMPT"'
        )
    task, sampling, columns = NO_TASK, Sampling(), {}
    if is_run(Path(model)):  # asks as in training: the task's instruction, the run's sampling
        flags = read_config(Path(model))
        task = load_task(flags["task"], flags["data_dir"])
        system, columns = shared_prompting(task.train, task.system)
        task = replace(task, system=system)
        sampling = sampling_of(flags)
    if config.temperature >= 0:
        sampling = replace(sampling, temperature=config.temperature)
    policy, tokenizer = load_policy(model, pick_device(config.device))
    room = context_length(policy) or 10**9
    if config.stop:
        sampling = replace(sampling, stop=config.stop)
    stop = stop_ids(policy, tokenizer, sampling.stop)

    def encode(prompt):
        return prompt_ids(task, Problem(prompt, "", columns=columns), tokenizer)

    def respond(prompt, samples):
        ids = encode(prompt)
        limit = max(1, min(config.max_new_tokens, room - len(ids)))
        write = interjection(tokenizer, sampling)
        rollout = generate(
            policy, [ids], samples, limit, stop, [config.seed], sampling, interject=write
        )
        return rollout.responses(tokenizer)

    if not config.chat:
        print("\n".join(respond(prompt, config.samples)))
        return
    system = [{"role": "system", "content": task.system}] if task.system else []
    turns = []  # the conversation; a model without a chat template sees only the line
    print("> ", end="", flush=True)
    for line in filter(str.strip, sys.stdin):
        turns.append({"role": "user", "content": line.strip()})
        prompt = [*system, *turns] if tokenizer.chat_template else line.strip()
        while len(turns) > 1 and 2 * len(encode(prompt)) > room:  # half of it is for the response
            del turns[:2]
        [text] = respond(prompt, 1)
        turns.append({"role": "assistant", "content": text})
        print(f"{text}\n> ", end="", flush=True)


if __name__ == "__main__":
    model = dict(help="model folder, run folder or Hugging Face name")
    prompt = dict(nargs="?", help="the text to respond to")
    run_script(main, Config, __doc__, model=model, prompt=prompt)
