"""Out of memory: what to do when it happens, and gradient checkpointing to avoid it."""

import warnings

import torch
from tqdm import tqdm

from lib.flags import UserError


def is_out_of_memory(error) -> bool:
    """Lack of memory has other names where cuBLAS or a CUDA graph is the first to notice it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    names = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in names)


class Memory:
    """Sizes that affect memory only, and are halved where the GPU runs out of it.

    sizes:    by name, as {"micro_batch_tokens": 4096}: the sizes in use
    halved:   the sizes that were halved: a part of what a run remembers
    cleanups: functions that free memory, and leave what other threads use
    """

    def __init__(self, halved, **sizes):
        self.halved = halved
        self.sizes = {name: min(size, halved.get(name, size)) for name, size in sizes.items()}
        self.cleanups = []

    def run(self, work, name, least=1, undo=None):
        """work(size), with the size of that name. Where the GPU runs out of memory: again with half
        of it, and so on; later calls start with the size that was small enough.

        least: no smaller size would help
        undo:  drops what a failed attempt has left behind
        """
        while True:
            size = self.sizes[name]
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size <= least:
                    raise UserError(
                        f"--{name} {size}: out of memory, and less would not help; shorter "
                        "responses, --gradient_checkpointing, --offload, --lora_rank 16 and with "
                        "it --load_in_4bit take less"
                    ) from None
            # outside the except block: the traceback no longer keeps tensors alive
            for cleanup in [*self.cleanups, undo]:
                if cleanup:
                    cleanup()
            torch.cuda.empty_cache()
            self.sizes[name] = self.halved[name] = max(least, size // 2)
            tqdm.write(f"out of memory: --{name} is {self.sizes[name]} from now on")


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
