"""``x * gate`` per channel; the backward also sums dy * x and |dy * x| over the pixels of each sample and channel.

    scale      y = x * gate, dx = dy * gate when no sums are wanted: one elementwise pass over the matrix of
               batch_norm_act's apply kernels, whose columns repeat the channels, so 16-byte loads for any C and S
    backward   a program owns BLOCK_C channels of one sample: reads dy and x once, writes dx and the sums

No atomics: a sum belongs to one program, so two runs agree bit for bit.  Traffic in bytes per element of b bytes, the
least there is: scale 2 b (x read, y written), backward 3 b (dy and x read, dx written), 2 b for a probe; sums are 4
bytes per plane.  NCHW planes that do not start on a vector (7 x 7) are read as in batch_norm_act: whole vectors,
foreign elements dropped; up to one vector per plane is read twice, from L1, and dx is stored by elements.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bn_geometry import TILE, _matrix, _num_warps, _pow2, _vector
from ._bn_tiles import _planes, _sum_ns, _tile


@triton.jit
def _scale_kernel(
    x_ptr, gate_ptr, y_ptr,  # (R, K), (C,), (R, K)
    R, K, C, S, CHUNK_R,     # column k is channel k // S, modulo C if REPEAT
    REPEAT: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reads x, writes y."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K // VEC * VEC
    c = k // S
    if REPEAT:
        c = c % C
    gate = tl.load(gate_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(1) * CHUNK_R
    for r in range(first, tl.minimum(first + CHUNK_R, R), BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R))[:, None]
        live = (rows < R) & inside[None, :]
        offset = rows.to(tl.int64) * (K // VEC) * VEC + k[None, :]
        tl.store(y_ptr + offset, tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32) * gate, mask=live)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr,                     # N * C * S elements, either layout
    gate_ptr,                          # (C,), or None without dx
    dx_ptr,                            # like x, or None
    grad_ptr, abs_ptr,                 # (N, C) float32, neighbouring columns, or None
    grad_stride, abs_stride,           # from sample to sample
    C, S, numel,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, PEEL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Reads dy and x once, writes dx once."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if dx_ptr is not None:
        gate = tl.load(gate_ptr + c, mask=inside, other=0.0).to(tl.float32)[None, :, None]
    base, first, last, read, exists = _planes(n, n + 1, c, 0, S, C, S, numel, VEC, CHANNELS_LAST, 1)
    steps = tl.arange(0, BLOCK_S)[None, None, :]
    sums = tl.zeros((1, BLOCK_C, BLOCK_S), dtype=tl.float32)
    magnitudes = tl.zeros((1, BLOCK_C, BLOCK_S), dtype=tl.float32)
    for start in range(0, S + (VEC - 1 if PEEL else 0), BLOCK_S):
        offset, readable, live = _tile(base, first, last, read, exists, start + steps, C, VEC, CHANNELS_LAST, PEEL)
        dy = tl.load(dy_ptr + offset, mask=readable, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=readable, other=0.0).to(tl.float32)
        product = tl.where(live, dy * x, 0.0)
        sums += product
        magnitudes += tl.abs(product)
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, dy * gate, mask=live)
    n = n.to(tl.int64)
    if grad_ptr is not None:
        tl.store(grad_ptr + n * grad_stride + c, _sum_ns(sums), mask=inside)
    if abs_ptr is not None:
        tl.store(abs_ptr + n * abs_stride + c, _sum_ns(magnitudes), mask=inside)


def config(N: int, C: int, S: int, channels_last: bool, itemsize: int) -> dict[str, int]:
    """Blocks of the backward; by occupancy and load width on paper, not yet measured on a GPU."""
    if channels_last:
        vec, peel = _vector(itemsize, C), False
        block_c = min(_pow2(C), 64)
        block_s = min(_pow2(S), TILE // block_c)
    else:  # the largest block with little padding
        vec = _vector(itemsize, N * C * S)
        peel = S % vec != 0
        reach = S + vec - 1 if peel else S
        top = min(_pow2(reach), TILE)
        blocks = [b for b in (2048, 1024, 512, 256) if b <= top] or [top]
        block_s = next((b for b in blocks if triton.cdiv(reach, b) * b <= 1.125 * reach), blocks[-1])
        block_c = min(_pow2(C), TILE // block_s)
    return {
        "VEC": vec, "CHANNELS_LAST": channels_last, "PEEL": peel, "BLOCK_C": block_c, "BLOCK_S": block_s,
        "num_warps": _num_warps(max(block_c * block_s // 16, 32)),
    }  # fmt: skip


def _sizes(x: Tensor) -> tuple[int, int, int, bool]:
    """N, C, pixels, and whether channels are innermost; 1 x 1 planes are read as if they were."""
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    return N, C, S, S == 1 or not x.is_contiguous()


def channel_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Launches the forward; arguments and results as in :mod:`fastprune.ops.channel_gate`."""
    y = torch.empty_like(x)
    if x.numel():
        N, C, S, channels_last = _sizes(x)
        grid, sizes, cfg = _matrix(N, C, S, channels_last, x.element_size())
        with torch.cuda.device_of(x):
            _scale_kernel[grid](x, gate, y, *sizes, **cfg)
    return y


def channel_gate_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, gate_grad: Tensor | None, gate_abs: Tensor | None,
    need_dx: bool, need_dgate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward; arguments and results as in :mod:`fastprune.ops.channel_gate`."""
    N, C, S, channels_last = _sizes(x)
    dx = torch.empty_like(x) if need_dx else None
    if need_dgate and gate_grad is None:
        gate_grad = x.new_empty((N, C), dtype=torch.float32)
    if x.numel() and not (gate_grad is None and gate_abs is None and dx is None):
        cfg = config(N, C, S, channels_last, x.element_size())
        strides = [0 if t is None else t.stride(0) for t in (gate_grad, gate_abs)]
        with torch.cuda.device_of(x):
            _backward_kernel[(N, triton.cdiv(C, cfg["BLOCK_C"]))](
                dy, x, gate if need_dx else None, dx, gate_grad, gate_abs, *strides, C, S, x.numel(), **cfg
            )
    else:
        for t in (gate_grad, gate_abs):
            if t is not None:
                t.zero_()  # sums over nothing
    dgate = gate_grad.sum(0).to(gate.dtype) if need_dgate else x.new_empty(0)
    return x.new_empty(0) if dx is None else dx, dgate


AOT_DTYPES = ("bf16", "fp16", "fp32")


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles: layers of ResNet-50 in both layouts."""
    size = 4 if dtype == "fp32" else 2
    x, f32 = f"*{dtype}:16", "*fp32:16"
    args = {
        **dict.fromkeys(("x_ptr", "dy_ptr", "y_ptr", "dx_ptr"), x),
        **dict.fromkeys(("gate_ptr", "grad_ptr", "abs_ptr"), f32),
        **dict.fromkeys(("R", "K", "C", "S", "CHUNK_R", "numel", "grad_stride", "abs_stride"), "i32"),
    }
    entries = []
    for label, N, C, S, nhwc in (
        ("nchw 56x56", 256, 64, 3136, False), ("nchw 14x14", 256, 256, 196, False),
        ("nchw 7x7", 256, 512, 49, False), ("nhwc 56x56", 256, 64, 3136, True), ("nhwc 7x7", 256, 512, 49, True),
    ):  # fmt: skip
        *_, cfg = _matrix(N, C, S, nhwc, size)
        entries.append((label, _scale_kernel, {**args, **({"S": 1} if nhwc else {})}, cfg, True))
        cfg = config(N, C, S, nhwc, size)
        entries.append((label, _backward_kernel, args, cfg, True))
        probe = {**args, "dx_ptr": None, "gate_ptr": None, "abs_ptr": None, "abs_stride": 0}
        entries.append((f"{label} probe", _backward_kernel, probe, cfg, True))
    return entries
