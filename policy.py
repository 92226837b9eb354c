"""The policy: loading and saving it with its tokenizer, adapters, stop tokens.

A policy is any causal language model that transformers loads. It stays in eval mode throughout:
dropout would make the trained policy another one than the sampling policy."""

import math
import os
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lib.checks import check_causal, freeze_unused
from lib.files import find_model
from lib.flags import UserError, first_line
from lib.head import float32_logits
from lib.lora import adapted_layers, add_adapter, find_base, load_adapter, save_adapter
from lib.progress import phase

logging.disable_progress_bar()  # of loading and saving: they garble the bar of the steps
THREADS = torch.get_num_threads()
DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name) -> torch.device:
    """'auto' -> cuda, else mps, else cpu. UserError if the named one is not available."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise UserError(f"--device {name}: not available on this machine, try --device auto")
    # Hopper and Blackwell prefer the attention of cuDNN, whose backward pass may give nan with a
    # mask (pytorch issue 196678), and which plans anew for each new shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


@cache  # says its sentence once
def pick_dtype(device) -> str:
    """bfloat16 on a GPU that has units for it."""
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    print(f"{torch.cuda.get_device_name()} has no units for bfloat16: --dtype float32")
    return "float32"


@phase("loading {}")
def load_policy(
    name, device, dtype="auto", in_4_bits=False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face name, a model folder or a run folder (its checkpoint) -> (model in eval mode,
    tokenizer). A folder may hold an adapter: then the model is its base model with the adapter.

    dtype:     a key of DTYPES, or 'auto': bfloat16 on a GPU that has units for it, else float32
    in_4_bits: the linear layers are; as an adapter's are if they were in its training
    UserError: it cannot be loaded, parameters are missing, the tokenizer does not fit,
               or the model cannot be a policy (lib/checks.py)
    """
    name = find_model(name)
    folder = Path(name)
    if (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
        name = str(folder)
    if dtype == "auto":
        dtype = pick_dtype(device)
    try:
        base, options = find_base(name, in_4_bits, device, DTYPES[dtype])
        model, info = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if (Path(base) / "generation_config.json").is_file():
            # from_pretrained ignores a corrupt one, and its stop tokens would be lost
            GenerationConfig.from_pretrained(base)
        load_adapter(model, folder)
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            raise OSError("there is no tokenizer in the folder")  # it would be an empty one
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        reason = f"cannot be loaded as a causal language model: {first_line(error)}"
        raise UserError(f"model {name}: {reason}") from None
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        count = f"{len(missing)} of its parameters are not in its files"
        raise UserError(f"model {name}: {count}, {missing[0]} for one")
    eos = tokenizer.eos_token_id
    vocabulary = model.get_input_embeddings().num_embeddings
    if eos is None:
        raise UserError(
            f"model {name}: its tokenizer has no end-of-text token (eos_token), so "
            "responses could not end"
        )
    if eos >= vocabulary:
        raise UserError(
            f"model {name}: its tokenizer ends by token {eos}, but the model knows "
            f"{vocabulary}: that tokenizer is another model's"
        )
    if device.type == "cpu" and not os.environ.get("OMP_NUM_THREADS"):
        # with small matrices threads would mostly wait for each other
        torch.set_num_threads(1 if model.num_parameters() < 10e6 else THREADS)
    model.to(device).eval()
    check_causal(name, model)
    if frozen := freeze_unused(model):
        print(f"{name}: {frozen / 1e6:,.2f} M parameters for images or sound are not trained")
    float32_logits(model)
    return model, tokenizer


def start_policy(config, checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy that a run trains, as it starts or resumes, and its tokenizer.

    config: train.Config; with lora_rank the policy is the base model with an adapter
    checkpoint: the folder to resume from, or None
    """
    name = config.model if config.lora_rank or not checkpoint else str(checkpoint)
    device = pick_device(config.device)
    policy, tokenizer = load_policy(name, device, config.dtype, config.load_in_4bit)
    torch.manual_seed(config.seed)  # for a new adapter and rewards; sampling has its own generators
    random.seed(config.seed)
    add_adapter(policy, config.lora_rank, checkpoint)
    return policy, tokenizer


def fill_in(config, policy):
    """The config of a run, with the values that its flags leave to the model."""
    lr = config.lr or default_learning_rate(policy, config.lora_rank)
    warmup_steps = config.warmup_steps
    if warmup_steps < 0:
        warmup_steps = default_warmup(config.steps)
    dtype = str(policy.dtype).removeprefix("torch.")
    return replace(config, lr=lr, warmup_steps=warmup_steps, dtype=dtype)


def load_reference(config, policy) -> PreTrainedModel | None:
    """The model that the run started from, also after --resume; None where no KL is wanted. With
    lora_rank it is the policy, whose adapter the learner leaves out."""
    if not (config.kl_beta or config.log_kl):
        return None
    if config.lora_rank:
        return policy
    return load_policy(config.model, policy.device, config.dtype)[0]


def stop_ids(model, tokenizer, stop="") -> list[int]:
    """Every token that ends a response: the tokenizer's end of text, what generation_config.json
    says, the token that the chat template puts after an assistant's turn, and those of --stop."""
    ids = model.generation_config.eos_token_id or []
    ids = ids if isinstance(ids, list) else [ids]
    if not {*map(type, ids)} <= {int}:
        raise UserError(f"model {model.name_or_path}: its eos_token_id {ids} is not a number")
    known = tokenizer.get_added_vocab()
    for token in stop.split():
        if token not in known:
            few = ", ".join(list(known)[:9])
            raise UserError(f"--stop {token}: not a token of its own, as {few} are")
        ids = [*ids, known[token]]
    return sorted({tokenizer.eos_token_id, *ids, *end_of_turn(tokenizer)})


def end_of_turn(tokenizer) -> list[int]:
    """The token that the chat template puts after an assistant's turn, if it has one of its own."""
    if tokenizer.chat_template is None:
        return []
    question = {"role": "user", "content": "1+1?"}
    turn = {"role": "assistant", "content": "It is two."}
    try:
        text = tokenizer.apply_chat_template([question, turn], tokenize=False)
    except Exception:  # of jinja2, or of what a template calls; a prompt will tell
        return []
    _, found, rest = text.rpartition(turn["content"])
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    added = set(tokenizer.get_added_vocab().values())
    return [id for id in ids[:1] if id in added]


def save_policy(model, tokenizer, folder) -> None:
    """Writes an ordinary Hugging Face folder, or of an adapted model only the adapter, as peft has
    it."""
    tokenizer.save_pretrained(folder)
    if adapted_layers(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


LEARNING_RATES = [  # parameters below, of the whole model, of an adapter
    (10e6, 2e-4, 2e-4),
    (200e6, 3e-5, 3e-4),
    (1e9, 1e-5, 1e-4),
    (math.inf, 5e-6, 3e-5),
]


def default_learning_rate(model, lora_rank) -> float:
    """Smaller models want larger steps, and an adapter about ten times those of the whole model.
    Measured and published rates: docs/real-model.md"""
    size = model.num_parameters()
    for limit, whole, adapter in LEARNING_RATES:
        if size < limit:
            return adapter if lora_rank else whole


def default_warmup(steps) -> int:
    """A tenth of the steps, at most 10: a long warm-up would take most of a short run."""
    return min(10, math.ceil(steps / 10))
