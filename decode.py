"""How sample.py's `generate` decodes fast: slots for keys and values, attention for one query, draws, recorded steps.

A decode step is one token of every row. What it reads and writes is allocated once and changed in place, so that on
CUDA a step can be recorded as a graph and replayed: a small model spends most of a step on launching kernels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel


class Slots(Cache):
    """Keys and values of the rows being decoded: two tensors (R, heads, columns, head size) a layer, written in place.
    Column c holds a row's token at position c, so that a row's numbers do not depend on its neighbours.

    fixed: all rows and columns are there from the start, and stay where they are, as recorded steps want it. Else there
    are just the columns that are looked at, side by side in memory: a CPU reads them three times as fast as those of a
    wider tensor, which pays for copying them when they become more.
    """

    def __init__(self, rows: int, columns: int, fixed: bool):
        super().__init__(layers=[])
        self.rows, self.columns, self.fixed, self.stores = rows, columns, fixed, None

    def prefill(self, prompts: DynamicCache) -> None:
        """Takes the keys and values of P prompts, for `admit` to copy; what the slots held is forgotten."""
        self.prompts = [part for layer in prompts.layers for part in (layer.keys, layer.values)]
        if not (self.stores and self.fixed):
            self.stores = [part.new_zeros(self.rows, part.shape[1], self.columns if self.fixed else 0, part.shape[3])
                           for part in self.prompts]

    def move(self, slots: Tensor | slice, filled: int) -> None:
        """`slots` (indices) come to the front, the others are gone; the first `filled` columns are looked at."""
        for i, store in enumerate(self.stores):
            moved = store[slots, :, :filled]
            if not self.fixed:
                room = store.new_zeros(*moved.shape[:2], filled - moved.shape[2], moved.shape[3])
                self.stores[i] = torch.cat([moved, room], 2)
            elif isinstance(slots, Tensor):
                store[: len(moved), :, :filled] = moved

    def admit(self, slots: Tensor, prompts: Tensor) -> None:
        """Copies the keys and values of `prompts` (indices) into `slots` (indices)."""
        for store, prompt in zip(self.stores, self.prompts):
            width = min(prompt.shape[2], store.shape[2])
            store[slots, :, :width] = prompt[prompts, :, :width]

    def at(self, positions: Tensor, filled: int) -> "Slots":
        """The next token of the first R rows goes to its position, (R,); the first `filled` columns are looked at."""
        self.positions, self.filled, self.places = positions, filled, {}
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> list[Tensor]:
        """Called by each attention layer with the newest keys and values, (R, heads, 1, head size)."""
        stores, (R, heads) = self.stores[2 * layer : 2 * layer + 2], keys.shape[:2]
        if heads not in self.places:  # of the new ones in a table of (R * heads * columns, head size)
            heads_before = torch.arange(R * heads, device=keys.device).view(R, heads)
            self.places[heads] = (heads_before * stores[0].shape[2] + self.positions[:, None]).flatten()
        for store, new in zip(stores, (keys, values)):
            store.flatten(0, 2).index_copy_(0, self.places[heads], new.flatten(0, 2))
        return [store[:R, :, : self.filled] for store in stores]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.filled - 1


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, softcap: float | None = None, capping: bool = True, **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one query a row: (R, heads, 1, size), keys and values (R, groups, columns, size) as Slots has them.

    The heads that share keys and values are several queries of one attention, so that nothing is repeated. On a CPU two
    plain products are the fastest; they also serve where scores are soft-capped, which sdpa cannot.
    capping: False leaves soft-capping out, as transformers' sdpa does
    """
    R, heads, _, size = query.shape
    groups, scaling = key.shape[1], size**-0.5 if scaling is None else scaling
    query = query.view(R, groups, heads // groups, size)
    softcap = softcap if capping else None
    if softcap is None and query.device.type != "cpu":
        out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(R, 1, heads, -1), None
    scores = torch.bmm((query * scaling).flatten(0, 1), key.flatten(0, 1).mT).view(*query.shape[:3], -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    shares = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(shares.flatten(0, 1), value.flatten(0, 1)).view(R, 1, heads, -1), None


@contextmanager
def one_query_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by `attend` within the block. (Architectures without that choice keep their own.)"""
    before = model.config._attn_implementation
    AttentionInterface.register("slots", partial(attend, capping=before != "sdpa"))
    model.set_attn_implementation("slots")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_masks(model: PreTrainedModel, positions: Tensor, columns: Tensor) -> Tensor | dict[str, Tensor]:
    """(R, Q) positions of the queries, (R or 1, K) of the keys -> additive mask (R, 1, Q, K): 0 where a query may look,
    at what is not after it and not too far before it. A position below 0 is no key.

    Models that mix kinds of layers take one mask for each kind.
    """
    config, lowest = model.config.get_text_config(), torch.finfo(model.dtype).min
    behind = positions[:, None, :, None] - columns[:, None, None, :]
    window, seen = getattr(config, "sliding_window", None), (behind >= 0) & (columns >= 0)[:, None, None, :]
    full = torch.zeros(behind.shape, dtype=model.dtype, device=behind.device).masked_fill_(~seen, lowest)
    sliding = full if window is None else full.masked_fill(behind >= window, lowest)
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V) float32 logits, written over, and (R,) float64 numbers in [0, 1) -> (R,) tokens, (R,) their log-probs.

    Inverse transform sampling: one random number a row picks the first token whose cumulative probability exceeds it,
    first among blocks of about sqrt(V) tokens, then within the block, so that nothing of size V is summed up step by
    step. Nothing is cut (no top-k, no top-p): a cut distribution is another policy than the one that learns.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    V = logits.shape[1]
    size = math.isqrt(V)  # of a block
    whole = V - V % size
    weights = torch.softmax(logits if temperature == 1 else logits.div_(temperature), -1, out=logits)  # V may be large
    sums = torch.cat([weights[:, :whole].unflatten(1, (-1, size)).sum(-1), weights[:, whole:].sum(-1, True)], 1)
    block, fraction = pick(sums, uniform)  # (R,) index of the block, and where within it
    members = block[:, None] * size + torch.arange(size, device=block.device)
    inside = torch.where(members < V, weights.gather(1, members.clamp(max=V - 1)), 0.0)
    token = (members[:, 0] + pick(inside, fraction)[0]).clamp_(max=V - 1)  # beyond it only where weights are nan
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


class Steps:
    """Runs decode steps. On CUDA a step is recorded as a graph when its key comes first, and replayed from then on:
    the key says all that Python decides, and every tensor that the step reads stays where it is."""

    def __init__(self, device: torch.device):
        self.record = self.graph if device.type == "cuda" else None
        self.replays, self.pool = {}, None  # pool: memory that all graphs share, for they run in turn

    def __call__(self, key: tuple, step: Callable[[], None]) -> None:
        if key in self.replays:
            self.replays[key]()
            return
        step()  # for real, which also warms up what the recording needs
        if self.record:
            self.replays[key] = self.record(step)

    def graph(self, step: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels of `step` without running them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        self.pool = graph.pool()
        return graph.replay


class Decoding:
    """All that a decode step reads and writes of B rows, in place. Row B is nobody's: slots without a row to work on
    read and write there."""

    def __init__(self, model: PreTrainedModel, B: int, slots: int, columns: int, N: int):
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        precise = torch.float32 if model.device.type == "mps" else torch.float64  # mps has no float64
        self.ids, self.lengths, self.prompt_lengths = zeros(B + 1, columns), zeros(B + 1), zeros(B + 1)
        self.logprobs, self.draws = zeros(B + 1, N, dtype=torch.float32), zeros(B + 1, N, dtype=precise)
        self.finished, self.rows = zeros(B + 1, dtype=torch.bool), zeros(slots)  # rows: what each slot works on, or B
        self.ends = zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)  # the stop tokens
        self.steps = Steps(model.device)
        self.slots = Slots(slots, columns, fixed=self.steps.record is not None)

    def begin(self, model: PreTrainedModel, prompts: list[list[int]], group_size: int, stop: list[int], draws: Tensor):
        """Runs each prompt once, without its last token: that one is fed by the first decode step, so that every token
        is drawn in one place. (A prompt of one token is run as it is; its first step writes the same key again.)"""
        table = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        for part in (self.ids, self.logprobs, self.finished, self.ends):
            part.zero_()
        self.ids[:-1, : table.shape[1]] = table.repeat_interleave(group_size, 0).to(model.device)
        self.prompt_lengths[:-1] = torch.tensor([len(p) for p in prompts for _ in range(group_size)])
        self.prompt_lengths[-1] = 1
        self.lengths.copy_(self.prompt_lengths)
        self.draws[:-1] = draws.to(self.draws.dtype)
        self.rows.fill_(len(self.ids) - 1)
        self.ends[stop] = True
        cache = DynamicCache()
        table = table[:, : max(1, table.shape[1] - 1)].to(model.device)
        model(table, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.slots.prefill(cache)

    def step(self, model: PreTrainedModel, used: int, filled: int, temperature: float) -> None:
        """One token for the rows of the first `used` slots; attention looks at the first `filled` columns."""
        slots = self.rows[:used]
        rows, nobody, N = slots.clone(), len(self.ids) - 1, self.logprobs.shape[1]
        positions, n = self.lengths[rows] - 1, self.lengths[rows] - self.prompt_lengths[rows]
        columns = torch.arange(filled, device=rows.device)[None]
        logits = model(self.ids[rows, positions, None], position_ids=positions[:, None], use_cache=True,
                       attention_mask=attention_masks(model, positions[:, None], columns),
                       past_key_values=self.slots.at(positions, filled)).logits[:, -1]
        token, self.logprobs[rows, n] = draw(logits.float(), temperature, self.draws[rows, n])
        self.ids[rows, positions + 1] = token
        self.lengths[rows] += 1
        self.finished[rows] = self.ends[token]
        slots.copy_(torch.where(self.ends[token] | (n + 1 == N), nobody, rows))
        self.lengths[-1] = self.prompt_lengths[-1]
