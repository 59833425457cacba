"""Pieces of the batch norm kernels: addresses of a tile, sums over a chunk, the elementwise passes."""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def _moments(
    x_ptr, n_first, n_last, c, s, size,  # planes n_first .. n_last of channels c (BLOCK_C,), elements s .. s + size
    inverse,
    N, C, S, numel,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a chunk, (BLOCK_C,) float64; inverse is 1 / its elements per channel.

    AGAIN: x is read once more by this launch, and should stay in L2.
    """
    KEEP: tl.constexpr = "evict_last" if AGAIN else ""
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    base, first, last, read, exists = _planes(n_first, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
    offset, readable, live = _tile(base, first, last, read, exists, steps, C, VEC, CHANNELS_LAST, PEEL)
    x = tl.load(x_ptr + offset, mask=readable, other=0.0, eviction_policy=KEEP).to(tl.float32)
    k = _sum_ns(tl.where(live, x, 0.0)) / tl.maximum(_sum_ns(live.to(tl.float32)), 1.0)
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # inf must reach the mean as inf: inf - inf would make it nan
    shift = k[None, :, None]

    sums = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_C, BLOCK_S), dtype=tl.float32)
    for n_start in range(n_first, n_last, BLOCK_N):
        base, first, last, read, exists = _planes(n_start, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        for start in range(0, size + (VEC - 1 if PEEL else 0), BLOCK_S):
            offset, readable, live = _tile(base, first, last, read, exists, start + steps, C, VEC, CHANNELS_LAST, PEEL)
            x = tl.load(x_ptr + offset, mask=readable, other=0.0, eviction_policy=KEEP).to(tl.float32)
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
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz * (x - mean) over a chunk, (BLOCK_C,) float32; writes dresidual and gate sums if asked.

    AGAIN: x, and dresidual or else dy, are read once more by this launch, and should stay in L2.
    """
    KEEP: tl.constexpr = "evict_last" if AGAIN else ""
    KEEP_DY: tl.constexpr = ("evict_last" if dresidual_ptr is None else "evict_first") if AGAIN else ""
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
            x = tl.load(x_ptr + offset, mask=readable, other=0.0, eviction_policy=KEEP).to(tl.float32)
            dy = tl.load(dy_ptr + offset, mask=readable, other=0.0, eviction_policy=KEEP_DY).to(tl.float32)
            dz, y = _through_relu(
                dy, x, y_ptr, offset, readable, mean[None, :, None], factor, bias[None, :, None], RELU
            )
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offset, dz, mask=live, eviction_policy=KEEP)
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


# ---- partial sums of a channel, joined in float64


@triton.jit
def _join_moments(at_ptr, inside, P, row, plane, inverse, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Chan's formula over P partials: mean and sum of squared deviations, (BLOCK_C,) float64.

    Counts are at at_ptr + p * row, means and squared deviations one and two planes further; reads 24 bytes each, twice.
    """
    inside = inside[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = at_ptr[None, :] + p * row
        count = tl.load(at, mask=inside & (p < P), other=0.0, cache_modifier=".cg")
        part = tl.load(at + plane, mask=inside & (p < P), other=0.0, cache_modifier=".cg")
        sums += tl.where(count > 0.0, count * part, 0.0)
    mean = tl.sum(sums, axis=0) * inverse
    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = at_ptr[None, :] + p * row
        count = tl.load(at, mask=inside & (p < P), other=0.0, cache_modifier=".cg")
        d = tl.load(at + plane, mask=inside & (p < P), other=0.0, cache_modifier=".cg") - mean[None, :]
        m2 = tl.load(at + 2 * plane, mask=inside & (p < P), other=0.0, cache_modifier=".cg")
        squares += tl.where(count > 0.0, m2 + count * d * d, 0.0)
    return mean, tl.sum(squares, axis=0)


@triton.jit
def _join_sums(at_ptr, inside, P, row, plane, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of dz and, one plane further, dz * (x - mean) over P partials, (BLOCK_C,) float64; reads 8 bytes each."""
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    sum_dot = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float64)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        at = at_ptr[None, :] + p * row
        live = (p < P) & inside[None, :]
        sum_dz += tl.load(at, mask=live, other=0.0, cache_modifier=".cg").to(tl.float64)
        sum_dot += tl.load(at + plane, mask=live, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(sum_dz, axis=0), tl.sum(sum_dot, axis=0)


# ---- elementwise passes, over planes as the sums are made, or over rows of the matrix (N, C * S)


@triton.jit
def _y_of(x_ptr, residual_ptr, offset, live, mean, scale, bias, RELU: tl.constexpr, LAST: tl.constexpr):
    x = tl.load(x_ptr + offset, mask=live, other=0.0, eviction_policy=LAST).to(tl.float32)
    z = _normalise(x, mean, scale, bias)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offset, mask=live, other=0.0, eviction_policy=LAST).to(tl.float32)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)  # keeps nan, as torch.relu does
    return z


@triton.jit
def _apply_planes(
    x_ptr, residual_ptr, y_ptr, n_first, n_last, c, s, size, mean, scale, bias,  # mean, scale, bias (BLOCK_C,)
    C, S, numel, RELU: tl.constexpr, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """y of planes n_first .. n_last, elements s .. s + size, backwards: what was read last is read first."""
    mean, scale, bias = mean[None, :, None], scale[None, :, None], bias[None, :, None]
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    tiles_s = tl.cdiv(size + (VEC - 1 if PEEL else 0), BLOCK_S)
    for i in range(tl.cdiv(n_last - n_first, BLOCK_N)):
        n = n_first + (tl.cdiv(n_last - n_first, BLOCK_N) - 1 - i) * BLOCK_N
        base, first, last, read, exists = _planes(n, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        for j in range(tiles_s):
            k = (tiles_s - 1 - j) * BLOCK_S + steps
            offset, readable, live = _tile(base, first, last, read, exists, k, C, VEC, CHANNELS_LAST, PEEL)
            z = _y_of(x_ptr, residual_ptr, offset, readable, mean, scale, bias, RELU, LAST)
            tl.store(y_ptr + offset, z, mask=live, eviction_policy=LAST)


@triton.jit
def _apply_rows(
    x_ptr, residual_ptr, y_ptr, r_first, r_last, k, inside, mean, scale, bias,  # all of the columns k, (BLOCK_K,)
    K, RELU: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """y of rows r_first .. r_last."""
    mean, scale, bias = mean[None, :], scale[None, :], bias[None, :]
    for r in range(r_first, r_last, BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R))[:, None]
        live = (rows < r_last) & inside[None, :]
        offset = rows.to(tl.int64) * (K // VEC) * VEC + k[None, :]
        z = _y_of(x_ptr, residual_ptr, offset, live, mean, scale, bias, RELU, LAST)
        tl.store(y_ptr + offset, z, mask=live, eviction_policy=LAST)


@triton.jit
def _dx_of(
    dy_ptr, x_ptr, y_ptr, dz_ptr, offset, live, mean, scale, bias, mean_dz, slope,
    TRAINING: tl.constexpr, RELU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + offset, mask=live, other=0.0, eviction_policy=LAST).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=live, other=0.0, eviction_policy=LAST).to(tl.float32)
    dx, _ = _through_relu(dy, x, y_ptr, offset, live, mean, scale, bias, RELU)
    if dz_ptr is not None:
        tl.store(dz_ptr + offset, dx, mask=live, eviction_policy=LAST)
    if TRAINING:
        dx = dx - mean_dz - (x - mean) * slope
    return dx * scale


@triton.jit
def _dx_planes(
    dy_ptr, x_ptr, y_ptr, dx_ptr, n_first, n_last, c, s, size, mean, scale, bias, mean_dz, slope,  # (BLOCK_C,)
    C, S, numel, TRAINING: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx of planes n_first .. n_last, elements s .. s + size, backwards."""
    mean, scale, bias = mean[None, :, None], scale[None, :, None], bias[None, :, None]
    mean_dz, slope = mean_dz[None, :, None], slope[None, :, None]
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    tiles_s = tl.cdiv(size + (VEC - 1 if PEEL else 0), BLOCK_S)
    for i in range(tl.cdiv(n_last - n_first, BLOCK_N)):
        n = n_first + (tl.cdiv(n_last - n_first, BLOCK_N) - 1 - i) * BLOCK_N
        base, first, last, read, exists = _planes(n, n_last, c, s, size, C, S, numel, VEC, CHANNELS_LAST, BLOCK_N)
        for j in range(tiles_s):
            k = (tiles_s - 1 - j) * BLOCK_S + steps
            offset, readable, live = _tile(base, first, last, read, exists, k, C, VEC, CHANNELS_LAST, PEEL)
            dx = _dx_of(
                dy_ptr, x_ptr, y_ptr, None, offset, readable, mean, scale, bias, mean_dz, slope, TRAINING, RELU, LAST
            )
            tl.store(dx_ptr + offset, dx, mask=live, eviction_policy=LAST)


@triton.jit
def _dx_rows(
    dy_ptr, x_ptr, y_ptr, dx_ptr, dz_ptr, r_first, r_last, k, inside, mean, scale, bias, mean_dz, slope,  # (BLOCK_K,)
    K, TRAINING: tl.constexpr, RELU: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx of rows r_first .. r_last; and dz, dy after the ReLU, if there is somewhere to put it."""
    mean, scale, bias, mean_dz, slope = mean[None, :], scale[None, :], bias[None, :], mean_dz[None, :], slope[None, :]
    for r in range(r_first, r_last, BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R))[:, None]
        live = (rows < r_last) & inside[None, :]
        offset = rows.to(tl.int64) * (K // VEC) * VEC + k[None, :]
        dx = _dx_of(dy_ptr, x_ptr, y_ptr, dz_ptr, offset, live, mean, scale, bias, mean_dz, slope, TRAINING, RELU, LAST)
        tl.store(dx_ptr + offset, dx, mask=live, eviction_policy=LAST)
