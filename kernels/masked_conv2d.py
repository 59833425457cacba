"""Convolution of live channels with live channels as implicit matrix products, forward and backward.

Nothing is gathered in memory: tiles are loaded through the lists of live channels, and only tiles of live outputs are
computed.  What is dead in the results was zeroed before.  Pixels are the rows of every product:

    forward     y (pixels, outputs)   = sum over taps  x (pixels, inputs) @ w (inputs, outputs)
    data        dx (pixels, inputs)   = sum over taps dy (pixels, outputs) @ w (outputs, inputs)
    weight      dw (outputs, inputs)  = dy (outputs, pixels) @ x (pixels, inputs), one tap a program, pixels in chunks
    finish      sum of the chunks, in order

Weight masks are applied to weights as they are loaded and to dw as it is stored; a tile of weights that are all dead is
not loaded, nor are the activations that it would meet.  Threads follow the memory: along the pixels in NCHW, along the
channels in channels_last.  All strides are in elements; offsets are 32-bit, which halves the registers of a tile's
addresses, so tensors of 2^31 elements are refused.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter's numpy has no bfloat16; GPUs multiply half types in their own units.
_WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _channel(index_ptr, at, count):
    """The channels at positions ``at`` of a list, and which positions exist."""
    live = at < count
    c = at
    if index_ptr is not None:
        c = tl.load(index_ptr + at, mask=live, other=0).to(tl.int32)
    return c, live


@triton.jit
def _pixel(at, H, W):
    """Sample, row and column of pixels ``at``."""
    return at // (H * W), at // W % H, at % W


@triton.jit
def _load(ptr, at, exists, c, c_live, stride, NHWC: tl.constexpr):
    """Channels c of pixels at offsets ``at``, (pixels, channels); neighbouring threads read neighbouring addresses."""
    if NHWC:
        return tl.load(ptr + at[:, None] + c[None, :] * stride, mask=exists[:, None] & c_live[None, :], other=0.0)
    return tl.trans(tl.load(ptr + c[:, None] * stride + at[None, :], mask=c_live[:, None] & exists[None, :], other=0.0))


@triton.jit
def _store(ptr, value, at, exists, c, c_live, stride, NHWC: tl.constexpr):
    if NHWC:
        tl.store(ptr + at[:, None] + c[None, :] * stride, value, mask=exists[:, None] & c_live[None, :])
    else:
        tl.store(ptr + c[:, None] * stride + at[None, :], tl.trans(value), mask=c_live[:, None] & exists[None, :])


@triton.jit
def _multiply(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, mask_ptr, bias_ptr, y_ptr,
    in_ptr, out_ptr,                  # live channels, int64; None: all
    inputs, outputs, pixels,          # live inputs, live outputs, N * P * Q
    H, W, P, Q,                       # of x, of y
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, w_o, w_i, w_h, w_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, NHWC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_M pixels, BLOCK_N live outputs) of y."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, p, q = _pixel(m, P, Q)
    o, o_live = _channel(out_ptr, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), outputs)
    blocks = tl.cdiv(inputs, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, KH * KW * blocks):
        tap = step // blocks
        kh, kw = tap // KW, tap % KW
        i, i_live = _channel(in_ptr, step % blocks * BLOCK_K + tl.arange(0, BLOCK_K), inputs)
        h = p * stride_h - pad_h + kh * dilation_h
        w = q * stride_w - pad_w + kw * dilation_w
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        w_at = i[:, None] * w_i + o[None, :] * w_o + kh * w_h + kw * w_w
        w_live = i_live[:, None] & o_live[None, :]
        if mask_ptr is not None:
            w_live &= tl.load(mask_ptr + w_at, mask=w_live, other=0) != 0
        if mask_ptr is None or tl.max(tl.max(w_live.to(tl.int32), axis=1), axis=0) > 0:
            x = _load(x_ptr, n * x_n + h * x_h + w * x_w, inside, i, i_live, x_c, NHWC)
            acc = _multiply(x, tl.load(w_ptr + w_at, mask=w_live, other=0.0), acc, WIDEN)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o_live, other=0.0).to(tl.float32)[None, :]
    _store(y_ptr, acc.to(y_ptr.dtype.element_ty), n * y_n + p * y_h + q * y_w, m < pixels, o, o_live, y_c, NHWC)


@triton.jit
def _data_kernel(
    dy_ptr, w_ptr, mask_ptr, dx_ptr,
    in_ptr, out_ptr,
    inputs, outputs, pixels,          # pixels: N * H * W
    H, W, P, Q,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, w_o, w_i, w_h, w_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, NHWC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_M pixels, BLOCK_N live inputs) of dx."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, h, w = _pixel(m, H, W)
    i, i_live = _channel(in_ptr, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), inputs)
    blocks = tl.cdiv(outputs, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, KH * KW * blocks):
        tap = step // blocks
        kh, kw = tap // KW, tap % KW
        o, o_live = _channel(out_ptr, step % blocks * BLOCK_K + tl.arange(0, BLOCK_K), outputs)
        rise = h + pad_h - kh * dilation_h  # stride times the output pixel that read h through this tap
        run = w + pad_w - kw * dilation_w
        p, q = rise // stride_h, run // stride_w
        read = (rise >= 0) & (rise % stride_h == 0) & (p < P) & (run >= 0) & (run % stride_w == 0) & (q < Q)
        w_at = o[:, None] * w_o + i[None, :] * w_i + kh * w_h + kw * w_w
        w_live = o_live[:, None] & i_live[None, :]
        if mask_ptr is not None:
            w_live &= tl.load(mask_ptr + w_at, mask=w_live, other=0) != 0
        if mask_ptr is None or tl.max(tl.max(w_live.to(tl.int32), axis=1), axis=0) > 0:
            dy = _load(dy_ptr, n * y_n + p * y_h + q * y_w, read & (m < pixels), o, o_live, y_c, NHWC)
            acc = _multiply(dy, tl.load(w_ptr + w_at, mask=w_live, other=0.0), acc, WIDEN)
    _store(dx_ptr, acc.to(dx_ptr.dtype.element_ty), n * x_n + h * x_h + w * x_w, m < pixels, i, i_live, x_c, NHWC)


@triton.jit
def _weight_kernel(
    dy_ptr, x_ptr, partials_ptr,      # partials: (chunks, KH * KW, outputs, inputs) float32
    in_ptr, out_ptr,
    inputs, outputs, pixels, chunk,   # pixels: N * P * Q; chunk of them, a multiple of BLOCK_M
    H, W, P, Q,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, NHWC: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_N live outputs, BLOCK_K live inputs) of one tap of dw, from one chunk of the pixels."""
    tiles = tl.cdiv(inputs, BLOCK_K)
    o_at = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    i_at = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    o, o_live = _channel(out_ptr, o_at, outputs)
    i, i_live = _channel(in_ptr, i_at, inputs)
    tap = tl.program_id(1)
    kh, kw = tap // KW, tap % KW
    first = tl.program_id(2) * chunk
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, chunk, BLOCK_M):
        m = first + start + tl.arange(0, BLOCK_M)
        n, p, q = _pixel(m, P, Q)
        h = p * stride_h - pad_h + kh * dilation_h
        w = q * stride_w - pad_w + kw * dilation_w
        exists = m < pixels
        inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        dy = _load(dy_ptr, n * y_n + p * y_h + q * y_w, inside, o, o_live, y_c, NHWC)
        x = _load(x_ptr, n * x_n + h * x_h + w * x_w, inside, i, i_live, x_c, NHWC)
        acc = _multiply(tl.trans(dy), x, acc, WIDEN)
    row = (tl.program_id(2).to(tl.int64) * (KH * KW) + tap) * outputs
    at = (row + o_at)[:, None] * inputs + i_at[None, :]
    tl.store(partials_ptr + at, acc, mask=o_live[:, None] & i_live[None, :])


@triton.jit
def _finish_kernel(
    partials_ptr, mask_ptr, dw_ptr,
    in_ptr, out_ptr,
    inputs, outputs, chunks,
    w_o, w_i, w_h, w_w,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK of the (KH * KW, outputs, inputs) live entries of dw."""
    size = tl.full((), outputs, tl.int64) * inputs * (KH * KW)  # outputs = 1 is a constant here, and has no .to
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, chunks):
        acc += tl.load(partials_ptr + k * size + at, mask=live, other=0.0)
    i, _ = _channel(in_ptr, at % inputs, inputs)
    o, _ = _channel(out_ptr, at // inputs % outputs, outputs)
    tap = at // inputs // outputs
    w_at = o * w_o + i * w_i + tap // KW * w_h + tap % KW * w_w
    if mask_ptr is not None:
        live &= tl.load(mask_ptr + w_at, mask=live, other=0) != 0
    tl.store(dw_ptr + w_at, acc, mask=live)


def config(dtype: torch.dtype, outputs: int, inputs: int) -> dict[str, int]:
    """Tile of the products; outputs and inputs are columns of the result and length of the sum, per tap."""

    def fit(n, most):
        return min(most, max(16, triton.next_power_of_2(n)))

    if dtype == torch.float32:  # exact float32 products are scalar fused multiply-adds, with operands in registers
        return {"BLOCK_M": 64, "BLOCK_N": fit(outputs, 32), "BLOCK_K": 16, "num_warps": 4}
    block_n = fit(outputs, 64)
    cfg = {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": fit(inputs, 32), "num_warps": 4}
    if block_n == 64:  # four warps would need 254 registers a thread
        cfg["num_warps"] = 8
        if torch.version.hip is None:
            cfg["maxnreg"] = 168  # left alone, ptxas spills to come to 128
    return cfg


def weight_config(dtype: torch.dtype, outputs: int, inputs: int) -> dict[str, int]:
    def fit(n, most):
        return min(most, max(16, triton.next_power_of_2(n)))

    most = 32 if dtype == torch.float32 else 64
    block_m = 16 if dtype == torch.float32 else 32
    block_n = fit(outputs, most)
    cfg = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": fit(inputs, 32), "num_warps": 8 if block_n == 64 else 4}
    if torch.version.hip is None:
        cfg["maxnreg"] = 168  # as in config
    return cfg


def _count(index: Tensor | None, channels: int) -> int:
    return channels if index is None else index.shape[0]


def _like(mask: Tensor | None, weight: Tensor) -> Tensor | None:
    """The mask in the strides of the weight, as bytes."""
    if mask is None:
        return None
    if mask.stride() != weight.stride():
        mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
    return mask.view(torch.uint8)


def _nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _zeros(x: Tensor, channels: int, height: int, width: int, dead: bool) -> Tensor:
    """(N, channels, height, width) like x, zeroed where some of it will not be written."""
    layout = torch.channels_last if _nhwc(x) else torch.contiguous_format
    out = torch.empty((x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    return out.zero_() if dead else out


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    weight_mask: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    """Launches the forward; arguments and result as in :mod:`fastprune.ops.masked_conv2d`."""
    (N, C, H, W), (K, _, KH, KW) = x.shape, weight.shape
    P, Q = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((H, W), (KH, KW), stride, padding, dilation, strict=True)
    )
    y = _zeros(x, K, P, Q, out_index is not None)
    inputs, outputs, pixels = _count(in_index, C), _count(out_index, K), N * P * Q
    cfg = config(x.dtype, outputs, inputs)
    grid = (triton.cdiv(pixels, cfg["BLOCK_M"]), triton.cdiv(outputs, cfg["BLOCK_N"]))
    if pixels:
        with torch.cuda.device_of(x):
            _forward_kernel[grid](
                x, weight, _like(weight_mask, weight), bias, y, in_index, out_index, inputs, outputs, pixels,
                H, W, P, Q, *x.stride(), *y.stride(), *weight.stride(), *stride, *padding, *dilation,
                KH=KH, KW=KW, NHWC=_nhwc(x), WIDEN=_WIDEN, **cfg,
            )  # fmt: skip
    return y


def masked_conv2d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, in_index: Tensor | None, out_index: Tensor | None,
    weight_mask: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward; an empty tensor for a gradient that is not needed."""
    (N, C, H, W), (K, _, KH, KW), (P, Q) = x.shape, weight.shape, dy.shape[2:]
    inputs, outputs = _count(in_index, C), _count(out_index, K)
    mask = _like(weight_mask, weight)
    sizes = (H, W, P, Q, *x.stride(), *dy.stride())
    window = (*stride, *padding, *dilation)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    with torch.cuda.device_of(x):
        if need_dx:
            dx = _zeros(x, C, H, W, in_index is not None)
            sizes_dx = (H, W, P, Q, *dx.stride(), *dy.stride())
            cfg = config(x.dtype, inputs, outputs)
            grid = (triton.cdiv(N * H * W, cfg["BLOCK_M"]), triton.cdiv(inputs, cfg["BLOCK_N"]))
            if dx.numel():
                _data_kernel[grid](
                    dy, weight, mask, dx, in_index, out_index, inputs, outputs, N * H * W,
                    *sizes_dx, *weight.stride(), *window, KH=KH, KW=KW, NHWC=_nhwc(x), WIDEN=_WIDEN, **cfg,
                )  # fmt: skip
        if need_dweight:
            dead = any(t is not None for t in (in_index, out_index, mask)) or not N
            dw = torch.zeros_like(weight) if dead else torch.empty_like(weight)
            cfg, pixels = weight_config(x.dtype, outputs, inputs), N * P * Q
            tiles = triton.cdiv(outputs, cfg["BLOCK_N"]) * triton.cdiv(inputs, cfg["BLOCK_K"])
            # Fixed by the shape alone, so that sums have one order: 1024 programs fill the largest GPUs.
            chunks = max(1, min(triton.cdiv(1024, tiles * KH * KW), triton.cdiv(pixels, 8 * cfg["BLOCK_M"])))
            chunk = triton.cdiv(triton.cdiv(pixels, chunks), cfg["BLOCK_M"]) * cfg["BLOCK_M"]
            partials = x.new_empty((chunks, KH * KW, outputs, inputs), dtype=torch.float32)
            if pixels:
                _weight_kernel[(tiles, KH * KW, chunks)](
                    dy, x, partials, in_index, out_index, inputs, outputs, pixels, chunk,
                    *sizes, *window, KH=KH, KW=KW, NHWC=_nhwc(x), WIDEN=_WIDEN, **cfg,
                )  # fmt: skip
                _finish_kernel[(triton.cdiv(KH * KW * outputs * inputs, 256),)](
                    partials, mask, dw, in_index, out_index, inputs, outputs, chunks, *weight.stride(),
                    KH=KH, KW=KW, BLOCK=256, num_warps=2,
                )  # fmt: skip
    return dx, dw


AOT_DTYPES = ("fp32", "bf16", "fp16")
AOT_LIMITS = {name: {"registers": 168} for name in ("_forward_kernel", "_data_kernel", "_weight_kernel")}


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles: 3x3, masks of both kinds and none, wide and narrow layers, both layouts."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    names = "inputs outputs pixels chunk chunks H W P Q stride_h stride_w pad_h pad_w dilation_h dilation_w".split()
    names += [f"{t}_{d}" for t in "xy" for d in "nchw"] + [f"w_{d}" for d in "oihw"]
    numbers = dict.fromkeys(names, "i32")
    pointers = {f"{t}_ptr": f"*{dtype}:16" for t in ("x", "w", "y", "dy", "dx", "dw", "bias")}
    pointers |= {"partials_ptr": "*fp32:16", "in_ptr": "*i64:16", "out_ptr": "*i64:16", "mask_ptr": "*u8:16"}
    rows = []
    for label, masked, outputs, inputs, nhwc in (
        ("masked nchw", True, 128, 128, False), ("masked nhwc", True, 128, 128, True),
        ("16 to 16 nchw", False, 16, 16, False), ("16 to 16 nhwc", False, 16, 16, True),
    ):  # fmt: skip
        types = {**pointers, **numbers} if masked else {**pointers, **numbers, "mask_ptr": None, "bias_ptr": None}
        types |= dict.fromkeys(("x_c", "y_c") if nhwc else ("x_w", "y_w"), 1)  # as the launcher sees them
        taps = {"KH": 3, "KW": 3}
        tile = {**taps, "NHWC": nhwc, "WIDEN": False, **config(torch_dtype, outputs, inputs)}
        for kernel in (_forward_kernel, _data_kernel):
            rows.append((label, kernel, types, tile, False))
        weight = {**taps, "NHWC": nhwc, "WIDEN": False, **weight_config(torch_dtype, outputs, inputs)}
        rows.append((label, _weight_kernel, types, weight, False))
        if not nhwc:
            rows.append((label, _finish_kernel, types, {**taps, "BLOCK": 256, "num_warps": 2}, False))
    return rows
