"""The policy: loading and saving it with its tokenizer, log-probs of its responses, the optimizer.

A policy is any causal language model that transformers loads. It stays in eval mode throughout: dropout would make the
policy that learns another one than the policy that sampled.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
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
    """An ordinary Hugging Face folder: AutoModelForCausalLM and AutoTokenizer load it. An adapter is merged into the
    weights, and saved by itself in folder/adapter as peft has it."""
    tokenizer.save_pretrained(folder)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    if not layers:
        model.save_pretrained(folder)
        return
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()
               if ".lora_" not in name}
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict=weights)
    model.save_pretrained(folder / "adapter")


def add_adapter(model: PreTrainedModel, rank: int, saved: Path | None = None) -> None:
    """Low-rank adapters on all linear layers of the body, alpha 32, are all that learns from here on. LoRA, 2106.09685.

    saved: a folder with the weights to go on from; else they start as no change, from torch's random state
    UserError: the package peft is missing.
    """
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError:
        raise UserError(f"--lora_rank {rank}: needs the package peft, install it by: pip install peft") from None
    model.add_adapter(LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear"))
    if saved:
        set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before `add_adapter`, within the block. A model without one stays as it is."""
    adapted = any(hasattr(layer, "get_delta_weight") for layer in model.modules())
    if adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            model.enable_adapters()


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


class Optimizer:
    """AdamW on float32 masters. bfloat16 weights keep 8 bits: nearly every update of an RL step is too small to change
    one, so updates are made on float32 copies and copied back. Float32 weights are their own masters.

    offload: masters, gradients and moments live in the host's memory; 16 bytes a parameter less on the GPU
    """

    def __init__(self, model: PreTrainedModel, weight_decay: float, offload: bool = False):
        def master(weight: Tensor) -> Tensor:
            if weight.dtype == torch.float32 and not offload:
                return weight
            home = "cpu" if offload else weight.device
            pinned = offload and weight.is_cuda
            copy = torch.empty(weight.shape, dtype=torch.float32, device=home, pin_memory=pinned)
            return copy.copy_(weight.detach()).requires_grad_()

        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = [master(weight) for weight in self.weights]
        self.adam = torch.optim.AdamW(self.masters, weight_decay=weight_decay, fused=True)
        for weight, master in zip(self.weights, self.masters):
            if weight is not master:
                weight.register_post_accumulate_grad_hook(lambda weight, master=master: self.collect(weight, master))

    @staticmethod
    def collect(weight: Tensor, master: Tensor) -> None:
        """Micro-batches add up in float32, where the master is; the weight's own gradient is freed at once."""
        gradient = weight.grad.to(master.device, torch.float32)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    def drop(self) -> None:
        """Forgets the gradients collected."""
        for weight in (*self.weights, *self.masters):
            weight.grad = None

    def step(self, lr: float, max_grad_norm: float, loss: float = 0.0) -> float:
        """One AdamW step (arXiv 1711.05101) on the gradients collected. Returns their norm before clipping; if that or
        the loss is not finite, the gradients are dropped, and nan is returned."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        if not math.isfinite(norm + loss):
            self.drop()
            return math.nan
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.drop()
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


def learning_rate(step: int, lr: float, warmup_steps: int, steps: int) -> float:
    """Steps count from 1. Rises to `lr` over the warm-up, then falls in a straight line to a tenth at the last step."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    return lr * (1 - 0.9 * (step - warmup_steps) / max(1, steps - warmup_steps))
