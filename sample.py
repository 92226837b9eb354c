"""Samples several responses to each prompt from a policy.

    python sample.py models/add "48+27="                      # a model folder, a run, or a Hugging Face name
    python sample.py runs/add "48+27=" --samples 8 --temperature 0.7
    python sample.py runs/add                                 # held-out prompts of a run, before and after training
    python sample.py runs/add --watch                         # the newest samples of a run, while it trains
    python sample.py Qwen/Qwen2.5-0.5B-Instruct --chat        # a conversation

`generate` is what train.py and eval.py call.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

import screen
from decode import Decoding, one_query_attention
from flags import UserError, need, run_script
from policy import context_length, load_policy, pick_device, response_logprobs, stop_ids
from tasks import PLAIN, Problem, Task, prompt_ids

CHECK_EVERY = {"cuda": 16, "mps": 16, "cpu": 1}  # decode steps between looks at which rows have ended
WIDTH = {"cuda": 64, "mps": 64, "cpu": 16}  # attention looks at a multiple of so many columns


@dataclass
class Rollout:
    """B = P * G rows, prompt-major: row b answers prompt b // G. Padding stands on the right."""

    ids: Tensor  # (B, T) prompt, response, padding
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor  # (B,) prompt and response, the stop token included
    logprobs: Tensor  # (B, N) float32, of each sampled token under what it was sampled from; 0 past the end
    finished: Tensor  # (B,) bool: ended by itself; False where it was cut at the limit

    @property
    def response_lengths(self) -> Tensor:
        return self.lengths - self.prompt_lengths

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) row indices -> their ids (R, longest), prompt lengths (R,) and lengths (R,)"""
        index = index.to(self.ids.device)
        lengths = self.lengths[index]
        return self.ids[index, : int(lengths.max())], self.prompt_lengths[index], lengths

    def responses(self, tokenizer) -> list[str]:
        """The response of each row as text, for rewards and people. Never tokenised again."""
        spans = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return tokenizer.batch_decode([ids[start:end] for ids, start, end in spans], skip_special_tokens=True)


def join(rollouts: list[Rollout]) -> Rollout:
    """One below the other, padded on the right to the longest."""
    def column(name: str) -> Tensor:
        parts = [getattr(rollout, name) for rollout in rollouts]
        width = max(part.shape[-1] for part in parts)
        return torch.cat([part if part.dim() == 1 else pad(part, (0, width - part.shape[1])) for part in parts])

    return Rollout(*(column(field.name) for field in fields(Rollout)))


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int, stop: list[int],
    seeds: list[int], temperature: float = 1.0, max_rows: int = 1 << 30, kept: dict | None = None,
) -> Rollout:
    """Samples `group_size` responses to each of P prompts (token ids). temperature 0 takes the likeliest token.

    stop:     the token ids that end a response
    seeds:    (P,) a prompt's draws depend on its own seed alone, so its responses are the same in any company
    max_rows: rows decoded at once; the others wait for one to end, so a rollout may be larger than the memory
    kept:     a dict of the caller's: on CUDA, buffers and recorded steps wait in it for the next call of the same size
    UserError: a prompt is empty, or leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, prompts, max_new_tokens)
    B, N, kind = len(prompts) * group_size, max_new_tokens, model.device.type
    width, every, kept = WIDTH[kind], CHECK_EVERY[kind], {} if kept is None else kept
    columns, used = -(-(max(map(len, prompts)) + N) // width) * width, min(B, max_rows)
    key = B, used, N, temperature, *(weight.data_ptr() for weight in model.parameters())  # recorded steps read there
    if key not in kept or kept[key].slots.columns < columns:
        kept.clear()
        kept[key] = Decoding(model, B, used, columns, N)
    work: Decoding = kept[key]
    own = [torch.Generator().manual_seed(seed) for seed in seeds]
    work.begin(model, prompts, group_size, stop, torch.cat([
        torch.rand(group_size, N, dtype=torch.float64, generator=generator) for generator in own]))
    unit = max(1, used // 8) if kind == "cuda" else 1  # few numbers of slots, few graphs
    waiting = filled = 0  # waiting: the first row that has not begun; filled: columns that attention looks at
    with one_query_attention(model):
        for step in itertools.count():
            if step % every == 0:  # looking at what has ended makes a GPU wait
                rows, began = work.rows[:used], waiting
                free = (rows == B).nonzero()[:, 0]
                waiting = min(B, waiting + len(free))
                rows[free[: waiting - began]] = torch.arange(began, waiting, device=rows.device)
                working = used - len(free) + waiting - began
                if working == 0:
                    break
                size, needed, left = (used, filled), -(-working // unit) * unit, slice(None)
                if needed <= used * 3 / 4:  # dropping slots copies the cache, so not for each that is free
                    left, used = (rows == B).to(torch.uint8).argsort(stable=True)[:needed], needed
                    rows = work.rows[:used] = rows[left]
                reach = int(work.lengths[rows].max()) + every
                filled = min(-(-reach // width) * width, columns)
                if (used, filled) != size:
                    work.slots.move(left, filled)
                if waiting > began:
                    new = ((rows >= began) & (rows < B)).nonzero()[:, 0]
                    work.slots.admit(new, rows[new] // group_size)
            work.steps((used, filled), partial(work.step, model, used, filled, temperature))
    lengths, prompt_lengths = work.lengths[:B], work.prompt_lengths[:B]
    longest = int((lengths - prompt_lengths).max())
    if not work.slots.fixed:
        kept.clear()  # nothing is replayed from there: the memory is the update's until then
    return Rollout(work.ids[:B, : int(lengths.max())].clone(), prompt_lengths.clone(), lengths.clone(),
                   work.logprobs[:B, :longest].clone(), work.finished[:B].clone())


@torch.no_grad()
def generate_by_transformers(
    model: PreTrainedModel, prompts: list[list[int]], group_size: int, max_new_tokens: int, stop: list[int],
    seeds: list[int], temperature: float = 1.0, max_rows: int = 1 << 30, kept: dict | None = None,
) -> Rollout:
    """`generate` by transformers' own method: slower, and right for every architecture. Prompts of one length at a
    time, for padding is what some do not stand; so a prompt's responses depend on its company."""
    check_room(model, prompts, max_new_tokens)
    rollouts, order = [], sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    for length, members in itertools.groupby(order, key=lambda p: len(prompts[p])):
        members, count = list(members), max(1, max_rows // group_size)
        for batch in (members[start : start + count] for start in range(0, len(members), count)):
            table = torch.tensor([prompts[p] for p in batch], device=model.device).repeat_interleave(group_size, 0)
            with torch.random.fork_rng():
                torch.manual_seed(seeds[batch[0]])
                ids = model.generate(table, attention_mask=torch.ones_like(table), max_new_tokens=max_new_tokens,
                                     eos_token_id=stop or None, pad_token_id=0, **how)
            ends = torch.isin(ids[:, length:], torch.tensor(stop, device=ids.device, dtype=ids.dtype))
            ended = ends.cumsum(1) - ends.long() > 0  # past the first stop token
            lengths = length + (~ended).sum(1)
            ids[:, length:].masked_fill_(ended, 0)
            starts = torch.full_like(lengths, length)
            logprobs = response_logprobs(model, ids, starts, lengths, temperature or 1.0)
            rollouts.append(Rollout(ids, starts, lengths, logprobs, ends.any(1)))
    rows = torch.tensor([p * group_size + g for p in order for g in range(group_size)]).argsort()
    joined = join(rollouts)
    return Rollout(*(getattr(joined, field.name)[rows] for field in fields(Rollout)))


def choose_sampler(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stop: list[int], name: str = "fast"
) -> Callable:
    """`generate` where its log-probs of a response to each prompt are those of a plain forward pass; else, with a line
    that says so, `generate_by_transformers`. (An architecture may have state that Slots does not hold, or attend in a
    way of its own.) That one too where `name` asks for it: 'generate'."""
    if name == "generate":
        return generate_by_transformers
    try:
        rollout = generate(model, prompts, 1, min(64, max_new_tokens), stop, list(range(len(prompts))))
        with torch.no_grad():
            plain = response_logprobs(model, rollout.ids, rollout.prompt_lengths, rollout.lengths)
        gap = ((rollout.logprobs - plain).abs().sum() / rollout.response_lengths.sum()).item()
        problem = f"log-probs are off by {gap:.2g} on average"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        gap, problem = float("inf"), f"{type(error).__name__}: {error}".splitlines()[0]
    if not gap > (1e-3 if model.dtype == torch.float32 else 0.1):  # nan is no reason: it is the model's own
        return generate
    tqdm.write(f"the fast sampler does not fit {type(model).__name__} ({problem}): model.generate samples instead")
    return generate_by_transformers


def check_room(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """UserError unless every prompt has a token and fits into the model's context together with its response."""
    room, longest = context_length(model), max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty: the model needs at least one token to go on from")
    if (highest := max(map(max, prompts))) >= (known := model.get_input_embeddings().num_embeddings):
        raise UserError(f"a prompt has token {highest}, but the model knows {known}: its tokenizer is another model's")
    if room is not None and longest + max_new_tokens > room:
        raise UserError(f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens} do not fit into the "
                        f"model's context of {room}: lower the flag, or leave that prompt out")


@dataclass(frozen=True)
class Config:
    samples: int = HfArg(default=4, help="responses to sample to a prompt")
    prompts: int = HfArg(default=3, help="without PROMPT: how many of a run's held-out prompts to show")
    chat: bool = HfArg(default=False, help="a conversation: a line in, a response out (without a chat template, each "
                       "line stands alone)")
    watch: bool = HfArg(default=False, help="the newest samples of a run, while it trains")
    temperature: float = HfArg(default=1.0, help="0 takes the likeliest token, 1 samples from the model as it is")
    max_new_tokens: int = HfArg(default=256, help="tokens after which a response is cut")
    seed: int = HfArg(default=0, help="same seed, same responses")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")


def main(config: Config, model: str, prompt: str | None = None) -> None:
    need(config, 1, "samples prompts max_new_tokens", most=1e6)
    need(config, 0, "seed")
    need(config, 1e-4 if config.temperature else 0, "temperature")
    if config.watch:
        return screen.watch(Path(model))
    device = pick_device(config.device)

    def respond(policy, tokenizer, task: Task, prompt: str | list, samples: int, number: int) -> list[tuple]:
        """Responses to a prompt, as long as the model has room for, each with a note on its end."""
        ids = prompt_ids(task, Problem(prompt, ""), tokenizer)
        room = (context_length(policy) or len(ids) + config.max_new_tokens) - len(ids)
        limit = max(1, min(config.max_new_tokens, room))
        stop = stop_ids(policy, tokenizer)
        sampler = choose_sampler(policy, [ids], min(16, limit), stop)
        rollout = sampler(policy, [ids], samples, limit, stop, [config.seed + number], config.temperature)
        ends = ["" if finished else f" [cut at {limit} tokens]" for finished in rollout.finished.tolist()]
        return list(zip(rollout.responses(tokenizer), ends))

    if config.chat:
        screen.chat(*load_policy(model, device), respond)
    elif prompt is None:
        screen.before_and_after(Path(model), config.prompts, config.samples, device, respond)
    else:
        print("\n".join(map("".join, respond(*load_policy(model, device), PLAIN, prompt, config.samples, 0))))


if __name__ == "__main__":
    run_script(main, Config, __doc__, model=dict(help="model folder, run folder or Hugging Face name"),
               prompt=dict(nargs="?", help="the text to respond to; without it a run is shown beside its base model"))
