"""Out of memory: what to do when it happens, and gradient checkpointing to avoid it."""

import warnings
from collections import ChainMap

import torch
from tqdm import tqdm

from lib.flags import UserError


def is_out_of_memory(error) -> bool:
    """Lack of memory has other names where cuBLAS or a CUDA graph is the first to notice it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    names = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in names)


def halve_on_oom(work, *arguments, sizes, name, least=1, undo=None, **options):
    """work(*arguments, **options), with sizes[name] as one more option of that name. Where the GPU
    runs out of memory: again with half the size, and so on; sizes[name] stays as small as that.

    least: no smaller size would help
    undo:  drops what a failed attempt has left behind, so that nothing is counted twice
    """
    while True:
        try:
            return work(*arguments, **options, **{name: sizes[name]})
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if sizes[name] <= least:
                raise UserError(
                    f"--{name} {sizes[name]}: out of memory, and less would not help; shorter "
                    "responses, --gradient_checkpointing, --offload, --lora_rank 16 and with it "
                    "--load_in_4bit take less"
                ) from None
        # outside the except block: the traceback no longer keeps tensors alive
        if undo:
            undo()
        torch.cuda.empty_cache()
        sizes[name] = max(least, sizes[name] // 2)
        tqdm.write(f"out of memory: --{name} is {sizes[name]} from now on")


def remember_halved(sizes, halved) -> ChainMap:
    """The sizes to start with: the flags' `sizes`, or the smaller ones a resumed run remembers.

    halved: a part of the run's state. A size that is set later is written into it."""
    for name in halved:
        halved[name] = min(halved[name], sizes[name])
    return ChainMap(halved, sizes)


def enable_gradient_checkpointing(model) -> None:
    """Layers recompute their activations in the backward pass. transformers does that only in train
    mode, which also drops the KV cache: so only the layers are put into it, for passes with a
    gradient."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it gets another name
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]

    def set_mode(*args) -> None:
        for layer in layers:
            layer.training = torch.is_grad_enabled()

    model.base_model.register_forward_pre_hook(set_mode)
    model.recomputes_activations = True  # engine/logprobs.py: such a model cannot share prompts
