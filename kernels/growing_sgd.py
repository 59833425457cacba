"""SGD step over all parameters of a model, in one launch; growing_sgd, grow_grads and hold.

The tensors stay where they are.  Two tables on the device say what a program of BLOCK elements does: ``owners``, the
tensor that a block belongs to (made once per model, sizes decide it), and ``table``, where each tensor, its
regularisation and its mask lie (a row per tensor, made when addresses change and copied without waiting for the
device).  Numbers such as the learning rate are arguments: a schedule neither recompiles nor makes a table.  A learning
rate that is a tensor is read on the device, as a CUDA graph needs it.

A regularisation or mask is read where it is: along the memory of its parameter it has up to 5 dimensions, joined where
they can be, with a stride of 0 where one value serves many elements.  Traffic: parameter, gradient and buffer are read
once, parameter and buffer written once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables

Dims = tuple[tuple[int, int], ...]  # (size, stride) along the memory of a parameter, the fastest first
STEP, GROW, HOLD = 0, 1, 2


@triton.jit
def _offsets(dims_ptr, start, BLOCK: tl.constexpr, DIMS: tl.constexpr):
    """Where the values for elements [start, start + BLOCK) lie, (BLOCK,) int64."""
    offset = tl.zeros((BLOCK,), dtype=tl.int64)
    carried = tl.arange(0, BLOCK)
    for d in tl.static_range(DIMS):
        size = tl.load(dims_ptr + 2 * d)
        at = (start % size).to(tl.int32) + carried  # the start needs 64 bits, what comes on top does not
        start = start // size
        if d + 1 < DIMS:
            carried = at // size.to(tl.int32)
            at = at % size.to(tl.int32)
        offset += at.to(tl.int64) * tl.load(dims_ptr + 2 * d + 1)
    return offset


@triton.jit
def _load(ptr, live, ACC: tl.constexpr):
    x = tl.load(ptr, mask=live, other=0.0)
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(ACC)


@triton.jit
def _block(
    row, start, size, p_ptr, g_ptr, m_ptr, grad_scale_ptr, minus_lr, momentum, share, decay,
    FULL: tl.constexpr, ACC: tl.constexpr, WORK: tl.constexpr,
    REG: tl.constexpr, KEEP: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = start + tl.arange(0, BLOCK)
    live = i < size
    if FULL:
        live = tl.full((BLOCK,), 1, tl.int1)  # a mask that the compiler knows, or it would load element by element
    p = _load(p_ptr + i, live, ACC)
    if KEEP:
        keep = tl.full((BLOCK,), 1, tl.uint8)
        if tl.load(row + 6) != 0:
            keep_ptr = tl.load(row + 6).to(tl.pointer_type(tl.uint8))
            keep = tl.load(keep_ptr + _offsets(row + 8 + 2 * DIMS, start, BLOCK, DIMS), mask=live, other=1)
    if WORK == 2:
        tl.store(p_ptr + i, tl.where(keep != 0, p, 0.0), mask=live)
    else:
        g = _load(g_ptr + i, live, ACC)
        if grad_scale_ptr is not None:
            g *= 1.0 / tl.load(grad_scale_ptr).to(ACC)
            tl.store(g_ptr + i, g, mask=live)
        if MAXIMIZE:
            g = -g
        if DECAY:
            g += p * decay
        if REG:
            if tl.load(row + 5) != 0:
                reg_ptr = tl.load(row + 5).to(tl.pointer_type(ACC))
                g += p * tl.load(reg_ptr + _offsets(row + 8, start, BLOCK, DIMS), mask=live, other=0.0)
        if WORK == 1:
            tl.store(g_ptr + i, g, mask=live)
        else:
            if MOMENTUM:
                b = g
                if not FIRST:
                    b = _load(m_ptr + i, live, ACC) * momentum + g * share
                if NESTEROV:
                    g += b * momentum
                else:
                    g = b
                if KEEP:
                    b = tl.where(keep != 0, b, 0.0)
                tl.store(m_ptr + i, b, mask=live)
            p += g * minus_lr
            if KEEP:
                p = tl.where(keep != 0, p, 0.0)
            tl.store(p_ptr + i, p, mask=live)


@triton.jit
def _growing_sgd_kernel(
    table_ptr,   # (tensors, 8 + 4 * DIMS) int64: addresses of param, grad, momentum; first block; elements; address of
                 # reg or 0, of keep or 0; whether the first three are multiples of 16; (size, stride) DIMS times, the
                 # fastest first, of reg, then of keep
    owners_ptr,  # (blocks,) int32: row of the table
    like_ptr,    # any pointer to the parameters' dtype; never read
    grad_scale_ptr, found_inf_ptr,  # () float32, or None
    rate_ptr,    # () float32 or float64, the learning rate in place of minus_lr, or None
    minus_lr: tl.float64, momentum: tl.float64, share: tl.float64, decay: tl.float64,
    DOUBLE: tl.constexpr, WORK: tl.constexpr,  # 0: all; 1: grad += reg * param; 2: param = 0 where not kept
    REG: tl.constexpr, KEEP: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = table_ptr + tl.load(owners_ptr + tl.program_id(0)) * (8 + 4 * DIMS)
    start = (tl.program_id(0) - tl.load(row + 3)) * BLOCK
    p_ptr = tl.load(row).to(like_ptr.dtype)
    g_ptr = tl.load(row + 1).to(like_ptr.dtype)
    m_ptr = tl.load(row + 2).to(like_ptr.dtype)
    if rate_ptr is not None:
        minus_lr = -tl.load(rate_ptr).to(ACC)
    minus_lr = tl.full((BLOCK,), minus_lr, ACC)
    momentum = tl.full((BLOCK,), momentum, ACC)
    share = tl.full((BLOCK,), share, ACC)
    decay = tl.full((BLOCK,), decay, ACC)
    size = tl.load(row + 4)
    if found_inf_ptr is not None:
        size = tl.where(tl.load(found_inf_ptr) == 0.0, size, 0)  # nothing is there
    if (tl.load(row + 7) != 0) & (start + BLOCK <= size):
        _block(
            row, start, size, tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16),
            grad_scale_ptr, minus_lr, momentum, share, decay,
            True, ACC, WORK, REG, KEEP, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, DIMS, BLOCK,
        )  # fmt: skip
    else:
        _block(
            row, start, size, p_ptr, g_ptr, m_ptr, grad_scale_ptr, minus_lr, momentum, share, decay,
            False, ACC, WORK, REG, KEEP, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, DIMS, BLOCK,
        )  # fmt: skip


def config() -> dict[str, int]:
    """Blocks; on paper, not yet measured on a GPU."""
    return {"BLOCK": 1024, "num_warps": 4}


@tables.cached(64)
def _owners(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(blocks,) int32 on ``device``."""
    blocks = torch.tensor([-(-size // block) for size in sizes])
    return tables.put(torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks), device)


@tables.cached(16)
def _table(
    addresses: tuple[tuple[int, ...], ...],  # of params, of grads, of momenta; those not there are those of params
    sizes: tuple[int, ...],
    reg: tuple[tuple[int, int, Dims], ...],  # position, address, dimensions
    keep: tuple[tuple[int, int, Dims], ...],
    dims: int,
    block: int,
    device: torch.device,
) -> Tensor:
    """(tensors, 8 + 4 * dims) int64 on ``device``."""
    rows, first = [], 0
    for *three, size in zip(*addresses, sizes, strict=True):
        rows.append([*three, first, size, 0, 0, all(a % 16 == 0 for a in three), *(1, 0) * (2 * dims)])
        first += -(-size // block)
    for column, parts in enumerate((reg, keep)):
        for i, address, spread in parts:
            rows[i][5 + column] = address
            begin = 8 + 2 * dims * column
            rows[i][begin : begin + 2 * len(spread)] = [n for pair in spread for n in pair]
    return tables.put(torch.tensor(rows, dtype=torch.int64), device)


@lru_cache(maxsize=4096)
def _dims(shape: torch.Size, strides: tuple[int, ...], part: torch.Size, part_strides: tuple[int, ...]) -> Dims:
    """A regularisation or mask along the memory of its parameter."""
    if len(part) != len(shape) or any(n not in (1, size) for n, size in zip(part, shape, strict=True)):
        raise ValueError(f"growing_sgd: expected reg or keep that broadcasts to {tuple(shape)}, got {tuple(part)}")
    dims: list[tuple[int, int]] = []
    for d in sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: strides[d]):
        stride = 0 if part[d] == 1 else part_strides[d]
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * shape[d], dims[-1][1])
        else:
            dims.append((shape[d], stride))
    if math.prod(size for size, _ in dims) >= 2**31 - 2**16:
        raise ValueError(f"growing_sgd: the kernel takes less than 2^31 elements with reg or keep, got {tuple(shape)}")
    return tuple(dims) or ((1, 0),)


def _launch(
    work: int,
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    reg: list[Tensor],
    reg_at: list[int],
    keep: list[Tensor],
    keep_at: list[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rate: Tensor | None = None,
    numbers: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
    **flags: bool,
) -> None:
    first, cfg = params[0], config()
    acc = torch.promote_types(first.dtype, torch.float32)
    shapes = [p.shape for p in params]
    for name, tensors in (("grads", grads), ("momenta", momenta)):
        if tensors and [t.shape for t in tensors] != shapes:
            raise ValueError(f"growing_sgd: expected {name} of the params' shapes")
    placed = []
    for parts, at, dtype in ((reg, reg_at, acc), (keep, keep_at, torch.bool)):
        if wrong := {t.dtype for t in parts} - {dtype}:
            raise ValueError(f"growing_sgd: expected reg or keep of {dtype}, got {wrong}")
        spread = [_dims(shapes[i], params[i].stride(), t.shape, t.stride()) for i, t in zip(at, parts, strict=True)]
        placed.append(tuple(zip(at, map(Tensor.data_ptr, parts), spread, strict=True)))
    regs, keeps = placed
    dims = max((len(spread) for _, _, spread in regs + keeps), default=1)
    own, sizes = tuple(p.data_ptr() for p in params), tuple(p.numel() for p in params)
    addresses = (own, *(tuple(t.data_ptr() for t in ts) or own for ts in (grads, momenta)))
    with torch.cuda.device_of(first):
        owners = _owners(sizes, cfg["BLOCK"], first.device)
        if not len(owners):
            return
        table = _table(addresses, sizes, regs, keeps, dims, cfg["BLOCK"], first.device)
        _growing_sgd_kernel[(len(owners),)](
            table, owners, first, grad_scale, found_inf, rate, *numbers,
            DOUBLE=acc == torch.float64, WORK=work, REG=bool(reg), KEEP=bool(keep), **FLAGS | flags, DIMS=dims, **cfg,
        )  # fmt: skip


FLAGS = dict.fromkeys(("MOMENTUM", "FIRST", "NESTEROV", "DECAY", "MAXIMIZE"), False)


def growing_sgd(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], reg: list[Tensor], reg_at: list[int],
    keep: list[Tensor], keep_at: list[int], grad_scale: Tensor | None, found_inf: Tensor | None, rate: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, first: bool,
) -> None:  # fmt: skip
    """Launches the step; arguments as in :mod:`fastprune.ops.growing_sgd`."""
    _launch(
        STEP, params, grads, momenta, reg, reg_at, keep, keep_at, grad_scale, found_inf, rate,
        (-lr, momentum, 1 - dampening, weight_decay),
        MOMENTUM=momentum != 0, FIRST=first, NESTEROV=nesterov, DECAY=weight_decay != 0, MAXIMIZE=maximize,
    )  # fmt: skip


def grow_grads(params: list[Tensor], grads: list[Tensor], reg: list[Tensor]) -> None:
    """Launches ``grads += reg * params``."""
    _launch(GROW, params, grads, [], reg, list(range(len(reg))), [], [])


def hold(tensors: list[Tensor], keep: list[Tensor]) -> None:
    """Launches ``tensors = 0 where not keep``."""
    _launch(HOLD, tensors, [], [], [], [], keep, list(range(len(keep))))


AOT_DTYPES = ("fp32", "bf16", "fp16", "fp64")
AOT_LIMITS = {"_growing_sgd_kernel": {"registers": 224}}  # float64 with masks of 5 dimensions


def aot(dtype: str) -> list[tuple]:
    """What scripts/aot_check.py compiles."""

    def entry(label: str, dims: int, work: int = STEP, scaled: bool = False, rate: bool = False, **flags) -> tuple:
        args = {"table_ptr": "*i64:16", "owners_ptr": "*i32:16", "like_ptr": f"*{dtype}:16"}
        args |= dict.fromkeys(("grad_scale_ptr", "found_inf_ptr"), "*fp32:16" if scaled else None)
        args |= {"rate_ptr": "*fp64:16" if rate else None}
        args |= dict.fromkeys(("minus_lr", "momentum", "share", "decay"), "fp64")
        args |= {"DOUBLE": dtype == "fp64", "WORK": work, "REG": False, "KEEP": False, **FLAGS, "DIMS": dims} | flags
        return label, _growing_sgd_kernel, args, config(), False

    usual = {"MOMENTUM": True, "DECAY": True}
    return [
        entry("plain", 1),
        entry("momentum", 1, **usual),
        entry("rate on device", 2, rate=True, REG=True, KEEP=True, **usual),
        entry("per filter", 2, REG=True, KEEP=True, **usual),
        entry("nesterov scaled", 3, scaled=True, REG=True, KEEP=True, NESTEROV=True, MAXIMIZE=True, **usual),
        entry("first 5 dims", 5, REG=True, KEEP=True, FIRST=True, **usual),
        entry("grow", 2, GROW, REG=True),
        entry("hold", 2, HOLD, KEEP=True),
    ]
