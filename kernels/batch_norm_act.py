"""Batch norm with scale ``w`` or ``sigmoid(w)``, residual add and ReLU: forward and backward.

A small layer takes one launch per direction (a program owns its channels from sums to output), a large one three:

    sums       partial sums, split so that few large planes and many small ones both fill the GPU
    finalise   partials -> statistics and running statistics | dweight, dbias and two coefficients per channel
    apply      one elementwise pass

Both layouts go through the same kernels, in two views of x:

    sums       tiles (n, c, s) of planes.  An NCHW plane that does not start on a vector (7 x 7) is read from the
               vector before it and the foreign elements are dropped after the load: 16-byte loads for any C and S.
    apply      a matrix whose columns repeat the channels, (N, C * S) for NCHW, (N * S, C) for channels_last: what
               belongs to a column is loaded once and reused down the rows.  Rows are joined until vectors fit.

Each program sums ``x - k`` and ``(x - k)^2`` with k the mean of its first tile.  That tile alone adds ``tile * (k -
mean)^2`` to the sum of squares, so what cancels is at most the number of tiles of a program, whatever the data.
Partials are joined by Chan's formula in float64.  No atomics, fixed chunks: two runs agree bit for bit.

Traffic, in passes over a tensor of x's size (a second read may come from L2): forward in training reads 2 and writes 1,
in eval reads 1 and writes 1; a residual adds one read.  Backward reads 4 (dy and x twice) and writes 1; with a residual
it reads 5 (y once, then dresidual in place of dy) and writes 2.  A gate sum writes 4 bytes per plane; sums of dy * y
find y read already, or without a ReLU read it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _planes(
    n_start, n_last, c, s, size, C, S, numel,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where elements s .. s + size of planes (n, c) are, n from n_start, c (BLOCK_C,); all (BLOCK_N, BLOCK_C, 1).

    Returns the int64 offset of k = 0, the live k (first .. last), the k to which one may read, and which planes exist.
    """
    n = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None, None]
    c = c[None, :, None]
    # x // VEC * VEC tells the compiler an alignment that the launcher made sure of (numel; C in channels_last)
    if CHANNELS_LAST:
        base = (n * S + s) * (C // VEC) * VEC + c
        first, last, read = 0, size, size
        exists = (n < n_last) & (c < C // VEC * VEC)
    else:
        start = (n * C + c) * S + s
        vector = start // VEC
        base = vector * VEC
        first = (start - base).to(tl.int32)
        last = first + size
        read = tl.minimum((last + VEC - 1) // VEC, numel // VEC - vector).to(tl.int32) * VEC
        exists = (n < n_last) & (c < C)
    return base, first, last, read, exists


@triton.jit
def _tile(base, first, last, read, exists, k, C, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr):
    """Offsets of the k-th elements, which of them to load (whole vectors), and which count (exact)."""
    offset = base + k
    if CHANNELS_LAST:
        offset = base + k.to(tl.int64) * (C // VEC) * VEC
    readable = exists & (k < read)
    live = readable
    if PEEL:
        live = exists & (k >= first) & (k < last)
    return offset, readable, live


@triton.jit
def _affine(weight_ptr, bias_ptr, c, live, SIGMOID: tl.constexpr):
    """Scale and bias of channels c, float32.  Absent ones are 1 and 0."""
    s = tl.full(c.shape, 1.0, tl.float32)
    b = tl.full(c.shape, 0.0, tl.float32)
    if weight_ptr is not None:
        s = tl.load(weight_ptr + c, mask=live, other=0.0).to(tl.float32)
        if SIGMOID:
            s = tl.sigmoid(s)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + c, mask=live, other=0.0).to(tl.float32)
    return s, b


@triton.jit
def _normalise(x, mean, scale, bias):
    # fma by name: backward must find the very sign that forward saw, with and without contraction by the compiler
    return tl.fma(x - mean, scale, bias)


@triton.jit
def _rstd(var, eps):
    """1 / sqrt(var + eps), float32; in float64 it would call a subroutine, and spill around it."""
    return tl.div_rn(1.0, tl.sqrt_rn((var + eps).to(tl.float32)))


@triton.jit
def _sum_ns(a):
    return tl.sum(tl.sum(a, axis=2), axis=0)


# ---- forward


@triton.jit
def _moments(
    x_ptr, n_first, n_last, c, s, size,  # planes n_first .. n_last of channels c (BLOCK_C,), elements s .. s + size
    inverse,
    N, C, S, numel,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a chunk, (BLOCK_C,) float64; inverse is 1 / its elements per channel."""
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    base, first, last, read, exists = _planes(n_first, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
    offset, readable, live = _tile(base, first, last, read, exists, steps, C, VEC, CHANNELS_LAST, PEEL)
    x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
    k = _sum_ns(tl.where(live, x, 0.0)) / tl.maximum(_sum_ns(live.to(tl.float32)), 1.0)
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # inf must reach the mean as inf: inf - inf would make it nan
    shift = k[None, :, None]

    sums = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    for n_start in range(n_first, n_last, BLOCK_N):
        base, first, last, read, exists = _planes(n_start, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        for start in range(0, size + (VEC - 1 if PEEL else 0), BLOCK_S):
            offset, readable, live = _tile(base, first, last, read, exists, start + steps, C, VEC, CHANNELS_LAST, PEEL)
            x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
            d = tl.where(live, x - shift, 0.0)
            sums += d
            squares += d * d
    total = _sum_ns(sums).to(tl.float64)
    mean = k.to(tl.float64) + total * inverse
    m2 = _sum_ns(squares).to(tl.float64) - total * total * inverse
    return mean, tl.where(m2 < 0.0, 0.0, m2)  # where keeps nan, maximum may drop it


@triton.jit
def _finish_stats(
    c, live, mean, var, unbiased, stats_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, momentum, eps, C,
    CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Writes stats and updates the running statistics; returns mean and rstd in float32."""
    rstd = _rstd(var, eps)
    tl.store(stats_ptr + c, mean.to(tl.float32), mask=live)
    tl.store(stats_ptr + C + c, rstd, mask=live)
    factor = momentum
    if CUMULATIVE:
        factor = 1.0 / tl.load(tracked_ptr).to(tl.float32)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c, mask=live, other=0.0).to(tl.float32)
        new = (1.0 - factor) * old + factor * mean.to(tl.float32)
        tl.store(running_mean_ptr + c, new, mask=live)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + c, mask=live, other=0.0).to(tl.float32)
        new = (1.0 - factor) * old + factor * (var * unbiased).to(tl.float32)
        tl.store(running_var_ptr + c, new, mask=live)
    return mean.to(tl.float32), rstd


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
        x_ptr,
        n_first,
        n_last,
        c,
        s,
        size,
        1.0 / count,
        N,
        C,
        S,
        numel,
        VEC,
        CHANNELS_LAST,
        PEEL,
        BLOCK_N,
        BLOCK_C,
        BLOCK_S,
    )
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
    """Chan's formula over P partials; reads 24 bytes each, twice."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < C)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = partials_ptr + p * C + c[None, :]
        count = tl.load(at, mask=inside & (p < P), other=0.0)
        sums += tl.where(count > 0.0, count * tl.load(at + P * C, mask=inside & (p < P), other=0.0), 0.0)
    mean = tl.sum(sums, axis=0) * inverse
    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = partials_ptr + p * C + c[None, :]
        count = tl.load(at, mask=inside & (p < P), other=0.0)
        d = tl.load(at + P * C, mask=inside & (p < P), other=0.0) - mean[None, :]
        m2 = tl.load(at + 2 * P * C, mask=inside & (p < P), other=0.0)
        squares += tl.where(count > 0.0, m2 + count * d * d, 0.0)
    _finish_stats(
        c, c < C, mean, tl.sum(squares, axis=0) * inverse, unbiased, stats_ptr, running_mean_ptr, running_var_ptr,
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
    for r in range(chunk * CHUNK_R, tl.minimum((chunk + 1) * CHUNK_R, R), BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R))[:, None]
        live = (rows < R) & inside[None, :]
        offset = rows.to(tl.int64) * (K // VEC) * VEC + k[None, :]
        x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
        z = _normalise(x, mean[None, :], s[None, :], b[None, :])
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offset, mask=live, other=0.0).to(tl.float32)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)  # keeps nan, as torch.relu does
        tl.store(y_ptr + offset, z, mask=live)


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
        x_ptr, 0, n_last, c, 0, size, inverse, N, C, S, numel, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S
    )
    mean, rstd = _finish_stats(
        c, c < C, mean64, m2 * inverse, unbiased, stats_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        momentum, eps, C, False,
    )  # fmt: skip
    if tracked_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    s, b = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
    mean, s, b = mean[None, :, None], (s * rstd)[None, :, None], b[None, :, None]
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    for n_start in range(0, n_last, BLOCK_N):
        base, first, last, read, exists = _planes(n_start, n_last, c, 0, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        for start in range(0, size + (VEC - 1 if PEEL else 0), BLOCK_S):
            offset, readable, live = _tile(base, first, last, read, exists, start + steps, C, VEC, CHANNELS_LAST, PEEL)
            x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
            z = _normalise(x, mean, s, b)
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offset, mask=readable, other=0.0).to(tl.float32)
            if RELU:
                z = tl.where(z <= 0.0, 0.0, z)
            tl.store(y_ptr + offset, z, mask=live)


# ---- backward


@triton.jit
def _through_relu(dy, x, y_ptr, offset, readable, mean, scale, bias, RELU: tl.constexpr):
    """dz: dy where the ReLU passed, judged by y if there is one, else by the forward done again; and what judged."""
    if y_ptr is not None:
        y = tl.load(y_ptr + offset, mask=readable, other=0.0).to(tl.float32)
    else:
        y = _normalise(x, mean, scale, bias)
    dz = dy
    if RELU:
        dz = tl.where(y <= 0.0, 0.0, dy)
    return dz, y


@triton.jit
def _dz_sums(
    dy_ptr, x_ptr, y_ptr, dresidual_ptr, gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr, gate_stride,
    n_first, n_last, c, s, size, mean, rstd, scale, bias,
    C, S, numel, RELU: tl.constexpr, GATES: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz * (x - mean) over a chunk, (BLOCK_C,) float32; writes dresidual and gate sums if asked."""
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    factor = (scale * rstd)[None, :, None]
    sum_dz = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    sum_dot = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    total_dz = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    total_dot = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for n_start in range(n_first, n_last, BLOCK_N):
        base, first, last, read, exists = _planes(n_start, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        if GATES:
            sum_dz = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
            sum_dot = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
        sum_abs = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)  # the compiler drops what is not asked
        sum_out = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
        sum_out_abs = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
        for start in range(0, size + (VEC - 1 if PEEL else 0), BLOCK_S):
            offset, readable, live = _tile(base, first, last, read, exists, start + steps, C, VEC, CHANNELS_LAST, PEEL)
            x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + offset, mask=readable, other=0.0).to(tl.float32)
            dz, y = _through_relu(
                dy, x, y_ptr, offset, readable, mean[None, :, None], factor, bias[None, :, None], RELU
            )
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offset, dz, mask=live)
            sum_dz += tl.where(live, dz, 0.0)
            sum_dot += tl.where(live, dz * (x - mean[None, :, None]), 0.0)
            if gate_abs_ptr is not None:
                z = _normalise(x, mean[None, :, None], factor, bias[None, :, None])
                sum_abs += tl.where(live, tl.abs(dz * z), 0.0)
            if out_grad_ptr is not None:
                sum_out += tl.where(live, dz * y, 0.0)
            if out_abs_ptr is not None:
                sum_out_abs += tl.where(live, tl.abs(dz * y), 0.0)
        if GATES:
            dz_n = tl.sum(sum_dz, axis=2)
            dot_n = tl.sum(sum_dot, axis=2)
            total_dz += dz_n
            total_dot += dot_n
            rows = (n_start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
            at = rows * gate_stride + c[None, :]
            wanted = (rows < n_last) & (c < C)[None, :]
            if gate_grad_ptr is not None:
                gate = (scale * rstd)[None, :] * dot_n + bias[None, :] * dz_n
                tl.store(gate_grad_ptr + at, gate, mask=wanted)
            if gate_abs_ptr is not None:
                tl.store(gate_abs_ptr + at, tl.sum(sum_abs, axis=2), mask=wanted)
            if out_grad_ptr is not None:
                tl.store(out_grad_ptr + at, tl.sum(sum_out, axis=2), mask=wanted)
            if out_abs_ptr is not None:
                tl.store(out_abs_ptr + at, tl.sum(sum_out_abs, axis=2), mask=wanted)
    if not GATES:
        total_dz = tl.sum(sum_dz, axis=2)
        total_dot = tl.sum(sum_dot, axis=2)
    return tl.sum(total_dz, axis=0), tl.sum(total_dot, axis=0)


@triton.jit
def _finish_sums(
    c, live, dz, dot, rstd, weight_ptr, dweight_ptr, dbias_ptr, SIGMOID: tl.constexpr
):  # fmt: skip
    """Writes dweight and dbias from the float64 sums of dz and dz * (x - mean)."""
    if dweight_ptr is not None:
        dweight = (dot * rstd.to(tl.float64)).to(tl.float32)
        if SIGMOID:
            s = tl.sigmoid(tl.load(weight_ptr + c, mask=live, other=0.0).to(tl.float32))
            dweight *= s * (1.0 - s)
        tl.store(dweight_ptr + c, dweight, mask=live)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, dz.to(tl.float32), mask=live)


@triton.jit
def _project(dz, dot, rstd, inverse):
    """The two coefficients of dx in training: sum(dz) / m and rstd^2 * sum(dz * (x - mean)) / m, float32."""
    rstd = rstd.to(tl.float64)
    return (dz * inverse).to(tl.float32), (dot * rstd * rstd * inverse).to(tl.float32)


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
        C, S, numel, RELU, GATES, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S,
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
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    sum_dot = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = partials_ptr + p * C + c[None, :]
        live = (p < P) & (c < C)[None, :]
        sum_dz += tl.load(at, mask=live, other=0.0).to(tl.float64)
        sum_dot += tl.load(at + P * C, mask=live, other=0.0).to(tl.float64)
    dz, dot = tl.sum(sum_dz, axis=0), tl.sum(sum_dot, axis=0)
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
    mean, s, b = mean[None, :], (s * rstd)[None, :], b[None, :]
    if projection_ptr is not None:
        mean_dz = tl.load(projection_ptr + c, mask=inside, other=0.0)[None, :]
        slope = tl.load(projection_ptr + C + c, mask=inside, other=0.0)[None, :]
    for r in range(chunk * CHUNK_R, tl.minimum((chunk + 1) * CHUNK_R, R), BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R))[:, None]
        live = (rows < R) & inside[None, :]
        offset = rows.to(tl.int64) * (K // VEC) * VEC + k[None, :]
        x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=live, other=0.0).to(tl.float32)
        dx, _ = _through_relu(dy, x, y_ptr, offset, live, mean, s, b, RELU)
        if projection_ptr is not None:
            dx = dx - mean_dz - (x - mean) * slope
        tl.store(dx_ptr + offset, dx * s, mask=live)


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
        C, S, numel, RELU, GATES, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S,
    )  # fmt: skip
    dz, dot = dz.to(tl.float64), dot.to(tl.float64)
    _finish_sums(c, c < C, dz, dot, rstd, weight_ptr, dweight_ptr, dbias_ptr, SIGMOID)
    if dx_ptr is not None:
        mean_dz, slope = _project(dz, dot, rstd, inverse)
        mean, s, b = mean[None, :, None], (scale * rstd)[None, :, None], bias[None, :, None]
        steps = tl.arange(0, BLOCK_S)[None, None, :]
        for n_start in range(0, n_last, BLOCK_N):
            base, first, last, read, exists = _planes(
                n_start, n_last, c, 0, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N
            )
            for start in range(0, size + (VEC - 1 if PEEL else 0), BLOCK_S):
                k = start + steps
                offset, readable, live = _tile(base, first, last, read, exists, k, C, VEC, CHANNELS_LAST, PEEL)
                x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + offset, mask=readable, other=0.0).to(tl.float32)
                dx, _ = _through_relu(dy, x, y_ptr, offset, readable, mean, s, b, RELU)
                if TRAINING:
                    dx = dx - mean_dz[None, :, None] - (x - mean) * slope[None, :, None]
                tl.store(dx_ptr + offset, dx * s, mask=live)


# ---- launch geometry: chosen by occupancy and load width on paper, not yet measured on a GPU

PROGRAMS = 1024  # fills 132 multiprocessors; a constant, so that the order of a sum does not depend on the device
FUSED_ELEMENTS = 32768  # at most so many per program of the one-launch kernels
TILE, WIDE_TILE = 2048, 4096  # elements of a tile in the sums | fused and apply kernels


LANES = 64 if torch.version.hip else 32  # threads of a warp


def _pow2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _vector(itemsize: int, n: int) -> int:
    """Elements of the widest load, at most 16 bytes, of which n is a multiple."""
    vec = 16 // itemsize
    while n % vec:
        vec //= 2
    return vec


def _num_warps(threads: int) -> int:
    return max(1, min(512, threads) // LANES)


def sums_config(N: int, C: int, S: int, channels_last: bool, itemsize: int, fused: bool = False) -> dict[str, int]:
    """Blocks of the kernels that walk over planes (n, c, s)."""
    tile = WIDE_TILE if fused else TILE
    if channels_last:
        vec, peel = _vector(itemsize, C), False
        block_c = min(_pow2(C), 32 // itemsize if fused else 64)  # a sector | a line or two
        block_s = min(_pow2(S), tile // block_c)
    else:
        vec = _vector(itemsize, N * C * S)
        peel = S % vec != 0
        reach = S + vec - 1 if peel else S
        # the largest block with little padding, but not so small that few samples cannot fill a tile
        top = min(_pow2(reach), tile)
        blocks = [b for b in (2048, 1024, 512, 256, 128, 64, top) if min(top, tile // _pow2(4 * N)) <= b <= top]
        padded = {b: triton.cdiv(reach, b) * b for b in blocks}
        block_s = next((b for b in blocks if padded[b] <= 1.125 * reach), min(blocks, key=padded.__getitem__))
        # neighbouring small planes share cache lines
        block_c = min(_pow2(C), max(1, tile // _pow2(N * S) if fused else tile // 4 // block_s))
    block_n = min(_pow2(N), tile // (block_c * block_s))
    elements = block_n * block_c * block_s
    cfg = {
        "VEC": vec, "CHANNELS_LAST": channels_last, "PEEL": peel,
        "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_S": block_s,
        "num_warps": _num_warps(elements // (8 if fused else 16)),
    }  # fmt: skip
    if fused and torch.version.hip is None:
        cfg["maxnreg"] = 128  # all that 16 warps can have; left alone, ptxas spills a few to fit one more block
    return cfg


def chunks(N: int, C: int, S: int, cfg: dict[str, int]) -> tuple[tuple[int, int, int], int, int]:
    """Grid of a sums kernel (channel blocks, chunks of samples, chunks of a plane), and the sizes of the chunks."""
    blocks = triton.cdiv(C, cfg["BLOCK_C"])
    want = triton.cdiv(PROGRAMS, blocks)
    tiles_n, tiles_s = triton.cdiv(N, cfg["BLOCK_N"]), triton.cdiv(S, cfg["BLOCK_S"])
    chunk_n = triton.cdiv(tiles_n, min(tiles_n, want)) * cfg["BLOCK_N"]
    parts_n = triton.cdiv(N, chunk_n)
    chunk_s = triton.cdiv(tiles_s, min(tiles_s, triton.cdiv(want, parts_n))) * cfg["BLOCK_S"]
    return (blocks, parts_n, triton.cdiv(S, chunk_s)), chunk_n, chunk_s


def finalise_config(P: int, C: int) -> dict[str, int]:
    return {"BLOCK_P": min(_pow2(P), 128), "BLOCK_C": min(_pow2(C), 8), "num_warps": _num_warps(128)}


def apply_config(rows: int, cols: int, itemsize: int, repeat: bool) -> dict[str, int]:
    block_k = min(_pow2(cols), 512, WIDE_TILE)
    block_r = min(_pow2(rows), WIDE_TILE // block_k)
    return {
        "REPEAT": repeat, "VEC": _vector(itemsize, cols), "BLOCK_R": block_r, "BLOCK_K": block_k,
        "num_warps": _num_warps(min(128, block_r * block_k // 16)),
    }  # fmt: skip


def _sizes(op: str, x: Tensor) -> tuple[int, int, int, bool]:
    """N, C, S = H * W, and whether channels are innermost."""
    N, C, H, W = x.shape
    S = H * W
    if max(N, C) * S > 2**30:
        raise ValueError(f"{op}: expected N * H * W and C * H * W up to 2^30, got {tuple(x.shape)}; split the batch")
    if x.is_contiguous():
        return N, C, S, S == 1  # 1 x 1 planes: the same memory, and channels make the longer runs
    if x.is_contiguous(memory_format=torch.channels_last):
        return N, C, S, True
    raise ValueError(f"{op}: expected x contiguous or channels_last, got strides {x.stride()}; call .contiguous()")


def _fused(N: int, C: int, S: int, channels_last: bool, itemsize: int, per_sample: bool) -> tuple | None:
    """Grid, sizes and blocks of a one-launch kernel, or None if the layer is too large for it."""
    if channels_last and not per_sample:
        N, S = 1, N * S
    cfg = sums_config(N, C, S, channels_last, itemsize, fused=True)
    if N * S * cfg["BLOCK_C"] > FUSED_ELEMENTS:
        return None
    return (triton.cdiv(C, cfg["BLOCK_C"]),), (N, C, S, N * C * S, N, S), cfg


def _split(N: int, C: int, S: int, channels_last: bool, itemsize: int, per_sample: bool) -> tuple:
    """Grid, sizes and blocks of a sums kernel, and how many times its channels repeat.

    channels_last samples are one long plane unless sums per sample are wanted.  A ragged C is made whole vectors by
    taking neighbouring rows for more channels: the finalise kernel reads partials (P, repeat * C) as (P * repeat, C).
    With sums per sample that needs an even H * W; 7 x 7 with a ragged C is read element by element.
    """
    repeat = 1
    if channels_last:
        if not per_sample:
            N, S = 1, N * S
        while C * repeat * itemsize % 16 and S % (2 * repeat) == 0:
            repeat *= 2
        C, S = C * repeat, S // repeat
    cfg = sums_config(N, C, S, channels_last, itemsize)
    grid, chunk_n, chunk_s = chunks(N, C, S, cfg)
    return grid, (N, C, S, N * C * S, chunk_n, chunk_s), cfg, repeat


def _matrix(N: int, C: int, S: int, channels_last: bool, itemsize: int) -> tuple:
    """Grid, sizes and blocks of an apply kernel."""
    rows, cols = (N * S, C) if channels_last else (N, C * S)
    once = cols
    while cols * itemsize % 16 and rows % 2 == 0:
        rows, cols = rows // 2, cols * 2
    cfg = apply_config(rows, cols, itemsize, cols != once)
    blocks, tiles = triton.cdiv(cols, cfg["BLOCK_K"]), triton.cdiv(rows, cfg["BLOCK_R"])
    chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, blocks))) * cfg["BLOCK_R"]
    return (blocks, triton.cdiv(rows, chunk)), (rows, cols, C, 1 if channels_last else S, chunk), cfg


def _gate_buffers(gates: tuple, parts: int, N: int, repeat: int, C: int) -> tuple[tuple, int]:
    """Where a kernel writes sums per sample, and the stride of their rows.

    That is where they belong if they are whole and lie alike, as columns of one matrix do; else (parts, N, repeat, C).
    """
    strides = {t.stride(0) for t in gates if t is not None} or {0}
    if parts * repeat == 1 and len(strides) == 1:
        return gates, strides.pop()
    return tuple(None if t is None else t.new_empty((parts, N, repeat, C)) for t in gates), repeat * C


def _join_parts(sums: tuple, gates: tuple) -> None:
    for part, whole in zip(sums, gates, strict=True):
        if part is not whole:
            torch.sum(part, (0, 2), out=whole)


def batch_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    training: bool, momentum: float | None, eps: float, sigmoid: bool, relu: bool, save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward; arguments and results as in :mod:`fastprune.ops.batch_norm_act`.

    The mask is always empty: backward rereads y, which costs no memory, as the next layer keeps it anyway.
    """
    N, C, S, channels_last = _sizes("batch_norm_act", x)
    y = torch.empty_like(x)
    stats = x.new_empty((2, C), dtype=torch.float32)
    mask = x.new_empty((0,), dtype=torch.uint8)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("batch_norm_act: eval mode needs running_mean and running_var; pass both, or training=True")
    if x.numel() == 0:  # as torch: the batch is counted, the running statistics stay
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return y, stats.zero_(), mask
    size = x.element_size()
    cumulative = momentum is None and num_batches_tracked is not None
    momentum = 0.0 if momentum is None else momentum
    m = N * S
    divisors = (1 / m, m / (m - 1) if m > 1 else float("nan"))  # of the mean and variance; nan is PyTorch's answer too
    with torch.cuda.device_of(x):
        grid, sizes, cfg = _matrix(N, C, S, channels_last, size)
        if not training:
            _apply_kernel[grid](
                x, residual, y, weight, bias, stats, running_mean, running_var, *sizes, eps, sigmoid, relu, **cfg
            )
            return y, stats, mask
        # Cumulative averages need the count before any program writes it, hence two launches.
        fused = None if cumulative else _fused(N, C, S, channels_last, size, False)
        if fused:
            grid, sizes, cfg = fused
            _fused_kernel[grid](
                x, residual, y, weight, bias, running_mean, running_var, num_batches_tracked, stats, *sizes,
                momentum, eps, *divisors, sigmoid, relu, **cfg,
            )  # fmt: skip
            return y, stats, mask
        part_grid, part_sizes, part_cfg, repeat = _split(N, C, S, channels_last, size, False)
        P = part_grid[1] * part_grid[2] * repeat
        partials = x.new_empty((3, P, C), dtype=torch.float64)
        _sums_kernel[part_grid](x, num_batches_tracked, partials, *part_sizes, **part_cfg)
        final = finalise_config(P, C)
        _finalise_kernel[(triton.cdiv(C, final["BLOCK_C"]),)](
            partials,
            stats,
            running_mean,
            running_var,
            num_batches_tracked,
            P,
            C,
            momentum,
            eps,
            *divisors,
            cumulative,
            **final,
        )
        _apply_kernel[grid](x, residual, y, weight, bias, stats, None, None, *sizes, eps, sigmoid, relu, **cfg)
    return y, stats, mask


def batch_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, y: Tensor | None,
    mask: Tensor | None, gate_grad: Tensor | None, gate_abs: Tensor | None, out_grad: Tensor | None,
    out_abs: Tensor | None, training: bool, eps: float, sigmoid: bool, relu: bool, need_dx: bool, need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward; arguments and results as in :mod:`fastprune.ops.batch_norm_act`.

    ``y`` is given when a residual was added before the ReLU (else the forward is redone to judge the ReLU), and for
    ``out_grad`` and ``out_abs``.
    """
    N, C, S, channels_last = _sizes("batch_norm_act_backward", x)
    if mask is not None and mask.numel():
        raise ValueError("batch_norm_act_backward: expected y, got mask bits, which another backend's forward saved")
    dx = torch.empty_like(x) if need_dx else x.new_empty((0,))
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty((0,))
    dweight = x.new_empty((0,)) if weight is None else torch.empty_like(weight)
    dbias = x.new_empty((0,)) if bias is None else torch.empty_like(bias)
    if x.numel() == 0:
        for t in (gate_grad, gate_abs, out_grad, out_abs):
            if t is not None:
                t.zero_()
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    size = x.element_size()
    gates = (gate_grad, gate_abs, out_grad, out_abs)
    if y is None and (out_grad is not None or out_abs is not None):
        raise ValueError("batch_norm_act_backward: expected y, for out_grad and out_abs, got None")
    y = y if relu or out_grad is not None or out_abs is not None else None
    dweight_or_none = None if weight is None else dweight
    dbias_or_none = None if bias is None else dbias
    dz = dresidual if need_dresidual else None
    per_sample = any(t is not None for t in gates)
    with torch.cuda.device_of(x):
        fused = _fused(N, C, S, channels_last, size, per_sample)
        if fused:
            grid, sizes, cfg = fused
            sums, stride = _gate_buffers(gates, 1, N, 1, C)
            _bwd_fused_kernel[grid](
                dy, x, y, dx if need_dx else None, dz, weight, bias, stats, dweight_or_none, dbias_or_none, *sums,
                stride, *sizes, 1 / (N * S), training, sigmoid, relu, per_sample, **cfg,
            )  # fmt: skip
            _join_parts(sums, gates)
            return dx, dweight, dbias, dresidual
        grid, sizes, cfg, repeat = _split(N, C, S, channels_last, size, per_sample)
        P = grid[1] * grid[2] * repeat
        partials = x.new_empty((2, P, C), dtype=torch.float32)
        projection = x.new_empty((2, C), dtype=torch.float32)
        sums, stride = _gate_buffers(gates, grid[2], N, repeat, C)
        _bwd_sums_kernel[grid](
            dy, x, y, weight, bias, stats, dz, *sums, stride, partials, *sizes, sigmoid, relu, per_sample, repeat, **cfg
        )
        _join_parts(sums, gates)
        final = finalise_config(P, C)
        _bwd_finalise_kernel[(triton.cdiv(C, final["BLOCK_C"]),)](
            partials, weight, stats, dweight_or_none, dbias_or_none, projection, P, C, 1 / (N * S), sigmoid, **final
        )
        if need_dx:
            grid, sizes, cfg = _matrix(N, C, S, channels_last, size)
            masked = (dy, relu, y if relu else None)
            if need_dresidual:
                masked = (dz, False, None)  # dz is dy after the ReLU already
            _bwd_apply_kernel[grid](
                masked[0], x, masked[2], dx, weight, bias, stats, projection if training else None, *sizes,
                sigmoid, masked[1], **cfg,
            )  # fmt: skip
    return dx, dweight, dbias, dresidual


# ---- what scripts/aot_check.py compiles

AOT_DTYPES = ("bf16", "fp16", "fp32")


def aot(dtype: str) -> list[tuple]:
    """Kernels, argument types and configurations at layers of ResNet-50 (56 x 56, 7 x 7), in both layouts."""
    size = 4 if dtype == "fp32" else 2
    x, param, f64 = f"*{dtype}:16", "*fp32:16", "*fp64:16"
    ints = ("N", "C", "S", "R", "K", "P", "numel", "CHUNK_N", "CHUNK_S", "CHUNK_R")
    args = {
        **dict.fromkeys(ints, "i32"), **dict.fromkeys(("eps", "inverse", "unbiased"), "fp64"),
        "momentum": "fp32", "tracked_ptr": "*i64:16",
        **dict.fromkeys(("x_ptr", "y_ptr", "residual_ptr", "dy_ptr", "dx_ptr", "dresidual_ptr"), x),
        **dict.fromkeys(("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr", "stats_ptr", "projection_ptr"), param),
        **dict.fromkeys(("running_mean_ptr", "running_var_ptr"), param),
        # columns of a matrix start anywhere
        **dict.fromkeys(("gate_grad_ptr", "gate_abs_ptr", "out_grad_ptr", "out_abs_ptr"), "*fp32"),
        "gate_stride": "i32", "GATES": True,
        "SIGMOID": True, "RELU": True, "TRAINING": True, "CUMULATIVE": False,
    }  # fmt: skip
    entries = []

    def add(label: str, kernel: triton.JITFunction, cfg: dict, wide: bool, **special: object) -> None:
        entries.append((label, kernel, {**args, **special}, cfg, wide))

    one_gate = {"gate_abs_ptr": None, "out_grad_ptr": None, "out_abs_ptr": None}
    plain = {"y_ptr": None, "dresidual_ptr": None, "gate_grad_ptr": None, **one_gate, "GATES": False}
    for label, N, C, S, nhwc in (
        ("nchw 56x56", 256, 64, 3136, False), ("nchw 7x7", 256, 512, 49, False),
        ("nhwc 56x56", 256, 64, 3136, True), ("nhwc ragged", 256, 37, 784, True),
    ):  # fmt: skip
        *_, cfg, repeat = _split(N, C, S, nhwc, size, False)
        one = {"N": 1} if nhwc else {}  # as the launcher sees it: 1 is a constant to Triton
        add(label, _sums_kernel, cfg, True, partials_ptr=f64, **one)
        add(label, _bwd_sums_kernel, cfg, True, partials_ptr=param, REPEAT=repeat, **one, **plain)
        *_, cfg, repeat = _split(N, C, S, nhwc, size, True)
        for gates, absent in (("gate", one_gate), ("gates", {})):
            special = {"partials_ptr": param, "REPEAT": repeat, **absent}
            add(f"{label} {gates}+add", _bwd_sums_kernel, cfg, True, **special)
        *_, cfg = _matrix(N, C, S, nhwc, size)
        one = {"S": 1} if nhwc else {}
        no_stats = {"running_mean_ptr": None, "running_var_ptr": None}
        add(label, _apply_kernel, cfg, True, residual_ptr=None, **no_stats, **one)
        add(f"{label} eval+add", _apply_kernel, cfg, True, **one)
        add(label, _bwd_apply_kernel, cfg, True, y_ptr=None, **one)
    for label, N, C, S, nhwc in (
        ("nchw 8x8", 128, 64, 64, False), ("nchw 7x7", 64, 64, 49, False), ("nhwc 8x8", 16, 64, 64, True)
    ):  # fmt: skip
        *_, cfg = _fused(N, C, S, nhwc, size, True)
        add(f"{label} add", _fused_kernel, cfg, True)
        add(f"{label} gate+add", _bwd_fused_kernel, cfg, True, **one_gate)
        add(f"{label} gates+add", _bwd_fused_kernel, cfg, True)
    add("", _finalise_kernel, finalise_config(512, 64), False, partials_ptr=f64, CUMULATIVE=True)
    add("", _bwd_finalise_kernel, finalise_config(512, 64), False, partials_ptr=param)
    return entries
