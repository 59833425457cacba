"""From per-sample gate gradients to sums over the batch, for all gates of a model at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune import backends


def gate_sums(
    slots: Tensor, columns: Tensor, offsets: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Add up what the gates of a model got in one backward, and clear it.

    Gate k owns the columns ``columns[offsets[k]:offsets[k + 1]]`` of ``slots``, one for each place it is used at, so
    its per-sample gradient is :math:`S_{nk} = \sum_j \mathrm{slots}[n, \mathrm{columns}_j]`.

    Args:
        slots: Per-sample gradients, (N, T), float32 or float64, inner stride 1.  The columns read are set to zero.
        columns: int64, (J,), each column at most once.
        offsets: int64, (K + 1,), ascending from 0 to J.
        backend: Force one backend; the default is the table in :mod:`fastprune.backends`.

    Returns: :math:`\sum_n S_{nk}`, :math:`\sum_n S_{nk}^2` and :math:`\sum_n |S_{nk}|`, (K,) float64 each.

    Raises:
        ValueError: A shape, dtype or device does not fit.
        BackendError: ``backend`` was named and cannot take this call.

    Source: Molchanov et al., CVPR 2019, arXiv:1906.10771 (square of the sum, sum of the squares); Theis et al., 2018,
    arXiv:1801.05787 (sum of the squares); Molchanov et al., ICLR 2017, arXiv:1611.06440 (sum of the magnitudes).
    """
    if slots.dim() != 2 or slots.dtype not in (torch.float32, torch.float64) or slots.stride(1) != 1:
        got = f"{tuple(slots.shape)} {slots.dtype}, strides {slots.stride()}"
        raise ValueError(f"gate_sums: expected slots (N, T), float32 or float64, inner stride 1, got {got}")
    for name, t in (("columns", columns), ("offsets", offsets)):
        if t.dim() != 1 or t.dtype != torch.int64 or t.device != slots.device or not t.is_contiguous():
            raise ValueError(
                f"gate_sums: expected {name} int64, one-dimensional, contiguous, on {slots.device}; "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if not len(offsets):
        raise ValueError("gate_sums: expected offsets (K + 1,), got an empty tensor")
    name = backends.select("gate_sums", backend, slots)
    run = backends.eager("gate_sums") if name == "eager" else getattr(torch.ops.fastprune.gate_sums, name)
    with torch.no_grad():
        return run(slots, columns, offsets)


def _eager(slots: Tensor, columns: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    taken = slots.index_select(1, columns).double().t().contiguous()
    # one after the other within a gate, so that the order of the sum is fixed; unsafe: the host looks at no offset
    sums = torch.segment_reduce(taken, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    slots.index_fill_(1, columns, 0)
    return sums.sum(1), sums.square().sum(1), sums.abs().sum(1)


def _fake(backend: str, slots: Tensor, columns: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    return tuple(slots.new_empty((offsets.shape[0] - 1,), dtype=torch.float64) for _ in range(3))


backends.define(
    "gate_sums",
    {"gate_sums": "(Tensor(a!) slots, Tensor columns, Tensor offsets) -> (Tensor, Tensor, Tensor)"},
    eager=_eager,
    fake={"gate_sums": _fake},
)
