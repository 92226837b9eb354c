"""The optimizer, on float32 master weights, which may live in the host's memory."""

import math
import weakref
from functools import partial

import torch
from torch import Tensor

from lib.flags import UserError
from lib.processes import sum_gradients
from tasks import stable_hash

PIECE = {"cuda": 1 << 26, "mps": 1 << 26, "cpu": 1 << 16}  # numbers that are rounded at once


class Optimizer:
    """bfloat16 parameters keep 8 bits: nearly every update of an RL step is too small to change
    one. So updates are made on float32 masters. The parameters are copies of these, rounded up or
    down at random: rounded to the nearest, they would stay where they are (docs/precision.md).
    Float32 parameters are their own masters.

    offload: masters and moments live in the host's memory: 12 bytes a parameter less on the GPU
    seed:    decides the rounding, together with the step and the number of the parameter. So a
             resumed run and all processes round alike
    in_8_bits: the moments are, by the package bitsandbytes: 6 bytes a parameter less
    """

    def __init__(self, model, weight_decay, offload=False, seed=0, in_8_bits=False):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [make_master(parameter, offload) for parameter in self.parameters]
        # AdamW is arXiv 1711.05101. Several optimizers would each have their own masters
        self.optimizers = [make_adamw(self.masters, weight_decay, in_8_bits)]
        self.seed = seed
        self.steps = 0
        self.staging = make_staging(self.parameters) if offload else None
        self.make_moments()
        # float32 sums of the gradients of bfloat16 parameters, on their device
        self.sums = [None] * len(self.parameters)
        add_gradient = weakref.WeakMethod(self.add_gradient)  # else nothing would ever be freed

        def collect(parameter, i):
            add = add_gradient()
            if add:  # None: another optimizer has this model now
                add(i, parameter)

        for i, parameter in enumerate(self.parameters):
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(partial(collect, i=i))

    def make_moments(self) -> None:
        """They would be allocated in the first step: if they do not fit, that shows now."""
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.update(lr=0.0)
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name == "step":
                        state[name] = 0 * value
                    elif not name.startswith("qmap"):  # the values of the 8-bit numbers
                        value.zero_()
        for master in self.masters:
            master.grad = None

    def add_gradient(self, i, parameter) -> None:
        """Micro-batches add up in float32. The parameter's own gradient is freed at once."""
        gradient = parameter.grad.float()
        parameter.grad = None
        self.sums[i] = gradient if self.sums[i] is None else self.sums[i].add_(gradient)

    def zero_grad(self) -> None:
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None
        self.sums = [None] * len(self.parameters)

    def update(self, lr) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def step(self, lr, max_grad_norm, loss=0.0) -> float:
        """One update from the gradients of the micro-batches. Returns their norm before clipping.
        If that or the loss is not finite, the gradients are dropped, nothing changes, and nan is
        returned."""
        self.steps += 1
        gradients = []
        for parameter, total in zip(self.parameters, self.sums):
            gradients.append(parameter.grad if total is None else total)
        gradients = sum_gradients(gradients, self.parameters)
        norm = clip(gradients, max_grad_norm)
        if not math.isfinite(norm + loss):
            self.zero_grad()
            return math.nan
        self.give_to_masters(gradients)
        self.update(lr)
        self.zero_grad()
        self.copy_masters()
        return norm.item()

    def give_to_masters(self, gradients) -> None:
        if not self.staging:
            for master, gradient in zip(self.masters, gradients):
                master.grad = gradient
            return
        for master, gradient, buffer in zip(self.masters, gradients, self.staging):
            if gradient is not None:
                master.grad = buffer.view(master.shape).copy_(gradient, non_blocking=True)
        if self.parameters[0].is_cuda:
            torch.cuda.current_stream().synchronize()  # one wait for all copies

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Parameters that are not their own masters get the new numbers."""
        for i, (parameter, master) in enumerate(zip(self.parameters, self.masters)):
            if parameter is master:
                continue
            values = master
            if parameter.dtype == torch.bfloat16:
                values = round_stochastically(master, self.seed, self.steps, i)
            if self.staging:  # what is pinned moves while the next one is rounded
                buffer = self.staging[i].view(parameter.dtype)[: master.numel()]
                values = buffer.view(master.shape).copy_(values)
            parameter.copy_(values, non_blocking=True)

    def state_dict(self) -> dict:
        masters = [
            master.detach()
            for parameter, master in zip(self.parameters, self.masters)
            if parameter is not master
        ]
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"optimizers": optimizers, "masters": masters, "steps": self.steps}

    def load_state_dict(self, state) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.state.clear()  # room for what is loaded
            optimizer.load_state_dict(saved)
        pairs = zip(self.parameters, self.masters)
        masters = [master for parameter, master in pairs if parameter is not master]
        with torch.no_grad():
            for master, saved in zip(masters, state["masters"], strict=True):
                master.copy_(saved)
        self.steps = state["steps"]


def make_adamw(masters, weight_decay, in_8_bits) -> torch.optim.Optimizer:
    """In 8 bits: arXiv 2110.02861; tensors of fewer than 4,096 numbers are in float32."""
    if not in_8_bits:
        return torch.optim.AdamW(masters, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--adam_8bit: needs a package, pip install bitsandbytes") from None
    return AdamW8bit(masters, weight_decay=weight_decay)


def make_master(parameter, offload) -> Tensor:
    if parameter.dtype == torch.float32 and not offload:
        return parameter
    device = "cpu" if offload else parameter.device
    master = torch.empty(parameter.shape, dtype=torch.float32, device=device)
    return master.copy_(parameter.detach()).requires_grad_()


def make_staging(parameters) -> tuple[Tensor, ...]:
    """A float32 buffer for each parameter in the host's memory, all parts of a single one. On their
    way to the masters gradients pass through it, and then the new parameters on their way back.
    Pinned memory, so that the GPU copies several at a time without a wait."""
    sizes = [parameter.numel() for parameter in parameters]
    return torch.empty(sum(sizes), pin_memory=parameters[0].is_cuda).split(sizes)


def clip(gradients, most) -> Tensor:
    """Scales the gradients, in place, to a norm of at most `most` -> their norm before."""
    present = [gradient for gradient in gradients if gradient is not None]
    norm = torch.nn.utils.get_total_norm(present)
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in present:
        gradient.mul_(scale)
    return norm


def round_stochastically(values, *key) -> Tensor:
    """Float32 -> bfloat16, up or down at random, so that the mean is the value: what lies a quarter
    of the way up is rounded up one time in four. Numbers that bfloat16 has stay as they are.

    key: numbers from which the random ones follow (Optimizer: seed, step, parameter)
    """
    seed = stable_hash("/".join(map(str, key)))
    generator = torch.Generator(values.device).manual_seed(seed)
    largest = torch.finfo(torch.bfloat16).max
    size = PIECE[values.device.type]
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for piece, target in zip(values.flatten().split(size), rounded.view(-1).split(size)):
        # four times 16 random bits in each number
        noise = torch.empty(len(piece) // 4 + 1, dtype=torch.int64, device=piece.device)
        noise = noise.random_(-(2**63), None, generator=generator).view(torch.int16)[: len(piece)]
        # a float32 is a bfloat16 and 16 bits below: added noise carries as often as they are large
        bits = noise.int().bitwise_and_(0xFFFF).add_(piece.view(torch.int32))
        up_or_down = bits.bitwise_and_(-0x10000).view(torch.float32)
        target.copy_(torch.where(piece.abs() <= largest, up_or_down, piece))  # else inf or nan
    return rounded
