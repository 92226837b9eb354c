"""The fast form of sample.py's `generate`: the same tokens for the same seeds, all prompts at once.

Each prompt is run once for its whole group. Keys and values are written in place into a KV cache
of slots; a slot whose response has ended takes the next queued row. One decode step is one token
for every slot. What a step reads and writes stays at the same addresses, so that on CUDA it is
captured as a CUDA graph and replayed: a small model would otherwise spend most of a step on
launching kernels."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface, Cache, DynamicCache

from engine.memory import is_out_of_memory
from lib.checks import CACHE, check_prompts
from lib.flags import name_error
from sample import Rollout, Sampling, float64, sample_token, uniform_numbers

# decode steps between checks for finished rows
CHECK_EVERY = {"cuda": 16, "mps": 16, "cpu": 1}
CAPTURE_FAILED = (
    "sampling continues without CUDA graphs, which is slower, because a decode step could not be "
    "captured. The usual cause is an edit of sample.policy_distribution or sample.sample_token "
    "that looks at values, by .item(), an `if` or a boolean index"
)
# attended lengths are rounded up to a multiple of this
LENGTH_MULTIPLE = {"cuda": 64, "mps": 64, "cpu": 16}


@torch.no_grad()
def generate(
    policy,
    prompts,
    group_size,
    max_new_tokens,
    stop,
    seeds,
    sampling=Sampling(),
    rows_at_once=None,
    buffers=None,
    interject=None,
    report=None,
    forward=None,
) -> Rollout:
    """See sample.py. The rows beyond rows_at_once are queued for a slot, so a rollout may be larger
    than the memory.

    forward: the compiled policy, which the decode steps use in its place
    """
    check_prompts(policy, prompts, max_new_tokens)
    buffers = {} if buffers is None else buffers
    B = len(prompts) * group_size
    slots = min(B, rows_at_once or B)
    columns = round_up(max(map(len, prompts)) + max_new_tokens, LENGTH_MULTIPLE[policy.device.type])
    # CUDA graphs hold the addresses of the parameters
    key = (max_new_tokens, *(parameter.data_ptr() for parameter in policy.parameters()))
    state = buffers.get(key)
    if state is None or not state.has_room(B, slots, columns):
        buffers.clear()
        state = buffers[key] = DecodeState(policy, B, slots, columns, max_new_tokens)
    if forward is not None:
        state.forward = forward
    state.prefill(policy, prompts, group_size, stop, seeds)
    if interject:
        state.begin_responses(interject)

    check_every = 1 if interject else CHECK_EVERY[policy.device.type]
    with decode_attention(policy), fused_norms(policy):
        for step in itertools.count():
            if step % check_every == 0:
                state.assign_slots(group_size, check_every)
                if state.slots == 0:
                    break
                if report:  # idle slots are counted too: to look would wait for the GPU
                    report(state.slots * check_every)
            if interject:
                state.run_step_and_interject(policy, sampling, interject)
            else:
                state.run_step(policy, sampling)
    rollout = state.rollout()
    if not state.cache.static:
        buffers.clear()  # a CPU captures nothing: the update gets the memory until the next rollout
    return rollout


def round_up(n, multiple) -> int:
    return math.ceil(n / multiple) * multiple


class SlotCache(Cache):
    """Keys and values of the rows being decoded: two tensors (slots, heads, columns, head size) a
    layer, written in place. Column c holds the token at position c of a row, so a row's numbers do
    not depend on the other rows.

    static: the cache has its full size from the start and never moves, as CUDA graphs need it.
            Otherwise it holds only the attended columns, contiguously, and is copied when it
            grows: a CPU reads them three times as fast as slices.
    """

    def __init__(self, slots, columns, static):
        super().__init__(layers=[])
        self.slots, self.columns, self.static, self.tensors = slots, columns, static, None

    def set_prompts(self, prompts) -> None:
        """Takes the keys and values of P prompts, to be copied by `load_prompts`. Empties the
        slots."""
        self.prompts = [part for layer in prompts.layers for part in (layer.keys, layer.values)]
        if self.tensors and self.static:
            return
        columns = self.columns if self.static else 0
        self.tensors = []
        for part in self.prompts:
            _, heads, _, size = part.shape
            self.tensors.append(part.new_zeros(self.slots, heads, columns, size))

    def resize(self, survivors, attended) -> None:
        """Moves the surviving slots (indices; None: all) to the front; `attended` columns are read
        from now on."""
        for i, tensor in enumerate(self.tensors):
            part = tensor[:, :, :attended] if survivors is None else tensor[survivors, :, :attended]
            if not self.static:
                room = tensor.new_zeros(*part.shape[:2], attended - part.shape[2], part.shape[3])
                self.tensors[i] = torch.cat([part, room], 2)
            elif survivors is not None:
                tensor[: len(part), :, :attended] = part

    def load_prompts(self, slots, prompts) -> None:
        """Copies the keys and values of `prompts` (indices) into `slots` (indices)."""
        for tensor, prompt in zip(self.tensors, self.prompts):
            width = min(prompt.shape[2], tensor.shape[2])
            tensor[slots, :, :width] = prompt[prompts, :, :width]

    def set_positions(self, positions, attended) -> None:
        """(R,) positions of the next token of the first R slots."""
        self.positions, self.attended, self.flat_index = positions, attended, {}

    def update(self, keys, values, layer, *args, **kwargs) -> list[Tensor]:
        """Called by each attention layer with the newest keys and values, (R, heads, 1, head
        size)."""
        tensors = self.tensors[2 * layer : 2 * layer + 2]
        R, heads = keys.shape[:2]
        if heads not in self.flat_index:
            # where the new ones go in a table of (R * heads * columns, head size)
            first = torch.arange(R * heads, device=keys.device).view(R, heads) * tensors[0].shape[2]
            self.flat_index[heads] = (first + self.positions[:, None]).flatten()
        for tensor, new in zip(tensors, (keys, values)):
            tensor.flatten(0, 2).index_copy_(0, self.flat_index[heads], new.flatten(0, 2))
        return [tensor[:R, :, : self.attended] for tensor in tensors]

    def get_seq_length(self, layer=0) -> int:
        return self.attended - 1


class DecodeState:
    """All that a decode step reads and writes, for up to `most_rows` rows. One row more, the last,
    is a dummy: idle slots read and write it."""

    def __init__(self, policy, most_rows, slots, columns, N):
        device = policy.device
        captures = device.type == "cuda"
        self.forward = policy
        vocabulary = policy.config.get_text_config().vocab_size
        self.ids = torch.zeros(most_rows + 1, columns, dtype=torch.long, device=device)
        self.lengths = torch.zeros(most_rows + 1, dtype=torch.long, device=device)
        self.prompt_lengths = torch.zeros_like(self.lengths)
        self.logprobs = torch.zeros(most_rows + 1, N, device=device)
        self.uniforms = torch.zeros(most_rows + 1, N, dtype=float64(device), device=device)
        # tokens that `interject` writes, by their place in the response; -1 where the policy does
        self.forced = torch.full((most_rows + 1, N), -1, device=device)
        self.finished = torch.zeros(most_rows + 1, dtype=torch.bool, device=device)
        self.row_of_slot = torch.zeros(slots, dtype=torch.long, device=device)
        self.is_stop_token = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.dummy = most_rows
        self.most_slots = slots
        self.cache = SlotCache(slots, columns, static=captures)
        self.graphs = {} if captures else None
        self.pool = None  # memory shared by all graphs, which never run at the same time

    def has_room(self, rows, slots, columns) -> bool:
        return rows <= self.dummy and slots <= self.most_slots and columns <= self.cache.columns

    def prefill(self, policy, prompts, group_size, stop, seeds) -> None:
        """Runs each prompt once, without its last token: the first decode step feeds that one, so
        every token is sampled in one place. (A prompt of one token is run and then fed again,
        which writes the same key.)"""
        B, N = len(prompts) * group_size, self.logprobs.shape[1]
        table = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        table = table.to(policy.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        uniforms = [uniform_numbers(seed, group_size, N, policy.device) for seed in seeds]
        for tensor in (self.ids, self.logprobs, self.finished, self.is_stop_token):
            tensor.zero_()
        self.forced.fill_(-1)
        self.ids[:B, : table.shape[1]] = table.repeat_interleave(group_size, 0)
        self.prompt_lengths[:B] = lengths.repeat_interleave(group_size)
        self.prompt_lengths[self.dummy] = 1
        self.lengths.copy_(self.prompt_lengths)
        self.uniforms[:B] = torch.cat(uniforms)
        self.row_of_slot.fill_(self.dummy)
        self.rows = B
        self.slots = min(B, self.most_slots)  # slots in use
        self.attended = 0  # columns of the cache that attention reads
        self.queued = 0  # first row of the queue
        self.is_stop_token[stop] = True
        cache = DynamicCache()
        prompts_without_last = table[:, : max(1, table.shape[1] - 1)]
        policy(prompts_without_last, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        self.cache.set_prompts(cache)

    def assign_slots(self, group_size, steps) -> None:
        """Gives free slots to queued rows, drops slots when a quarter of them is free, and makes
        room for the next `steps` tokens. No slots are left when every row has ended. This looks at
        values, so a GPU is waited for."""
        kind = self.ids.device.type
        before = (self.slots, self.attended)
        rows = self.row_of_slot[: self.slots]
        free = (rows == self.dummy).nonzero()[:, 0]
        first_new = self.queued
        self.queued = min(self.rows, self.queued + len(free))
        new_rows = torch.arange(first_new, self.queued, device=rows.device)
        rows[free[: len(new_rows)]] = new_rows
        active = len(rows) - len(free) + len(new_rows)
        if active == 0:
            self.slots = 0
            return

        survivors = None
        # few sizes, so few CUDA graphs
        granularity = max(1, self.most_slots // 8) if kind == "cuda" else 1
        wanted = round_up(active, granularity)
        if wanted <= self.slots * 3 / 4:  # not for every free slot: dropping slots copies the cache
            survivors = (rows == self.dummy).to(torch.uint8).argsort(stable=True)[:wanted]
            self.row_of_slot[:wanted] = rows[survivors]
            self.slots = wanted
            rows = self.row_of_slot[:wanted]
        longest = int(self.lengths[rows].max()) + steps
        self.attended = min(round_up(longest, LENGTH_MULTIPLE[kind]), self.cache.columns)
        if before != (self.slots, self.attended):
            self.cache.resize(survivors, self.attended)
        new = ((rows >= first_new) & (rows < self.dummy)).nonzero()[:, 0]
        if len(new_rows):
            self.cache.load_prompts(new, rows[new] // group_size)

    def decode_step(self, policy, sampling) -> None:
        """Samples one token for the row of each slot. Nothing in here looks at a value."""
        N = self.logprobs.shape[1]
        rows = self.row_of_slot[: self.slots].clone()
        positions = self.lengths[rows] - 1  # of the last token, from which the next is predicted
        n = self.lengths[rows] - self.prompt_lengths[rows]  # response tokens so far
        columns = torch.arange(self.attended, device=rows.device)[None]
        self.cache.set_positions(positions, self.attended)
        output = self.forward(
            self.ids[rows, positions, None],
            position_ids=positions[:, None],
            attention_mask=attention_masks(policy, positions[:, None], columns),
            use_cache=True,
            **{CACHE: self.cache},
        )
        logits, uniforms = output.logits[:, -1], self.uniforms[rows, n]
        token, self.logprobs[rows, n] = sample_token(logits, uniforms, sampling)
        forced = self.forced[rows, n]
        token = torch.where(forced < 0, token, forced)
        stopped = self.is_stop_token[token] & (forced < 0)
        self.ids[rows, positions + 1] = token
        self.lengths[rows] += 1
        self.finished[rows] = stopped
        self.row_of_slot[: self.slots] = torch.where(stopped | (n + 1 == N), self.dummy, rows)
        self.lengths[-1] = self.prompt_lengths[-1]  # the dummy row never grows

    def run_step(self, policy, sampling) -> None:
        """A decode step. On CUDA it is captured the first time that its sizes are seen, and then
        replayed."""
        sizes = (self.slots, self.attended, sampling)
        if self.graphs and sizes in self.graphs:
            self.graphs[sizes].replay()
            return
        self.decode_step(policy, sampling)  # also the warm-up that capture needs
        if self.graphs is None:
            return
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.decode_step(policy, sampling)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture does not
            if is_out_of_memory(error):
                raise
            self.graphs = None
            tqdm.write(f"{CAPTURE_FAILED} ({name_error(error.__context__ or error)})")
            return
        self.graphs[sizes] = graph
        self.pool = graph.pool()

    def begin_responses(self, interject) -> None:
        """What `interject` writes before the first token of each response."""
        for row in range(self.rows):
            self.force(row, 0, interject([], False))

    def run_step_and_interject(self, policy, sampling, interject) -> None:
        """A decode step, and after each token that the policy wrote what `interject` writes."""
        rows = self.row_of_slot[: self.slots].tolist()
        self.run_step(policy, sampling)
        prompt_lengths, lengths = self.prompt_lengths.tolist(), self.lengths.tolist()
        for slot, row in enumerate(rows):
            n = lengths[row] - prompt_lengths[row]  # response tokens so far
            if row == self.dummy or self.forced[row, n - 1] >= 0:
                continue
            response = self.ids[row, prompt_lengths[row] : lengths[row]].tolist()
            tokens = interject(response, bool(self.finished[row]))
            if tokens:
                self.force(row, n, tokens)
                self.finished[row] = False
                if n < self.logprobs.shape[1]:
                    self.row_of_slot[slot] = row  # the response continues

    def force(self, row, n, tokens) -> None:
        """The tokens come at place n of the row's response, as many as there is room for."""
        tokens = tokens[: self.forced.shape[1] - n]
        self.forced[row, n : n + len(tokens)] = torch.tensor(tokens, dtype=torch.long)

    def rollout(self) -> Rollout:
        """Copies of the rows, as short as they are."""
        B = self.rows
        lengths, prompt_lengths = self.lengths[:B].clone(), self.prompt_lengths[:B].clone()
        response_lengths = lengths - prompt_lengths
        N = int(response_lengths.max())
        mask = torch.arange(N, device=lengths.device) < response_lengths[:, None]
        mask &= self.forced[:B, :N] < 0
        ids = self.ids[:B, : int(lengths.max())].clone()
        logprobs = self.logprobs[:B, :N].where(mask, 0.0)
        return Rollout(ids, prompt_lengths, lengths, mask, logprobs, self.finished[:B].clone())


def attend(
    module, query, key, value, attention_mask, scaling=None, softcap=None, capping=True, **kwargs
) -> tuple[Tensor, None]:
    """Attention of one query a row: (R, heads, 1, size), keys and values (R, groups, columns,
    size).

    Heads that share keys and values are several queries of one attention, so nothing is repeated.
    Two plain products are the fastest on a CPU; they also serve where scores are soft-capped,
    which sdpa cannot do.
    capping: False leaves soft-capping out, as transformers' sdpa does
    """
    R, heads, _, size = query.shape
    groups = key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    softcap = softcap if capping else None
    query = query.view(R, groups, heads // groups, size)
    if softcap is None and query.device.type != "cpu":
        out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.reshape(R, 1, heads, -1), None
    scores = torch.bmm((query * scaling).flatten(0, 1), key.flatten(0, 1).mT)
    scores = scores.view(*query.shape[:3], -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    probs = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(probs.flatten(0, 1), value.flatten(0, 1)).view(R, 1, heads, -1), None


@contextmanager
def decode_attention(model) -> Iterator[None]:
    """The model attends by `attend` within the block."""
    before = model.config._attn_implementation
    AttentionInterface.register("slots", partial(attend, capping=before != "sdpa"))
    model.set_attn_implementation("slots")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def fused_norms(model) -> Iterator[None]:
    """On CUDA each RMSNorm is one kernel within the block, where transformers' has eight."""
    norms = []
    for module in model.modules() if model.device.type == "cuda" else ():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norms.append(module)
    for norm in norms:
        norm.forward = partial(rms_norm, weight=norm.weight, eps=norm.variance_epsilon)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def rms_norm(states, weight, eps) -> Tensor:
    return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)


def attention_masks(model, queries, keys) -> Tensor | dict[str, Tensor]:
    """Positions of the queries (R, Q) and of the keys (R or 1, K), below 0 for no key -> additive
    mask (R, 1, Q, K): 0 where a query attends, to what is not after it and within the model's
    window.

    Models that mix kinds of layers take one mask for each kind.
    """
    config, lowest = model.config.get_text_config(), torch.finfo(model.dtype).min
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    attended = (distance >= 0) & (keys >= 0)[:, None, None, :]
    full = torch.zeros(distance.shape, dtype=model.dtype, device=distance.device)
    full.masked_fill_(~attended, lowest)
    window = getattr(config, "sliding_window", None)
    sliding = full if window is None else full.masked_fill(distance >= window, lowest)
    if getattr(config, "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding
