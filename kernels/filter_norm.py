"""Sums over the filters or input channels of all weights of a model, in one launch; filter_norm and weight_taylor.

The tensors stay where they are: a table on the device holds, per block of BLOCK_C channels, where they lie and where
their sums go (see scale_penalty).  A weight is (outer, channels, inner), dense; a sum runs over outer and inner, and a
filter has outer = 1.  One program owns a sum, so its order never changes; terms are made and added in float64, where
the square of any float32 fits.  Traffic: every weight (and gradient) is read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables

WIDTH = 8  # of a row of the table
TERMS = {  # what is summed: flags of the kernel
    "l1": {"ABS": True, "SQUARE": False, "TIMES_GRAD": False, "ROOT": False},
    "l2": {"ABS": False, "SQUARE": True, "TIMES_GRAD": False, "ROOT": True},
    "sum_squares": {"ABS": False, "SQUARE": True, "TIMES_GRAD": False, "ROOT": False},
    "sum": {"ABS": False, "SQUARE": False, "TIMES_GRAD": False, "ROOT": False},
    "taylor": {"ABS": False, "SQUARE": True, "TIMES_GRAD": True, "ROOT": False},
}


@triton.jit
def _add_up(
    weight_ptr, grad_ptr, count, outer, channels, inner,
    ABS: tl.constexpr, SQUARE: tl.constexpr, TIMES_GRAD: tl.constexpr,
    FILTERS: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of ``count`` channels, (BLOCK_C,) float64."""
    c = tl.arange(0, BLOCK_C)[:, None]
    inner = inner // VEC * VEC  # tells the compiler an alignment that the table vouches for
    sums = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float64)
    for start in range(0, outer * inner, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        live = (c < count) & (k < outer * inner)
        if FILTERS:
            offset = c.to(tl.int64) * inner + k
        else:
            offset = (k // inner).to(tl.int64) * (channels * inner) + c * inner + k % inner
        term = tl.load(weight_ptr + offset, mask=live, other=0.0)
        if term.dtype == tl.bfloat16:
            term = term.to(tl.float32)
        term = term.to(tl.float64)
        if ABS:
            term = tl.abs(term)
        if TIMES_GRAD:
            grad = tl.load(grad_ptr + offset, mask=live, other=0.0)
            if grad.dtype == tl.bfloat16:
                grad = grad.to(tl.float32)
            term *= grad.to(tl.float64)
        if SQUARE:
            term *= term
        sums += term
    return tl.sum(sums, axis=1)


@triton.jit
def _filter_sums_kernel(
    table_ptr,  # (blocks, 8) int64: addresses of weight and gradient; channels of the block; outer, channels, inner;
                # offset into out; whether addresses and inner are multiples of 16 bytes
    like_ptr,   # any pointer to the weights' dtype; never read
    out_ptr,    # (all channels,) float32, or float64 for float64 weights
    ABS: tl.constexpr, SQUARE: tl.constexpr, TIMES_GRAD: tl.constexpr, ROOT: tl.constexpr,
    FILTERS: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = table_ptr + tl.program_id(0) * 8
    weight_ptr = tl.load(row).to(like_ptr.dtype)
    grad_ptr = tl.load(row + 1).to(like_ptr.dtype)
    count = tl.load(row + 2).to(tl.int32)
    outer = tl.load(row + 3).to(tl.int32)
    channels = tl.load(row + 4)
    inner = tl.load(row + 5).to(tl.int32)
    if tl.load(row + 7) != 0:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        sums = _add_up(
            weight_ptr, grad_ptr, count, outer, channels, inner,
            ABS, SQUARE, TIMES_GRAD, FILTERS, VEC, BLOCK_C, BLOCK_K,
        )  # fmt: skip
    else:
        sums = _add_up(
            weight_ptr, grad_ptr, count, outer, channels, inner,
            ABS, SQUARE, TIMES_GRAD, FILTERS, 1, BLOCK_C, BLOCK_K,
        )  # fmt: skip
    if ROOT:
        sums = tl.sqrt(sums)
    c = tl.arange(0, BLOCK_C)
    tl.store(out_ptr + tl.load(row + 6) + c, sums, mask=c < count)


def config(filters: bool) -> dict[str, int]:
    """Blocks; on paper, not yet measured on a GPU.  Input channels lie side by side, filters end to end."""
    return {"BLOCK_C": 4, "BLOCK_K": 256, "num_warps": 4} if filters else {"BLOCK_C": 32, "BLOCK_K": 32, "num_warps": 4}


@tables.cached(16)  # 0.4 MB each for ResNet-50
def _table(
    addresses: tuple[tuple[int, int], ...],
    shapes: tuple[tuple[int, int, int], ...],
    itemsize: int,
    block: int,
    device: torch.device,
) -> Tensor:
    """(blocks, 8) int64 on ``device``."""
    rows, offset = [], 0
    for pair, (outer, channels, inner) in zip(addresses, shapes, strict=True):
        aligned = all(n % 16 == 0 for n in (*pair, inner * itemsize))
        for first in range(0, channels, block):
            count, moved = min(block, channels - first), (a + first * inner * itemsize for a in pair)
            rows.append((*moved, count, outer, channels, inner, offset + first, aligned))
        offset += channels
    return tables.put(torch.tensor(rows, dtype=torch.int64).reshape(-1, WIDTH), device)


def launch(weights: list[Tensor], grads: list[Tensor], term: str, dim: int) -> Tensor:
    """Sums of one of the TERMS; gradients are alike in memory with their weights."""
    first = weights[0]
    shapes = tuple(_view(w, dim) for w in weights)
    out = first.new_empty(sum(s[1] for s in shapes), dtype=torch.promote_types(first.dtype, torch.float32))
    # any address will do for the gradients that are not read
    addresses = tuple((w.data_ptr(), g.data_ptr()) for w, g in zip(weights, grads, strict=True))
    cfg, size = config(dim == 0), first.element_size()
    with torch.cuda.device_of(first):
        table = _table(addresses, shapes, size, cfg["BLOCK_C"], first.device)
        if len(table):
            _filter_sums_kernel[(len(table),)](
                table, first, out, **TERMS[term], FILTERS=dim == 0, VEC=16 // size, **cfg
            )
    return out


def _view(w: Tensor, dim: int) -> tuple[int, int, int]:
    """A dense weight as (outer, channels, inner)."""
    pixels = math.prod(w.shape[2:])
    if dim == 0:
        return 1, w.shape[0], w.shape[1] * pixels
    return (w.shape[0], w.shape[1], pixels) if w.is_contiguous() else (w.shape[0] * pixels, w.shape[1], 1)


def filter_norm(weights: list[Tensor], kind: str, dim: int) -> Tensor:
    """Launches the sums; arguments and results as in :mod:`fastprune.ops.filter_norm`."""
    return launch(weights, weights, kind, dim)


AOT_DTYPES = ("fp32", "bf16", "fp16", "fp64")


def aot_entry(dtype: str, term: str, dim: int) -> tuple:
    acc, size = ("fp64", 8) if dtype == "fp64" else ("fp32", 4 if dtype == "fp32" else 2)
    args = {"table_ptr": "*i64:16", "like_ptr": f"*{dtype}:16", "out_ptr": f"*{acc}:16", **TERMS[term]}
    return (
        f"{term} {dim}",
        _filter_sums_kernel,
        {**args, "FILTERS": dim == 0, "VEC": 16 // size},
        config(dim == 0),
        False,
    )


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles."""
    return [aot_entry(dtype, term, dim) for term in ("l1", "l2", "sum") for dim in (0, 1)]
