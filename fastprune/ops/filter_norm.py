"""Norms of the filters, or of the input channels, of all weights of a model at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune import backends

KINDS = ("l1", "l2", "sum_squares", "sum")


@torch.no_grad()
def filter_norm(weights: Sequence[Tensor], kind: str = "l1", dim: int = 0, backend: str | None = None) -> Tensor:
    r"""Reduce each filter (``dim=0``) or each input channel (``dim=1``) of each weight to a number, in one launch.

    ``"l1"``: :math:`\sum |w|`; ``"l2"``: :math:`\sqrt{\sum w^2}`; ``"sum_squares"``: :math:`\sum w^2`; ``"sum"``:
    :math:`\sum w`.  A statistic: no gradient flows, and the result does not require one.  The squares of any finite
    float32 are summed without overflow.

    Args:
        weights: Weights of convolutions and linear layers, of 2 to 5 dimensions and any sizes, all of one dtype and
            device; contiguous, channels_last or channels_last_3d.  With others the call runs on eager, or is refused
            in words by a backend that was named.
        kind: ``"l1"``, ``"l2"``, ``"sum_squares"`` or ``"sum"``.
        dim: The dimension that is kept: 0 or 1.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: All weights' results concatenated, (sum of ``w.shape[dim]``,), float32 (float64 for float64 weights).

    Raises:
        ValueError: No weights, a shape, dtype or device that does not fit, unknown ``kind`` or ``dim``.
        BackendError: ``backend`` was named and cannot take this call.

    Source: L1, Li et al., ICLR 2017, arXiv:1608.08710; growing regularisation, Wang et al., ICLR 2021,
    arXiv:2012.09243; weight norms as a baseline of Molchanov et al., CVPR 2019, arXiv:1906.10771.
    """
    weights = tuple(weights)
    if kind not in KINDS:
        raise ValueError(f"filter_norm: kind must be {', '.join(map(repr, KINDS[:-1]))} or 'sum', got {kind!r}")
    if dim not in (0, 1):
        raise ValueError(f"filter_norm: dim must be 0 (filters) or 1 (input channels), got {dim!r}")
    check_weights("filter_norm", weights)
    name = backends.select("filter_norm", backend, *weights)
    if name == "eager":
        return backends.eager("filter_norm")(weights, kind, dim)
    return getattr(torch.ops.fastprune.filter_norm, name)(weights, kind, dim)


def check_weights(op: str, weights: tuple[Tensor, ...]) -> None:
    """What filter_norm and weight_taylor ask of their weights."""
    if not weights:
        raise ValueError(f"{op}: expected at least one weight, got none")
    first = weights[0]
    for i, w in enumerate(weights):
        if not 2 <= w.dim() <= 5 or not w.is_floating_point():
            raise ValueError(
                f"{op}: expected weights of floats with 2 to 5 dimensions, weights[{i}] is {tuple(w.shape)} {w.dtype}"
            )
        if w.dtype != first.dtype or w.device != first.device:
            raise ValueError(
                f"{op}: expected one dtype and device, weights[0] is {first.dtype} on {first.device}, "
                f"weights[{i}] is {w.dtype} on {w.device}"
            )


def _eager(weights: Sequence[Tensor], kind: str, dim: int) -> Tensor:
    acc = torch.promote_types(weights[0].dtype, torch.float32)
    norms = []
    for w in weights:
        rest = [d for d in range(w.dim()) if d != dim]
        if kind == "l1":
            norms.append(w.to(acc).abs().sum(rest))
        elif kind == "sum":
            norms.append(w.sum(rest, dtype=acc))
        else:  # float32 would overflow from 1.8e19 on
            squares = w.double().square().sum(rest)
            norms.append((squares.sqrt() if kind == "l2" else squares).to(acc))
    return torch.cat(norms)


def dense(w: Tensor) -> bool:
    """Whether ``w`` is contiguous, channels_last or channels_last_3d."""
    nhwc = {4: torch.channels_last, 5: torch.channels_last_3d}.get(w.dim())
    return w.is_contiguous() or (nhwc is not None and w.is_contiguous(memory_format=nhwc))


def _fake(backend: str, weights: list[Tensor], kind: str, dim: int) -> Tensor:
    acc = torch.promote_types(weights[0].dtype, torch.float32)
    return weights[0].new_empty(sum(w.shape[dim] for w in weights), dtype=acc)


_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (),
}


def refuse(backend: str, *weights: Tensor) -> str | None:
    """Why a compiled backend cannot take these weights."""
    if weights[0].dtype not in _DTYPES[backend]:
        return f"it takes {', '.join(str(d)[6:] for d in _DTYPES[backend])}"
    for i, w in enumerate(weights):
        if not dense(w):
            return f"the weights must be contiguous or channels_last, weights[{i}] has strides {w.stride()}"
    return None


backends.define(
    "filter_norm",
    {"filter_norm": "(Tensor[] weights, str kind, int dim) -> Tensor"},
    eager=_eager,
    fake={"filter_norm": _fake},
    refuse=refuse,
)
