"""The update: log-probs of a rollout's responses and the gradient of its loss, without waste.

Three things make it cheap, and none changes a number: a prompt is run once for all rows of its group, rows of like
length share a micro-batch, and the output head runs in tiles of tokens, so that nothing of size tokens x V is kept.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from decode import attention_masks
from flags import UserError

TILE = {"cuda": 512, "mps": 512, "cpu": 128}  # tokens whose logits are held at once
SPARED = 0.05  # prompts are run once for a group where that spares so large a share of the tokens
Result = TypeVar("Result")


class Learner:
    """A model as the update sees it: a body that makes hidden states, and a head that makes logits of them.

    temperature: the sampler's, so that the distribution is the one that was sampled from
    gradient_checkpointing: keeps the input of each layer alone, and runs the layer again on the way back
    Where head(body(ids)) are not the model's own logits (it may scale them in its own way, or have a bias), the body is
    the whole model and the head does nothing: right as well, but all logits of a micro-batch are held at once.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, gradient_checkpointing: bool = False):
        self.model, self.temperature, self.layers = model, temperature, []
        if gradient_checkpointing:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it is about to get another name
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
        linear, self.cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
        self.linear = linear if type(linear) is torch.nn.Linear and linear.bias is None else None
        self.body = lambda ids, **inputs: model.base_model(ids, **inputs).last_hidden_state
        ids = torch.arange(4, device=model.device)[None]
        with torch.no_grad():
            expected, got = model(ids, use_cache=False).logits[0], self.head(self.body(ids, use_cache=False)[0])
        if got.shape != expected.shape or (got - expected).abs().max() > 0.01 * expected.abs().max():
            self.linear = self.cap = None
            self.body = lambda ids, **inputs: model(ids, **inputs).logits

    def head(self, states: Tensor, out: Tensor | None = None) -> Tensor:
        """(K, hidden size) -> (K, V) logits, written into `out` where it is given"""
        logits = torch.mm(states, self.linear.weight.T, out=out) if self.linear else states
        return (logits / self.cap).tanh() * self.cap if self.cap else logits

    def states(self, rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) indices into the rollout -> (K, hidden size) what these rows' K response tokens are predicted from, (K,)
        those tokens, (R, N) bool: which place of which row has one.

        No mask is needed where a row is run whole: attention is causal, and padding stands after everything that it
        could be seen from.
        """
        ids, prompt_lengths, lengths = rollout.rows(rows)
        last = prompt_lengths - 1  # position of a prompt's last token, from which the response begins
        places = last[:, None] + torch.arange(int((lengths - prompt_lengths).max()), device=ids.device)  # (R, N)
        inside = places + 1 < lengths[:, None]  # from lengths, not from pad ids: pad may equal EOS, which is trained on
        tokens = ids.gather(1, (places + 1).clamp(max=ids.shape[1] - 1))[inside]
        places = places.clamp(max=ids.shape[1] - 1)
        columns = torch.arange(max(1, int(last.max())), device=ids.device)  # of prompts, their last tokens left out
        within = columns < last[:, None]
        prompts, member = ids[:, : len(columns)].masked_fill(~within, -1).unique(dim=0, return_inverse=True)
        if (len(ids) - len(prompts)) * len(columns) < SPARED * ids.numel() or self.layers:
            for layer in self.layers:  # they recompute only in train mode: they alone, for dropout must stay off
                layer.training = True
            states = self.body(ids, use_cache=False)
            for layer in self.layers:
                layer.training = False
            return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))[inside], tokens, inside
        cache = DynamicCache()
        self.body(prompts.clamp(min=0), past_key_values=cache, use_cache=True)
        for layer in cache.layers:  # a prompt's keys and values for each of its rows: their gradients add up
            layer.keys, layer.values = layer.keys[member], layer.values[member]
        keys = torch.cat([columns.where(within, -1), places], 1)  # (R, prompt + N) positions, -1 for no key
        states = self.body(ids.gather(1, places), position_ids=places, past_key_values=cache, use_cache=True,
                           attention_mask=attention_masks(self.model, places, keys))
        return states[inside], tokens, inside

    def read_off(self, states: Tensor, tokens: Tensor, slopes: Tensor | None = None) -> Tensor:
        """(K, hidden size) states, (K,) tokens -> (K,) float32 log-probs of the tokens, in tiles.

        slopes: (K,) d loss / d log-prob. With them the gradient of the loss is formed on the way and sent back through
        the body: one softmax and three matrix products a tile, and nothing is kept.
        """
        logprobs, size = torch.empty(len(tokens), device=states.device), min(len(tokens), TILE[states.device.type])
        inputs, weight = states.detach(), self.linear.weight if self.linear else None
        roots = [] if slopes is None else [states, weight] if self.linear and weight.requires_grad else [states]
        gradients = [torch.zeros_like(root, dtype=torch.float32 if root is weight else None) for root in roots]
        V = len(weight) if self.linear else states.shape[1]  # below, room for a tile: a CPU is slow to get new memory
        products, room = states.new_empty(size, V), torch.empty(size, V, device=states.device)
        for part in (slice(start, start + size) for start in range(0, len(tokens), size)):
            with torch.no_grad():
                tile = inputs[part]
                logits = self.head(tile, out=products[: len(tile)])
                scaled = logits.float() if self.temperature == 1 else logits.float() / self.temperature
                shares = torch.softmax(scaled, -1, out=room[: len(tile)])
                log_sum = scaled.amax(-1) - shares.amax(-1).log()  # of exponentials, without taking V of them again
                logprobs[part] = scaled.gather(1, tokens[part, None])[:, 0] - log_sum
                if slopes is None:
                    continue
                slope = slopes[part, None] / self.temperature
                shares.mul_(-slope).scatter_add_(1, tokens[part, None], slope)  # d loss / d logits
                if self.cap:
                    shares.mul_(1 - (logits.float() / self.cap).square())
                slope = shares.to(tile.dtype)  # d loss / d product of the tile and the weight
                gradients[0][part] = slope @ weight if self.linear else slope
                for total in gradients[1:]:  # in float32, in place where the product is too
                    total.addmm_(slope.T, tile) if tile.dtype == torch.float32 else total.add_(slope.T @ tile)
        if roots:
            torch.autograd.backward(roots, [gradient.to(root.dtype) for root, gradient in zip(roots, gradients)])
        return logprobs

    @torch.no_grad()
    def logprobs(self, rollout, micro_batch_tokens: int) -> Tensor:
        """(B, N) log-probs of all responses of a rollout, 0 past a row's end."""
        logprobs = torch.zeros_like(rollout.logprobs)
        for rows in micro_batches(rollout.lengths.cpu(), micro_batch_tokens):
            states, tokens, inside = self.states(rollout, rows)
            logprobs[rows.to(logprobs.device), : inside.shape[1]] = spread(self.read_off(states, tokens), inside)
        return logprobs

    def backward(self, rollout, rows: Tensor, token_losses: Callable, then: Tensor, start: Tensor, weights: Tensor,
                 factors: Tensor, micro_batch_tokens: int) -> dict[str, float]:
        """Adds the gradient of the loss of some rows to the model's, in micro-batches: the same for any size of them.

        rows: (R,) indices into the rollout; token_losses: from loss.py's `choose`; weights, factors: (B,)
        then, start: (B, N) log-probs of the policy that sampled and of the reference
        -> loss, and over the tokens: largest gap to the sampler's log-probs, mean and largest ratio, share clipped
        """
        def losses(now: Tensor) -> tuple[Tensor, Tensor]:
            """(R, N) log-probs -> sum of the rows' losses, which tokens were clipped"""
            each, clipped = token_losses(now, then[part], start[part], weights[index, None], inside)
            return (each.sum(1) * factors[index]).sum(), clipped

        def slopes(now: Tensor) -> Tensor:
            now = now.detach().requires_grad_()
            return torch.autograd.grad(losses(now)[0], now)[0]

        loss, gaps, ratios, clips = 0.0, [], [], []
        for micro in micro_batches(rollout.lengths[rows].cpu(), micro_batch_tokens):
            index = rows[micro.to(rows.device)]
            states, tokens, inside = self.states(rollout, index)
            part = index, slice(inside.shape[1])
            slope = slopes(then[part])
            if not torch.equal(slope, slopes(then[part] - 1)):  # it depends on the log-probs, so they come first
                slope = slopes(spread(self.read_off(states, tokens), inside))
            now = spread(self.read_off(states, tokens, slope[inside]), inside)
            micro_loss, clipped = losses(now)
            loss += micro_loss.item()
            gaps.append((now - rollout.logprobs[part])[inside].abs())
            ratios.append((now - then[part])[inside].exp())
            clips.append(clipped[inside].float())
        ratio = torch.cat(ratios)
        return {"loss": loss, "sampler_gap": torch.cat(gaps).max().item(), "ratio_mean": ratio.mean().item(),
                "ratio_max": ratio.max().item(), "clip_share": torch.cat(clips).mean().item()}


def spread(values: Tensor, inside: Tensor) -> Tensor:
    """(K,) values, (R, N) bool with K times True -> (R, N), 0 elsewhere"""
    return torch.zeros(inside.shape, device=inside.device).masked_scatter_(inside, values)


def micro_batches(lengths: Tensor, tokens: int) -> list[Tensor]:
    """(B,) lengths -> row indices, longest rows first, each batch at most `tokens` once padded (or one row). Rows much
    shorter than the longest begin a new batch once there is enough to do: padding costs as much as tokens."""
    batches, batch, longest = [], [], 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        padded = longest * len(batch)
        if batch and (padded + longest > tokens or (padded > tokens / 4 and lengths[row] < 0.75 * longest)):
            batches.append(torch.tensor(batch))
            batch = []
        longest = longest if batch else int(lengths[row])
        batch.append(row)
    return batches + ([torch.tensor(batch)] if batch else [])


def within_memory(work: Callable[[int], Result], size: int, flag: str, undo: Callable[[], None]) -> tuple[Result, int]:
    """work(size) -> its result and the size; where CUDA runs out of memory again with half the size, and so on.

    undo: drops what a try that failed has left behind, so that nothing is counted twice
    UserError: even a size of 1 is too much.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError(f"{flag}: out of memory even at 1; --gradient_checkpointing, --lora_rank 16, --offload "
                                "and shorter responses take less") from None
        undo()  # out here the error, and with it the tensors of its frames, is gone
        torch.cuda.empty_cache()
        size //= 2
        tqdm.write(f"out of memory: {flag} is {size} from here on")
