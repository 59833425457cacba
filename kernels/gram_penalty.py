"""Penalties on Gram matrices, over all weights of a model: one launch for the blocks of G, one for the gradients.

Rows of a weight are taken in the order of the plan, cut ones first, so what is not needed are whole tiles: they are
not in the list of tiles, and never computed, written or read.  The first kernel writes E = m (G - T) / N^2 tile by tile
into a scratch and a share of the value per tile; the second multiplies E by the weight.  The weights stay where they
are (see filter_norm); their gradients are views of one buffer.
"""

from __future__ import annotations

import math
import os
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(a, b, acc, SPLIT: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter has no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if SPLIT:
        return tl.dot(a, b, acc, input_precision="bf16x6")
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _rows(order_ptr, start, i, n):
    """Rows of the weight at the places i of its order; row 0 beyond the last."""
    if order_ptr is None:
        rows = tl.where(i < n, i, 0)
    else:
        rows = tl.load(order_ptr + start + i, mask=i < n, other=0)
    return rows.to(tl.int64)


@triton.jit
def _gram_tile(
    weight_ptr, rows_i, rows_j, live_i, live_j, n, width, acc, COLUMNS: tl.constexpr,
    VEC: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products of rows i and j, each ``width`` long; with COLUMNS of columns of a matrix (width, n)."""
    if COLUMNS:
        n = n // VEC * VEC  # tells the compiler an alignment that the table vouches for
    else:
        width = width // VEC * VEC
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if COLUMNS:
            at = k[:, None].to(tl.int64) * n
            live = (k < width)[:, None]
            a = tl.load(weight_ptr + at + rows_i[None, :], mask=live & live_i[None, :], other=0.0)
            b = tl.load(weight_ptr + at + rows_j[None, :], mask=live & live_j[None, :], other=0.0)
            acc = _dot(tl.trans(a), b, acc, SPLIT, WIDEN)
        else:
            live = (k < width)[None, :]
            a = tl.load(weight_ptr + rows_i[:, None] * width + k[None, :], mask=live_i[:, None] & live, other=0.0)
            b = tl.load(weight_ptr + rows_j[:, None] * width + k[None, :], mask=live_j[:, None] & live, other=0.0)
            acc = _dot(a, tl.trans(b), acc, SPLIT, WIDEN)
    return acc


@triton.jit
def _gram(
    mode, weight_ptr, i, j, rows_i, rows_j, n, width, acc, MIXED: tl.constexpr,
    VEC: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of G by the layer's mode: + 1 if aligned, + 2 if of columns."""
    wide_ptr = tl.multiple_of(weight_ptr, 16)
    if mode == 1:
        acc = _gram_tile(wide_ptr, rows_i, rows_j, i < n, j < n, n, width, acc, False, VEC, BLOCK_K, SPLIT, WIDEN)
    elif mode == 0:
        acc = _gram_tile(weight_ptr, rows_i, rows_j, i < n, j < n, n, width, acc, False, 1, BLOCK_K, SPLIT, WIDEN)
    if MIXED:
        if mode == 3:
            acc = _gram_tile(wide_ptr, i, j, i < n, j < n, n, width, acc, True, VEC, BLOCK_K, SPLIT, WIDEN)
        elif mode == 2:
            acc = _gram_tile(weight_ptr, i, j, i < n, j < n, n, width, acc, True, 1, BLOCK_K, SPLIT, WIDEN)
    return acc


@triton.jit
def _gram_kernel(
    layers_ptr,   # (L, 8) int64: address, rows, cut rows, width; where its order, matrix and gradient start; mode
    tiles_ptr,    # (tiles, 3) int64: layer, first row, first column
    factors_ptr,  # (L, 3) float64: of blocks with a cut row or column, of the others; what the layer's value adds
    refs_ptr,     # (L,) int64, or None: addresses of weights whose G is the target; else the identity
    like_ptr,     # any pointer to the weights' dtype; never read
    order_ptr,    # (all rows,) int32, or None: as they are
    scale_ptr,    # (L,) or None: 1
    matrix_ptr,   # E of all layers, rows of a multiple of 16
    sums_ptr,     # (tiles,) float64
    MIXED: tl.constexpr,  # whether layers may be of columns
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    VEC: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = matrix_ptr.dtype.element_ty
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    index = tl.load(tile)
    layer = layers_ptr + index * 8
    weight_ptr = tl.load(layer).to(like_ptr.dtype)
    n = tl.load(layer + 1).to(tl.int32)
    cuts = tl.load(layer + 2).to(tl.int32)
    width = tl.load(layer + 3).to(tl.int32)
    first_i = tl.load(tile + 1).to(tl.int32)
    first_j = tl.load(tile + 2).to(tl.int32)
    i = first_i + tl.arange(0, BLOCK)
    j = first_j + tl.arange(0, BLOCK)
    start = tl.load(layer + 4)
    rows_i = _rows(order_ptr, start, i, n)
    rows_j = _rows(order_ptr, start, j, n)
    mode = tl.load(layer + 7)
    gram = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    gram = _gram(mode, weight_ptr, i, j, rows_i, rows_j, n, width, gram, MIXED, VEC, BLOCK_K, SPLIT, WIDEN)
    kept_i, kept_j = (i >= cuts)[:, None], (j >= cuts)[None, :]
    if refs_ptr is not None:
        ref_ptr = tl.load(refs_ptr + index).to(like_ptr.dtype)
        target = tl.zeros((BLOCK, BLOCK), dtype=ACC)
        target = _gram(mode, ref_ptr, i, j, rows_i, rows_j, n, width, target, MIXED, VEC, BLOCK_K, SPLIT, WIDEN)
    else:
        target = ((i[:, None] == j[None, :]) & kept_i).to(ACC)
    cut = tl.load(factors_ptr + 3 * index).to(ACC)
    kept = tl.load(factors_ptr + 3 * index + 1).to(ACC)
    factor = tl.where(kept_i & kept_j, kept, cut)
    live = (i < n)[:, None] & (j < n)[None, :]
    wanted = live & (factor != 0)  # not 0 * inf where there is nothing to penalise
    distance = tl.where(wanted, gram - target, 0.0)
    e = factor * distance
    value = tl.sum(tl.sum((e * distance).to(tl.float64), axis=1), axis=0)
    if first_i != first_j:
        value *= 2
    if first_i + first_j == 0:
        value += tl.load(factors_ptr + 3 * index + 2)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr + index).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), value)
    stride = (n + 15) // 16 * 16
    matrix_ptr += tl.multiple_of(tl.load(layer + 5), 16)
    tl.store(matrix_ptr + i[:, None].to(tl.int64) * stride + j[None, :], e, mask=live)
    if first_i != first_j:
        tl.store(matrix_ptr + j[None, :].to(tl.int64) * stride + i[:, None], e, mask=live)


@triton.jit
def _gradient_tile(
    matrix_ptr, weight_ptr, order_ptr, grad_ptr, start, first_i, first_k, begin, end, n, width, factor,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = matrix_ptr.dtype.element_ty
    stride = (n + 15) // 16 * 16
    if COLUMNS:
        n = n // VEC * VEC
    else:
        width = width // VEC * VEC
    i = first_i + tl.arange(0, BLOCK)
    k = first_k + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=ACC)
    for first in range(begin, end, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        live = (i < n)[:, None] & (j < end)[None, :]
        e = tl.load(matrix_ptr + i[:, None].to(tl.int64) * stride + j[None, :], mask=live, other=0.0)
        if COLUMNS:
            at = k[:, None].to(tl.int64) * n + j[None, :]
            a = tl.trans(tl.load(weight_ptr + at, mask=(k < width)[:, None] & (j < end)[None, :], other=0.0))
        else:
            rows = _rows(order_ptr, start, j, n)[:, None]
            a = tl.load(
                weight_ptr + rows * width + k[None, :], mask=(j < end)[:, None] & (k < width)[None, :], other=0.0
            )
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
        acc = _dot(e, a.to(ACC), acc, SPLIT, False)
    if COLUMNS:
        at = k[:, None].to(tl.int64) * n + i[None, :]
        tl.store(grad_ptr + at, tl.trans(acc * factor), mask=(k < width)[:, None] & (i < n)[None, :])
    else:
        rows = _rows(order_ptr, start, i, n)[:, None]
        tl.store(grad_ptr + rows * width + k[None, :], acc * factor, mask=(i < n)[:, None] & (k < width)[None, :])


@triton.jit
def _gradient_kernel(
    layers_ptr, tiles_ptr,  # as above; (tiles, 5): layer, first row, first column, columns [begin, end) of E
    like_ptr, order_ptr, scale_ptr, matrix_ptr,
    grad_ptr,  # all gradients, in the dtype of E
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * 5
    index = tl.load(tile)
    layer = layers_ptr + index * 8
    weight_ptr = tl.load(layer).to(like_ptr.dtype)
    n = tl.load(layer + 1).to(tl.int32)
    width = tl.load(layer + 3).to(tl.int32)
    first_i = tl.load(tile + 1).to(tl.int32)
    first_k = tl.load(tile + 2).to(tl.int32)
    begin = tl.load(tile + 3).to(tl.int32)
    end = tl.load(tile + 4).to(tl.int32)
    start = tl.load(layer + 4)
    matrix_ptr += tl.multiple_of(tl.load(layer + 5), 16)
    grad_ptr += tl.multiple_of(tl.load(layer + 6), 16)
    factor = tl.full((), 4, matrix_ptr.dtype.element_ty)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr + index)
    mode = tl.load(layer + 7)
    wide_ptr = tl.multiple_of(weight_ptr, 16)
    if mode == 1:
        _gradient_tile(
            matrix_ptr, wide_ptr, order_ptr, grad_ptr, start, first_i, first_k, begin, end, n, width, factor,
            False, BLOCK, BLOCK_J, VEC, SPLIT,
        )  # fmt: skip
    elif mode == 0:
        _gradient_tile(
            matrix_ptr, weight_ptr, order_ptr, grad_ptr, start, first_i, first_k, begin, end, n, width, factor,
            False, BLOCK, BLOCK_J, 1, SPLIT,
        )  # fmt: skip
    if MIXED:
        if mode == 3:
            _gradient_tile(
                matrix_ptr, wide_ptr, order_ptr, grad_ptr, start, first_i, first_k, begin, end, n, width, factor,
                True, BLOCK, BLOCK_J, VEC, SPLIT,
            )  # fmt: skip
        elif mode == 2:
            _gradient_tile(
                matrix_ptr, weight_ptr, order_ptr, grad_ptr, start, first_i, first_k, begin, end, n, width, factor,
                True, BLOCK, BLOCK_J, 1, SPLIT,
            )  # fmt: skip


def config(dtype: torch.dtype, mixed: bool = False) -> dict[str, int]:
    """Tiles of both kernels; on paper, not yet measured on a GPU."""
    small = dtype == torch.float64 or (mixed and dtype == torch.float32)  # larger ones would spill
    return {"BLOCK": 32 if small else 64, "num_warps": 4 if small else 8, "num_stages": 2}


def split(dtype: torch.dtype) -> bool:
    """Whether products of float32 are made of six of bfloat16, as exact as float32's; the interpreter has them not."""
    return dtype != torch.float64 and not _INTERPRET


class Layer(NamedTuple):
    """A weight whose G is n x n; of columns, the matrix in memory is (width, n) instead of (n, width)."""

    address: int
    n: int
    cuts: int
    width: int
    columns: bool = False
    size: int | None = None  # what the value is divided by; None: n x n
    offset: int = 0  # what is added before that


@tables.cached(16)
def _tables(
    layers: tuple[Layer, ...], cut: float, kept: float, itemsize: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, list[int]]:
    """Layers, tiles of G, tiles of the gradients, factors; elements of the matrices; where gradients start, and end."""
    rows, gram, grads, factors, order, matrix = [], [], [], [], 0, 0
    starts = [0, *accumulate(-(-layer.n * layer.width // 16) * 16 for layer in layers)]
    for index, (address, n, cuts, width, columns, size, offset) in enumerate(layers):
        aligned = address % 16 == 0 and (n if columns else width) * itemsize % 16 == 0
        rows.append((address, n, cuts, width, order, matrix, starts[index], aligned + 2 * columns))
        size = max(n * n if size is None else size, 1)
        factors.append((cut / size, kept / size, offset / size))
        for i in range(0, n, block):
            has_kept = min(i + block, n) > cuts
            for j in range(0, i + 1, block):  # then j has a cut row if i has
                if (cut and j < cuts) or (kept and has_kept and min(j + block, n) > cuts):
                    gram.append((index, i, j))
            begin, end = 0 if cut else cuts, n if kept or (cut and i < cuts) else cuts
            if not cut and not (kept and has_kept):
                begin = end = 0
            grads += [(index, i, k, begin, end) for k in range(0, width, block)]
        order += n
        matrix += n * (-(-n // 16) * 16)

    def put(numbers: list, columns: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return tables.put(torch.tensor(numbers, dtype=dtype).reshape(-1, columns), device)

    return put(rows, 8), put(gram, 3), put(grads, 5), put(factors, 3, torch.float64), matrix, starts


def gram_penalty(
    weights: list[Tensor], order: Tensor | None, cuts: list[int], cut: float, kept: float, scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Launches both kernels; arguments and results as in :mod:`fastprune.ops.gram_penalty`."""
    layers = tuple(
        Layer(w.data_ptr(), w.shape[0], c, math.prod(w.shape[1:])) for w, c in zip(weights, cuts, strict=True)
    )
    return _launch(weights, layers, order, cut, kept, scale)


def orthogonality_penalty(
    weights: list[Tensor], references: list[Tensor], kind: str, strides: list[int], paddings: list[int], norm: bool,
    scale: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Launches both kernels for ``"columns"`` and ``"energy"``; as in :mod:`fastprune.ops.gram_penalty`.

    The smaller of both Gram matrices does for columns: :math:`|A^T A - I|^2 = |A A^T - I|^2 + K - N`, and the gradients
    are the same.  With K < N that would be a difference of large numbers, and so would it for energy, whose matrices
    are K x K therefore.
    """
    layers = []
    for w in weights:
        n, width = w.shape[0], math.prod(w.shape[1:])
        if kind == "columns" and 0 < n <= width:
            layers.append(Layer(w.data_ptr(), n, 0, width, size=width * width, offset=width - n))
        else:
            layers.append(Layer(w.data_ptr(), width, 0, n, columns=True))
    return _launch(weights, tuple(layers), None, 0.0, 1.0, scale, tuple(r.data_ptr() for r in references), mixed=True)


@tables.cached(16)
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return tables.put(torch.tensor(addresses, dtype=torch.int64), device)


def _launch(
    weights: list[Tensor], layers: tuple[Layer, ...], order: Tensor | None, cut: float, kept: float,
    scale: Tensor | None, references: tuple[int, ...] = (), mixed: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    first = weights[0]
    acc = torch.promote_types(first.dtype, torch.float32)
    cfg, size = config(first.dtype, mixed), first.element_size()
    with torch.cuda.device_of(first):
        table, gram, tiles, factors, elements, starts = _tables(layers, cut, kept, size, cfg["BLOCK"], first.device)
        refs = _addresses(references, first.device) if references else None
        matrix, grad = first.new_empty(elements, dtype=acc), first.new_empty(starts[-1], dtype=acc)
        sums = first.new_empty(len(gram), dtype=torch.float64)
        options = {**cfg, "VEC": 16 // size, "SPLIT": split(first.dtype), "MIXED": mixed}
        if len(gram):
            widen = _INTERPRET and first.dtype == torch.bfloat16
            _gram_kernel[(len(gram),)](
                table, gram, factors, refs, first, order, scale, matrix, sums, **options, BLOCK_K=32, WIDEN=widen
            )
        if len(tiles):
            _gradient_kernel[(len(tiles),)](table, tiles, first, order, scale, matrix, grad, **options, BLOCK_J=32)
    grads = [grad.as_strided(w.shape, w.stride(), start) for w, start in zip(weights, starts, strict=False)]
    return sums.sum().to(acc), grads


AOT_DTYPES = ("fp32", "bf16", "fp16", "fp64")
AOT_LIMITS = {"_gram_kernel": {"registers": 255}, "_gradient_kernel": {"registers": 248}}


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles: masks and scales, and neither."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[dtype]
    acc, size = ("fp64", 8) if dtype == "fp64" else ("fp32", torch_dtype.itemsize)
    rows = []
    tables = {"layers_ptr": "*i64:16", "tiles_ptr": "*i64:16", "like_ptr": f"*{dtype}:16", "matrix_ptr": f"*{acc}:16"}
    for label, order, scale, refs in (
        ("masks", "*i32:16", f"*{acc}:16", None), ("all rows", None, None, None),
        ("columns", None, None, None), ("energy", None, None, "*i64:16"),
    ):  # fmt: skip
        args = {**tables, "order_ptr": order, "scale_ptr": scale, "VEC": 16 // size, "SPLIT": dtype != "fp64"}
        args |= {"refs_ptr": refs, "MIXED": label in ("columns", "energy")}
        cfg = config(torch_dtype, args["MIXED"])
        gram = {"factors_ptr": "*fp64:16", "sums_ptr": "*fp64:16", "BLOCK_K": 32, "WIDEN": False}
        rows.append((label, _gram_kernel, {**args, **gram}, cfg, False))
        rows.append((label, _gradient_kernel, {**args, "grad_ptr": f"*{acc}:16", "BLOCK_J": 32}, cfg, False))
    return rows
