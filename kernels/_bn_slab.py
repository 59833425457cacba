"""Batch norm in one launch, x (backward: dy and x) read from memory once: slabs of channels that stay in L2.

All programs are on the GPU at the same time (a cooperative launch makes sure) and form teams.  A team takes one block
of channels after the other; a member owns a fixed chunk of its samples or pixels:

    sums(b)     its chunk's partial sums go to a slot of their own; it arrives at the counter of block b
                who arrives last joins the slots, in their order, writes the statistics, and arrives once more
    apply(b-1)  waits until the block before is finished, then reads its chunk again, from L2

So nobody waits for the block that was just summed: the wait for one block lies behind the sums of the next.  Two blocks
per team are in L2 at a time, which is what the launcher's budget is for.  Whoever joins does it in the same order: two
runs agree bit for bit.  The only atomics are the counters, integers.
"""

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
)

COUNTER_STRIDE = 8  # int32: a sector each


@triton.jit
def _arrive(counter_ptr):
    """Publishes all that the program has stored; returns how many had arrived before, whose stores it now sees."""
    tl.debug_barrier()  # the atomic is one thread's: the stores of the others must lie before it
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _wait(counter_ptr, count):
    """Until so many have arrived; then their stores can be seen."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while seen < count:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def _share(member, N, S, CHUNK_N, CHUNK_S, PARTS_S):
    """The chunk of a member: planes n_first .. n_last, elements s .. s + size."""
    n_first = member // PARTS_S * CHUNK_N
    s = member % PARTS_S * CHUNK_S
    return n_first, tl.minimum(n_first + CHUNK_N, N), s, tl.minimum(CHUNK_S, S - s)


@triton.jit
def _columns(c_first, j, C, S, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns c_first * S + j of the matrix (N, C * S): where, which of them are the block's, of which channel.

    The launcher made sure that a block begins on a vector and has whole ones.
    """
    k = (c_first * S) // VEC * VEC + j
    inside = j < tl.minimum(BLOCK_C, C - c_first) * S // VEC * VEC
    return k, inside, c_first + j // S


@triton.jit
def _slab_kernel(
    x_ptr, residual_ptr, y_ptr,  # N * C * S elements, either layout; residual may be None
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,  # (C,) or None
    tracked_ptr,                 # int64 () or None; counted up already if CUMULATIVE
    stats_ptr,                   # (2, C) float32
    partials_ptr,                # (blocks, 3, members, BLOCK_C) float64: count, mean, squared deviations
    counters_ptr,                # (blocks, COUNTER_STRIDE) int32, zero
    N, C, S, numel, CHUNK_N, CHUNK_S, TEAMS, PARTS_N, PARTS_S,  # members of a team: PARTS_N * PARTS_S
    momentum, eps: tl.float64, inverse: tl.float64, unbiased: tl.float64,
    SIGMOID: tl.constexpr, RELU: tl.constexpr, CUMULATIVE: tl.constexpr, STRIDE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x and the residual from memory once, writes y: 2 passes over a tensor of x's size, 3 with a residual."""
    members = PARTS_N * PARTS_S
    team, member = tl.program_id(0) // members, tl.program_id(0) % members
    n_first, n_last, s, size = _share(member, N, S, CHUNK_N, CHUNK_S, PARTS_S)
    count = ((n_last - n_first) * size).to(tl.float64)
    lanes = tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(C, BLOCK_C)
    if tracked_ptr is not None:
        if not CUMULATIVE:
            if tl.program_id(0) == 0:
                tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    for block in range(team, blocks + TEAMS, TEAMS):
        if block < blocks:
            c = block * BLOCK_C + lanes
            mean64, m2 = _moments(
                x_ptr, n_first, n_last, c, s, size, 1.0 / count, N, C, S, numel,
                VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, True,
            )  # fmt: skip
            partials = partials_ptr + block * (3 * members * BLOCK_C) + lanes
            slot = partials + member * BLOCK_C
            tl.store(slot, tl.zeros((BLOCK_C,), dtype=tl.float64) + count)
            tl.store(slot + members * BLOCK_C, mean64)
            tl.store(slot + 2 * members * BLOCK_C, m2)
            if _arrive(counters_ptr + block * STRIDE) == members - 1:
                mean64, m2 = _join_moments(
                    partials, c < C, members, BLOCK_C, members * BLOCK_C, inverse, BLOCK_P, BLOCK_C
                )
                _finish_stats(
                    c, c < C, mean64, m2 * inverse, unbiased, stats_ptr, running_mean_ptr, running_var_ptr,
                    tracked_ptr, momentum, eps, C, CUMULATIVE,
                )  # fmt: skip
                _arrive(counters_ptr + block * STRIDE)
        if block >= TEAMS:
            c_first = (block - TEAMS) * BLOCK_C
            _wait(counters_ptr + (block - TEAMS) * STRIDE, members + 1)
            if PEEL:
                for start in range(s // CHUNK_S * BLOCK_K, BLOCK_C * S, PARTS_S * BLOCK_K):
                    k, inside, c = _columns(c_first, start + tl.arange(0, BLOCK_K), C, S, VEC, BLOCK_C)
                    mean = tl.load(stats_ptr + c, mask=inside, other=0.0, cache_modifier=".cg")
                    rstd = tl.load(stats_ptr + C + c, mask=inside, other=0.0, cache_modifier=".cg")
                    scale, bias = _affine(weight_ptr, bias_ptr, c, inside, SIGMOID)
                    _apply_rows(
                        x_ptr, residual_ptr, y_ptr, n_first, n_last, k, inside, mean, scale * rstd, bias, C * S,
                        RELU, VEC, BLOCK_R, "evict_first",
                    )  # fmt: skip
            else:
                c = c_first + lanes
                mean = tl.load(stats_ptr + c, mask=c < C, other=0.0, cache_modifier=".cg")
                rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0, cache_modifier=".cg")
                scale, bias = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
                _apply_planes(
                    x_ptr, residual_ptr, y_ptr, n_first, n_last, c, s, size, mean, scale * rstd, bias, C, S, numel,
                    RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, "evict_first",
                )  # fmt: skip


@triton.jit
def _slab_dx(
    dy_ptr, x_ptr, y_ptr, dx_ptr, dz_ptr, weight_ptr, bias_ptr, stats_ptr, projection_ptr,
    c_first, n_first, n_last, s, size, C, S, numel, CHUNK_S, PARTS_S,
    TRAINING: tl.constexpr, SIGMOID: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of a member's chunk of the block that begins with channel c_first."""
    if PEEL:
        for start in range(s // CHUNK_S * BLOCK_K, BLOCK_C * S, PARTS_S * BLOCK_K):
            k, inside, c = _columns(c_first, start + tl.arange(0, BLOCK_K), C, S, VEC, BLOCK_C)
            mean = tl.load(stats_ptr + c, mask=inside, other=0.0)
            rstd = tl.load(stats_ptr + C + c, mask=inside, other=0.0)
            mean_dz = tl.load(projection_ptr + c, mask=inside, other=0.0, cache_modifier=".cg")
            slope = tl.load(projection_ptr + C + c, mask=inside, other=0.0, cache_modifier=".cg")
            scale, bias = _affine(weight_ptr, bias_ptr, c, inside, SIGMOID)
            _dx_rows(
                dy_ptr, x_ptr, y_ptr, dx_ptr, dz_ptr, n_first, n_last, k, inside, mean, scale * rstd, bias, mean_dz,
                slope, C * S, TRAINING, RELU, VEC, BLOCK_R, "evict_first",
            )  # fmt: skip
    else:
        c = c_first + tl.arange(0, BLOCK_C)
        mean = tl.load(stats_ptr + c, mask=c < C, other=0.0)
        rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
        mean_dz = tl.load(projection_ptr + c, mask=c < C, other=0.0, cache_modifier=".cg")
        slope = tl.load(projection_ptr + C + c, mask=c < C, other=0.0, cache_modifier=".cg")
        scale, bias = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
        _dx_planes(
            dy_ptr, x_ptr, y_ptr, dx_ptr, n_first, n_last, c, s, size, mean, scale * rstd, bias, mean_dz, slope,
            C, S, numel, TRAINING, RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, "evict_first",
        )  # fmt: skip


@triton.jit
def _bwd_slab_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr, dresidual_ptr,  # N * C * S elements, either layout; y, dresidual may be None
    weight_ptr, bias_ptr, stats_ptr,              # (C,) or None, (C,) or None, (2, C) float32
    dweight_ptr, dbias_ptr,                       # (C,) or None
    gate_grad_ptr, gate_abs_ptr, out_grad_ptr, out_abs_ptr,  # (PARTS_S, N, C) float32, or None
    gate_stride,                                  # of their rows; PARTS_S > 1: C
    projection_ptr,                               # (2, C) float32: what apply subtracts
    partials_ptr,                                 # (blocks, 2, members, BLOCK_C) float32: sums of dz, dz * (x - mean)
    counters_ptr,                                 # (blocks, COUNTER_STRIDE) int32, zero
    N, C, S, numel, CHUNK_N, CHUNK_S, TEAMS, PARTS_N, PARTS_S, inverse: tl.float64,
    TRAINING: tl.constexpr, SIGMOID: tl.constexpr, RELU: tl.constexpr, GATES: tl.constexpr, STRIDE: tl.constexpr,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads dy and x (and y) from memory once, writes dx (and dresidual): 3 passes, 5 with a residual and a ReLU."""
    members = PARTS_N * PARTS_S
    team, member = tl.program_id(0) // members, tl.program_id(0) % members
    n_first, n_last, s, size = _share(member, N, S, CHUNK_N, CHUNK_S, PARTS_S)
    part = (s // CHUNK_S).to(tl.int64) * N * gate_stride
    if gate_grad_ptr is not None:
        gate_grad_ptr += part
    if gate_abs_ptr is not None:
        gate_abs_ptr += part
    if out_grad_ptr is not None:
        out_grad_ptr += part
    if out_abs_ptr is not None:
        out_abs_ptr += part
    lanes = tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(C, BLOCK_C)
    for block in range(team, blocks + TEAMS, TEAMS):
        if block < blocks:
            c = block * BLOCK_C + lanes
            mean = tl.load(stats_ptr + c, mask=c < C, other=0.0)
            rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
            scale, bias = _affine(weight_ptr, bias_ptr, c, c < C, SIGMOID)
            # off the vectors sums would store dresidual element by element: apply writes it
            dz, dot = _dz_sums(
                dy_ptr, x_ptr, y_ptr, None if PEEL else dresidual_ptr, gate_grad_ptr, gate_abs_ptr, out_grad_ptr,
                out_abs_ptr, gate_stride, n_first, n_last, c, s, size, mean, rstd, scale, bias,
                C, S, numel, RELU, GATES, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, True,
            )  # fmt: skip
            partials = partials_ptr + block * (2 * members * BLOCK_C) + lanes
            slot = partials + member * BLOCK_C
            tl.store(slot, dz)
            tl.store(slot + members * BLOCK_C, dot)
            if _arrive(counters_ptr + block * STRIDE) == members - 1:
                dz64, dot64 = _join_sums(partials, c < C, members, BLOCK_C, members * BLOCK_C, BLOCK_P, BLOCK_C)
                _finish_sums(c, c < C, dz64, dot64, rstd, weight_ptr, dweight_ptr, dbias_ptr, SIGMOID)
                mean_dz, slope = _project(dz64, dot64, rstd, inverse)
                tl.store(projection_ptr + c, mean_dz, mask=c < C)
                tl.store(projection_ptr + C + c, slope, mask=c < C)
                _arrive(counters_ptr + block * STRIDE)
        if block >= TEAMS:
            c_first = (block - TEAMS) * BLOCK_C
            _wait(counters_ptr + (block - TEAMS) * STRIDE, members + 1)
            if dresidual_ptr is None:
                _slab_dx(
                    dy_ptr, x_ptr, y_ptr if RELU else None, dx_ptr, None, weight_ptr, bias_ptr, stats_ptr,
                    projection_ptr, c_first, n_first, n_last, s, size, C, S, numel, CHUNK_S, PARTS_S, TRAINING, SIGMOID,
                    RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            elif PEEL:
                _slab_dx(
                    dy_ptr, x_ptr, y_ptr if RELU else None, dx_ptr, dresidual_ptr, weight_ptr, bias_ptr, stats_ptr,
                    projection_ptr, c_first, n_first, n_last, s, size, C, S, numel, CHUNK_S, PARTS_S, TRAINING, SIGMOID,
                    RELU, VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            else:  # dresidual is dy after the ReLU already
                _slab_dx(
                    dresidual_ptr, x_ptr, None, dx_ptr, None, weight_ptr, bias_ptr, stats_ptr, projection_ptr,
                    c_first, n_first, n_last, s, size, C, S, numel, CHUNK_S, PARTS_S, TRAINING, SIGMOID, False,
                    VEC, CHANNELS_LAST, PEEL, BLOCK_N, BLOCK_C, BLOCK_S, BLOCK_R, BLOCK_K,
                )  # fmt: skip
