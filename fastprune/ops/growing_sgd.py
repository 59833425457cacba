"""SGD whose weight decay grows per filter, channel or weight, and which holds what was cut at zero, in one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastprune import backends

Parts = Mapping[int, Tensor] | Sequence[Tensor | None]  # tensors for some of the parameters


@torch.no_grad()
def growing_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    reg: Parts = (),
    keep: Parts = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    r"""One SGD step on all parameters, in place and in one launch, with a regularisation and a mask for any of them.

    Per element, with :math:`g` the gradient (divided by ``grad_scale``, negated if ``maximize``):

    .. math::
        g &\leftarrow g + \mathrm{weight\_decay} \cdot p + \mathrm{reg} \cdot p \\
        b &\leftarrow g \text{ if first, else } \mathrm{momentum} \cdot b + (1 - \mathrm{dampening}) \cdot g \\
        p &\leftarrow p - \mathrm{lr} \cdot (g + \mathrm{momentum} \cdot b \text{ if nesterov, else } b)

    and :math:`p = b = 0` where ``keep`` is False, so that what was cut stays zero and brings no momentum back.
    Half types are computed in float32, from the load to the store.  Without ``reg`` and ``keep``, float32 and float64
    parameters become what ``torch.optim.SGD(foreach=True)`` makes of them, bit for bit on ``eager``, and on ``cpp``
    where the CPU has fused multiply-add.

    Args:
        params: Parameters of any shape, all of one dtype and device: float32, bfloat16, float64, and float16 (on CPU
            by ``eager``).  Compiled backends take dense ones (contiguous, channels_last, transposed, ...) whose
            gradient and buffer have the same strides; with others the call runs on ``eager``, or is refused in words
            by a backend that was named.
        grads: Like ``params``.  They are left as they are, but for a division by ``grad_scale``.
        momenta: The buffers :math:`b`, like ``params``; empty when ``momentum`` is 0.
        lr: Learning rate; or (), float32 or float64, on the parameters' device, where the kernel reads it, so that it
            may change between the replays of a CUDA graph.  On ``eager`` a tensor rounds once more than a number.
        momentum: Decay of the buffers.
        dampening: Of the gradient on its way into the buffer.
        weight_decay: The same for all parameters.
        nesterov: Look ahead by the momentum.
        maximize: Go up.
        first: Buffers are written, not read.
        reg: By position in ``params`` (a mapping, or a sequence with None): additional weight decay, of the dimensions
            of its parameter, each of size 1 or the parameter's: (N, 1, 1, 1) per filter, (1, C, 1, 1) per input
            channel, (N, C, 1, 1), or per weight.  Any sign.  float32 (float64 for float64 parameters).
        keep: Likewise, bool: False = held at zero.
        grad_scale: (), float32: of a ``GradScaler``; the gradients are divided by it in place.
        found_inf: (), float32: where it is not 0, the call changes nothing.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Raises:
        ValueError: Lists, shapes, dtypes or devices that do not fit together, or a bad number.
        BackendError: ``backend`` was named and cannot take this call.

    Source: growing regularisation, Wang et al., ICLR 2021, arXiv:2012.09243; TPP, Wang and Fu, ICLR 2023,
    arXiv:2207.12534.
    """
    params, grads, momenta = list(params), list(grads), list(momenta)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(
            f"growing_sgd: nesterov needs a momentum and no dampening, got momentum={momentum}, dampening={dampening}"
        )
    if len(momenta) != (len(params) if momentum else 0):
        raise ValueError(
            f"growing_sgd: expected {'a buffer per parameter' if momentum else 'no buffers without momentum'}, "
            f"got {len(momenta)} for {len(params)} parameters"
        )
    check_alike("growing_sgd", params, grads=grads, **({"momenta": momenta} if momentum else {}))
    regs, keeps = (_numbered("growing_sgd", name, parts, len(params)) for name, parts in (("reg", reg), ("keep", keep)))
    for i, r in regs.items():
        check_broadcast("growing_sgd", f"reg[{i}]", r, params[i])
    for i, k in keeps.items():
        check_broadcast("growing_sgd", f"keep[{i}]", k, params[i], mask=True)
    rate = lr if isinstance(lr, Tensor) else None
    for name, t in (("grad_scale", grad_scale), ("found_inf", found_inf), ("lr", rate)):
        allowed = (torch.float32, torch.float64) if name == "lr" else (torch.float32,)
        if t is not None and (t.dim() or t.dtype not in allowed or (params and t.device != params[0].device)):
            raise ValueError(
                f"growing_sgd: expected {name} (), {' or '.join(str(d)[6:] for d in allowed)}, on "
                f"{params[0].device if params else 'the device'}, got {tuple(t.shape)} {t.dtype} on {t.device}"
            )
    numbers = (lr if rate is None else 0.0, momentum, dampening, weight_decay, nesterov, maximize, first)
    launch(params, grads, momenta, regs, keeps, grad_scale, found_inf, rate, *numbers, backend=backend)


def launch(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    reg: dict[int, Tensor],
    keep: dict[int, Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rate: Tensor | None,
    *numbers: float | bool,
    backend: str | None = None,
) -> None:
    """:func:`growing_sgd` for callers that know their arguments to be right.  ``numbers``: lr (which a ``rate``
    replaces), momentum, dampening, weight_decay, nesterov, maximize, first."""
    if not params:
        return
    name = backends.select("growing_sgd", backend, params[0], params, grads, momenta)
    args = (
        params, grads, momenta, list(reg.values()), list(reg), list(keep.values()), list(keep),
        grad_scale, found_inf, rate, *numbers,
    )  # fmt: skip
    if name == "eager":
        backends.eager("growing_sgd")(*args)
        return
    getattr(torch.ops.fastprune.growing_sgd, name)(*args)
    increment_version([*params, *momenta] if grad_scale is None else [*params, *grads, *momenta])


@torch.no_grad()
def grow_grads(params: Sequence[Tensor], grads: Sequence[Tensor], reg: Parts, backend: str | None = None) -> None:
    """``grads += reg * params`` in one launch: growing regularisation in front of any optimizer.

    Args:
        params: As for :func:`growing_sgd`.
        grads: Like ``params``; changed in place where there is a ``reg``.
        reg: As for :func:`growing_sgd`.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Raises:
        ValueError: Lists, shapes, dtypes or devices that do not fit together.
        BackendError: ``backend`` was named and cannot take this call.

    Source: as :func:`growing_sgd`.
    """
    params, grads = list(params), list(grads)
    check_alike("grow_grads", params, grads=grads)
    regs = _numbered("grow_grads", "reg", reg, len(params))
    for i, r in regs.items():
        check_broadcast("grow_grads", f"reg[{i}]", r, params[i])
    params, grads, regs = [params[i] for i in regs], [grads[i] for i in regs], list(regs.values())
    if not params:
        return
    name = backends.select("growing_sgd", backend, params[0], params, grads, [])
    if name == "eager":
        for p, g, r in zip(params, grads, regs, strict=True):
            g.copy_(_wide(g).addcmul(r, _wide(p)))
        return
    getattr(torch.ops.fastprune.grow_grads, name)(params, grads, regs)
    increment_version(grads)


@torch.no_grad()
def hold(tensors: Sequence[Tensor], keep: Parts, backend: str | None = None) -> None:
    """Set to zero, in one launch, what is not kept, be it NaN: after the step of any optimizer.

    Args:
        tensors: Parameters and whatever else must stay zero with them, such as an optimizer's buffers; otherwise as the
            ``params`` of :func:`growing_sgd`.
        keep: As for :func:`growing_sgd`.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit together.
        BackendError: ``backend`` was named and cannot take this call.
    """
    tensors = list(tensors)
    check_alike("hold", tensors)
    keeps = _numbered("hold", "keep", keep, len(tensors))
    for i, k in keeps.items():
        check_broadcast("hold", f"keep[{i}]", k, tensors[i], mask=True)
    tensors, keeps = [tensors[i] for i in keeps], list(keeps.values())
    if not tensors:
        return
    name = backends.select("growing_sgd", backend, tensors[0], tensors, [], [])
    if name == "eager":
        for t, k in zip(tensors, keeps, strict=True):
            t.masked_fill_(~k, 0)
        return
    getattr(torch.ops.fastprune.hold, name)(tensors, keeps)
    increment_version(tensors)


def check_alike(op: str, params: list[Tensor], **others: list[Tensor]) -> None:
    """That parameters share dtype and device, and that each has its like in each of the other lists."""
    for i, p in enumerate(params):
        if not p.is_floating_point() or p.dtype != params[0].dtype or p.device != params[0].device:
            raise ValueError(
                f"{op}: expected params of floats of one dtype and device, params[0] is {params[0].dtype} on "
                f"{params[0].device}, params[{i}] is {p.dtype} on {p.device}; call once for each"
            )
    for name, tensors in others.items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: expected {name} for all {len(params)} params, got {len(tensors)}")
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t.layout != torch.strided:
                raise ValueError(f"{op}: expected dense tensors, {name}[{i}] is {t.layout}; call .to_dense() on it")
            if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
                raise ValueError(
                    f"{op}: expected {name}[{i}] like its parameter, {tuple(p.shape)} {p.dtype} on {p.device}, "
                    f"got {tuple(t.shape)} {t.dtype} on {t.device}"
                )


def check_broadcast(op: str, name: str, t: Tensor, param: Tensor, mask: bool = False) -> None:
    """That ``t`` is a regularisation, or a mask, of ``param``."""
    fits = t.dim() == param.dim() and all(n in (1, size) for n, size in zip(t.shape, param.shape, strict=True))
    dtype = torch.bool if mask else torch.float64 if param.dtype == torch.float64 else torch.float32
    if not fits or t.dtype != dtype or t.device != param.device:
        raise ValueError(
            f"{op}: expected {name} to have {param.dim()} dimensions, each of size 1 or that of its parameter "
            f"{tuple(param.shape)}, {dtype} on {param.device}; got {tuple(t.shape)} {t.dtype} on {t.device}"
        )


def _numbered(op: str, name: str, parts: Parts, count: int) -> dict[int, Tensor]:
    """Position to tensor, without None."""
    if not isinstance(parts, Mapping):
        if len(parts) not in (0, count):
            raise ValueError(f"{op}: expected {name} for all {count} params (or None), got {len(parts)}")
        parts = dict(enumerate(parts))
    if outside := [i for i in parts if not 0 <= i < count]:
        raise ValueError(f"{op}: {name} has positions {outside}, but there are {count} params")
    return {i: t for i, t in parts.items() if t is not None}


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _eager(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], reg: list[Tensor], reg_at: list[int],
    keep: list[Tensor], keep_at: list[int], grad_scale: Tensor | None, found_inf: Tensor | None, rate: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
) -> None:  # fmt: skip
    regs, keeps = dict(zip(reg_at, reg, strict=True)), dict(zip(keep_at, keep, strict=True))
    skip = None if found_inf is None else found_inf != 0
    minus_rate = None if rate is None else -rate.to(torch.promote_types(params[0].dtype, torch.float32))

    def write(to: Tensor, value: Tensor) -> None:
        to.copy_(value if skip is None else torch.where(skip, to, value))

    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        p, g = _wide(param), _wide(grad)
        if grad_scale is not None:
            g = g / grad_scale
            write(grad, g)
        if maximize:
            g = -g
        if weight_decay:
            g = g.add(p, alpha=weight_decay)
        if i in regs:
            g = g.addcmul(regs[i], p)
        if momenta:
            buffer = g if first else (_wide(momenta[i]) * momentum).add(g, alpha=1 - dampening)
            g = g.add(buffer, alpha=momentum) if nesterov else buffer
            write(momenta[i], torch.where(keeps[i], buffer, 0) if i in keeps else buffer)
        p = p.add(g, alpha=-lr) if rate is None else p.addcmul(g, minus_rate)
        write(param, torch.where(keeps[i], p, 0) if i in keeps else p)


_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (),
}
MAX_DIMS = 5


def _refuse(backend: str, x: Tensor, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> str | None:
    if x.dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    if max(map(Tensor.dim, params)) <= MAX_DIMS and all(map(Tensor.is_contiguous, (*params, *grads, *momenta))):
        return None  # the usual case: some hundred parameters are to be seen through in every step
    strides = list(map(Tensor.stride, params))
    for i, p in enumerate(params):
        if p.dim() > MAX_DIMS or not _dense(p.shape, strides[i]):
            return f"params must be dense, of at most {MAX_DIMS} dimensions; params[{i}] has strides {strides[i]}"
    for name, tensors in (("grads", grads), ("momenta", momenta)):
        theirs = list(map(Tensor.stride, tensors))
        for i, (p, mine) in enumerate(zip(params, strides, strict=True) if tensors and theirs != strides else ()):
            if any(n > 1 and a != b for n, a, b in zip(p.shape, mine, theirs[i], strict=False)) and p.numel():
                return f"{name}[{i}] must have its parameter's strides, {mine}, got {theirs[i]}"
    return None


@lru_cache(maxsize=4096)
def _dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, its dimensions being in any order."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return not math.prod(shape)
        expected *= size
    return True


backends.define(
    "growing_sgd",
    {
        "growing_sgd": "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momenta, Tensor[] reg, int[] reg_at, "
        "Tensor[] keep, int[] keep_at, Tensor? grad_scale, Tensor? found_inf, Tensor? rate, float lr, float momentum, "
        "float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()",
        "grow_grads": "(Tensor[] params, Tensor(a!)[] grads, Tensor[] reg) -> ()",
        "hold": "(Tensor(a!)[] tensors, Tensor[] keep) -> ()",
    },
    eager=_eager,
    fake=dict.fromkeys(("growing_sgd", "grow_grads", "hold"), lambda backend, *args: None),
    refuse=_refuse,
)
