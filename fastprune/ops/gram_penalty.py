"""Penalties on the Gram matrices of all weights of a model at once: value and gradient in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastprune import backends
from fastprune.ops.filter_norm import check_weights, dense

KINDS = ("rows", "columns", "energy", "conv")


@dataclass(frozen=True)
class GramPlan:
    """Which channels of each weight are cut, in the form the kernels read; made once by :func:`gram_plan`."""

    order: Tensor  # (sum of N,) int32: per weight its rows, cut ones first
    cuts: tuple[int, ...]  # cut rows per weight


def gram_plan(keep: Sequence[Tensor], device: torch.device | str | None = None) -> GramPlan:
    """Prepare keep masks for many calls of :func:`gram_penalty`, which then never wait for the GPU.

    Args:
        keep: Per weight a mask of its channels, (N,) bool, True = kept.
        device: Of the weights; default: that of the masks.

    Raises:
        ValueError: No masks, or one that is not (N,) bool.
    """
    keep = tuple(keep)
    for i, k in enumerate(keep):
        if k.dim() != 1 or k.dtype != torch.bool:
            raise ValueError(f"gram_plan: expected masks (N,) bool, keep[{i}] is {tuple(k.shape)} {k.dtype}")
    if not keep:
        raise ValueError("gram_plan: expected at least one mask, got none")
    device = keep[0].device if device is None else device
    keep = [k.cpu() for k in keep]
    order = torch.cat([torch.argsort(k, stable=True) for k in keep]).to(torch.int32)
    return GramPlan(order.to(device), tuple(len(k) - int(k.sum()) for k in keep))


def gram_penalty(
    weights: Sequence[Tensor],
    keep: GramPlan | Sequence[Tensor],
    *,
    cut: float = 1.0,
    kept: float = 0.0,
    scale: Tensor | Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Push the rows of cut channels towards 0 and away from the other rows, over all weights of a model.

    With :math:`A` a weight as (N, K) and :math:`G = A A^T`, each weight adds
    :math:`\frac{1}{N^2} \sum_{ij} m_{ij} (G_{ij} - t_{ij})^2`, with :math:`m_{ij}` = ``kept`` where i and j are both
    kept and ``cut`` elsewhere, and :math:`t_{ij} = 1` where i = j is kept, 0 elsewhere.  ``kept=0`` is trainability
    preserving pruning: kernels then compute only the blocks of G with a cut row or column; ``kept=1`` adds kernel
    orthogonality of the kept channels.  Differentiable twice with respect to the weights.

    Args:
        weights: Weights of convolutions and linear layers, of 2 to 5 dimensions and any sizes, all of one dtype and
            device; contiguous, channels_last or channels_last_3d.  With others the call runs on eager, or is refused
            in words by a backend that was named.
        keep: A :func:`gram_plan`, or per weight a mask of its channels, (N,) bool, from which one is made.
        cut: Factor of the blocks with a cut channel.
        kept: Factor of the block of kept channels.
        scale: Per weight a factor of its penalty, (L,); treated as a constant.  Give a tensor on the weights' device
            where calls are many.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: (), float32 (float64 for float64 weights).

    Raises:
        ValueError: No weights, a shape, dtype or device that does not fit, masks or a scale of another length.
        BackendError: ``backend`` was named and cannot take this call.

    Source: TPP, Wang and Fu, ICLR 2023, arXiv:2207.12534; kernel orthogonality, Xie et al., CVPR 2017,
    arXiv:1703.01827.
    """
    weights = tuple(weights)
    check_weights("gram_penalty", weights)
    plan = keep if isinstance(keep, GramPlan) else gram_plan(keep, weights[0].device)
    rows = sum(w.shape[0] for w in weights)
    if len(plan.cuts) != len(weights) or plan.order.numel() != rows or plan.order.device != weights[0].device:
        raise ValueError(
            f"gram_penalty: expected masks for {len(weights)} weights of {rows} channels in all on "
            f"{weights[0].device}, got {len(plan.cuts)} of {plan.order.numel()} on {plan.order.device}"
        )
    for i, (w, count) in enumerate(zip(weights, plan.cuts, strict=True)):
        if count > w.shape[0]:
            raise ValueError(f"gram_penalty: keep cuts {count} channels of weights[{i}], which has {w.shape[0]}")
    scale = _scale("gram_penalty", scale, weights)
    name = backends.select("gram_penalty", backend, weights[0], weights, "rows")
    return _Penalty.apply("gram_penalty", name, plan.order, plan.cuts, cut, kept, scale, *weights)


@torch.no_grad()
def value_and_grad(
    weights: Sequence[Tensor], plan: GramPlan, cut: float, kept: float, scale: Tensor | None, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """The penalty, (), and its gradients in float32 (float64), each with its weight's strides.

    For callers without autograd, which add the gradients to ``.grad`` themselves.  Nothing is checked; ``backend`` is
    what ``backends.select("gram_penalty", None, weights[0], weights, "rows")`` says.
    """
    return _call("gram_penalty", backend, weights, plan.order, plan.cuts, cut, kept, scale)


def orthogonality_penalty(
    weights: Sequence[Tensor],
    kind: str = "rows",
    *,
    references: Sequence[Tensor] = (),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | None = None,
    norm: bool = False,
    scale: Tensor | Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Distance of all weights of a model from orthogonal ones.  Differentiable twice.

    With :math:`A` a weight as (N, K), each weight adds

    - ``"rows"``: the mean over N x N of :math:`(A A^T - I)^2`;
    - ``"columns"``: the mean over K x K of :math:`(A^T A - I)^2`;
    - ``"energy"``: the mean over K x K of :math:`(A^T A - B^T B)^2`, B the weight's reference, a constant;
    - ``"conv"``: :math:`\lVert \mathrm{conv}(W, W) - T \rVert^2`, T being I at the centre of the output and 0
      elsewhere; with ``norm=True`` its square root.

    Args:
        weights: As in :func:`gram_penalty`; 2 or 4 dimensions for ``"conv"``.
        kind: ``"rows"``, ``"columns"``, ``"energy"`` or ``"conv"``.
        references: ``"energy"``: B per weight, with its shape, dtype, device and strides.
        stride: ``"conv"``: of the convolution, for all weights or for each.
        padding: ``"conv"``: likewise; None is the paper's ``(k - 1) // stride * stride``.
        norm: ``"conv"``: take the square root of each weight's sum.  Its gradient is 0 where the sum is.
        scale: As in :func:`gram_penalty`.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: (), float32 (float64 for float64 weights).

    Raises:
        ValueError: As :func:`gram_penalty`; an unknown ``kind``, or an argument of another kind.
        BackendError: ``backend`` was named and cannot take this call.

    Source: kernel orthogonality, Xie et al., CVPR 2017, arXiv:1703.01827; convolutional orthogonality, Wang et al.,
    CVPR 2020, arXiv:1911.12207; as baselines of pruning, Wang and Fu, ICLR 2023, arXiv:2207.12534.
    """
    op, weights, references = "orthogonality_penalty", tuple(weights), tuple(references)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}, got {kind!r}")
    check_weights(op, weights)
    if kind != "conv" and (norm or stride != 1 or padding is not None):
        raise ValueError(f"{op}: stride, padding and norm belong to kind 'conv'; leave them out with {kind!r}")
    if len(references) != (len(weights) if kind == "energy" else 0):
        raise ValueError(f"{op}: expected one reference per weight with 'energy' and none else, got {len(references)}")
    for i, (w, r) in enumerate(zip(weights, references, strict=False)):
        if (r.shape, r.dtype, r.device) != (w.shape, w.dtype, w.device):
            raise ValueError(
                f"{op}: references[{i}] is {tuple(r.shape)} {r.dtype} on {r.device}, expected what its weight is: "
                f"{tuple(w.shape)} {w.dtype} on {w.device}"
            )
    strides, paddings = _windows(op, weights, stride, padding) if kind == "conv" else ([], [])
    scale = _scale(op, scale, weights)
    name = backends.select("gram_penalty", backend, weights[0], weights + references, kind)
    if kind == "rows":
        return _Penalty.apply("gram_penalty", name, None, [0] * len(weights), 0.0, 1.0, scale, *weights)
    detached = [r.detach() for r in references]
    return _Penalty.apply(op, name, detached, kind, strides, paddings, norm, scale, *weights)


def orthogonality_value_and_grad(
    weights: Sequence[Tensor],
    kind: str,
    references: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    norm: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """As :func:`value_and_grad`, of :func:`orthogonality_penalty`; ``paddings`` has two numbers per weight."""
    if kind == "rows":
        return _call("gram_penalty", backend, weights, None, [0] * len(weights), 0.0, 1.0, None)
    return _call("orthogonality_penalty", backend, weights, references, kind, strides, paddings, norm, None)


def _scale(op: str, scale: Tensor | Sequence[float] | None, weights: tuple[Tensor, ...]) -> Tensor | None:
    if scale is None:
        return None
    acc = _acc(weights[0])
    if isinstance(scale, Tensor):
        scale = scale.detach()
    else:
        scale = torch.tensor(list(scale), dtype=acc, device=weights[0].device)
    if scale.shape != (len(weights),) or scale.device != weights[0].device:
        raise ValueError(
            f"{op}: expected a scale ({len(weights)},) on {weights[0].device}, "
            f"got {tuple(scale.shape)} on {scale.device}"
        )
    return scale.to(acc).contiguous()


def _windows(
    op: str, weights: tuple[Tensor, ...], stride: int | Sequence[int], padding: int | Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Per weight the stride, and the padding of both dimensions."""
    count = len(weights)
    strides = [stride] * count if isinstance(stride, int) else list(stride)
    given = [padding] * count if padding is None or isinstance(padding, int) else list(padding)
    if len(strides) != count or len(given) != count or min(strides) < 1 or min(p or 0 for p in given) < 0:
        raise ValueError(
            f"{op}: expected a stride from 1 and a padding from 0 on, for all or for each of {count} weights, "
            f"got {stride} and {padding}"
        )
    paddings: list[int] = []
    for i, (w, s, p) in enumerate(zip(weights, strides, given, strict=True)):
        if w.dim() not in (2, 4):
            raise ValueError(f"{op}: 'conv' takes weights of 2 or 4 dimensions, weights[{i}] is {tuple(w.shape)}")
        kernel = w.shape[2:] if w.dim() == 4 else (1, 1)
        paddings += [(k - 1) // s * s if p is None else p for k in kernel]
    return strides, paddings


def _call(function: str, backend: str, weights: Sequence[Tensor], *args: object) -> tuple[Tensor, list[Tensor]]:
    if backend == "eager":
        with torch.autocast(weights[0].device.type, enabled=False):  # products of float32 stay float32
            return _EAGER[function](weights, *args)
    return getattr(getattr(torch.ops.fastprune, function), backend)(weights, *args)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, backend, *args):
        count = _ARGUMENTS[function]
        args, weights = args[:count], args[count:]
        value, grads = _call(function, backend, weights, *args)
        ctx.save_for_backward(*weights, *grads)
        ctx.function, ctx.args = function, args
        return value

    @staticmethod
    def backward(ctx, dy):
        count = len(ctx.saved_tensors) // 2
        weights, grads = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # under create_graph=True the gradient must itself be differentiable
            grads = _EAGER[ctx.function](weights, *ctx.args)[1]
        grads = ((g * dy).to(w.dtype) for g, w in zip(grads, weights, strict=True))
        return None, None, *[None] * len(ctx.args), *grads


def _eager(
    weights: Sequence[Tensor], order: Tensor | None, cuts: Sequence[int], cut: float, kept: float, scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    sizes = [w.shape[0] for w in weights]
    orders = [None] * len(weights) if order is None else order.split(sizes)
    values, grads = [], []
    for w, rows, count in zip(weights, orders, cuts, strict=True):
        n = w.shape[0]
        a = _matrix(w)
        keep = torch.ones(n, dtype=torch.bool, device=w.device)
        if rows is not None:
            keep.index_fill_(0, rows[:count].long(), False)
        both = keep[:, None] & keep
        distance = a @ a.t() - torch.diag(keep.to(a.dtype))
        parts = [d * m if m else torch.zeros_like(d) for d, m in ((distance, kept), (distance, cut))]
        weighted = torch.where(both, *parts)
        values.append(torch.where(weighted == 0, 0, weighted * distance).sum() / max(n * n, 1))
        grads.append(_like(weighted @ a * (4 / max(n * n, 1)), w))
    return _add_up(values, grads, scale)


def _eager_orthogonality(
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    kind: str,
    strides: Sequence[int],
    paddings: Sequence[int],
    norm: bool,
    scale: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    values, grads = [], []
    for i, w in enumerate(weights):
        if kind == "conv":
            if not w.numel():  # conv2d takes no empty weights; the distance is that of 0 from the target
                values.append(w.new_full((), w.shape[0] ** (0.5 if norm else 1), dtype=_acc(w)))
                grads.append(torch.empty_like(w, dtype=_acc(w)))
                continue
            w4 = w.to(_acc(w))
            w4 = w4 if w.dim() == 4 else w4[:, :, None, None]
            s, p = strides[i], tuple(paddings[2 * i : 2 * i + 2])
            distance = F.conv2d(w4, w4, stride=s, padding=p)
            target = torch.zeros_like(distance)
            centre = target[:, :, target.shape[2] // 2, target.shape[3] // 2]
            centre.copy_(torch.eye(len(w), dtype=w4.dtype, device=w.device))
            distance = distance - target
            value = distance.square().sum()
            grad = 2 * conv2d_input(w4.shape, w4, distance, s, p) + 2 * conv2d_weight(w4, w4.shape, distance, s, p)
            if norm:
                value = value.sqrt()
                grad = torch.where(value > 0, grad / (2 * value), 0)
            values.append(value)
            grads.append(_like(grad, w))
            continue
        a = _matrix(w)
        if kind == "columns":
            target = torch.eye(a.shape[1], dtype=a.dtype, device=w.device)
        else:
            target = _matrix(references[i]).t() @ _matrix(references[i])
        distance = a.t() @ a - target
        size = max(distance.numel(), 1)
        values.append(distance.square().sum() / size)
        grads.append(_like(a @ distance * (4 / size), w))
    return _add_up(values, grads, scale)


def _matrix(w: Tensor) -> Tensor:
    return w.reshape(w.shape[0], math.prod(w.shape[1:])).to(_acc(w))


def _acc(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def _like(grad: Tensor, w: Tensor) -> Tensor:
    """``grad`` with the shape and, where it is dense, the layout of ``w``."""
    grad = grad.reshape(w.shape)
    if w.is_contiguous() or not dense(w):
        return grad
    return grad.contiguous(memory_format=torch.channels_last if w.dim() == 4 else torch.channels_last_3d)


def _add_up(values: list[Tensor], grads: list[Tensor], scale: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    if scale is None:
        return torch.stack(values).sum(), grads
    return (torch.stack(values) * scale).sum(), [g * s for g, s in zip(grads, scale, strict=True)]


def _fake(backend: str, weights: list[Tensor], *args: object) -> tuple[Tensor, list[Tensor]]:
    first, acc = weights[0], _acc(weights[0])
    value = first.new_empty((), dtype=acc)
    if backend == "cpp":
        return value, [torch.empty_like(w, dtype=acc) for w in weights]
    *starts, total = 0, *accumulate(-(-w.numel() // 16) * 16 for w in weights)  # Triton writes into one buffer
    flat = first.new_empty(total, dtype=acc)
    return value, [flat.as_strided(w.shape, w.stride(), start) for w, start in zip(weights, starts, strict=True)]


_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (),
}


def _refuse(backend: str, first: Tensor, tensors: tuple[Tensor, ...], kind: str) -> str | None:
    if backend == "triton" and kind == "conv":
        return f"it has no kernel of kind {kind!r}"
    if first.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    for i, w in enumerate(tensors):
        if not dense(w):
            return f"the weights must be contiguous or channels_last, weights[{i}] has strides {w.stride()}"
    half = len(tensors) // 2
    if backend == "triton" and kind == "energy":
        for i, (w, r) in enumerate(zip(tensors[:half], tensors[half:], strict=True)):
            if w.numel() and any(n > 1 and a != b for n, a, b in zip(w.shape, w.stride(), r.stride(), strict=True)):
                return f"references must lie like their weights, references[{i}] has strides {r.stride()}"
    return None


_EAGER = {"gram_penalty": _eager, "orthogonality_penalty": _eager_orthogonality}
_ARGUMENTS = {"gram_penalty": 5, "orthogonality_penalty": 6}
backends.define(
    "gram_penalty",
    {
        "gram_penalty": "(Tensor[] weights, Tensor? order, int[] cuts, float cut, float kept, Tensor? scale)"
        " -> (Tensor, Tensor[])",
        "orthogonality_penalty": "(Tensor[] weights, Tensor[] references, str kind, int[] strides, int[] paddings, "
        "bool norm, Tensor? scale) -> (Tensor, Tensor[])",
    },
    eager=_eager,
    fake={"gram_penalty": _fake, "orthogonality_penalty": _fake},
    refuse=_refuse,
)
