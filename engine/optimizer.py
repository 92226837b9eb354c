"""The optimizer, on float32 master weights, which may live in the host's memory."""

import math

import torch
from torch import Tensor

from lib.processes import sum_gradients


class Optimizer:
    """bfloat16 parameters keep 8 bits: nearly every update of an RL step is too small to change
    one, so updates are made on float32 masters and copied back. Float32 parameters are their own
    masters.

    offload: masters, gradients and moments live in the host's memory: 16 bytes a parameter less on
             the GPU
    """

    def __init__(self, model, weight_decay, offload=False):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [make_master(parameter, offload) for parameter in self.parameters]
        # AdamW is arXiv 1711.05101. Several optimizers would each have their own masters
        self.optimizers = [torch.optim.AdamW(self.masters, weight_decay=weight_decay, fused=True)]
        self.make_moments()
        for parameter, master in self.copies():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, master=master: move_gradient(parameter, master)
            )

    def make_moments(self) -> None:
        """They would be allocated in the first step: if they do not fit, that shows now."""
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.update(lr=0.0)
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for tensor in filter(torch.is_tensor, state.values()):
                    tensor.zero_()
        self.zero_grad()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters with their masters, where these are not the same tensor."""
        return [
            (parameter, master)
            for parameter, master in zip(self.parameters, self.masters)
            if parameter is not master
        ]

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def update(self, lr) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def step(self, lr, max_grad_norm, loss=0.0) -> float:
        """One update from the gradients of the micro-batches. Returns their norm before clipping.
        If that or the loss is not finite, the gradients are dropped, nothing changes, and nan is
        returned."""
        sum_gradients(self.masters)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        if not math.isfinite(norm + loss):
            self.zero_grad()
            return math.nan
        self.update(lr)
        self.zero_grad()
        with torch.no_grad():
            for parameter, master in self.copies():
                parameter.copy_(master)
        return norm.item()

    def state_dict(self) -> dict:
        masters = [master.detach() for _, master in self.copies()]
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"optimizers": optimizers, "masters": masters}

    def load_state_dict(self, state) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.state.clear()  # room for what is loaded
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            for (_, master), saved in zip(self.copies(), state["masters"], strict=True):
                master.copy_(saved)


def make_master(parameter, offload) -> Tensor:
    if parameter.dtype == torch.float32 and not offload:
        return parameter
    device = "cpu" if offload else parameter.device
    pinned = offload and parameter.is_cuda
    master = torch.empty(parameter.shape, dtype=torch.float32, device=device, pin_memory=pinned)
    return master.copy_(parameter.detach()).requires_grad_()


def move_gradient(parameter, master) -> None:
    """Micro-batches add up in float32, where the master is; the parameter's own gradient is freed
    at once."""
    gradient = parameter.grad.to(master.device, torch.float32)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
