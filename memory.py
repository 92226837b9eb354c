"""How much memory a run will take, by its flags: train.py shows it when it starts, this script before you start.

    python memory.py Qwen/Qwen2.5-0.5B-Instruct --prompts_per_step 8 --memory_gb 12      # fetches config.json alone
    python memory.py qwen2.5-1.5b --offload                                              # a shape by name: no download
"""

import os
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.pytorch_utils import Conv1D

from flags import UserError, need, run_script
from policy import DTYPES, first_line, pick_device
from update import TILE

TINY = dict(model_type="llama", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=352, vocab_size=100, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)
QWEN = dict(model_type="qwen2", num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768,
            tie_word_embeddings=True)
SHAPES = {
    "tiny": TINY,
    "tiny-32k": TINY | {"vocab_size": 32000},
    "qwen2.5-0.5b": QWEN | dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864),
    "qwen2.5-1.5b": QWEN | dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960),
}
CURES = (("micro_batch_tokens", 4096), ("micro_batch_tokens", 2048), ("gradient_checkpointing", True),
         ("rows_at_once", 64), ("offload", True), ("lora_rank", 16))  # what costs least first


@dataclass(frozen=True)
class Config:  # those flags of train.py that memory depends on, with the same defaults
    prompts_per_step: int = HfArg(default=8, help="P, prompts a step")
    group_size: int = HfArg(default=16, help="G, responses sampled to each prompt")
    max_new_tokens: int = HfArg(default=512, help="tokens after which a response is cut")
    rows_at_once: int = HfArg(default=0, help="responses sampled at once, the others wait; 0 for all")
    micro_batch_tokens: int = HfArg(default=4096, help="tokens in one forward pass of the update")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank alone, 0 trains all weights")
    offload: bool = HfArg(default=False, help="keep the optimizer in the host's memory")
    gradient_checkpointing: bool = HfArg(default=False, help="keep the layers' inputs alone, and run them twice")
    log_kl: bool = HfArg(default=False, help="with a reference: a second copy of the weights")
    # of this script alone
    longest_prompt: int = HfArg(default=256, help="tokens of the longest prompt")
    dtype: Literal["float32", "bfloat16"] = HfArg(default="bfloat16", help="of the weights")
    memory_gb: float = HfArg(default=0.0, help="what the device has; 0 takes that of this machine")


def shape(name: str, **changes) -> PreTrainedConfig:
    """The config of a model of that shape, with random weights to come: nothing is downloaded."""
    return AutoConfig.for_model(**{**SHAPES[name], **changes})


def cache_bytes(config: PreTrainedConfig, bytes_each: int) -> int:
    """Of one token of one row: 2 (keys, values) x layers x KV heads x head size x bytes. Qwen2.5-0.5B in bfloat16:
    2 * 24 * 2 * 64 * 2 = 12,288."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * bytes_each


def trained_parameters(model: PreTrainedModel, lora_rank: int) -> int:
    """All, or rank * (inputs + outputs) of each linear layer but the head."""
    if not lora_rank:
        return model.num_parameters()
    return sum(lora_rank * sum(module.weight.shape) for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear | Conv1D) and "lora_" not in name
               and module is not model.get_output_embeddings())


def kept_bytes(model: PreTrainedModel, tokens: int = 64) -> float:
    """What a forward pass keeps for the backward pass, in bytes a token: counted in a pass of one short row."""
    sizes, alive = {weight.untyped_storage()._cdata: 0 for weight in model.parameters()}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # or another would get its address
        sizes.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=False, logits_to_keep=1)
    return sum(sizes.values()) / tokens


def estimate(flags: Config, model: PreTrainedModel, kept: float, longest_prompt: int) -> dict[str, float]:
    """-> bytes by purpose: 'sampling' and 'update' take turns, what is 'host' is not on the device; keys and values
    stay where they are for the next rollout. kept: of `kept_bytes`."""
    config, bytes_each = model.config.get_text_config(), model.dtype.itemsize
    rows, width = flags.prompts_per_step * flags.group_size, longest_prompt + flags.max_new_tokens
    tokens = max(width, min(flags.micro_batch_tokens, rows * width))
    at_once = min(rows, flags.rows_at_once or rows)
    trained, host = trained_parameters(model, flags.lora_rank), ", host" if flags.offload else ""
    head = 0 if flags.lora_rank else config.hidden_size * config.vocab_size  # its gradient is summed up on the way
    if flags.gradient_checkpointing:  # the input of each layer, and one layer in full
        kept = config.num_hidden_layers * config.hidden_size * bytes_each + kept / config.num_hidden_layers
    copies = 2 if model.dtype == torch.float32 else 3  # float32 weights are their own masters
    return {
        "weights": model.num_parameters() * bytes_each * (1 + (flags.log_kl and not flags.lora_rank)),
        f"optimizer{host}": 4 * copies * trained,
        "keys and values": at_once * width * cache_bytes(config, bytes_each),
        "sampling: logits": at_once * config.vocab_size * (4 + bytes_each),
        f"update: gradients{host}": 4 * trained,
        "update: activations": tokens * kept,
        "update: logits": min(TILE["cuda"], tokens) * config.vocab_size * (8 + 2 * bytes_each)
                          + head * (4 + bytes_each),
    }


def peak(parts: dict[str, float]) -> float:
    """The most bytes that are on the device at one time."""
    here = {name: size for name, size in parts.items() if "host" not in name}
    turns = [sum(here[name] for name in here if name.startswith(phase)) for phase in ("sampling", "update")]
    return sum(here.values()) - min(turns)


def device_memory(device: torch.device) -> int:
    """Bytes that the device, or the host where it is a CPU, has for us."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(config, model: PreTrainedModel, device: torch.device, longest_prompt: int) -> str:
    """Lines for the start of a run, each ended. '' where it takes less than a tenth of the memory: nobody has to know.

    config: train.Config or this file's; model may be without storage (FakeTensorMode). Not counted: a reward model.
    """
    flags = Config(*(getattr(config, field.name, field.default) for field in fields(Config)))
    flags = replace(flags, log_kl=flags.log_kl or getattr(config, "kl_beta", 0) > 0)
    kept, has = kept_bytes(model), flags.memory_gb * 1e9 or device_memory(device)
    parts = estimate(flags, model, kept, longest_prompt)
    if peak(parts) < 0.1 * has:
        return ""
    rows = {**parts, "at most at one time": peak(parts), f"{'the card' if flags.memory_gb else device.type} has": has}
    lines = [f"memory in GB: {model.num_parameters() / 1e6:,.1f} M parameters, {flags.prompts_per_step} x "
             f"{flags.group_size} rows of up to {longest_prompt} + {flags.max_new_tokens} tokens",
             *(f"    {name:28}{size / 1e9:8.2f}" for name, size in rows.items())]


    def after(changes: tuple) -> float:
        return peak(estimate(replace(flags, **dict(changes)), model, kept, longest_prompt))

    ways = [changes for count in range(len(CURES) + 1) for changes in combinations(CURES, count)]
    ways.sort(key=lambda changes: "lora_rank" in dict(changes))  # last: it alone changes what is learnt
    changes = next((changes for changes in ways if after(changes) < 0.9 * has), None)  # a tenth for what is not counted
    if changes is None:
        lines.append("This is too much, whatever the flags: take a smaller model.")
    elif changes:
        text = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in changes)
        lines.append(f"This may not fit. With {text} it takes {after(changes) / 1e9:.2f}.")
    return "\n".join(lines) + "\n"


def main(config: Config, model: str) -> None:
    need(config, 1, "prompts_per_step group_size max_new_tokens micro_batch_tokens longest_prompt")
    need(config, 0, "lora_rank memory_gb")
    try:
        model_config = shape(model) if model in SHAPES else AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: neither one of {', '.join(SHAPES)} nor a model with a config.json: "
                        f"{first_line(error)}") from None
    with FakeTensorMode():  # all shapes, no storage
        empty = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[config.dtype]).eval()
        text = table(config, empty, pick_device("auto"), config.longest_prompt)
    print(text or "Less than a tenth of the memory.")


if __name__ == "__main__":
    run_script(main, Config, __doc__, model=dict(help="model folder, Hugging Face name, or a name in SHAPES"))
