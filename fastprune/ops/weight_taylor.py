"""First-order Taylor importance of the filters of all weights of a model at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune import backends
from fastprune.ops.filter_norm import check_weights, refuse


@torch.no_grad()
def weight_taylor(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None, backend: str | None = None
) -> Tensor:
    r"""Sum :math:`(w\,g)^2` over each filter of each weight, in one launch: each product is squared, then summed.

    A statistic: no gradient flows, and the result does not require one.

    Args:
        weights: As in :func:`fastprune.ops.filter_norm`; a filter is ``w[c]``.
        grads: One per weight, of its shape, dtype and device; None counts as zeros.  Default: each weight's ``.grad``.
            One that lies in memory in another order than its weight is copied first.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: All weights' results concatenated, (sum of ``w.shape[0]``,), float32 (float64 for float64 weights).

    Raises:
        ValueError: No weights; a shape, dtype, device or number of gradients that does not fit.
        BackendError: ``backend`` was named and cannot take this call.

    Source: method 0 of Molchanov et al., CVPR 2019, arXiv:1906.10771.
    """
    weights = tuple(weights)
    check_weights("weight_taylor", weights)
    grads = tuple(w.grad for w in weights) if grads is None else tuple(grads)
    if len(grads) != len(weights):
        raise ValueError(f"weight_taylor: expected a gradient or None per weight, {len(weights)}, got {len(grads)}")
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if g is not None and (g.shape != w.shape or g.dtype != w.dtype or g.device != w.device):
            raise ValueError(
                f"weight_taylor: expected grads[{i}] like its weight, {tuple(w.shape)} {w.dtype} on {w.device}, "
                f"got {tuple(g.shape)} {g.dtype} on {g.device}"
            )
    name = backends.select("weight_taylor", backend, *weights)
    run = backends.eager("weight_taylor") if name == "eager" else getattr(torch.ops.fastprune.weight_taylor, name)
    used = [(w, _like(g, w)) for w, g in zip(weights, grads, strict=True) if g is not None]
    made = run([w for w, _ in used], [g for _, g in used]) if used else None
    if len(used) == len(weights):
        return made
    sizes = [len(w) for w, _ in used]
    parts = iter(made.split(sizes) if used else ())
    acc = torch.promote_types(weights[0].dtype, torch.float32)
    return torch.cat(
        [w.new_zeros(len(w), dtype=acc) if g is None else next(parts) for w, g in zip(weights, grads, strict=True)]
    )


def _like(g: Tensor, w: Tensor) -> Tensor:
    """``g`` in the memory order of ``w``; strides of sizes 0 and 1 do not matter."""
    alike = all(a == b or n < 2 for a, b, n in zip(g.stride(), w.stride(), w.shape, strict=True))
    return g if alike else torch.empty_like(w).copy_(g)


def _eager(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    acc = torch.promote_types(weights[0].dtype, torch.float32)
    pairs = zip(weights, grads, strict=True)
    return torch.cat([(w.to(acc) * g).square().sum(tuple(range(1, w.dim()))) for w, g in pairs])


def _fake(backend: str, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    acc = torch.promote_types(weights[0].dtype, torch.float32)
    return weights[0].new_empty(sum(w.shape[0] for w in weights), dtype=acc)


backends.define(
    "weight_taylor",
    {"weight_taylor": "(Tensor[] weights, Tensor[] grads) -> Tensor"},
    eager=_eager,
    fake={"weight_taylor": _fake},
    refuse=refuse,
)
