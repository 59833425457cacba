"""Batch norm, bounded or free scale, then an optional residual add and an optional ReLU, in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune import backends


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    bound: str | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    gate_grad: Tensor | None = None,
    gate_abs: Tensor | None = None,
    out_grad: Tensor | None = None,
    out_abs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Batch norm with scale ``weight`` or ``sigmoid(weight)``, then ``+ residual``, then ReLU.

    .. math:: y = \mathrm{act}(z + r), \quad z = s\,\hat x + b, \quad \hat x = (x - \mu) / \sqrt{\sigma^2 + \epsilon}

    with :math:`s = \mathrm{weight}`, or :math:`\mathrm{sigmoid}(\mathrm{weight})` for ``bound="sigmoid"``.  Mean and
    variance are those of the batch (``training``) or the running ones.  Differentiable twice.

    *Gate gradients* cost no extra pass.  Imagine a gate of value 1 on each channel of each sample, multiplying ``z``;
    its gradient is :math:`\sum_{hw} dz\, z = s_c \sum dz\,\hat x + b_c \sum dz`, sums that the backward of a batch norm
    makes anyway.  A gate on ``y`` instead, after the residual and the ReLU, has :math:`\sum_{hw} dy\, y`; the backward
    then reads ``y`` once, which the next convolution keeps anyway.  Without a residual the two are equal.

    Args:
        x: Activations, (N, C, H, W), float32, bfloat16, float16 (GPU; eager on CPU) or float64 (eager); NCHW or
            channels_last.  Tensors that are neither (slices, transposes) run on eager, or are refused in words by a
            backend that was named.
        weight: (C,), dtype of ``x`` or float32; None is a scale of 1.
        bias: (C,), as ``weight``; None is 0.
        running_mean, running_var: (C,), as ``weight``; updated in place in training (the variance by the unbiased one).
        num_batches_tracked: int64 scalar, incremented in training.
        residual: Added before the activation, shape and dtype of ``x``.
        act: ``"relu"`` or None.
        bound: ``"sigmoid"`` or None.
        training: Normalise by the statistics of the batch.
        momentum: Weight of the new statistics; None is the cumulative average over ``num_batches_tracked`` batches.
        eps: Added to the variance.
        gate_grad, gate_abs, out_grad, out_abs: Buffers, (N, C), float32 (float64 for float64 ``x``), with inner stride
            1 and any row stride from C up, so that columns of one matrix serve a whole network.  Each backward
            overwrites them: ``gate_grad`` with sum(dz z), ``gate_abs`` with sum(abs(dz z)), ``out_grad`` with
            sum(dy y), ``out_abs`` with sum(abs(dy y)), over the pixels; dz is the gradient of ``z``.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: (N, C, H, W), dtype and memory format of ``x``.

    Raises:
        ValueError: A shape, dtype, device or name does not fit, or there is one value per channel in training.
        BackendError: ``backend`` was named and cannot take this call.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167; sigmoid bound, Suteu and Guo, 2022, arXiv:2204.06404; gates,
    Molchanov et al., CVPR 2019, arXiv:1906.10771, and Theis et al., 2018, arXiv:1801.05787.
    """
    tensors = (x, weight, bias, residual, running_mean, running_var, num_batches_tracked)
    gates = (gate_grad, gate_abs, out_grad, out_abs)
    _check(*tensors, act, bound, training, momentum, eps)
    _check_gates(x, gates)
    name = backends.select("batch_norm_act", backend, *tensors)
    run = backends.eager("batch_norm_act") if name == "eager" else _compiled
    return run(tensors, (training, momentum, eps, bound == "sigmoid", act == "relu"), gates, name)


def _check(x, weight, bias, residual, running_mean, running_var, tracked, act, bound, training, momentum, eps):
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act: expected x (N, C, H, W), got {x.dim()} dimensions, {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"batch_norm_act: expected a floating-point x, got {x.dtype}")
    if act not in (None, "relu"):
        raise ValueError(f"batch_norm_act: act must be 'relu' or None, got {act!r}")
    if bound not in (None, "sigmoid"):
        raise ValueError(f"batch_norm_act: bound must be 'sigmoid' or None, got {bound!r}")
    if not eps > 0:  # PyTorch's words
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    if bound and weight is None:
        raise ValueError("batch_norm_act: bound='sigmoid' needs a weight, got None")
    C = x.shape[1]
    for name, t in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != C:
            raise ValueError(f"batch_norm_act: expected {name} ({C},) for x {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.device != x.device or (t.dtype != x.dtype and t.dtype != torch.float32):
            raise ValueError(
                f"batch_norm_act: {name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}; "
                f"expected {x.dtype} or torch.float32 on the same device"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm_act: running_mean and running_var go together, got only one of them")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"batch_norm_act: expected residual like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    if training:
        if x.numel() == C:  # PyTorch's words
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if momentum is None and running_mean is not None and tracked is None:
            raise ValueError("batch_norm_act: momentum=None (cumulative average) needs num_batches_tracked, got None")
    elif running_mean is None:
        raise ValueError("batch_norm_act: training=False needs running_mean and running_var, got None")


def _check_gates(x, gates):
    (N, C), acc = x.shape[:2], x.dtype if x.dtype == torch.float64 else torch.float32  # promote_types is an operator
    for name, t in zip(("gate_grad", "gate_abs", "out_grad", "out_abs"), gates, strict=True):
        if t is None:
            continue
        fits = t.shape == (N, C) and t.dtype == acc and t.device == x.device
        if not fits or (C > 1 and t.stride(1) != 1) or (N > 1 and t.stride(0) < C):
            raise ValueError(
                f"batch_norm_act: expected {name} ({N}, {C}) {acc} on {x.device} with strides (at least {C}, 1), "
                f"got {tuple(t.shape)} {t.dtype} on {t.device} with strides {t.stride()}"
            )


def _distinct(gates, has_residual):
    """The sums to make, of gate_grad, gate_abs, out_grad and out_abs, and (to, from) pairs to copy afterwards.

    Without a residual dy y = dz z, also where a ReLU cut: the sums are made once.
    """
    if has_residual:
        return gates, []
    grads, magnitudes = gates[::2], gates[1::2]
    first = [next((t for t in pair if t is not None), None) for pair in (grads, magnitudes)]
    copies = [pair[::-1] for pair in (grads, magnitudes) if pair[0] is not None and pair[1] is not None]
    return (*first, None, None), copies


def _eager(tensors, flags, gates, _):
    x, weight, bias, residual, running_mean, running_var, tracked = tensors
    training, momentum, eps, sigmoid, relu = flags
    if training and tracked is not None:
        tracked.add_(1)
    cumulative = momentum is None and training and tracked is not None
    if momentum is None:
        momentum = 1.0 if cumulative else 0.0
    scale = weight.sigmoid() if sigmoid else weight
    # F.batch_norm wants one dtype for parameters and statistics; casting (C,) costs nothing.  x is never cast.
    mean, var = running_mean, running_var
    if len({t.dtype for t in (scale, bias, mean, var) if t is not None}) > 1:
        scale, bias, mean, var = (None if t is None else t.float() for t in (scale, bias, mean, var))
    if cumulative:  # the host does not know how many batches there were: the device mixes what they gave
        mean, var = (None if t is None else t.clone() for t in (mean, var))
    z = F.batch_norm(x, mean, var, scale, bias, training, momentum, eps)
    for running, now in ((running_mean, mean), (running_var, var)):
        if training and running is not None and now is not running:
            running.lerp_(now.to(running.dtype), 1 / tracked.to(running.dtype)) if cumulative else running.copy_(now)
    (*at_z, out_grad, out_abs), copies = _distinct(gates, residual is not None)
    z = _probe(z, *at_z, copies)
    if residual is not None:
        z = z + residual
    return _probe(z.relu() if relu else z, out_grad, out_abs)


def _probe(t, grad, magnitude, copies=()):
    return t if grad is None and magnitude is None else _GateProbe.apply(t, grad, magnitude, copies)


class _GateProbe(torch.autograd.Function):
    """Identity whose backward writes the gate sums of its input: the definition, with a pass of its own."""

    @staticmethod
    def forward(ctx, t, grad, magnitude, copies):
        ctx.save_for_backward(t)
        ctx.buffers = grad, magnitude, copies
        return t.clone()  # not a view: an activation in place may follow

    @staticmethod
    def backward(ctx, dt):
        (t,) = ctx.saved_tensors
        grad, magnitude, copies = ctx.buffers
        with torch.no_grad():
            _write_sums(dt.to(torch.promote_types(dt.dtype, torch.float32)) * t, grad, magnitude)
            _copy(copies)
        return dt, None, None, None


def _write_sums(product, grad, magnitude):
    if grad is not None:
        grad.copy_(product.sum((2, 3)))
    if magnitude is not None:
        magnitude.copy_(product.abs().sum((2, 3)))


def _copy(pairs):
    for to, source in pairs:
        to.copy_(source)


def _compiled(tensors, flags, gates, backend):
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        return _BatchNormAct.apply(*tensors, *flags, *gates, backend)
    return getattr(torch.ops.fastprune.batch_norm_act, backend)(*tensors, *flags, False)[0]


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, *rest):
        *rest, gate_grad, gate_abs, out_grad, out_abs, backend = rest
        training, _, eps, sigmoid, relu = rest[3:]
        masked = relu and residual is not None  # without a residual the backward finds the ReLU's mask again from x
        gates, ctx.copies = _distinct((gate_grad, gate_abs, out_grad, out_abs), residual is not None)
        sums_y = gates[2] is not None or gates[3] is not None
        run = getattr(torch.ops.fastprune.batch_norm_act, backend)
        y, stats, mask = run(x, weight, bias, residual, *rest, masked)
        bits = mask.numel() > 0
        keep_y = sums_y or (masked and not bits)
        ctx.save_for_backward(x, weight, bias, stats, y if keep_y else None, mask if bits else None)
        ctx.flags, ctx.has_residual = (training, eps, sigmoid, relu), residual is not None
        ctx.gates, ctx.backend = gates, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, _, _, _ = saved = ctx.saved_tensors
        relu = ctx.flags[3]
        if not _same_layout(dy, x):
            dy = torch.empty_like(x).copy_(dy)  # sum() has a stride-0 gradient; the kernels want the layout of x
        need_dx, need_dresidual = ctx.needs_input_grad[0], ctx.has_residual and ctx.needs_input_grad[3]
        # Grad mode is on only under create_graph=True: the gradient must then be made of differentiable operations.
        if torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = _differentiable_backward(dy, *saved, ctx.gates, *ctx.flags)
        else:
            run = getattr(torch.ops.fastprune.batch_norm_act_backward, ctx.backend)
            needs = (need_dx, need_dresidual and relu)
            dx, dweight, dbias, dresidual = run(dy, *saved, *ctx.gates, *ctx.flags, *needs)
            if not relu:
                dresidual = dy
        _copy(ctx.copies)
        return (
            dx if need_dx else None,
            None if weight is None else dweight,
            None if bias is None else dbias,
            dresidual if need_dresidual else None,
            *(None,) * 13,
        )


def _differentiable_backward(dy, x, weight, bias, stats, y, mask, gates, training, eps, sigmoid, relu):
    """The backward in plain PyTorch, from ``x`` on, so that it has derivatives of its own."""
    acc = torch.promote_types(x.dtype, torch.float32)

    def column(t):
        return t.view(1, -1, 1, 1)

    xf, dz = x.to(acc), dy.to(acc)
    if training:
        mean, rstd = xf.mean((0, 2, 3)), (xf.var((0, 2, 3), correction=0) + eps).rsqrt()
    else:
        mean, rstd = stats.to(acc)
    xhat = (xf - column(mean)) * column(rstd)
    scale = torch.ones_like(mean) if weight is None else weight.to(acc).sigmoid() if sigmoid else weight.to(acc)
    shift = torch.zeros_like(mean) if bias is None else bias.to(acc)
    if relu:  # NaN passes, as in PyTorch's ReLU
        if mask is not None:
            dz = dz * unpack_mask(mask, x)
        else:
            dz = dz * ~((column(scale) * xhat + column(shift) if y is None else y) <= 0)
    dshift, dscale = dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))
    with torch.no_grad():
        if any(t is not None for t in gates[:2]):
            _write_sums(dz * (column(scale) * xhat + column(shift)), *gates[:2])
        if any(t is not None for t in gates[2:]):
            _write_sums(dz * y, *gates[2:])
    dxhat = dz
    if training:
        m = max(x.numel() // x.shape[1], 1)
        dxhat = dz - column(dshift / m) - xhat * column(dscale / m)
    dx = column(scale * rstd) * dxhat
    dweight = None if weight is None else (dscale * scale * (1 - scale) if sigmoid else dscale).to(weight.dtype)
    return dx.to(x.dtype), dweight, None if bias is None else dshift.to(bias.dtype), dz.to(x.dtype)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The ReLU's mask as bool like ``x``, from bits: (N, C, bytes of H*W) for NCHW, (N, H*W, bytes of C) otherwise.

    Bit k of byte j of a row is element 8 j + k; rows are padded to 2 bytes.
    """
    N, C, H, W = x.shape
    rows = ((mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1).flatten(2).bool()
    if x.is_contiguous():
        return rows[..., : H * W].view(N, C, H, W)
    return rows[..., :C].view(N, H, W, C).permute(0, 3, 1, 2)


def _fake(backend, x, weight, bias, residual, mean, var, tracked, training, momentum, eps, sigmoid, relu, save_mask):
    N, C, H, W = x.shape
    shape = (0,)
    if save_mask and backend == "cpp":
        rows, n = (C, H * W) if x.is_contiguous() else (H * W, C)
        shape = (N, rows, 2 * ((n + 15) // 16))
    return torch.empty_like(x), x.new_empty((2, C), dtype=torch.float32), x.new_empty(shape, dtype=torch.uint8)


def _fake_backward(backend, dy, x, weight, bias, stats, y, mask, *rest):
    need_dx, need_dresidual = rest[-2:]
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        torch.empty_like(x) if need_dresidual else x.new_empty(0),
    )


_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; strides of size-1 dimensions cannot tell."""
    nhwc = torch.channels_last
    if a.is_contiguous():
        return b.is_contiguous()
    return a.is_contiguous(memory_format=nhwc) and b.is_contiguous(memory_format=nhwc)


def _refuse(backend, x, weight, bias, residual, running_mean, running_var, tracked):
    if x.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return f"it needs an NCHW or channels_last tensor without gaps, got {tuple(x.shape)} with strides {x.stride()}"
    if backend == "triton" and max(x.shape[:2]) * x.shape[2] * x.shape[3] > 2**30:
        return f"it takes at most 2^30 values per channel or sample, got {tuple(x.shape)}"
    if residual is not None and not _same_layout(residual, x):
        return f"residual must have the strides of x, {x.stride()}, got {residual.stride()}"
    if not all(t is None or t.is_contiguous() for t in (weight, bias, running_mean, running_var)):
        return "weight, bias and running statistics must be contiguous"
    return None


backends.define(
    "batch_norm_act",
    {
        "batch_norm_act": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
        "bool sigmoid, bool relu, bool save_mask) -> (Tensor, Tensor, Tensor)",
        "batch_norm_act_backward": "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor? y, "
        "Tensor? mask, Tensor(a!)? gate_grad, Tensor(b!)? gate_abs, Tensor(c!)? out_grad, Tensor(d!)? out_abs, "
        "bool training, float eps, bool sigmoid, bool relu, bool need_dx, bool need_dresidual) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    },
    eager=_eager,
    fake={"batch_norm_act": _fake, "batch_norm_act_backward": _fake_backward},
    refuse=_refuse,
)
