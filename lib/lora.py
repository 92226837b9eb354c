"""Low-rank adapters (LoRA, arXiv 2106.09685) by the package peft: only they are trained. The base
model may be held in 4 bits (QLoRA, arXiv 2305.14314) by the package bitsandbytes.

A folder with an adapter holds adapter_model.safetensors, and adapter_config.json, which names the
base model. peft is called directly: transformers' own integration refuses versions of it that work.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_accelerate_available, is_bitsandbytes_available

from lib.checks import freeze_unused
from lib.flags import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names in the file of an adapter
IN_4_BITS = {"base_model": "nf4"}  # metadata of that file, if the base model was in 4 bits


def find_base(name, in_4_bits, device, dtype) -> tuple[str, dict]:
    """The name of the model to load, and options for `from_pretrained`. For a folder with an
    adapter this is its base model, in 4 bits if it was so in training."""
    folder = Path(name)
    if (folder / CONFIG).is_file():
        name = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        if Path(name).is_absolute() and not Path(name).exists():
            raise OSError(f"the base model of its adapter, {name}, is not there")
        with safe_open(folder / WEIGHTS, "pt") as file:
            in_4_bits |= file.metadata() == IN_4_BITS
    if not in_4_bits:
        return name, {}
    if not (is_bitsandbytes_available() and is_accelerate_available()):
        packages = "needs two packages, install them by: pip install bitsandbytes accelerate"
        raise UserError(f"--load_in_4bit: {packages}")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return name, {"quantization_config": quantisation, "device_map": {"": device}}


def import_peft():
    try:
        import peft
    except ImportError:
        raise UserError(
            "--lora_rank: adapters need the package peft, install it by: pip install peft"
        ) from None
    return peft


def add_adapter(model, rank, saved=None) -> None:
    """From now on only adapters on all linear layers of the body are trained, alpha 32. With rank 0
    nothing changes.

    saved: folder of an adapter to resume from; otherwise freshly initialised, so that it changes
           nothing yet
    UserError: the package peft is missing, or the model has an adapter already
    """
    base = model.name_or_path
    if adapted_layers(model):
        run = base.removesuffix("/checkpoint")
        raise UserError(
            f"model {run}: holds an adapter, but training starts from a whole model, which "
            f"this writes: python -m tools.merge {run}"
        )
    if not rank:
        return
    if saved:
        load_adapter(model, saved)
        freeze_unused(model)
        return
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).exists() else base,
    )
    peft.inject_adapter_in_model(config, model)
    freeze_unused(model)


def load_adapter(model, folder) -> None:
    """Adds the adapter in the folder, if there is one."""
    for layer in model.modules():
        # bitsandbytes would repack 4-bit weights on some CPUs: coarser, and without a gradient
        layer.support_avx512bf16_for_cpu = False
    if (folder / CONFIG).is_file():
        peft = import_peft()
        flags = json.loads((folder / CONFIG).read_text()) | {"inference_mode": False}
        config = peft.LoraConfig.from_peft_type(**flags)
        peft.inject_adapter_in_model(config, model)
        adapter = load_file(folder / WEIGHTS)
        adapter = {name.removeprefix(PEFT_PREFIX): value for name, value in adapter.items()}
        peft.set_peft_model_state_dict(model, adapter)
        model.name_or_path = str(folder)


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


def save_adapter(model, folder) -> None:
    """Writes the adapter as peft has it."""
    adapter = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapter[PEFT_PREFIX + name.replace(".default", "")] = parameter.contiguous()
    in_4_bits = getattr(model, "is_loaded_in_4bit", False)
    save_file(adapter, folder / WEIGHTS, IN_4_BITS if in_4_bits else None)
    model.peft_config["default"].save_pretrained(folder)


def save_merged(model, folder, dtype, convert) -> None:
    """Writes an ordinary Hugging Face folder, and uses the model up. The adapter is added to the
    parameters that it was trained on: 4-bit ones stay as coarse.

    convert: (float32 sum, its number) -> the same in dtype
    """
    peft = import_peft()
    base = model.peft_config["default"].base_model_name_or_path
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config.dtype = dtype
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    merged = model.state_dict()
    for i, (name, layer) in enumerate(adapted_layers(model).items()):
        linear = layer.base_layer
        weight = peft.utils.integrations.dequantize_module_weight(linear).detach()
        change = layer.get_delta_weight("default").detach()
        weight = convert(weight.float() + change.float(), i)
        # bitsandbytes has the layers of GPT-2 the other way round
        transposed = getattr(linear, "source_cls", None) is Conv1D
        merged[f"{name}.weight"] = weight.T.contiguous() if transposed else weight
        merged[f"{name}.bias"] = linear.bias
    merged = {name: merged[name].to(dtype) for name in plain.state_dict()}
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict=merged)
