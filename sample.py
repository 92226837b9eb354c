"""Samples several responses to each prompt from a policy.

    python sample.py models/add "48+27="                      # a model folder, a run, or a Hugging Face name
    python sample.py runs/add "48+27=" --samples 8 --temperature 0.7

`generate` is what train.py and eval.py call.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.hf_argparser import HfArg

from flags import UserError, need, run_script
from policy import context_length, load_policy, pick_device, stop_ids
from tasks import Problem, Task, prompt_ids

CHECK_EVERY = {"cuda": 16, "mps": 16, "cpu": 1}  # decode steps between looks at which rows have ended
WIDTH = {"cuda": 64, "mps": 64, "cpu": 8}  # attention looks at a multiple of so many columns
BLOCK = 256  # tokens summed up at once when one is drawn


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
    seeds: list[int], temperature: float = 1.0, max_rows: int = 1 << 30,
) -> Rollout:
    """Samples `group_size` responses to each of P prompts (token ids). temperature 0 takes the likeliest token.

    stop:     the token ids that end a response
    seeds:    (P,) a prompt's draws depend on its own seed alone, so its responses are the same in any company
    max_rows: rows decoded at once; the others wait for one to end, so a rollout may be larger than the memory
    UserError: a prompt is empty, or leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, prompts, max_new_tokens)
    device, P, B, N = model.device, len(prompts), len(prompts) * group_size, max_new_tokens
    table = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    # Everything has a row B that is nobody's: slots without a row to work on read and write there.
    prompt_of = torch.cat([torch.arange(P).repeat_interleave(group_size), torch.zeros(1, dtype=torch.long)]).to(device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[prompt_of]
    ids = torch.cat([table[prompt_of], table.new_zeros(B + 1, N)], 1)
    lengths, finished = prompt_lengths.clone(), torch.zeros(B + 1, dtype=torch.bool, device=device)
    logprobs, stop = torch.zeros(B + 1, N, device=device), torch.tensor(stop, device=device)
    draws = torch.cat([torch.rand(group_size, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                       for seed in seeds] + [torch.zeros(1, N, dtype=torch.float64)])
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)  # mps has no float64

    # One prefill per prompt, without its last token: that one is fed by the first decode step, so that every token is
    # drawn in one place. (A prompt of one token is run as it is; its first step writes the same key again.)
    cache = DynamicCache()
    model(table[:, : max(1, table.shape[1] - 1)], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = torch.full((min(B, max_rows),), B, device=device)  # (R,) the row that each slot works on
    cache, waiting = Slots(cache, len(rows), table.shape[1] + N), 0  # waiting: the first row that has not begun
    for step in itertools.count():
        if step % CHECK_EVERY[device.type] == 0:  # looking at what has ended makes a GPU wait
            free = (rows == B).nonzero()[:, 0]
            begin = torch.arange(waiting, min(B, waiting + len(free)), device=device)
            rows[free[: len(begin)]] = begin
            cache.admit(free[: len(begin)], prompt_of[begin])
            waiting += len(begin)
            if len(free) - len(begin) >= len(rows) / 4:  # dropping slots copies the cache, so not for each that is free
                left = (rows < B).nonzero()[:, 0]
                rows = rows[left]
                cache.keep(left)
            if len(rows) == 0:
                break
            reach = int(lengths[rows].max()) + CHECK_EVERY[device.type]
            width = WIDTH[device.type]
            filled = min(-(-reach // width) * width, table.shape[1] + N)  # columns that attention looks at
        positions, n = lengths[rows] - 1, lengths[rows] - prompt_lengths[rows]
        logits = model(ids[rows, positions, None], position_ids=positions[:, None], use_cache=True,
                       attention_mask=attention_masks(model, positions, filled),
                       past_key_values=cache.at(positions, filled)).logits[:, -1]
        token, logprobs[rows, n] = draw(logits.float(), temperature, draws[rows, n])
        ids[rows, positions + 1] = token
        lengths[rows] += 1
        finished[rows] = torch.isin(token, stop)
        rows = torch.where(finished[rows] | (n + 1 == N), B, rows)
        lengths[B] = prompt_lengths[B]
    longest = int((lengths - prompt_lengths).max())
    return Rollout(ids[:B, : int(lengths.max())], prompt_lengths[:B], lengths[:B], logprobs[:B, :longest], finished[:B])


class Slots(Cache):
    """Keys and values of the rows being decoded: two tensors (R, heads, columns, head size) a layer, written in place.
    Column c holds a row's token at position c, so that a row's numbers do not depend on its neighbours."""

    def __init__(self, prompts: DynamicCache, rows: int, columns: int):
        super().__init__(layers=[])
        self.prompts = [(layer.keys, layer.values) for layer in prompts.layers]
        self.stores = [[part.new_zeros(rows, part.shape[1], columns, part.shape[3]) for part in layer]
                       for layer in self.prompts]

    def admit(self, slots: Tensor, prompts: Tensor) -> None:
        """Copies the keys and values of `prompts` (indices) into `slots` (indices)."""
        for store, prompt in zip(itertools.chain(*self.stores), itertools.chain(*self.prompts)):
            store[slots, :, : prompt.shape[2]] = prompt[prompts]

    def keep(self, slots: Tensor) -> None:
        """Drops the other slots. Only the columns in use are copied."""
        for layer in self.stores:
            for i, store in enumerate(layer):
                layer[i] = store.new_zeros(len(slots), *store.shape[1:])
                layer[i][:, :, : self.filled] = store[slots, :, : self.filled]

    def at(self, positions: Tensor, filled: int) -> "Slots":
        """The next token of each row goes to its position, (R,); the first `filled` columns are looked at."""
        self.rows = torch.arange(len(positions), device=positions.device)
        self.positions, self.filled = positions, filled
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> list[Tensor]:
        """Called by each attention layer with the newest keys and values, (R, heads, 1, head size)."""
        for store, new in zip(self.stores[layer], (keys, values)):
            store[self.rows, :, self.positions] = new[:, :, 0]
        return [store[:, :, : self.filled] for store in self.stores[layer]]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.filled - 1


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V) float32 logits, written over, and (R,) float64 numbers in [0, 1) -> (R,) tokens, (R,) their log-probs.

    Inverse transform sampling: one random number a row picks the first token whose cumulative probability exceeds it,
    first among blocks of BLOCK tokens, then within the block, so that nothing of size V is summed up step by step.
    Nothing is cut (no top-k, no top-p): a cut distribution is another policy than the one that learns.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    V = logits.shape[1]
    weights = logits.div_(temperature).sub_(logits.amax(-1, keepdim=True)).exp_()  # in place: V may be large
    whole = V - V % BLOCK
    sums = torch.cat([weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), weights[:, whole:].sum(-1, True)], 1)
    block, fraction = pick(sums, uniform)  # (R,) among V / BLOCK sums, and where within the block
    members = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = torch.where(members < V, weights.gather(1, members.clamp(max=V - 1)), 0.0)
    token = (block * BLOCK + pick(inside, fraction)[0]).clamp_(max=V - 1)  # beyond it only where weights are nan
    return token, (weights.gather(1, token[:, None])[:, 0] / sums.sum(-1)).log()


def pick(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) weights, (R,) in [0, 1) -> (R,) index of the weight that the number falls on, (R,) where within it, [0, 1)

    [[1, 0, 3]], [0.5] -> [2], [1/3]. A weight of 0 is never picked.
    """
    weights = weights.to(uniform.dtype)  # float64: in float32 a sum over a large V loses the rare tokens
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    aim = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # rounding may reach total
    index = torch.searchsorted(cumulative, aim, right=True).clamp_(max=weights.shape[1] - 1)
    width = weights.gather(1, index)
    return index[:, 0], ((aim - cumulative.gather(1, index) + width) / width)[:, 0].clamp_(0, 1 - 2**-53)


def attention_masks(model: PreTrainedModel, positions: Tensor, columns: int) -> Tensor | dict[str, Tensor]:
    """(R,) positions of the newest tokens -> additive mask (R, 1, 1, columns): 0 where they may look.

    Models that mix kinds of layers take one mask for each kind.
    """
    config = model.config.get_text_config()
    behind = positions[:, None] - torch.arange(columns, device=positions.device)
    window, lowest = getattr(config, "sliding_window", None), torch.finfo(model.dtype).min
    full = torch.where(behind >= 0, 0.0, lowest).to(model.dtype)[:, None, None]
    sliding = full if window is None else full.masked_fill((behind >= window)[:, None, None], lowest)
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


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
    samples: int = HfArg(default=4, help="responses to sample")
    temperature: float = HfArg(default=1.0, help="0 takes the likeliest token, 1 samples from the model as it is")
    max_new_tokens: int = HfArg(default=256, help="tokens after which a response is cut")
    seed: int = HfArg(default=0, help="same seed, same responses")
    device: Literal["auto", "cuda", "mps", "cpu"] = HfArg(default="auto", help="auto: the first of these that is there")


def main(config: Config, model: str, prompt: str) -> None:
    need(config, 1, "samples max_new_tokens", most=1e6)
    need(config, 0, "seed")
    need(config, 1e-4 if config.temperature else 0, "temperature")
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
