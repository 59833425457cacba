"""Batch norm with one Triton program per channel: what a simple GPU implementation does, to compare with.

FlagGems' formulation of the op, written anew from its description: the program of a channel walks over tiles of batch x
space twice, first for the statistics by Welford's update (an own mean, sum of squares and count in each lane, joined at
the end), then for the output; the backward likewise, first for the two sums, then for dx.  No add and no ReLU is fused.
A layer of 64 channels keeps 64 multiprocessors busy, whatever its planes.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048


@triton.jit
def _tile(n_start, s_start, N, S, x_n, x_s, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    n = (n_start + tl.arange(0, BLOCK_N))[:, None]
    s = (s_start + tl.arange(0, BLOCK_S))[None, :]
    return n.to(tl.int64) * x_n + s * x_s, (n < N) & (s < S)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    stats_ptr,  # (2, C) float32: mean, 1 / sqrt(var + eps)
    N, C, S, x_n, x_c, x_s, momentum, eps,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    x_ptr += c * x_c
    y_ptr += c * x_c
    mean = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
    count = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        for s in range(0, S, BLOCK_S):
            offset, live = _tile(n, s, N, S, x_n, x_s, BLOCK_N, BLOCK_S)
            x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
            count += live.to(tl.float32)
            d = tl.where(live, x - mean, 0.0)
            mean += d / tl.maximum(count, 1.0)
            squares += tl.where(live, d * (x - mean), 0.0)
    m = (N * S).to(tl.float32)
    whole = tl.sum(tl.sum(mean * count, axis=1), axis=0) / m
    d = mean - whole
    var = tl.sum(tl.sum(squares + count * d * d, axis=1), axis=0) / m
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(stats_ptr + c, whole)
    tl.store(stats_ptr + C + c, rstd)
    old_mean, old_var = tl.load(running_mean_ptr + c), tl.load(running_var_ptr + c)
    tl.store(running_mean_ptr + c, (1.0 - momentum) * old_mean + momentum * whole)
    tl.store(running_var_ptr + c, (1.0 - momentum) * old_var + momentum * var * m / (m - 1.0))
    scale = tl.load(weight_ptr + c) * rstd
    shift = tl.load(bias_ptr + c) - whole * scale
    for n in range(0, N, BLOCK_N):
        for s in range(0, S, BLOCK_S):
            offset, live = _tile(n, s, N, S, x_n, x_s, BLOCK_N, BLOCK_S)
            x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
            tl.store(y_ptr + offset, x * scale + shift, mask=live)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, stats_ptr, dweight_ptr, dbias_ptr,
    N, C, S, x_n, x_c, x_s,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    dy_ptr += c * x_c
    x_ptr += c * x_c
    dx_ptr += c * x_c
    mean, rstd = tl.load(stats_ptr + c), tl.load(stats_ptr + C + c)
    sum_dy = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
    sum_dot = tl.zeros((BLOCK_N, BLOCK_S), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        for s in range(0, S, BLOCK_S):
            offset, live = _tile(n, s, N, S, x_n, x_s, BLOCK_N, BLOCK_S)
            x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offset, mask=live, other=0.0).to(tl.float32)
            sum_dy += dy
            sum_dot += dy * (x - mean) * rstd
    dbias = tl.sum(tl.sum(sum_dy, axis=1), axis=0)
    dweight = tl.sum(tl.sum(sum_dot, axis=1), axis=0)
    tl.store(dbias_ptr + c, dbias)
    tl.store(dweight_ptr + c, dweight)
    m = (N * S).to(tl.float32)
    scale = tl.load(weight_ptr + c) * rstd
    for n in range(0, N, BLOCK_N):
        for s in range(0, S, BLOCK_S):
            offset, live = _tile(n, s, N, S, x_n, x_s, BLOCK_N, BLOCK_S)
            x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offset, mask=live, other=0.0).to(tl.float32)
            dx = scale * (dy - (dbias + (x - mean) * rstd * dweight) / m)
            tl.store(dx_ptr + offset, dx, mask=live)


if os.environ.get("TRITON_INTERPRET") == "1":  # which has nothing to tune
    _forward, _backward = _forward_kernel, _backward_kernel
else:
    _configs = [triton.Config({}, num_warps=warps) for warps in (4, 8, 16)]
    _forward, _backward = (
        triton.autotune(_configs, key=["N", "C", "S", "x_c"], restore_value=list(kept))(kernel)
        for kernel, kept in ((_forward_kernel, ("running_mean_ptr", "running_var_ptr")), (_backward_kernel, ()))
    )


def _sizes(x: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """N, C, pixels and strides of a contiguous or channels_last x; blocks."""
    N, C, S = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    block_s = min(triton.next_power_of_2(S), TILE)
    blocks = {"BLOCK_N": min(triton.next_power_of_2(N), TILE // block_s), "BLOCK_S": block_s}
    return (N, C, S, x.stride(0), x.stride(1), x.stride(3)), blocks


class _PerChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var):
        sizes, blocks = _sizes(x)
        y, stats = torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)
        _forward[(x.shape[1],)](x, y, weight, bias, running_mean, running_var, stats, *sizes, 0.1, 1e-5, **blocks)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, stats = ctx.saved_tensors
        sizes, blocks = _sizes(x)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        _backward[(x.shape[1],)](dy, x, dx, weight, stats, dweight, dbias, *sizes, **blocks)
        return dx, dweight, dbias, None, None


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Batch norm in training, momentum 0.1 and eps 1e-5, differentiable.

    Args:
        x: (N, C, H, W), contiguous or channels_last; ``dy`` must lie like it.
        weight, bias, running_mean, running_var: (C,) float32.
    """
    return _PerChannel.apply(x, weight, bias, running_mean, running_var)
