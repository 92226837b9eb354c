"""Low-rank adapters (LoRA, arXiv 2106.09685) by the package peft: only they are trained.

peft is called directly: transformers' own integration refuses versions of it that work.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lib.flags import UserError

PEFT_PREFIX = "base_model.model."  # of the names in the file of an adapter


def add_adapter(model, rank, saved=None) -> None:
    """From now on only adapters on all linear layers of the body are trained, alpha 32.

    saved: folder of an adapter to resume from; otherwise freshly initialised, so that it changes
           nothing yet
    UserError: the package peft is missing
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError:
        raise UserError(
            f"--lora_rank {rank}: needs the package peft, install it by: pip install peft"
        ) from None
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=32, **options), model)
    if saved:
        adapter = load_file(saved / "adapter_model.safetensors")
        adapter = {name.removeprefix(PEFT_PREFIX): value for name, value in adapter.items()}
        set_peft_model_state_dict(model, adapter)


def adapted_layers(model) -> dict:
    """The layers that have an adapter, by name."""
    return {
        name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
    }


@contextmanager
def adapter_off(model) -> Iterator[None]:
    """Within the block the model is what it was before `add_adapter`. A model without an adapter
    stays as it is."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapted(model, folder) -> None:
    """Writes the model with its adapter merged into the parameters, and the adapter by itself."""
    merged, adapter = {}, {}
    for name, parameter in model.state_dict().items():
        if ".lora_" in name:
            adapter[PEFT_PREFIX + name.replace(".default", "")] = parameter.contiguous()
        else:
            merged[name.replace(".base_layer", "")] = parameter
    for name, layer in adapted_layers(model).items():
        weight = merged[f"{name}.weight"]
        change = layer.get_delta_weight("default")
        merged[f"{name}.weight"] = (weight.float() + change.float()).to(weight.dtype)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict=merged)
    model.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
