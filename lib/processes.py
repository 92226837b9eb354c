"""Several processes that train together, one on each GPU, started by torchrun (docs/scale.md). Each
holds the whole model and does its share of a step's prompts and rows. In a single process, the
usual case, nothing here does anything."""

import io
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import wraps

import torch

from lib.flags import TORCHRUN

if TORCHRUN:
    import torch.distributed as dist
PATIENCE = timedelta(hours=1)  # how long a process waits for the others before it gives up


def together(main):
    """main(config), run in all processes, of which only the first one prints."""

    @wraps(main)
    def run(config):
        if not TORCHRUN:
            return main(config)
        backend = "gloo"
        if config.device in ("auto", "cuda") and torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise OSError(f"--nproc_per_node: at most {gpus}, the GPUs of this machine")
            torch.cuda.set_device(local)  # the GPU that "cuda" means from here on
        dist.init_process_group(backend, timeout=PATIENCE)
        quiet = None if is_first() else open(os.devnull, "w")  # noqa: SIM115
        with redirect_stdout(quiet or sys.stdout), redirect_stderr(quiet or sys.stderr):
            result = main(config)
        dist.destroy_process_group()  # not after an error: it might wait for the others
        return result

    return run


def processes() -> int:
    return dist.get_world_size() if TORCHRUN and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return processes() == 1 or dist.get_rank() == 0


def share(items):
    """This process's part of a list or tensor. The parts of all, in order, are the whole: of 5
    items, two processes get the first 2 and the last 3."""
    n = processes()
    rank = dist.get_rank() if n > 1 else 0
    return items[len(items) * rank // n : len(items) * (rank + 1) // n]


def gather(thing) -> list:
    """What each process gives, in order: all get the same list, with tensors on their own GPU.

    thing: tensors, numbers, texts; lists, tuples and dicts of them"""
    if processes() == 1:
        return [thing]
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    sent = [None] * processes()
    with others_alive():
        dist.all_gather_object(sent, buffer.getvalue())
    return [torch.load(io.BytesIO(one), to_own_gpu, weights_only=True) for one in sent]


def to_own_gpu(storage, device):
    return storage.cuda() if device.startswith("cuda") else storage


def sum_gradients(gradients, parameters) -> list:
    """Adds up the gradients of all processes, in place: None for a parameter that has one
    nowhere."""
    if processes() == 1:
        return gradients
    found = gather([gradient is not None for gradient in gradients])
    summed = list(gradients)
    for i, has in enumerate(zip(*found)):
        if summed[i] is None and any(has):
            summed[i] = torch.zeros_like(parameters[i], dtype=torch.float32)
    present = [gradient for gradient in summed if gradient is not None]
    with others_alive():  # one by one, without a copy of all
        for sending in [dist.all_reduce(gradient, async_op=True) for gradient in present]:
            sending.wait()
    return summed


@contextmanager
def others_alive():
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended") from error
