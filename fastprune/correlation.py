"""How well two rankings of channels agree, such as a method's scores and the oracle's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float:
    """Linear correlation, in float64.

    Args:
        x, y: (n,), n >= 2, any real dtype, finite.

    Returns: In [-1, 1]; NaN if either is constant, as scipy.stats, but without its warning.

    Raises:
        ValueError: Not two vectors of one length, fewer than two values, NaN or infinity.
    """
    _check("pearson", x, y)
    for name, t in (("x", x), ("y", y)):
        if not t.isfinite().all():
            raise ValueError(f"pearson: {name} has infinite values; use spearman or kendall, which only rank")
    return _pearson(x.double(), y.double())


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation: Pearson's of the ranks, ties sharing the mean of theirs.  As :func:`pearson`, but infinities
    are ranked."""
    _check("spearman", x, y)
    return _pearson(_mean_ranks(x), _mean_ranks(y))


def kendall(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b: concordant less discordant pairs over all pairs, corrected for ties.

    Counts pairs exactly, in integers, in n log(n)^2 time and n memory.  Arguments, result and errors as
    :func:`spearman`.

    Source: Kendall, The treatment of ties in ranking problems, Biometrika 33, 1945.
    """
    _check("kendall", x, y)
    x, y = (t.unique(return_inverse=True)[1] for t in (x, y))
    n, width = len(x), int(y.max()) + 1
    pairs = n * (n - 1) // 2
    ties_x, ties_y, ties_xy = _tied_pairs(x), _tied_pairs(y), _tied_pairs(x * width + y)
    if pairs in (ties_x, ties_y):
        return math.nan
    discordant = _inversions(y[(x * width + y).argsort()])
    excess = pairs - ties_x - ties_y + ties_xy - 2 * discordant
    return excess / math.sqrt(pairs - ties_x) / math.sqrt(pairs - ties_y)


def _check(name: str, x: Tensor, y: Tensor) -> None:
    if x.dim() != 1 or x.shape != y.shape:
        raise ValueError(f"{name}: expected two vectors of one length, got {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < 2:
        raise ValueError(f"{name}: expected at least 2 values, got {len(x)}")
    for which, t in (("x", x), ("y", y)):
        if t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"{name}: expected numbers in {which}, got {t.dtype}")
        if t.isnan().any():
            raise ValueError(f"{name}: NaN in {which}")


def _pearson(x: Tensor, y: Tensor) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    x, y = x / x.abs().max(), y / y.abs().max()  # so that no square overflows
    return max(-1.0, min(1.0, torch.dot(x / x.norm(), y / y.norm()).item()))


def _mean_ranks(t: Tensor) -> Tensor:
    _, inverse, counts = t.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1).double() / 2)[inverse]


def _tied_pairs(t: Tensor) -> int:
    counts = t.unique(return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _inversions(t: Tensor) -> int:
    """Pairs i < j with t[i] > t[j], of non-negative integers.

    Such a pair agrees in some high bits and then has 1 before 0.  So, bit by bit: gather what agrees above it, in the
    old order, and count the ones before each zero.
    """
    total = 0
    for bit in range(int(t.max()).bit_length()):
        above, order = (t >> (bit + 1)).sort(stable=True)
        ones = (t[order] >> bit) & 1
        before = ones.cumsum(0) - ones
        start = torch.searchsorted(above, above)  # first of each one's group
        total += int(((before - before[start]) * (1 - ones)).sum())
    return total
