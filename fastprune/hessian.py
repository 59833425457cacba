"""The diagonal of a loss's Hessian, exactly, for second-order scores."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastprune import backends


def hessian_diagonal(loss_fn: Callable[[], Tensor], params: Sequence[Tensor], chunk: int = 64) -> list[Tensor]:
    """Second derivative of a loss by every entry of ``params``, alone: the exact diagonal, nothing stochastic.

    One forward and one backward make the gradient with its graph; then ``chunk`` rows of the Hessian at a time come
    from one batched backward (:func:`torch.autograd.grad` with ``is_grads_batched=True``), each block only through what
    lies between the loss and its own tensor.  If an op in the graph cannot be batched, the rows are made one by one,
    with the same result, and a warning names the op.

    fastprune's ops run on their eager backend meanwhile, as compiled kernels have no batching rules.  Hooks and gate
    gradient buffers of the model see the additional backwards: take them off before, or do not trust them after.
    ``loss_fn`` runs once, so a norm in training mode updates its running statistics once.

    Args:
        loss_fn: No arguments; builds the loss, a scalar, with its graph.
        params: Gates, or any floating tensors that require grad and that the loss depends on.
        chunk: Rows per backward; the additional memory grows with it, by about ``chunk`` backwards' worth.

    Returns: Per tensor of ``params`` one of the same shape, dtype and device, without autograd; 0 where the loss is
        linear or does not depend on it.

    Raises:
        ValueError: The loss is no differentiable scalar, or a tensor does not require grad.

    Source: LeCun et al., Optimal Brain Damage, NeurIPS 1989; of gates, Molchanov et al., CVPR 2019, arXiv:1906.10771.
    """
    params = list(params)
    if chunk < 1:
        raise ValueError(f"hessian_diagonal: chunk must be at least 1, got {chunk}")
    for i, p in enumerate(params):
        if not p.is_floating_point() or not p.requires_grad:
            got = f"{p.dtype}, requires_grad={p.requires_grad}"
            raise ValueError(f"hessian_diagonal: expected floating tensors that require grad, params[{i}] is {got}")
    with torch.enable_grad(), backends.force("eager"):
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"{tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else type(loss)
            raise ValueError(f"hessian_diagonal: loss_fn must return a scalar with grad, got {got}")
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True) if params else ()
        diagonals, batched = [], True
        for p, g in zip(params, grads, strict=True):
            diagonal = p.new_zeros(p.numel())
            if g is not None and g.requires_grad:  # else the loss is linear in p or does not depend on it
                for entries in torch.arange(p.numel(), device=p.device).split(chunk):
                    unit = p.new_zeros(len(entries), p.numel()).scatter_(1, entries[:, None], 1).view(-1, *p.shape)
                    if batched:
                        try:
                            rows = _rows(g, p, unit, is_grads_batched=True)
                        except torch.OutOfMemoryError:
                            raise
                        except RuntimeError as e:
                            batched = False
                            warnings.warn(
                                f"hessian_diagonal: one row at a time, which is slow: {_why(e)}", stacklevel=2
                            )
                    if batched:
                        diagonal[entries] = rows.flatten(1).gather(1, entries[:, None])[:, 0]
                    else:
                        for i, v in zip(entries, unit, strict=True):
                            diagonal[i] = _rows(g, p, v).flatten()[i]
            diagonals.append(diagonal.view(p.shape))
    return diagonals


def _rows(g: Tensor, p: Tensor, v: Tensor, **how: bool) -> Tensor:
    """``v`` times the Hessian, as far as ``p`` goes."""
    return torch.autograd.grad(g, p, v, retain_graph=True, allow_unused=True, materialize_grads=True, **how)[0]


def _why(e: RuntimeError) -> str:
    op = re.search(r"[Bb]atching rule not implemented for (.+?);", str(e))
    return f"{op[1]} has no batching rule" if op else f"batching failed, {str(e).splitlines()[0]}"
