"""The policy: loading and saving it with its tokenizer, log-probs of its responses, the optimizer.

A policy is any causal language model that transformers loads. It stays in eval mode throughout: dropout would make the
policy that learns another one than the policy that sampled.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from flags import UserError, first_line

logging.disable_progress_bar()  # of loading and saving: they would tear the bar of the steps
# what transformers, tokenizers and safetensors raise on files that are damaged or not theirs
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, SafetensorError,
              StrictDataclassError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """'auto' -> cuda, else mps, else cpu. UserError if the named one is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there[name]:
        raise UserError(f"--device {name}: not available on this machine, try --device auto")
    return torch.device(name)


def load_policy(
    name: str, device: torch.device, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face name, a model folder or a run folder (its checkpoint) -> (model in eval mode, tokenizer).

    dtype: a key of DTYPES, or 'auto': bfloat16 on cuda, float32 elsewhere
    UserError: nothing there to load, no tokenizer, no end-of-text token.
    """
    if name.startswith(("/", "./", "../", "~", "runs/", "models/")) and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder")  # rather than ask the hub for it
    if (Path(name) / "checkpoint").is_dir():
        name = str(Path(name) / "checkpoint")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        if (Path(name) / "generation_config.json").is_file():  # a damaged one would be passed over, and its stop tokens
            GenerationConfig.from_pretrained(name)
    except UNREADABLE as error:
        raise UserError(f"--model {name}: cannot be loaded as a causal language model: {first_line(error)}") from None
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"--model {name}: {len(missing)} of its weights are not in its files, {missing[0]} for one")
    if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):  # transformers would make an empty one
        raise UserError(f"--model {name}: there is no tokenizer in the folder, save the model's tokenizer there too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"--model {name}: its tokenizer cannot be loaded: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-text token (eos_token), responses could not end")
    if tokenizer.eos_token_id >= (known := model.get_input_embeddings().num_embeddings):
        raise UserError(f"--model {name}: its tokenizer ends by token {tokenizer.eos_token_id}, but the model knows "
                        f"{known}: that tokenizer is another model's")
    model.config.use_cache = True
    return model.to(device).eval(), tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: what generation_config.json says (chat models end turns by a token of their
    own), and the tokenizer's end of text."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [] if ids is None else [ids])})


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of prompt and response together, or None where the model names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary Hugging Face folder: AutoModelForCausalLM and AutoTokenizer load it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def response_logprobs(
    model: PreTrainedModel, ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, temperature: float = 1.0
) -> Tensor:
    """(B, T) ids padded on the right -> (B, N) float32: log-prob of each response token, 0 past a row's end.

    prompt_lengths, lengths: (B,), tokens of the prompt, and of prompt and response together
    temperature: the sampler's, so that the distribution is the one that was sampled from
    No mask: attention is causal, and padding stands after everything that it could be seen from.
    """
    first = int(prompt_lengths.min()) - 1  # the logits at a position predict the token at the next
    width = int((lengths - prompt_lengths).max())
    columns = torch.arange(first, int(lengths.max()) - 1, device=ids.device)
    logits = model(ids, use_cache=False, logits_to_keep=columns).logits.float() / temperature
    token_logprobs = torch.gather(logits, 2, ids[:, columns + 1, None])[:, :, 0] - logits.logsumexp(-1)
    offset = torch.arange(width, device=ids.device)
    inside = offset < (lengths - prompt_lengths)[:, None]  # (B, N), from lengths: pad may equal EOS
    index = (prompt_lengths[:, None] - 1 - first + offset).clamp(max=len(columns) - 1)
    return torch.where(inside, token_logprobs.gather(1, index), 0.0)


@torch.no_grad()
def rollout_logprobs(model: PreTrainedModel, rollout, tokens: int, temperature: float) -> Tensor:
    """(B, N) log-probs of all responses of a rollout under another model, or under the learner's arithmetic."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in micro_batches(rollout.lengths.cpu(), tokens):
        part = response_logprobs(model, *rollout.rows(rows), temperature)
        logprobs[rows.to(logprobs.device), : part.shape[1]] = part
    return logprobs


def micro_batches(lengths: Tensor, tokens: int) -> list[Tensor]:
    """(B,) lengths -> row indices, longest rows first, each batch at most `tokens` once padded (or one row)."""
    batches, batch, longest = [], [], 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        if batch and longest * (len(batch) + 1) > tokens:
            batches.append(torch.tensor(batch))
            batch = []
        longest = longest if batch else int(lengths[row])
        batch.append(row)
    return batches + ([torch.tensor(batch)] if batch else [])


def backward(
    model: PreTrainedModel, rollout, rows: Tensor, token_losses: Callable, then: Tensor, start: Tensor, weights: Tensor,
    factors: Tensor, tokens: int, temperature: float
) -> dict[str, float]:
    """Adds the gradient of the loss of some rows to the model's, in micro-batches: the same for any size of them.

    rows: (R,) indices into the rollout; token_losses: from loss.py's `choose`; weights, factors: (B,)
    then, start: (B, N) log-probs of the policy that sampled and of the reference
    -> loss, and over the tokens: largest gap to the sampler's log-probs, mean and largest ratio, share clipped
    """
    now, clipped, loss = torch.zeros_like(then), torch.zeros_like(then, dtype=torch.bool), 0.0
    inside = torch.arange(then.shape[1], device=then.device) < rollout.response_lengths[:, None]  # (B, N)
    for micro in micro_batches(rollout.lengths[rows].cpu(), tokens):
        index = rows[micro.to(rows.device)]
        logprobs = response_logprobs(model, *rollout.rows(index), temperature)
        part = index, slice(logprobs.shape[1])
        losses, clipped[part] = token_losses(logprobs, then[part], start[part], weights[index, None], inside[part])
        micro_loss = (losses.sum(1) * factors[index]).sum()
        micro_loss.backward()
        loss += micro_loss.item()
        now[part] = logprobs.detach()
    gap, ratio = (now - rollout.logprobs)[rows].abs(), (now - then).exp()[rows][inside[rows]]
    return {"loss": loss, "sampler_gap": gap.max().item(), "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(), "clip_share": clipped[rows][inside[rows]].float().mean().item()}


def learning_rate(step: int, lr: float, warmup_steps: int, steps: int) -> float:
    """Steps count from 1. Rises to `lr` over the warm-up, then falls in a straight line to a tenth at the last step."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    return lr * (1 - 0.9 * (step - warmup_steps) / max(1, steps - warmup_steps))


class Optimizer:
    """AdamW on float32 masters. bfloat16 weights keep 8 bits: nearly every update of an RL step is too small to change
    one, so updates are made on float32 copies and copied back. Float32 weights are their own masters."""

    def __init__(self, model: PreTrainedModel, weight_decay: float):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = [
            weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()
            for weight in self.weights
        ]
        self.adam = torch.optim.AdamW(self.masters, weight_decay=weight_decay, fused=True)
        for weight, master in zip(self.weights, self.masters):
            if weight is not master:
                weight.register_post_accumulate_grad_hook(lambda weight, master=master: self.collect(weight, master))

    @staticmethod
    def collect(weight: Tensor, master: Tensor) -> None:
        """Micro-batches add up in float32; the bfloat16 gradient is freed at once."""
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    def step(self, lr: float, max_grad_norm: float, loss: float = 0.0) -> float:
        """One AdamW step (arXiv 1711.05101) on the gradients collected. Returns their norm before clipping; if that or
        the loss is not finite, the gradients are dropped, and nan is returned."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        if not math.isfinite(norm + loss):
            self.adam.zero_grad()
            return math.nan
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters):
                if weight is not master:
                    weight.copy_(master)
        return norm.item()

    def state_dict(self) -> dict:
        copies = [master.detach() for weight, master in zip(self.weights, self.masters) if weight is not master]
        return {"adam": self.adam.state_dict(), "masters": copies}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        copies = [master for weight, master in zip(self.weights, self.masters) if weight is not master]
        with torch.no_grad():
            for master, saved in zip(copies, state["masters"], strict=True):
                master.copy_(saved)
