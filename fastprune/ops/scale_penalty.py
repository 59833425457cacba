"""Sparsity penalties on the scales of batch norms: value and gradient over all layers of a model at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune import backends

KINDS = ("rni", "l1")


def scale_penalty(
    scales: Sequence[Tensor], kind: str = "rni", shift: float = 0.0, backend: str | None = None
) -> Tensor:
    r"""Sum a penalty over all scales of a model.

    ``"rni"``: :math:`\sum s (1 - \ln s)` with :math:`s = \mathrm{sigmoid}(w + \mathrm{shift})`; its gradient
    :math:`-s (1 - s) \ln s` pushes scales of low importance towards 0 and hardly touches the others.
    ``"l1"``: :math:`\sum |w|`.  Differentiable twice; finite at any finite ``w``.

    Args:
        scales: The ``weight`` of each norm, (C,) each, all of one dtype and device.
        kind: ``"rni"`` or ``"l1"``.
        shift: Added to ``w`` by ``"rni"``; a larger one weakens the push on unimportant channels.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: (), float32 (float64 for float64 scales).

    Raises:
        ValueError: No scales, not (C,), of several dtypes or devices; unknown ``kind``; a ``shift`` with ``"l1"``.
        BackendError: ``backend`` was named and cannot take this call.

    Source: Suteu and Guo, 2022, arXiv:2204.06404; L1, Liu et al., ICCV 2017, arXiv:1708.06519.
    """
    scales = tuple(scales)
    _check(scales, kind, shift)
    return _ScalePenalty.apply(kind, shift, backends.select("scale_penalty", backend, *scales), *scales)


def value_and_grad(scales: Sequence[Tensor], kind: str, shift: float, backend: str) -> tuple[Tensor, Tensor]:
    """The penalty, (), and its gradient with respect to all scales concatenated, (sum of C,).

    For callers without autograd, which add the gradient to ``.grad`` themselves.  Nothing is checked.
    """
    if backend == "eager":
        return backends.eager("scale_penalty")(scales, kind, shift)
    return getattr(torch.ops.fastprune.scale_penalty, backend)(scales, kind, shift)


def _check(scales: tuple[Tensor, ...], kind: str, shift: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"scale_penalty: kind must be 'rni' or 'l1', got {kind!r}")
    if kind == "l1" and shift:
        raise ValueError(f"scale_penalty: shift belongs to kind 'rni'; leave it 0 with 'l1', got {shift}")
    if not scales:
        raise ValueError("scale_penalty: expected at least one tensor of scales, got none")
    first = scales[0]
    for i, w in enumerate(scales):
        if w.dim() != 1 or not w.is_floating_point():
            raise ValueError(
                f"scale_penalty: expected scales (C,) of floats, scales[{i}] is {tuple(w.shape)} {w.dtype}"
            )
        if w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"scale_penalty: expected one dtype and device, scales[0] is {first.dtype} on {first.device}, "
                f"scales[{i}] is {w.dtype} on {w.device}"
            )


class _ScalePenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kind, shift, backend, *scales):
        value, grad = value_and_grad(scales, kind, shift, backend)
        ctx.save_for_backward(grad, *scales)
        ctx.kind, ctx.shift = kind, shift
        return value

    @staticmethod
    def backward(ctx, dy):
        grad, *scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True the gradient must itself be differentiable
            grad = _eager(scales, ctx.kind, ctx.shift)[1]
        grads = (grad * dy).to(scales[0].dtype).split([w.numel() for w in scales])
        return None, None, None, *grads


def _eager(scales: Sequence[Tensor], kind: str, shift: float) -> tuple[Tensor, Tensor]:
    w = torch.cat(list(scales))
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if kind == "l1":
        return w.abs().sum(), w.sign()
    w = w + shift
    s, log_s = w.sigmoid(), F.logsigmoid(w)  # not log(s): s underflows to 0 long before log s leaves the range
    return (s * (1 - log_s)).sum(), -s * (-w).sigmoid() * log_s


def _fake(backend: str, scales: list[Tensor], kind: str, shift: float) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(scales[0].dtype, torch.float32)
    return scales[0].new_empty((), dtype=acc), scales[0].new_empty(sum(w.numel() for w in scales), dtype=acc)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {"cpp": _FLOATS, "triton": _FLOATS, "cuda": ()}


def _refuse(backend: str, *scales: Tensor) -> str | None:
    if scales[0].dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    if not all(w.is_contiguous() for w in scales):
        return "the scales must be contiguous"
    return None


backends.define(
    "scale_penalty",
    {"scale_penalty": "(Tensor[] scales, str kind, float shift) -> (Tensor, Tensor)"},
    eager=_eager,
    fake={"scale_penalty": _fake},
    refuse=_refuse,
)
