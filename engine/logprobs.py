"""The fast form of loss.py's `token_logprobs`: the same values and gradients.

A prompt is run once for all rows of its group, and the output head runs in tiles of tokens,
forward and backward, so that nothing of size tokens x V is kept. Log-probs that are known already
are not computed again."""

import torch
from torch import Tensor
from transformers import DynamicCache

from engine.generate import attention_masks
from lib.checks import CACHE
from lib.estimate import TILE as GPU_TILE
from loss import token_stats
from sample import policy_distribution

TILE = {"cuda": GPU_TILE, "mps": GPU_TILE, "cpu": 128}  # tokens whose logits are held at once
MIN_SHARED = 0.05  # share prompts if it saves at least this share of the tokens


def token_logprobs(
    policy, rollout, sampling, known=None, with_entropy=False, by_hand=True
) -> tuple[Tensor, Tensor | None]:
    """See loss.py. by_hand: the gradient of the stock `token_stats` is written out, which is
    faster; False: autograd differentiates `token_stats` within each tile, which is right for any
    `token_stats`."""
    mask = rollout.response_mask
    states, tokens = response_states(policy, rollout)
    head = Head(policy, sampling, by_hand, with_entropy)
    parameters = policy.get_output_embeddings().parameters()
    known = None if known is None else known[mask]
    logprobs, entropy = TiledHead.apply(head, tokens, known, states, *parameters)
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs = zeros.masked_scatter(mask, logprobs)
    return logprobs, zeros.masked_scatter(mask, entropy) if with_entropy else None


def response_states(policy, rollout) -> tuple[Tensor, Tensor]:
    """-> (K, hidden size) hidden states from which the K response tokens are predicted, (K,) these
    tokens."""
    prompt_lengths, mask = rollout.prompt_lengths, rollout.response_mask
    ids = rollout.ids[:, : int(rollout.lengths.max())]
    row, column = mask.nonzero(as_tuple=True)
    tokens = ids[row, prompt_lengths[row] + column]

    # the prompts without their last tokens, from which the responses are predicted
    last = prompt_lengths - 1
    prompt_columns = torch.arange(max(1, int(last.max())), device=ids.device)
    in_prompt = prompt_columns < last[:, None]
    prompts = ids[:, : len(prompt_columns)].masked_fill(~in_prompt, -1)
    prompts, prompt_of_row = prompts.unique(dim=0, return_inverse=True)
    saved = (len(ids) - len(prompts)) * len(prompt_columns)
    recomputes = getattr(policy, "recomputes_activations", False)  # that drops the KV cache
    if saved < MIN_SHARED * ids.numel() or recomputes:
        states = policy.base_model(ids, use_cache=False).last_hidden_state
        return states[row, last[row] + column], tokens

    cache = DynamicCache()
    policy.base_model(prompts.clamp(min=0), use_cache=True, **{CACHE: cache})
    for layer in cache.layers:
        # a prompt's keys and values for each of its rows: autograd adds their gradients up
        layer.keys, layer.values = layer.keys[prompt_of_row], layer.values[prompt_of_row]
    width = int((rollout.lengths - prompt_lengths).max())
    positions = last[:, None] + torch.arange(width, device=ids.device)  # (R, width)
    positions = positions.clamp(max=ids.shape[1] - 1)
    inputs = ids.gather(1, positions)
    prompt_positions = prompt_columns.where(in_prompt, -1)  # -1: no key there
    keys = torch.cat([prompt_positions, positions], 1)
    states = policy.base_model(
        inputs,
        position_ids=positions,
        attention_mask=attention_masks(policy, positions, keys),
        use_cache=True,
        **{CACHE: cache},
    ).last_hidden_state
    return states[row, column], tokens


class Head:
    """The output head of a model, in tiles: hidden states -> logits -> log-probs and entropies of
    tokens."""

    def __init__(self, policy, sampling, by_hand, with_entropy):
        self.linear = policy.get_output_embeddings()
        self.cap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
        self.sampling = sampling
        self.with_entropy = with_entropy
        plain = type(self.linear) is torch.nn.Linear and self.linear.bias is None and not self.cap
        self.by_hand = by_hand and plain and not with_entropy

    def tiles(self, tokens) -> list[slice]:
        size = TILE[tokens.device.type]
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    def stats(self, states, tokens) -> tuple[Tensor, ...]:
        """-> log-probs and, if wanted, entropies of a tile."""
        logits = self.linear(states)
        if self.cap:
            logits = (logits / self.cap).tanh() * self.cap
        logprobs, entropy = token_stats(logits, tokens, self.sampling)
        return (logprobs, entropy) if self.with_entropy else (logprobs,)

    def gradients(self, states, tokens, grads) -> list[Tensor]:
        """Gradients of the log-probs and entropies -> those of the states and of the parameters
        that are trained."""
        parameters = [p for p in self.linear.parameters() if p.requires_grad]
        grad_states = torch.empty_like(states)
        totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for tile in self.tiles(tokens):
            with torch.enable_grad():
                inputs = states[tile].detach().requires_grad_()
                outputs = self.stats(inputs, tokens[tile])
            tile_grads = [grad[tile] for grad in grads[: len(outputs)]]
            found = torch.autograd.grad(outputs, [inputs, *parameters], tile_grads)
            grad_states[tile], *found = found
            for total, grad in zip(totals, found):
                total += grad
        return [grad_states, *totals]

    def gradients_by_hand(self, states, tokens, grads) -> list[Tensor]:
        """The same for a linear layer and the stock `token_stats`: d log p(token) / d logits =
        onehot - softmax.

        All tiles share two buffers: memory that is fresh for each tile is slow on a CPU. (In
        bfloat16 the head gives new logits in float32: lib/head.py.)"""
        weight = self.linear.weight
        size = min(len(tokens), TILE[tokens.device.type])
        in_float32 = states.dtype == torch.float32
        logits_buffer = states.new_empty(size if in_float32 else 0, len(weight))
        probs_buffer = torch.empty(size, len(weight), device=states.device)
        grad_states = torch.empty_like(states)
        total = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        for tile in self.tiles(tokens):
            inputs, target = states[tile], tokens[tile, None]
            if in_float32:
                logits = torch.mm(inputs, weight.T, out=logits_buffer[: len(inputs)])
            else:
                logits = self.linear(inputs)
            logits = policy_distribution(logits, self.sampling)
            probs = torch.softmax(logits, -1, out=probs_buffer[: len(inputs)])
            grad = grads[0][tile, None] / self.sampling.temperature
            grad_logits = probs.mul_(-grad).scatter_add_(1, target, grad).to(inputs.dtype)
            torch.mm(grad_logits, weight, out=grad_states[tile])
            if total is None:
                continue
            if in_float32:
                total.addmm_(grad_logits.T, inputs)
            else:
                total += grad_logits.T @ inputs
        return [grad_states] if total is None else [grad_states, total]


class TiledHead(torch.autograd.Function):
    """(K, hidden size) states, (K,) tokens -> (K,) log-probs, (K,) entropies. Its backward
    computes the logits again, tile by tile, so that nothing of size K x V is kept."""

    @staticmethod
    def forward(ctx, head, tokens, known, states, *parameters):
        ctx.head = head
        ctx.save_for_backward(states, tokens)
        entropy = torch.zeros(len(tokens), device=states.device)
        if known is not None and not head.with_entropy:
            return known.clone(), entropy
        logprobs = torch.empty_like(entropy)
        for tile in head.tiles(tokens):
            logprobs[tile], *rest = head.stats(states[tile], tokens[tile])
            if rest:
                entropy[tile] = rest[0]
        return logprobs if known is None else known.clone(), entropy

    @staticmethod
    def backward(ctx, *grads):
        states, tokens = ctx.saved_tensors
        gradients = ctx.head.gradients_by_hand if ctx.head.by_hand else ctx.head.gradients
        grad_states, *found = gradients(states, tokens, grads)
        grad_parameters = []
        for parameter in ctx.head.linear.parameters():
            grad = found.pop(0).to(parameter.dtype) if parameter.requires_grad else None
            grad_parameters.append(grad)
        return None, None, None, grad_states, *grad_parameters
