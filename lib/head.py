"""Logits in float32, also of a model in bfloat16."""

from functools import partial

import torch
from torch import Tensor


def float32_logits(model) -> None:
    """The output head of a bfloat16 model gives float32 from now on. The product is summed in
    float32 in any case. Rounded to bfloat16, which keeps 8 bits, a logit of 16 would be off by up
    to 0.06, and in the sampler otherwise than in the learner. (docs/precision.md; arXiv 2506.13585)

    A head with a bias stays as it is.
    """
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and head.weight.dtype == torch.bfloat16:
        # a partial, so that a copy of the model computes with its own weight
        head.forward = partial(product, head)


def product(head, states) -> Tensor:
    """bfloat16 states (..., H) -> float32 logits (..., V)"""
    return Float32Product.apply(states, head.weight)


class Float32Product(torch.autograd.Function):
    """torch has no derivative of the product with `out_dtype`."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.save_for_backward(states, weight)
        if not states.is_cuda:
            return states.float() @ weight.float().T
        rows = torch.mm(states.flatten(0, -2), weight.T, out_dtype=torch.float32)
        return rows.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_states = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ states.flatten(0, -2)
        return grad_states, grad_weight
