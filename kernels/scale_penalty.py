"""Sparsity penalties over all scales of a model: value and gradient, one launch over all tensors and a final sum.

The tensors stay where they are: a table on the device holds, per block of at most BLOCK scales, their address, their
count and where their gradient goes.  Parameters do not move between steps, so a table is made once per model.  A model
has 10^4 scales: what counts is launches, not bandwidth (a scale's itemsize read, its gradient written).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables


@triton.jit
def _block_kernel(
    table_ptr,     # (blocks, 3) int64: address of the first scale, count, offset into grad
    like_ptr,      # any pointer to the scales' dtype; never read
    grad_ptr,      # (all scales,) accumulation dtype
    partials_ptr,  # (blocks,) float64
    shift: tl.float64,
    RNI: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value and gradient of one block."""
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    row = table_ptr + tl.program_id(0) * 3
    scales_ptr = tl.load(row).to(like_ptr.dtype)
    count = tl.load(row + 1)
    i = tl.arange(0, BLOCK)
    live = i < count
    w = tl.load(scales_ptr + i, mask=live, other=0.0).to(ACC)
    if RNI:
        # With e = exp(-|w|) nothing overflows, and neither s, 1 - s nor ln s is a difference of like numbers.
        w += tl.full((BLOCK,), shift, ACC)
        e = tl.exp(-tl.abs(w))
        s = tl.where(w < 0.0, e, 1.0) / (1.0 + e)
        rest = tl.where(w < 0.0, 1.0, e) / (1.0 + e)
        # ln(1 + e) = 2 artanh(r), r = e / (2 + e) <= 1/3, by its series: tl.log is too coarse near 1
        r = e / (2.0 + e)
        series = tl.zeros((BLOCK,), dtype=ACC)
        for term in tl.static_range(TERMS):
            series = series * r * r + 1.0 / (2 * (TERMS - term) - 1)
        ln_s = tl.where(w < 0.0, w, 0.0) - 2.0 * r * series
        value = s * (1.0 - ln_s)
        grad = -s * rest * ln_s
    else:
        value = tl.abs(w)
        grad = tl.where(w > 0.0, 1.0, tl.where(w < 0.0, -1.0, w))  # w itself when 0 or nan
    tl.store(grad_ptr + tl.load(row + 2) + i, grad, mask=live)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(live, value, 0.0).to(tl.float64), axis=0))


@triton.jit
def _total_kernel(partials_ptr, value_ptr, blocks, BLOCK: tl.constexpr):
    """Sum of the partials in a fixed order; (blocks,) float64 to () accumulation dtype."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + i, mask=i < blocks, other=0.0)
    tl.store(value_ptr, tl.sum(total, axis=0))


def config() -> dict[str, int]:
    return {"BLOCK": 512, "num_warps": 2 if torch.version.hip else 4}


def _terms(dtype: torch.dtype) -> int:
    """Terms of the artanh series at r = 1/3 for full precision."""
    return 17 if dtype == torch.float64 else 8


@tables.cached(256)
def _table(
    addresses: tuple[int, ...], sizes: tuple[int, ...], itemsize: int, block: int, device: torch.device
) -> Tensor:
    """(blocks, 3) int64 on ``device``."""
    rows, offset = [], 0
    for address, size in zip(addresses, sizes, strict=True):
        for start in range(0, size, block):
            rows.append((address + start * itemsize, min(block, size - start), offset + start))
        offset += size
    return tables.put(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), device)


def scale_penalty(scales: list[Tensor], kind: str, shift: float) -> tuple[Tensor, Tensor]:
    """Launches the penalty; arguments and results as in :mod:`fastprune.ops.scale_penalty`.  Scales share one dtype."""
    first = scales[0]
    acc = torch.promote_types(first.dtype, torch.float32)
    sizes = tuple(w.numel() for w in scales)
    cfg = config()
    value, grad = first.new_empty((), dtype=acc), first.new_empty(sum(sizes), dtype=acc)
    with torch.cuda.device_of(first):
        table = _table(tuple(w.data_ptr() for w in scales), sizes, first.element_size(), cfg["BLOCK"], first.device)
        blocks = table.shape[0]
        partials = first.new_empty(blocks, dtype=torch.float64)
        if blocks:
            _block_kernel[(blocks,)](table, first, grad, partials, shift, kind == "rni", _terms(acc), **cfg)
        _total_kernel[(1,)](partials, value, blocks, BLOCK=128, num_warps=4)
    return value, grad


AOT_DTYPES = ("fp32", "bf16", "fp16", "fp64")


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles."""
    acc = "fp64" if dtype == "fp64" else "fp32"
    types = {"table_ptr": "*i64:16", "like_ptr": f"*{dtype}:16", "grad_ptr": f"*{acc}:16", "partials_ptr": "*fp64:16"}
    block = [
        (kind, _block_kernel, {**types, "shift": "fp64", "RNI": kind == "rni", "TERMS": terms}, config(), False)
        for kind, terms in (("rni", 17 if acc == "fp64" else 8), ("l1", 8))
    ]
    total = {"partials_ptr": "*fp64:16", "value_ptr": f"*{acc}:16", "blocks": "i32"}
    return [*block, ("", _total_kernel, total, {"BLOCK": 128, "num_warps": 4}, False)]
