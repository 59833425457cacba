"""Batch norm in three launches per direction (sums, finalise, apply), or in one where a program owns its channels."""

from __future__ import annotations

import triton
import triton.language as tl

from ._bn_tiles import (
    _affine,
    _apply_planes,
    _apply_rows,
    _dx_planes,
    _dx_rows,
    _dz_sums,
    _finish_stats,
    _finish_sums,
    _join_moments,
    _join_sums,
    _moments,
    _project,
    _rstd,
)


@triton.jit
def _sums_kernel(
    x_ptr,         # N * C * S elements, either layout
    tracked_ptr,   # int64 () or None
    partials_ptr,  # (3, P, C) float64: count, mean, squared deviations; P = gridDim.y * gridDim.z
    N, C, S, numel, CHUNK_N, CHUNK_S,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads x once."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_first = tl.program_id(1) * CHUNK_N
    s = tl.program_id(2) * CHUNK_S
    n_last = tl.minimum(n_first + CHUNK_N, N)
    size = tl.minimum(CHUNK_S, S - s)
    count = ((n_last - n_first) * size).to(tl.float64)
    mean, m2 = _moments(
        x_ptr, n_first, n_last, c, s, size, 1.0 / count, N, C, S, numel,
        VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, False,
    )  # fmt: skip
    p = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    stride = tl.num_programs(1) * tl.num_programs(2) * C
    out = partials_ptr + p * C + c
    tl.store(out, tl.zeros((BLOCK_C,), dtype=tl.float64) + count, mask=c < C)
    tl.store(out + stride, mean, mask=c < C)
    tl.store(out + 2 * stride, m2, mask=c < C)
    if tracked_ptr is not None:
        # here, not in the finalise kernel: there every program may need the new value
        if (tl.program_id(0) == 0) & (p == 0):
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def _finalise_kernel(
    partials_ptr,                        # (3, P, C) float64
    stats_ptr,                           # (2, C) float32
    running_mean_ptr, running_var_ptr,   # (C,) or None
    tracked_ptr,                         # int64 () or None, already counted up
    P, C, momentum, eps: tl.float64, inverse: tl.float64, unbiased: tl.float64,  # 1 / m, m / (m - 1), m = N * H * W
    CUMULATIVE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's formula over P partials."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, m2 = _join_moments(partials_ptr + c, c < C, P, C, P * C, inverse, BLOCK_P, BLOCK_C)
    _finish_stats(
        c, c < C, mean, m2 * inverse, unbiased, stats_ptr, running_mean_ptr, running_var_ptr,
        tracked_ptr, momentum, eps, C, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def _apply_kernel(
    x_ptr, residual_ptr, y_ptr,  # (R, K); residual may be None
    weight_ptr, bias_ptr,        # (C,) or None
    stats_ptr,                   # (2, C) float32: read in training, written in eval
    running_mean_ptr, running_var_ptr,  # (C,) in eval, else None
    R, K, C, S, CHUNK_R, eps: tl.float64,  # column k is channel k // S, modulo C if REPEAT
    SIGMOID: tl.constexpr, RELU: tl.constexpr, REPEAT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x (and residual), writes y."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K // VEC * VEC
    c = k // S
    if REPEAT:
        c = c % C
    # Backwards: what the sums kernel read last is still in L2.
    chunk = tl.num_programs(1) - 1 - tl.program_id(1)
    if running_mean_ptr is not None:
        mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
        var = tl.load(running_var_ptr + c, mask=inside, other=1.0).to(tl.float64)
        rstd = _rstd(var, eps)
        once = inside & (k < C * S) & (k % S == 0) & (chunk == 0)
        tl.store(stats_ptr + c, mean, mask=once)
        tl.store(stats_ptr + C + c, rstd, mask=once)
    else:
        mean = tl.load(stats_ptr + c, mask=inside, other=0.0)
        rstd = tl.load(stats_ptr + C + c, mask=inside, other=0.0)
    s, b = _affine(weight_ptr, bias_ptr, c, inside, SIGMOID)
    s *= rstd
    r, r_last = chunk * CHUNK_R, tl.minimum((chunk + 1) * CHUNK_R, R)
    _apply_rows(x_ptr, residual_ptr, y_ptr, r, r_last, k, inside, mean, s, b, K, RELU, VEC, BLOCK_R, "")


@triton.jit
def _fused_kernel(
    x_ptr, residual_ptr, y_ptr,  # N * C * S elements, either layout
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,  # (C,) or None
    tracked_ptr,                 # int64 () or None
    stats_ptr,                   # (2, C) float32
    N, C, S, numel, CHUNK_N, CHUNK_S, momentum, eps: tl.float64, inverse: tl.float64, unbiased: tl.float64,
    SIGMOID: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The whole forward of BLOCK_C channels; reads x twice (the second time from L1 or L2), writes y."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_last = tl.program_id(1) + CHUNK_N  # one chunk; program_id keeps the launcher's 1s from being constants here
    size = tl.program_id(2) + CHUNK_S
    mean64, m2 = _moments(
        x_ptr, 0, n_last, c, 0, size, inverse, N, C, S, numel, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C,
        BLOCK_S, False,
    )  # fmt: skip
    mean, rstd = _finish_stats(
        c, c < C, mean64, m2 * inverse, unbiased, stats_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        momentum, eps, C, False,
    )  # fmt: skip
    if tracked_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    s, b = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
    _apply_planes(
        x_ptr, residual_ptr, y_ptr, 0, n_last, c, 0, size, mean, s * rstd, b, C, S, numel,
        RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, "",
    )  # fmt: skip


@triton.jit
def _bwd_sums_kernel(
    dy_ptr, x_ptr, y_ptr,  # N * C * S elements, either layout; y only with RELU and a residual, or for sums of dy * y
    weight_ptr, bias_ptr, stats_ptr,  # (C,) or None, (C,) or None, (2, C) float32
    dresidual_ptr,         # as x, or None
    gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr,  # (gridDim.z, N, C) float32 with C as below, or None
    gate_stride,           # of their rows; gridDim.z > 1: C
    partials_ptr,          # (2, P, C) float32: sums of dz and dz * (x - mean)
    N, C, S, numel, CHUNK_N, CHUNK_S,  # C counts REPEAT rows of channels, see _split
    SIGMOID: tl.constexpr, RELU: tl.constexpr, GATES: tl.constexpr, REPEAT: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads dy and x (and y), writes dresidual on request."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_first = tl.program_id(1) * CHUNK_N
    s = tl.program_id(2) * CHUNK_S
    n_last = tl.minimum(n_first + CHUNK_N, N)
    size = tl.minimum(CHUNK_S, S - s)
    channels = C // REPEAT
    channel = c % channels
    mean = tl.load(stats_ptr + channel, mask=c < C, other=0.0)
    rstd = tl.load(stats_ptr + channels + channel, mask=c < C, other=0.0)
    scale, bias = _affine(weight_ptr, bias_ptr, channel, c < C, SIGMOID)
    part = tl.program_id(2).to(tl.int64) * N * gate_stride
    if gate_grad_ptr is not None:
        gate_grad_ptr += part
    if gate_abs_ptr is not None:
        gate_abs_ptr += part
    if out_grad_ptr is not None:
        out_grad_ptr += part
    if out_abs_ptr is not None:
        out_abs_ptr += part
    dz, dot = _dz_sums(
        dy_ptr, x_ptr, y_ptr, dresidual_ptr, gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr, gate_stride,
        n_first, n_last, c, s, size, mean, rstd, scale, bias,
        C, S, numel, RELU, GATES, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, False,
    )  # fmt: skip
    p = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    out = partials_ptr + p * C + c
    tl.store(out, dz, mask=c < C)
    tl.store(out + tl.num_programs(1) * tl.num_programs(2) * C, dot, mask=c < C)


@triton.jit
def _bwd_finalise_kernel(
    partials_ptr,             # (2, P, C) float32
    weight_ptr, stats_ptr,    # (C,) or None, (2, C) float32
    dweight_ptr, dbias_ptr,   # (C,) or None
    projection_ptr,           # (2, C) float32, what apply subtracts
    P, C, inverse: tl.float64,  # 1 / (N * H * W)
    SIGMOID: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads 8 bytes per partial."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dz, dot = _join_sums(partials_ptr + c, c < C, P, C, P * C, BLOCK_P, BLOCK_C)
    rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
    _finish_sums(c, c < C, dz, dot, rstd, weight_ptr, dweight_ptr, dbias_ptr, SIGMOID)
    mean_dz, slope = _project(dz, dot, rstd, inverse)
    tl.store(projection_ptr + c, mean_dz, mask=c < C)
    tl.store(projection_ptr + C + c, slope, mask=c < C)


@triton.jit
def _bwd_apply_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr,     # (R, K); y only with RELU and a residual; dy may be dresidual, then RELU is off
    weight_ptr, bias_ptr, stats_ptr,  # (C,) or None, (C,) or None, (2, C) float32
    projection_ptr,                   # (2, C) float32 in training, None in eval
    R, K, C, S, CHUNK_R,
    SIGMOID: tl.constexpr, RELU: tl.constexpr, REPEAT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads dy and x (and y), writes dx."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K // VEC * VEC
    c = k // S
    if REPEAT:
        c = c % C
    chunk = tl.num_programs(1) - 1 - tl.program_id(1)  # backwards, as in _apply_kernel
    mean = tl.load(stats_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(stats_ptr + C + c, mask=inside, other=0.0)
    s, b = _affine(weight_ptr, bias_ptr, c, inside, SIGMOID)
    mean_dz, slope = mean, mean  # not used in eval
    if projection_ptr is not None:
        mean_dz = tl.load(projection_ptr + c, mask=inside, other=0.0)
        slope = tl.load(projection_ptr + C + c, mask=inside, other=0.0)
    r, r_last = chunk * CHUNK_R, tl.minimum((chunk + 1) * CHUNK_R, R)
    _dx_rows(
        dy_ptr, x_ptr, y_ptr, dx_ptr, None, r, r_last, k, inside, mean, s * rstd, b, mean_dz, slope, K,
        projection_ptr is not None, RELU, VEC, BLOCK_R, "",
    )  # fmt: skip


@triton.jit
def _bwd_fused_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr,  # N * C * S elements, either layout; y, dx, dresidual may be None
    weight_ptr, bias_ptr, stats_ptr,              # (C,) or None, (C,) or None, (2, C) float32
    dweight_ptr, dbias_ptr,                       # (C,) or None
    gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr, gate_stride,  # (N, C) float32 or None, stride of rows
    N, C, S, numel, CHUNK_N, CHUNK_S, inverse: tl.float64,  # 1 / (N * H * W)
    TRAINING: tl.constexpr, SIGMOID: tl.constexpr, RELU: tl.constexpr, GATES: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The whole backward of BLOCK_C channels; reads dy and x (and y) twice (then from L1 or L2), writes dx."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_last = tl.program_id(1) + CHUNK_N
    size = tl.program_id(2) + CHUNK_S
    mean = tl.load(stats_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
    scale, bias = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
    dz, dot = _dz_sums(
        dy_ptr, x_ptr, y_ptr, dresidual_ptr, gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr, gate_stride,
        0, n_last, c, 0, size, mean, rstd, scale, bias,
        C, S, numel, RELU, GATES, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, False,
    )  # fmt: skip
    dz, dot = dz.to(tl.float64), dot.to(tl.float64)
    _finish_sums(c, c < C, dz, dot, rstd, weight_ptr, dweight_ptr, dbias_ptr, SIGMOID)
    if dx_ptr is not None:
        mean_dz, slope = _project(dz, dot, rstd, inverse)
        _dx_planes(
            dy_ptr, x_ptr, y_ptr, dx_ptr, 0, n_last, c, 0, size, mean, scale * rstd, bias, mean_dz, slope,
            C, S, numel, TRAINING, RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, "",
        )  # fmt: skip
