"""Convolution of the live channels only: dead ones are neither read nor computed, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune import backends


class Live(NamedTuple):
    """The live channels of a mask, in every form a backend wants; made by :func:`live_channels`.

    mask: (C,) bool, True = live.
    index: Live channels in ascending order, (live,), int64, on the mask's device.
    channels: The same on the host.
    """

    mask: Tensor
    index: Tensor
    channels: tuple[int, ...]


def live_channels(mask: Tensor) -> Live:
    """Look a mask up once, so that steps need neither a synchronisation nor a graph break.

    Args:
        mask: (C,), bool, True = live.

    Raises:
        ValueError: ``mask`` is not (C,) of bool.
    """
    if mask.dim() != 1 or mask.dtype != torch.bool:
        raise ValueError(f"live_channels: expected a bool mask (C,), got {tuple(mask.shape)} {mask.dtype}")
    channels = tuple(c for c, live in enumerate(mask.tolist()) if live)
    return Live(mask, torch.tensor(channels, dtype=torch.int64, device=mask.device), channels)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_mask: Tensor | Live | None = None,
    out_mask: Tensor | Live | None = None,
    weight_mask: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    r"""``conv2d(x, weight, bias)`` with the dead channels, or the dead weights, as if they were removed.

    .. math:: y_o = m^{out}_o \Big(b_o + \sum_{i:\, m^{in}_i} x_i * (w_{oi} \odot m^w_{oi})\Big)

    Dead outputs are exactly 0; dead inputs, and the rows and columns of the weight that belong to dead channels, are
    never read, so that inf and NaN there do not leak.  Their gradients are 0.  Differentiable twice.

    With ``groups > 1`` the live channels are computed alone if every group with live outputs has as many live inputs,
    and as many live outputs, as the others (a depthwise convolution whose masks agree always does).  Otherwise no
    smaller grouped convolution exists, and the eager backend computes the dense one on masked operands.

    Args:
        x: Activations, (N, C_in, H, W), float32, bfloat16, float16 (GPU; eager on CPU) or float64 (eager); NCHW or
            channels_last.  Tensors that are neither run on eager, or are refused by a backend that was named.
        weight: (C_out, C_in / groups, kh, kw), dtype of ``x``.
        bias: (C_out,), dtype of ``x``, or None.
        in_mask, out_mask: (C_in,), (C_out,), bool, True = live; None: all.  A mask is looked up on the host in each
            call; pass ``live_channels(mask)`` where it stays the same, and always under ``torch.compile``.
        weight_mask: Shape of ``weight``, bool, True = live.  An inf or NaN of ``x`` that only dead weights meet may or
            may not show.
        stride, padding, dilation, groups: As for :func:`torch.nn.functional.conv2d`, "same" and "valid" included.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: (N, C_out, H', W'), dtype and memory format of ``x``.

    Raises:
        ValueError: A shape, dtype, device or padding does not fit.
        BackendError: ``backend`` was named and cannot take this call.
    """
    _check(x, weight, bias, in_mask, out_mask, weight_mask, groups)
    stride, dilation = _pair(stride), _pair(dilation)
    x, padding = _padded(x, weight, padding, stride, dilation)
    live_in, live_out = _live(in_mask), _live(out_mask)
    plan = _plan(live_in, live_out, weight.shape, groups, x.device)
    name = backends.select("masked_conv2d", backend, x, weight, bias, weight_mask, plan, groups)
    window = (stride, padding, dilation)
    with torch.autocast(x.device.type, enabled=False):  # the op works in the dtype of x
        if name == "eager":
            y = _eager(x, weight, bias, live_in, live_out, weight_mask, window, groups)
        elif live_in is None and live_out is None and weight_mask is None:
            y = F.conv2d(x, weight, bias, *window, groups)
        elif any(live is not None and not live.channels for live in (live_in, live_out)):
            y = _constant(x, weight, bias, live_out, window)
        else:
            y = (_cpp if name == "cpp" else _triton)(x, weight, bias, plan, weight_mask, window)
    return y.contiguous(memory_format=memory_format(x))  # PyTorch's small convolutions turn channels_last into NCHW


def _check(x, weight, bias, in_mask, out_mask, weight_mask, groups):
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"masked_conv2d: expected a floating-point x (N, C, H, W), got {tuple(x.shape)} {x.dtype}")
    C = x.shape[1]
    if groups < 1 or weight.dim() != 4 or weight.shape[1] * groups != C or weight.shape[0] % groups:
        raise ValueError(
            f"masked_conv2d: expected weight (C_out, {C} / groups, kh, kw) with C_out a multiple of groups={groups} "
            f"for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"masked_conv2d: expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(
                f"masked_conv2d: {name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}; expected the same"
            )
    shapes = (("in_mask", in_mask, x.shape[1:2]), ("out_mask", out_mask, weight.shape[:1]))
    for name, mask, shape in (*shapes, ("weight_mask", weight_mask, weight.shape)):
        t = mask.mask if isinstance(mask, Live) else mask
        if t is not None and (t.shape != shape or t.dtype != torch.bool or t.device != x.device):
            raise ValueError(
                f"masked_conv2d: expected {name} {tuple(shape)} bool on {x.device}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}"
            )


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"masked_conv2d: expected a number or two of stride, padding and dilation, got {value!r}")
    return tuple(value)


def _padded(x, weight, padding, stride, dilation):
    """``x``, and the padding that is left to the convolution: "same" may need one more row below than above."""
    if not isinstance(padding, str):
        return x, _pair(padding)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(f"masked_conv2d: padding must be numbers, 'valid' or, with stride 1, 'same'; got {padding!r}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)


def _live(mask: Tensor | Live | None) -> Live | None:
    if mask is None:
        return None
    live = mask if isinstance(mask, Live) else live_channels(mask)
    return None if len(live.channels) == live.mask.shape[0] else live  # all live: the plain convolution


class Plan(NamedTuple):
    """A smaller convolution with the same result: which channels it takes, (live,) int64, None for all of them."""

    inputs: Tensor | None
    outputs: Tensor | None
    columns: Tensor | None  # of the weight, group after group; inputs themselves with one group
    groups: int


def _plan(live_in: Live | None, live_out: Live | None, shape: torch.Size, groups: int, device) -> Plan | None:
    if groups == 1 or (live_in is None and live_out is None):
        inputs, outputs = (None if live is None else live.index for live in (live_in, live_out))
        return Plan(inputs, outputs, inputs, groups)
    channels = (None if live is None else live.channels for live in (live_in, live_out))
    return _grouped_plan(*channels, *shape[:2], groups, device)


@lru_cache(maxsize=1024)
def _grouped_plan(ins, outs, out_channels, columns, groups, device) -> Plan | None:
    """The rule of grouped convolutions: all groups that have live outputs must be equally wide, else there is no plan.

    Groups without live outputs are left out, with their inputs.
    """
    rows = out_channels // groups
    outs = range(out_channels) if outs is None else outs
    ins = range(columns * groups) if ins is None else ins
    outputs = [[c for c in outs if c // rows == g] for g in range(groups)]
    inputs = [[c for c in ins if c // columns == g] for g in range(groups)]
    inputs = [i for i, o in zip(inputs, outputs, strict=True) if o]
    outputs = [o for o in outputs if o]
    if not outputs:
        return Plan(None, None, None, 0)
    if len({len(o) for o in outputs}) > 1 or len({len(i) for i in inputs}) > 1 or not inputs[0]:
        return None

    def index(lists):
        return torch.tensor([c for part in lists for c in part], dtype=torch.int64, device=device)

    whole = len(inputs[0]) == columns
    return Plan(
        index(inputs), index(outputs), None if whole else index([c % columns for c in i] for i in inputs), len(inputs)
    )


def _eager(x, weight, bias, live_in, live_out, weight_mask, window, groups):
    """The definition: the dense convolution of masked operands, by ops that the channel graph knows."""
    if weight_mask is not None:
        weight = weight.masked_fill(~weight_mask, 0)
    if live_in is not None:
        dead = ~live_in.mask
        x = x.masked_fill(dead.view(1, -1, 1, 1), 0)
        by_group = weight.unflatten(0, (groups, -1)).masked_fill(dead.view(groups, 1, -1, 1, 1), 0)
        weight = by_group.flatten(0, 1)  # a NaN in a dead column must not meet the zeros of x
    if live_out is not None:
        weight = weight.masked_fill((~live_out.mask).view(-1, 1, 1, 1), 0)  # nor one in a dead row the zeros of dy
    y = F.conv2d(x, weight, bias, *window, groups)
    return y if live_out is None else y.masked_fill((~live_out.mask).view(1, -1, 1, 1), 0)


def _size(x, weight, window) -> tuple[int, ...]:
    """Shape of the output."""
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *window, strict=True)
    ]
    return x.shape[0], weight.shape[0], *spatial


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last only where it differs from NCHW."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _constant(x, weight, bias, live_out, window):
    """No live input or no live output: the bias, or 0; it depends on the operands with gradient 0."""
    empty = sum(t.flatten()[:0].sum() for t in (x, weight))
    y = torch.empty(_size(x, weight, window), dtype=x.dtype, device=x.device, memory_format=memory_format(x)).zero_()
    if bias is None:
        return y + empty
    if live_out is not None:
        bias = bias.masked_fill(~live_out.mask, 0)
    return y + (bias + empty).view(1, -1, 1, 1)


# cpp: gather the live channels, PyTorch's convolution of them, scatter


def _cpp(x, weight, bias, plan, weight_mask, window):
    inputs, outputs, columns, groups = plan
    nhwc = memory_format(x) == torch.channels_last
    channels = weight.shape[0]
    if weight_mask is not None:
        weight = weight.masked_fill(~weight_mask, 0)
    if inputs is not None:
        x = _Gather.apply(x, None, inputs, 1)
    if outputs is not None or columns is not None:
        weight = _Gather.apply(weight, outputs, columns, groups)
    if outputs is not None and bias is not None:
        bias = bias.index_select(0, outputs)
    y = F.conv2d(x, weight, bias, *window, groups)
    return y if outputs is None else _Scatter.apply(y, None, outputs, 1, y.shape[0], channels, nhwc)


class _Gather(torch.autograd.Function):
    """Rows (dimension 0) and columns (dimension 1) of a 4-D tensor; its derivative puts them back among zeros."""

    @staticmethod
    def forward(ctx, t, rows, columns, groups):
        ctx.save_for_backward(rows, columns)
        ctx.args = groups, t.shape[0], t.shape[1], memory_format(t) == torch.channels_last
        return torch.ops.fastprune.masked_conv2d_gather.cpp(t, rows, columns, groups)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, *ctx.saved_tensors, *ctx.args), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, rows, columns, groups, row_count, column_count, channels_last):
        ctx.save_for_backward(rows, columns)
        ctx.args, ctx.format = groups, torch.channels_last if channels_last else torch.contiguous_format
        t = t.contiguous(memory_format=ctx.format)  # of the live part: PyTorch's convolution may choose another layout
        return torch.ops.fastprune.masked_conv2d_scatter.cpp(
            t, rows, columns, groups, row_count, column_count, channels_last
        )

    @staticmethod
    def backward(ctx, grad):
        if not _dense(grad):
            grad = grad.contiguous(memory_format=ctx.format)  # sum() has a stride-0 gradient
        return _Gather.apply(grad, *ctx.saved_tensors, ctx.args), *(None,) * 6


# triton: one kernel per product, channels looked up as tiles are loaded


def _triton(x, weight, bias, plan, weight_mask, window):
    return _Fused.apply(x, weight, bias, plan.inputs, plan.outputs, weight_mask, *window)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, inputs, outputs, weight_mask, *window):
        ctx.save_for_backward(x, weight, bias, inputs, outputs, weight_mask)
        ctx.window = window
        return torch.ops.fastprune.masked_conv2d.triton(x, weight, bias, inputs, outputs, weight_mask, *window)

    @staticmethod
    def backward(ctx, dy):
        x, weight, _, inputs, outputs, weight_mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # under create_graph=True the gradient must itself be differentiable
            return *_differentiable_backward(dy, *ctx.saved_tensors, ctx.window, needs), *(None,) * 6
        run = torch.ops.fastprune.masked_conv2d_backward.triton
        dx, dweight = run(dy, x, weight, inputs, outputs, weight_mask, *ctx.window, *needs[:2])
        dbias = _spread(_select(dy, 1, outputs).sum((0, 2, 3)), 0, outputs, len(weight)) if needs[2] else None
        return dx if needs[0] else None, dweight if needs[1] else None, dbias, *(None,) * 6


def _select(t: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return t if index is None else t.index_select(dim, index)


def _spread(t: Tensor, dim: int, index: Tensor | None, size: int) -> Tensor:
    """``t`` at ``index`` of ``size`` zeros along ``dim``."""
    if index is None:
        return t
    return t.new_zeros([*t.shape[:dim], size, *t.shape[dim + 1 :]]).index_copy(dim, index, t)


def _differentiable_backward(dy, x, weight, bias, inputs, outputs, weight_mask, window, needs):
    """The backward of the live channels in plain PyTorch."""
    live = weight if weight_mask is None else weight.masked_fill(~weight_mask, 0)
    live = _select(_select(live, 0, outputs), 1, inputs)
    dx, dw, db = torch.ops.aten.convolution_backward(
        *(_select(dy, 1, outputs), _select(x, 1, inputs), live, None if bias is None else live.shape[:1]),
        *(*window, False, (0, 0), 1, needs),
    )
    if needs[0]:
        dx = _spread(dx, 1, inputs, x.shape[1])
    if needs[1]:
        dw = _spread(_spread(dw, 1, inputs, weight.shape[1]), 0, outputs, weight.shape[0])
        dw = dw if weight_mask is None else dw.masked_fill(~weight_mask, 0)
    return dx, dw, _spread(db, 0, outputs, weight.shape[0]) if needs[2] else None


def _fake(backend, x, weight, bias, inputs, outputs, weight_mask, *window):
    return torch.empty(_size(x, weight, window), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_backward(backend, dy, x, weight, inputs, outputs, weight_mask, *rest):
    need_dx, need_dweight = rest[-2:]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return dx if need_dx else x.new_empty(0), torch.empty_like(weight) if need_dweight else weight.new_empty(0)


def _fake_gather(backend, t, rows, columns, groups):
    sizes = [t.shape[0] if rows is None else rows.shape[0], t.shape[1] if columns is None else columns.shape[0]]
    if columns is not None:
        sizes[1] = sizes[1] // groups
    return torch.empty((*sizes, *t.shape[2:]), dtype=t.dtype, device=t.device, memory_format=memory_format(t))


def _fake_scatter(backend, t, rows, columns, groups, row_count, column_count, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((row_count, column_count, *t.shape[2:]), dtype=t.dtype, device=t.device, memory_format=layout)


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


_DTYPES = {"cpp": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16), "cuda": ()}


def _refuse(backend, x, weight, bias, weight_mask, plan, groups):
    if x.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    if not _dense(x):
        return f"it needs an NCHW or channels_last tensor without gaps, got {tuple(x.shape)} with strides {x.stride()}"
    if not _dense(weight):
        return f"weight must be contiguous or channels_last, got strides {weight.stride()}"
    if backend == "triton" and x.shape[0] * max(x.shape[1], len(weight)) * x.shape[2] * x.shape[3] >= 2**30:
        return f"it takes fewer than 2^30 values per tensor, got {tuple(x.shape)} and {len(weight)} outputs"
    if backend == "triton" and groups > 1:
        return f"it takes ungrouped convolutions, got groups={groups}"
    if plan is None:
        return "its groups have different numbers of live channels"
    return None


backends.define(
    "masked_conv2d",
    {
        "masked_conv2d": "(Tensor x, Tensor weight, Tensor? bias, Tensor? inputs, Tensor? outputs, "
        "Tensor? weight_mask, int[] stride, int[] padding, int[] dilation) -> Tensor",
        "masked_conv2d_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor? inputs, Tensor? outputs, "
        "Tensor? weight_mask, int[] stride, int[] padding, int[] dilation, bool need_dx, bool need_dweight) "
        "-> (Tensor, Tensor)",
        "masked_conv2d_gather": "(Tensor t, Tensor? rows, Tensor? columns, int groups) -> Tensor",
        "masked_conv2d_scatter": "(Tensor t, Tensor? rows, Tensor? columns, int groups, SymInt row_count, "
        "SymInt column_count, bool channels_last) -> Tensor",
    },
    eager=_eager,
    fake={
        "masked_conv2d": _fake,
        "masked_conv2d_backward": _fake_backward,
        "masked_conv2d_gather": _fake_gather,
        "masked_conv2d_scatter": _fake_scatter,
    },
    refuse=_refuse,
)
