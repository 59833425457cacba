"""Sums over the batch of the per-sample gate gradients of a model, in one launch.

Traffic: N T slots read and zeroed once, at 4 + 4 bytes; 1.5 MB for ResNet-56 at batch 128.  What counts is the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sums_kernel(
    slots_ptr,                 # (N, T) rows of `stride` elements; the columns read are zeroed
    columns_ptr, offsets_ptr,  # (J,), (K + 1,) int64
    sum_ptr, squares_ptr, magnitudes_ptr,  # (K,) float64 each
    N, stride, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_K gates and all samples: no atomics, so the order of the sums never changes."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = k < K
    first = tl.load(offsets_ptr + k, mask=live, other=0)
    last = tl.load(offsets_ptr + k + 1, mask=live, other=0)
    uses = tl.max(last - first, axis=0)
    total = tl.zeros((BLOCK_K,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float64)
    magnitudes = tl.zeros((BLOCK_K,), dtype=tl.float64)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        s = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float64)
        for use in range(0, uses):
            used = first + use < last
            column = tl.load(columns_ptr + first + use, mask=used, other=0)
            at = slots_ptr + n[:, None] * stride + column[None, :]
            here = (n < N)[:, None] & used[None, :]
            s += tl.load(at, mask=here, other=0.0).to(tl.float64)
            tl.store(at, tl.zeros((BLOCK_N, BLOCK_K), dtype=slots_ptr.dtype.element_ty), mask=here)
        total += tl.sum(s, axis=0)
        squares += tl.sum(s * s, axis=0)
        magnitudes += tl.sum(tl.abs(s), axis=0)
    tl.store(sum_ptr + k, total, mask=live)
    tl.store(squares_ptr + k, squares, mask=live)
    tl.store(magnitudes_ptr + k, magnitudes, mask=live)


def config() -> dict[str, int]:
    return {"BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4}


def gate_sums(slots: Tensor, columns: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the sums; arguments and results as in :mod:`fastprune.ops.gate_sums`."""
    K, cfg = offsets.shape[0] - 1, config()
    sums = tuple(slots.new_empty((K,), dtype=torch.float64) for _ in range(3))
    if K:
        with torch.cuda.device_of(slots):
            grid = (triton.cdiv(K, cfg["BLOCK_K"]),)
            _sums_kernel[grid](slots, columns, offsets, *sums, slots.shape[0], slots.stride(0), K, **cfg)
    return sums


AOT_DTYPES = ("fp32", "fp64")
AOT_LIMITS = {"_sums_kernel": {"registers": 168}}


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles."""
    types = {"slots_ptr": f"*{dtype}:16", "columns_ptr": "*i64:16", "offsets_ptr": "*i64:16"}
    types |= {f"{name}_ptr": "*fp64:16" for name in ("sum", "squares", "magnitudes")}
    return [("", _sums_kernel, {**types, "N": "i32", "stride": "i32", "K": "i32"}, config(), False)]
