"""Sum of (w * g)^2 over the filters of all weights of a model: a term of the kernel of filter_norm."""

from __future__ import annotations

from torch import Tensor

from .filter_norm import AOT_DTYPES, aot_entry, launch

__all__ = ["AOT_DTYPES", "aot", "weight_taylor"]


def weight_taylor(weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Launches the sums; arguments and results as in :mod:`fastprune.ops.weight_taylor`."""
    return launch(weights, grads, "taylor", 0)


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles."""
    return [aot_entry(dtype, "taylor", 0)]
