"""A gate per channel: ``x * gate``, whose backward also yields the gradient of the gate of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune import backends


def channel_gate(
    x: Tensor,
    gate: Tensor | None = None,
    *,
    gate_grad: Tensor | None = None,
    gate_abs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multiply each channel by its gate, ``out[n, c] = x[n, c] * gate[c]``; 0 removes the channel.

    Backward makes ``dx`` and, in the same pass over memory, the gradient of the gate of each sample,
    :math:`S_{nc} = \sum_{hw} dy\,x`, and :math:`\sum_{hw} |dy\,x|`.  Differentiable twice.

    Without a gate it is a *probe*: a gate of 1 that is never multiplied.  The output is a view of ``x`` (do not change
    it in place: backward needs ``x``), the gradient passes uncopied, and only the sums are made.

    Args:
        x: Activations, (N, C, *spatial) of 2 to 5 dimensions, float32, bfloat16, float16 (GPU; eager on CPU) or
            float64 (eager); contiguous, channels_last or channels_last_3d.  Tensors that are none of these (slices,
            transposes) run on eager, or are refused in words by a backend that was named.
        gate: (C,), dtype of ``x`` or float32; None is a probe.
        gate_grad: Buffer, (N, C), float32 (float64 for float64 ``x``); overwritten with ``S`` by each backward that
            reaches ``x`` or ``gate``.  Rows may be any distance apart: columns of a larger matrix will do.
        gate_abs: The same for the sum of absolute values.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: Shape, dtype and memory format of ``x``; ``x`` itself for a probe that has nothing to watch (no buffer, or
        no gradient).

    Raises:
        ValueError: A shape, dtype, stride or device does not fit.
        BackendError: ``backend`` was named and cannot take this call.

    Source: gates, Molchanov et al., CVPR 2019, arXiv:1906.10771; Fisher, Theis et al., 2018, arXiv:1801.05787.
    """
    _check(x, gate, gate_grad, gate_abs)
    name = backends.select("channel_gate", backend, x, gate)
    dx, dgate = x.requires_grad, gate is not None and gate.requires_grad
    sums = dgate or gate_grad is not None or gate_abs is not None
    if torch.is_grad_enabled() and (dgate or (dx and (sums or gate is not None))):
        return _ChannelGate.apply(x, gate, gate_grad, gate_abs, sums, name)
    return x if gate is None else _forward(x, gate, name)


def _check(x: Tensor, gate: Tensor | None, gate_grad: Tensor | None, gate_abs: Tensor | None) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"channel_gate: expected x (N, C, *spatial) of 2 to 5 dimensions, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"channel_gate: expected a floating-point x, got {x.dtype}")
    C = x.shape[1]
    if gate is not None:
        if gate.dim() != 1 or gate.shape[0] != C:
            raise ValueError(f"channel_gate: expected gate ({C},) for x {tuple(x.shape)}, got {tuple(gate.shape)}")
        if gate.device != x.device or (gate.dtype != x.dtype and gate.dtype != torch.float32):
            raise ValueError(
                f"channel_gate: gate is {gate.dtype} on {gate.device}, x is {x.dtype} on {x.device}; "
                f"expected {x.dtype} or torch.float32 on the same device"
            )
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types is an operator
    for name, t in (("gate_grad", gate_grad), ("gate_abs", gate_abs)):
        if t is None:
            continue
        if t.shape != x.shape[:2] or t.dtype != acc or t.device != x.device:
            raise ValueError(
                f"channel_gate: expected {name} {tuple(x.shape[:2])} {acc} on {x.device}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}"
            )
        if (C > 1 and t.stride(1) != 1) or (len(t) > 1 and t.stride(0) < C):
            raise ValueError(
                f"channel_gate: expected {name} with neighbouring columns and rows at least {C} apart, "
                f"got strides {t.stride()}"
            )


def _column(gate: Tensor, x: Tensor) -> Tensor:
    return gate.view(-1, *(1,) * (x.dim() - 2))


def _eager(x: Tensor, gate: Tensor) -> Tensor:
    y = x * _column(gate, x)
    # With y.to(y.dtype), a no-op, torch.compile silently returned zero gradients (torch 2.11).
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _forward(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    if backend == "eager":
        return backends.eager("channel_gate")(x, gate)
    return getattr(torch.ops.fastprune.channel_gate, backend)(x, gate)


class _ChannelGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, gate_grad, gate_abs, sums, backend):
        ctx.save_for_backward(x if sums else None, gate)
        ctx.gate_grad, ctx.gate_abs, ctx.backend, ctx.layout = gate_grad, gate_abs, backend, _layout(x)
        return x.view_as(x) if gate is None else _forward(x, gate, backend)

    @staticmethod
    def backward(ctx, dy):
        x, gate = ctx.saved_tensors
        need_dx, need_dgate = ctx.needs_input_grad[:2]
        dx = dy if gate is None else None
        buffers, needs = (ctx.gate_grad, ctx.gate_abs), (need_dx and gate is not None, need_dgate)
        # Grad mode is on only under create_graph=True: the gradient must then be made of differentiable operations.
        if torch.is_grad_enabled() or ctx.backend == "eager":
            made, dgate = _differentiable_backward(dy, x, gate, *buffers, *needs)
        else:
            dy = dy.contiguous(memory_format=ctx.layout)  # sum() has a stride-0 gradient; the kernels want x's layout
            if x is None:
                made, dgate = _forward(dy, gate, ctx.backend), None
            else:
                run = getattr(torch.ops.fastprune.channel_gate_backward, ctx.backend)
                made, dgate = run(dy, x, gate, *buffers, *needs)
        if gate is not None and need_dx:
            dx = made
        return dx, dgate if need_dgate else None, None, None, None, None


def _differentiable_backward(dy, x, gate, gate_grad, gate_abs, need_dx, need_dgate):
    """The backward in plain PyTorch, so that it has derivatives of its own."""
    dx = _eager(dy, gate) if need_dx else None
    if x is None:
        return dx, None
    acc, pixels = torch.promote_types(x.dtype, torch.float32), tuple(range(2, x.dim()))
    product = dy.to(acc) * x.to(acc)
    sums = product.sum(pixels) if pixels else product  # sum(()) would sum over everything
    with torch.no_grad():
        if gate_grad is not None:
            gate_grad.copy_(sums)
        if gate_abs is not None:
            gate_abs.copy_(product.abs().sum(pixels) if pixels else product.abs())
    return dx, sums.sum(0).to(gate.dtype) if need_dgate else None


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of ``x``; preserve_format if it is none that the kernels know."""
    if x.is_contiguous():
        return torch.contiguous_format
    nhwc = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return nhwc if nhwc and x.is_contiguous(memory_format=nhwc) else torch.preserve_format


def _fake(backend, x, gate):
    return torch.empty_like(x)


def _fake_backward(backend, dy, x, gate, gate_grad, gate_abs, need_dx, need_dgate):
    return torch.empty_like(x) if need_dx else x.new_empty(0), torch.empty_like(gate) if need_dgate else x.new_empty(0)


_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16), "cuda": ()}


def _refuse(backend, x, gate):
    if x.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    if _layout(x) == torch.preserve_format:
        return f"it needs a contiguous or channels_last tensor, got {tuple(x.shape)} with strides {x.stride()}"
    if backend == "triton" and x.numel() > 2**30 * min(x.shape[:2]):
        return f"it takes at most 2^30 values per channel or sample, got {tuple(x.shape)}"
    if gate is not None and not gate.is_contiguous():
        return f"gate must be contiguous, got strides {gate.stride()}"
    return None


backends.define(
    "channel_gate",
    {
        "channel_gate": "(Tensor x, Tensor gate) -> Tensor",
        "channel_gate_backward": "(Tensor dy, Tensor x, Tensor? gate, Tensor(a!)? gate_grad, Tensor(b!)? gate_abs, "
        "bool need_dx, bool need_dgate) -> (Tensor, Tensor)",
    },
    eager=_eager,
    fake={"channel_gate": _fake, "channel_gate_backward": _fake_backward},
    refuse=_refuse,
)
