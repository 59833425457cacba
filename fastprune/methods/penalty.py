"""A penalty in the loss whose gradient goes to ``.grad`` in one call, whatever the depth of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def penalty_of(
    value: Tensor, parameters: Sequence[Tensor], grads: Sequence[Tensor], weight: float | Tensor = 1.0
) -> Tensor:
    """``weight * value`` as a term of a loss, whose gradients are known.

    Handed to autograd, the gradients would be added one by one: a launch per parameter.  So ``torch.autograd.grad``
    does not see them; they are added to ``.grad`` at the end of the backward pass.

    Args:
        value: Scalar, without autograd.
        parameters: Leaves that require a gradient, at least one.
        grads: Of ``value`` with respect to each, of its shape; read in the backward, so not to be written until then.
        weight: Factor of value and gradients; a number, or () on their device, of the dtype of ``value``.
    """
    return _Penalty.apply(parameters[0], value, parameters, grads, weight)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, value, parameters, grads, weight):  # the anchor makes the backward run
        ctx.parameters, ctx.grads, ctx.weight = parameters, grads, weight
        return value * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        parameters, factor = ctx.parameters, dy * ctx.weight
        grads = torch._foreach_mul(list(ctx.grads), factor)

        def add() -> None:
            for w in parameters:
                if w.grad is None:
                    w.grad = torch.zeros_like(w)
            torch._foreach_add_([w.grad for w in parameters], grads)

        # Queued twice: DistributedDataParallel queues, after us, the callback that overwrites .grad with the mean.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(add))
        return None, None, None, None, None
