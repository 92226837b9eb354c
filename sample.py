"""Samples several responses to each prompt from a policy.

    python sample.py models/add "48+27="                      # a model folder, a run, or a Hugging Face name
    python sample.py runs/add "48+27=" --samples 8 --temperature 0.7

`generate` is what train.py and eval.py call.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.hf_argparser import HfArg

from flags import UserError, run_script
from policy import context_length, load_policy, pick_device, stop_ids
from tasks import Problem, Task, prompt_ids


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
    model: PreTrainedModel,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    stop: list[int],
    seeds: list[int],
    temperature: float = 1.0,
) -> Rollout:
    """Samples `group_size` responses to each of P prompts (token ids). temperature 0 takes the likeliest token.

    stop:  the token ids that end a response
    seeds: (P,) a prompt's draws depend on its own seed alone, so its responses are the same in any company
    UserError: a prompt is empty, or leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, prompts, max_new_tokens)
    device, group = model.device, torch.arange(len(prompts)).repeat_interleave(group_size)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest, B, N = int(prompt_lengths.max()), len(group), max_new_tokens
    prompt_table = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(prompt_table, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    draws = torch.cat([torch.rand(group_size, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                       for seed in seeds]).to(device)

    # One prefill per prompt, without its last token: that one is fed by the first decode step, so that every token is
    # drawn in one place. The keys and values of a prompt are then repeated for the rows of its group.
    cache = DynamicCache()
    if longest > 1:
        model(prompt_table[:, :-1].to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(group_size)

    prompt_lengths = prompt_lengths.to(device)[group]  # (B,)
    ids = torch.cat([prompt_table[group], torch.zeros(B, N, dtype=torch.long)], 1).to(device)
    logprobs = torch.zeros(B, N, device=device)
    lengths, finished = prompt_lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)
    key_positions = cache_positions(prompt_lengths, longest, N)
    stop = torch.tensor(stop, device=device)
    rows = torch.arange(B, device=device)  # the rows still being decoded
    for n in range(N):
        positions = prompt_lengths[rows] - 1 + n
        logits = model(
            ids[rows, positions, None],
            position_ids=positions[:, None],
            attention_mask=attention_masks(model, key_positions[rows, : longest + n], positions),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        token, logprob = draw(logits.float(), temperature, draws[rows, n])
        going = ~finished[rows]
        ids[rows, positions + 1] = torch.where(going, token, 0)
        logprobs[rows, n] = torch.where(going, logprob, 0.0)
        lengths[rows] += going
        finished[rows] |= torch.isin(token, stop)
        left = (~finished[rows]).nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) <= 0.75 * len(rows):  # dropping rows copies the cache, so not at every step
            rows = rows[left]
            cache.batch_select_indices(left)
    T = int(lengths.max())
    return Rollout(ids[:, :T], prompt_lengths, lengths, logprobs[:, : int((lengths - prompt_lengths).max())], finished)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V) float32 logits, (R,) float64 numbers in [0, 1) -> (R,) tokens, (R,) their log-probs.

    Inverse transform sampling: one random number a row picks the first token whose cumulative probability exceeds it.
    Nothing is cut (no top-k, no top-p): a cut distribution is another policy than the one that learns.
    """
    scaled = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cumulative = scaled.double().exp().cumsum(-1)  # float64: in float32 the sum over a large V loses rare tokens
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
        token.clamp_(max=logits.shape[1] - 1)
    return token, scaled.gather(1, token[:, None])[:, 0]


def cache_positions(prompt_lengths: Tensor, longest: int, N: int) -> Tensor:
    """(B, longest - 1 + N): the position of each cached key in its own row, and -1 for padding.

    The cache has the prompts (without their last token) on the left, then a column for each decode step. For prompts
    of 3 and 1 tokens and N = 2:  [[0, 1, 2, 3], [-1, -1, 0, 1]]
    """
    column = torch.arange(longest - 1 + N, device=prompt_lengths.device)
    last = prompt_lengths[:, None] - 1
    prompt = torch.where(column < last, column, -1)
    return torch.where(column < longest - 1, prompt, last + column - (longest - 1))


def attention_masks(model: PreTrainedModel, key_positions: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """(R, C) positions of the keys, (R,) of the queries -> additive mask (R, 1, 1, C): 0 where it may look.

    Models that mix kinds of layers take one mask for each kind; a sliding window counts positions, not columns.
    """
    config = model.config.get_text_config()
    seen = key_positions >= 0
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (positions[:, None] - key_positions < window)
    lowest = torch.finfo(model.dtype).min
    full, sliding = (torch.where(mask, 0.0, lowest).to(model.dtype)[:, None, None] for mask in (seen, near))
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def check_room(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """UserError unless every prompt has a token and fits into the model's context together with its response."""
    room, longest = context_length(model), max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty: the model needs at least one token to go on from")
    if room is not None and longest + max_new_tokens > room:
        raise UserError(f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens} do not fit into the "
                        f"model's context of {room}: lower the flag, or leave that prompt out")


@dataclass(frozen=True)
class Config:
    samples: int = HfArg(default=4, help="responses to sample")
    temperature: float = HfArg(default=1.0, help="0 takes the likeliest token, 1 samples from the model as it is")
    max_new_tokens: int = HfArg(default=256, help="tokens after which a response is cut")
    seed: int = HfArg(default=0, help="same seed, same responses")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")


def main(config: Config, model: str, prompt: str) -> None:
    policy, tokenizer = load_policy(model, pick_device(config.device))
    ids = prompt_ids(Task("", [], [], [], ""), Problem(prompt, ""), tokenizer)
    room = (context_length(policy) or len(ids) + config.max_new_tokens) - len(ids)
    limit = max(1, min(config.max_new_tokens, room))
    rollout = generate(policy, [ids], config.samples, limit, stop_ids(policy, tokenizer), [config.seed],
                       config.temperature)
    for text, finished in zip(rollout.responses(tokenizer), rollout.finished.tolist()):
        print(text if finished else f"{text} [cut at {limit} tokens]")


if __name__ == "__main__":
    run_script(main, Config, __doc__, model=dict(help="model folder, run folder or Hugging Face name"),
               prompt=dict(help="the text to respond to"))
