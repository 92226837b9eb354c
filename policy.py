"""The policy: loading and saving it with its tokenizer, adapters, stop tokens.

A policy is any causal language model that transformers loads. It stays in eval mode throughout:
dropout would make the trained policy another one than the sampling policy."""

import os
import random
from dataclasses import replace
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

from lib.checks import check_causal
from lib.files import find_model
from lib.flags import UserError, first_line
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
    return torch.device(name)


@phase("loading {}")
def load_policy(
    name, device, dtype="auto", in_4_bits=False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face name, a model folder or a run folder (its checkpoint) -> (model in eval mode,
    tokenizer). A folder may hold an adapter: then the model is its base model with the adapter.

    dtype:     a key of DTYPES, or 'auto': bfloat16 on cuda, float32 elsewhere
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
        dtype = "bfloat16" if device.type == "cuda" else "float32"
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
    return replace(config, lr=lr, dtype=str(policy.dtype).removeprefix("torch."))


def load_reference(config, policy) -> PreTrainedModel | None:
    """The model that the run started from, also after --resume; None where no KL is wanted. With
    lora_rank it is the policy, whose adapter the learner leaves out."""
    if not (config.kl_beta or config.log_kl):
        return None
    if config.lora_rank:
        return policy
    return load_policy(config.model, policy.device, config.dtype)[0]


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the tokenizer's end of text, and what
    generation_config.json says (chat models end their turns with a token of their own)."""
    ids = model.generation_config.eos_token_id or []
    ids = ids if isinstance(ids, list) else [ids]
    if not {*map(type, ids)} <= {int}:
        raise UserError(f"model {model.name_or_path}: its eos_token_id {ids} is not a number")
    return sorted({tokenizer.eos_token_id, *ids})


def save_policy(model, tokenizer, folder) -> None:
    """Writes an ordinary Hugging Face folder, or of an adapted model only the adapter, as peft has
    it."""
    tokenizer.save_pretrained(folder)
    if adapted_layers(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


def default_learning_rate(model, lora_rank) -> float:
    """2e-4 for models under 10 M parameters, 1e-5 for an adapter, else 1e-6."""
    if model.num_parameters() < 10e6:
        return 2e-4
    return 1e-5 if lora_rank else 1e-6
