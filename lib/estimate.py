"""An estimate of the memory that a run takes, before it starts, with the shapes of a few models."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lib.flags import name_error
from lib.progress import phase

TILE = 512  # tokens whose logits are held at once on a GPU, see engine/logprobs.py
PROGRAM = 0.46e9  # bytes of a process with train.py, peft and a tokenizer of 49,152 tokens
MOMENTS = 2  # float32 numbers per trained parameter that AdamW keeps, see engine/optimizer.py

TINY = dict(
    model_type="llama",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=352,
    vocab_size=100,
    bos_token_id=None,
    eos_token_id=None,
)
QWEN = dict(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936)


def qwen(layers, heads, hidden_size, intermediate_size, **more) -> dict:
    return QWEN | dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        **more,
    )


SHAPES = {
    "tiny": TINY,
    "tiny-32k": TINY | {"vocab_size": 32000},
    "qwen2.5-0.5b": qwen(24, 14, 896, 4864),
    "qwen2.5-1.5b": qwen(28, 12, 1536, 8960),
    "qwen2.5-3b": qwen(36, 16, 2048, 11008),
    "qwen2.5-7b": qwen(
        28, 28, 3584, 18944, num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064
    ),
}
# bytes of a weight in 4 bits, as lib/lora.py has it (double quantisation, arXiv 2305.14314): for
# each 64 weights a scale of 8 bits, for each 256 scales one of 32 bits
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# what to suggest where it does not fit, in this order
SUGGESTIONS = {
    "micro_batch_tokens": 2048,
    "gradient_checkpointing": True,
    "rows_at_once": 64,
    "offload": True,
    "lora_rank": 16,
}


def shape(name, **changes) -> PreTrainedConfig:
    """The config of a model of that shape: nothing is downloaded."""
    return AutoConfig.for_model(**{**SHAPES[name], **changes})


def cache_bytes(config, bytes_each) -> int:
    """Bytes of the KV cache for one token of one row: 2 (keys, values) x layers x KV heads x head
    size x bytes. Qwen2.5-0.5B in bfloat16: 2 * 24 * 2 * 64 * 2 = 12,288. 0 for a model without
    attention: its state does not grow."""
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_size * bytes_each


def linear_layers(model) -> list[tuple[int, int]]:
    """(inputs, outputs) of each linear layer that gets an adapter: all except the head."""
    sizes = []
    for name, module in model.named_modules():
        if "lora_" in name or module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):  # also one in 4 bits
            sizes.append((module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            sizes.append(tuple(module.weight.shape))
    return sizes


def activation_bytes(model, tokens=64) -> float:
    """Bytes a token that a forward pass keeps for the backward pass, counted in a pass of one
    short row."""
    kept = []  # no backward pass follows, so the hook need not return the tensor
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        model(ids, use_cache=False, logits_to_keep=1)
    storages = [tensor.untyped_storage() for tensor in kept]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage()._cdata, None)
    kept.clear()  # Python does not see a cycle through the graph, and would never free the model
    return sum(sizes.values()) / tokens


def estimate(flags, model, activations, longest_prompt) -> dict[str, float]:
    """Bytes by purpose, from train.py's flags. 'sampling' and 'update' take turns; 'host' is not
    on the device.

    activations: from `activation_bytes`
    """
    config, bytes_each = model.config.get_text_config(), model.dtype.itemsize
    rows = flags.prompts_per_step * flags.group_size
    width = longest_prompt + flags.max_new_tokens
    rows_at_once = min(rows, flags.rows_at_once or rows)
    columns = rows_at_once * width + flags.prompts_per_step * longest_prompt
    # of a micro-batch: a prompt is run once for its rows, see engine/logprobs.py
    update_rows = max(1, min(rows, flags.micro_batch_tokens / width))
    prompts = min(flags.prompts_per_step, update_rows)
    if flags.gradient_checkpointing:
        prompts = update_rows
    tokens = prompts * longest_prompt + update_rows * flags.max_new_tokens
    copied = update_rows * width if prompts < update_rows else 0
    # attention with a mask writes keys and values out for each of its heads
    heads = getattr(config, "num_attention_heads", 1)
    copied *= heads / (getattr(config, "num_key_value_heads", None) or heads)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    parameters = model.num_parameters() - adapter
    linear = linear_layers(model)
    adapter = flags.lora_rank * sum(map(sum, linear))
    trained = adapter or parameters
    reference = 1 if (flags.kl_beta or flags.log_kl) and not flags.lora_rank else 0
    # the optimizer's moments, and float32 masters of bfloat16 parameters
    copies = MOMENTS
    if flags.adam_8bit:  # a byte each, and for 256 of them a float32 scale
        copies *= 1 / 4 + 1 / 256
    if model.dtype != torch.float32:
        copies += 1
    host = ", host" if flags.offload else ""
    weights = (parameters * (1 + reference) + adapter) * bytes_each
    if flags.load_in_4bit:  # one layer at a time is unpacked
        sizes = [*map(math.prod, linear)]
        weights -= sum(sizes) * (bytes_each - NF4) - max(sizes) * bytes_each
    head = 0 if flags.lora_rank else config.hidden_size * config.vocab_size
    layers = config.num_hidden_layers
    of_layer = activations / layers
    if flags.gradient_checkpointing:  # the input of each layer, and one layer in full
        activations = layers * config.hidden_size * bytes_each + of_layer
    activations += of_layer / 2  # and the gradients of some, measured in tests/test_memory.py
    # the logits of a decode step: CUDA graphs keep them during the update too
    graphs = "sampling" if model.dtype == torch.float32 else "graphs"
    logits = min(TILE, tokens) * config.vocab_size * (8 + 2 * bytes_each)
    return {
        "weights": weights,
        f"optimizer{host}": 4 * copies * trained,
        "keys and values": columns * cache_bytes(config, bytes_each),
        f"{graphs}: logits": rows_at_once * config.vocab_size * (4 + bytes_each),
        "update: gradients": 4 * trained,  # with --offload too: they add up on the device
        # and the keys and values of a shared prompt with those of each row
        "update: activations": tokens * activations + copied * cache_bytes(config, bytes_each),
        "update: logits": logits + head * (4 + bytes_each),  # and the gradient of the head
    }


def peak(parts) -> float:
    """The most bytes that are on the device at one time."""
    on_device = {name: size for name, size in parts.items() if "host" not in name}
    totals = []
    for other in ("update", "sampling"):
        totals.append(sum(on_device[name] for name in on_device if not name.startswith(other)))
    return max(totals)


def device_memory(device) -> float:
    """Bytes that a run may take on the device, including what this process has already. On a CPU it
    is the memory of the host that no other program uses: inf on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):
        return math.inf
    try:  # Linux
        [kilobytes] = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        own_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return int(kilobytes) * 1024 + own_pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@phase("estimating the memory")
def memory_table(flags, model, available, longest_prompt, program=0) -> str:
    """The estimate as lines for the screen, and a suggestion where it does not fit. '' where it is
    less than a tenth of what is available.

    flags: train.Config; model may be without storage (FakeTensorMode). Not counted: a reward model.
    program: bytes of Python and its packages, where the device is the CPU
    """
    if available == math.inf:
        return "memory: how much there is cannot be found out here, so there is no estimate\n"
    try:
        activations = activation_bytes(model)
        parts = estimate(flags, model, activations, longest_prompt)
        if program:
            parts["program"] = program
    except Exception as error:  # configs of all kinds
        return f"memory: no estimate for {type(model).__name__} ({name_error(error)})\n"
    if peak(parts) < 0.1 * available:
        return ""
    rows = {**parts, "at most at one time": peak(parts), "available": available}
    lines = [
        f"memory in GB: {model.num_parameters() / 1e6:,.1f} M parameters, {flags.prompts_per_step} "
        f"x {flags.group_size} rows of up to {longest_prompt} + {flags.max_new_tokens} tokens"
    ]
    lines += [f"    {name:28}{size / 1e9:8.2f}" for name, size in rows.items()]
    limit = 0.9 * available  # a tenth for what is not counted
    # each alone, all of them, and in 4 bits: the first that fits is suggested
    alone = [{name: value} for name, value in SUGGESTIONS.items()]
    options = [{}, *alone, SUGGESTIONS, SUGGESTIONS | {"load_in_4bit": True}]
    for changes in options:
        changed = replace(flags, **changes)
        needed = program + peak(estimate(changed, model, activations, longest_prompt))
        if needed < limit:
            break
    if needed >= limit:
        lines.append("This is too much, whatever the flags: take a smaller model.")
    elif changes:
        settings = " ".join(f"--{name} {value}" for name, value in changes.items())
        settings = settings.replace(" True", "")
        lines.append(f"This may not fit. With {settings} it takes {needed / 1e9:.2f}.")
    return "\n".join(lines) + "\n"
